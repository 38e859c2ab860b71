"""What the stages will read is looked at before the first one runs; with real files throughout."""

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from opensora_jax import config as config_lib
from opensora_jax import files, main
from opensora_jax.convert import videogpt
from opensora_jax.data import video_io
from opensora_jax.inference.small_text_model import make_small_text_model
from opensora_jax.inference.tokenizer import save_tokenizer

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
STRIDE_4 = GOLDEN / "videogpt_stride4x4x4.ckpt"  # 8 frames
DIT = GOLDEN / "dit_tiny.pt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Good inputs of every kind."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "videos").mkdir()
    video_io.write_video(folder / "videos" / "a.mp4", np.zeros((8, 32, 32, 3), np.uint8), 8.0)
    entry = {"file": "a.mp4", "captions": ["a cat sleeps"]}
    files.write_json(folder / "captions.json", [entry, {"file": "b.mp4", "captions": ["no file"]}])
    make_small_text_model(folder / "text_model", ["a cat sleeps"])
    save_tokenizer(folder / "vqvae", videogpt.load_videogpt(STRIDE_4))
    metadata = {
        "complete": True,
        "codebook": "codebook.npy",
        "n_codes": 16,
        "downsample": [4, 4, 4],
        "vqvae": "vqvae",
        "text_model": "text_model",
        "text_width": 64,
        "resolution": [32, 32],
        "fps": 8.0,
    }
    (folder / "dataset").mkdir()
    files.write_json(folder / "dataset" / "metadata.json", metadata)
    return folder


def load(name, stages, folder, **fields):
    """A configuration with fields set; texts that begin with @ are paths in the folder."""
    c = importlib.import_module(f"configs.{name}").get_config()
    c.stages = stages
    for field, value in fields.items():
        if isinstance(value, str) and value.startswith("@"):
            value = str(folder / value[1:])
        c.update_from_flattened_dict({field.replace("__", "."): value})
    config_lib.check(c)
    return c


def own_videos(stages, folder, **fields):
    """A configuration for the folder's videos, captions, tokenizer and text model."""
    given = {f"data__{name}": f"@{name}" for name in ("videos", "vqvae", "text_model")}
    given["data__captions"] = "@captions.json"
    return load("default", stages, folder, **{**given, "preprocess__resolution": 32, **fields})


def refused(c, workdir):
    with pytest.raises((ValueError, OSError)) as caught:
        config_lib.check_inputs(c, workdir)
    return str(caught.value)


def test_what_is_there_passes_and_nothing_is_written(folder, tmp_path):
    workdir = tmp_path / "run"
    config_lib.check_inputs(own_videos(("preprocess", "dit"), folder), workdir)
    config_lib.check_inputs(own_videos(("preprocess",), folder, data__vqvae=str(STRIDE_4)), workdir)
    c = load("msrvtt_vqvae", ("vqvae",), folder, data__videos="@videos")
    config_lib.check_inputs(c, workdir)
    c = load("msrvtt", ("dit",), folder, data__dataset="@dataset")
    config_lib.check_inputs(c, workdir)
    c = load("quickstart", tuple(config_lib.STAGES), folder)
    config_lib.check_inputs(c, workdir)  # which makes all that it reads
    assert not workdir.exists()


def test_a_name_on_the_hub_is_not_asked_for(folder, tmp_path):
    name = "nobody-of-this-name/no-such-model"
    config_lib.check_inputs(own_videos(("preprocess",), folder, data__text_model=name), tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("data.captions", "/nope", "no such file"),
        ("data.captions", "@videos", "not one entry can be used: a.mp4: captions="),
        ("data.captions", "@videos/a.mp4", "not UTF-8"),
        ("data.captions", "", "shapes/train/captions.json: no such file"),
        ("data.videos", "@text_model", "none of the captions' videos is there, not 'a.mp4'"),
        ("data.videos", "", "expected those of data.captions="),
        ("data.text_model", "/nope", "no such folder, and no name on the hub"),
        ("data.text_model", "runs/no/text_model", "no such folder, and no name on the hub"),
        ("data.text_model", "@videos", "config.json: not found"),
        ("data.text_model", "@broken_text_model", "no tokenizer"),
        ("data.text_model", "setup.py", "a file, expected a folder"),
        ("data.vqvae", "/nope", "/nope"),
        ("data.vqvae", "@videos", "/videos"),
        ("data.vqvae", "@captions.json", "neither a PyTorch nor a safetensors file"),
        ("data.vqvae", "", "/vqvae"),
        ("data.vqvae", "", "; name one, or put vqvae into config.stages"),
        ("preprocess.n_frames", 6, "a multiple of 4: downsample=(4, 4, 4) of "),
    ],
)
def test_bad_inputs_of_preprocess_are_named(folder, tmp_path, monkeypatch, name, value, expected):
    monkeypatch.chdir(ROOT)
    if value == "@broken_text_model" and not (folder / "broken_text_model").exists():
        shutil.copytree(folder / "text_model", folder / "broken_text_model")
        (folder / "broken_text_model" / "tokenizer.json").unlink()
    message = refused(own_videos(("preprocess",), folder, **{name: value}), tmp_path / "run")
    assert message.startswith(f"config.{name}=")
    assert expected in message
    assert not (tmp_path / "run").exists()


def test_the_patch_fits_a_given_tokenizer(folder, tmp_path):
    c = own_videos(("preprocess", "dit"), folder, preprocess__resolution=36)
    message = refused(c, tmp_path)
    assert (
        "config.preprocess.resolution=36: expected a multiple of 8: downsample=(4, 4, 4)" in message
    )
    assert message.endswith("x dit.patch=2")


@pytest.mark.parametrize("field", ["data.videos", "data.held_out_videos"])
@pytest.mark.parametrize("value", ["/nope", "@text_model"])
def test_the_vqvae_needs_videos(folder, tmp_path, field, value):
    fields = {"data.videos": "@videos", "data.held_out_videos": "", field: value}
    message = refused(load("msrvtt_vqvae", ("vqvae",), folder, **fields), tmp_path)
    assert message.startswith(f"config.{field}=")
    assert "no video files" in message


def test_the_dit_needs_a_finished_dataset(folder, tmp_path):
    c = load("msrvtt", ("dit",), folder)
    message = refused(c, tmp_path)
    assert message.startswith("config.data.dataset='': ")
    assert "put preprocess into config.stages" in message
    metadata = json.loads((folder / "dataset" / "metadata.json").read_text())
    for change, expected in (
        ({"complete": False}, "not finished"),
        ({"text_width": "wide"}, "text_width='wide': expected"),
    ):
        files.write_json(tmp_path / "metadata.json", metadata | change)
        c.data.dataset = str(tmp_path)
        message = refused(c, tmp_path)
        assert message.startswith(f"config.data.dataset={str(tmp_path)!r}: ")
        assert expected in message


@pytest.mark.parametrize(
    ("path", "size", "expected"),
    [
        ("/nope.pt", (2, 12, 2), "No such file"),
        (STRIDE_4, (2, 12, 2), "expected a DiT of facebookresearch/DiT"),
        (DIT, (3, 12, 2), "expected depth 3 and width 12 as the configuration says"),
    ],
)
def test_the_checkpoint_to_start_from_is_looked_at(folder, tmp_path, path, size, expected):
    depth, width, heads = size
    dit = {"dit.size": "", "dit.depth": depth, "dit.width": width, "dit.heads": heads}
    c = load("msrvtt", ("dit",), folder, data__dataset="@dataset", dit__init_from=str(path), **dit)
    message = refused(c, tmp_path)
    assert message.startswith("config.dit.init_from=")
    assert expected in message


def test_a_finished_training_asks_for_nothing(folder, tmp_path):
    nothing = {"data__dataset": "/nope", "dit__init_from": "/nope", "data__videos": "/nope"}
    c = load("msrvtt", ("vqvae", "dit"), folder, **nothing)
    for stage in ("vqvae", "dit"):
        (tmp_path / stage).mkdir()
        files.write_json(tmp_path / stage / "done.json", {"steps": c[stage].steps})
    config_lib.check_inputs(c, tmp_path)
    c.dit.steps += 1
    assert refused(c, tmp_path).startswith("config.data.dataset='/nope': ")
    c = own_videos(("preprocess",), folder, data__captions="/nope")
    shutil.copytree(folder / "dataset", tmp_path / "dataset")
    config_lib.check_inputs(c, tmp_path)


def test_a_vqvae_is_not_trained_on_below_the_dataset_it_made(folder, tmp_path):
    c = load("default", ("vqvae", "preprocess"), folder, vqvae__steps=200)
    (tmp_path / "vqvae").mkdir()
    files.write_json(tmp_path / "vqvae" / "done.json", {"steps": 100})
    shutil.copytree(folder / "dataset", tmp_path / "dataset")
    message = refused(c, tmp_path)
    assert message.startswith("config.vqvae.steps=200: expected no more than")
    assert str(tmp_path / "dataset") in message


def test_fidelity_needs_shapes_and_a_dit(folder, tmp_path):
    c = load("quickstart", ("fidelity",), folder)
    assert "shapes before fidelity" in refused(c, tmp_path)
    (tmp_path / "shapes" / "train").mkdir(parents=True)
    (tmp_path / "shapes" / "train" / "captions.json").touch()
    assert "dit before fidelity" in refused(c, tmp_path)
    (tmp_path / "dit").mkdir()
    (tmp_path / "dit" / "model.json").touch()
    config_lib.check_inputs(c, tmp_path)


def test_a_workdir_that_cannot_be_is_named(folder, tmp_path):
    c = load("quickstart", ("report",), folder)
    (tmp_path / "file").touch()
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        expected = f"--workdir={workdir}: {tmp_path / 'file'} is a file: expected a folder"
        assert refused(c, workdir) == expected
    assert "only vqvae and dit, which can write to an object store" in refused(c, "gs://b/run")
    c = load("msrvtt", ("dit",), folder, data__dataset="@dataset")
    config_lib.check_inputs(c, tmp_path)


def test_main_looks_before_it_writes(folder, tmp_path):
    c = load("quickstart", tuple(config_lib.STAGES), folder, data__text_model="/nope")
    with pytest.raises(ValueError, match=r"^config\.data\.text_model='/nope': "):
        main.run(c, tmp_path / "run")
    assert not (tmp_path / "run").exists()
