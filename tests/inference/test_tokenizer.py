"""Opening tokenizers wherever they lie, and telling what is none."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from opensora_jax import cli
from opensora_jax.convert.torch_file import load
from opensora_jax.convert.videogpt import load_videogpt
from opensora_jax.data import moving_shapes, video_io
from opensora_jax.inference.small_text_model import make_small_text_model
from opensora_jax.inference.text_encoder import TextEncoder
from opensora_jax.inference.tokenizer import (
    WindowEncoder,
    decode,
    fingerprint,
    load_tokenizer,
    save_tokenizer,
)

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
CHECKPOINT = GOLDEN / "videogpt_stride4x4x4.ckpt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir with a tokenizer in vqvae/."""
    workdir = tmp_path_factory.mktemp("run")
    save_tokenizer(workdir / "vqvae", load_videogpt(CHECKPOINT))
    return workdir


def test_decoding_uses_the_windows_of_encoding():
    model = load_tokenizer(CHECKPOINT)  # trained on windows of 8 frames, two latents
    rng = np.random.default_rng(0)
    # Two whole windows of 12 frames and a third of one.
    video = moving_shapes.render(rng, "red", "circle", "up", 28, 16)
    encoder = WindowEncoder(model, 12, 4)
    encoder.add(video)
    (codes,) = encoder.finish()
    assert len(codes) == 7
    decoded = decode(model, codes[None], 12)[0]
    assert decoded.shape == video.shape
    for i in (0, 1):
        alone = decode(model, codes[None, 3 * i : 3 * i + 3], 12)[0]
        np.testing.assert_array_equal(decoded[12 * i : 12 * i + 12], alone)
    assert (decoded != decode(model, codes[None])[0]).any()


def write_wrong(folder, workdir):
    """Files and folders that are no tokenizer: name -> what is told of each."""
    (folder / "text.txt").write_text("a tokenizer")
    video_io.write_video(folder / "video.mp4", np.zeros((4, 16, 16, 3), np.uint8), fps=8)
    whole = CHECKPOINT.read_bytes()
    (folder / "truncated.ckpt").write_bytes(whole[: len(whole) // 2])
    shutil.copy(GOLDEN / "dit_tiny.pt", folder / "dit.pt")
    for name, description in {
        "dit": {"dit": {"depth": 1}, "vqvae": "runs/mine/vqvae"},
        "older": {"n_codes": 4},
        "damaged": json.loads((workdir / "vqvae" / "model.json").read_text()) | {"n_hiddens": "8"},
        "huge": {"n_codes": 10**30},
    }.items():
        (folder / name).mkdir()
        (folder / name / "model.json").write_text(json.dumps(description))
    (folder / "unfinished").mkdir()
    shutil.copy(workdir / "vqvae" / "model.json", folder / "unfinished" / "model.json")
    (folder / "empty").mkdir()
    return {
        "text.txt": "neither a PyTorch nor a safetensors file",
        "video.mp4": "neither a PyTorch nor a safetensors file",
        "truncated.ckpt": "corrupt or truncated zip file",
        "dit.pt": "no codebook.embeddings; expected a VQ-VAE of VideoGPT",
        "dit": "holds a DiT, not a tokenizer: did you mean its own, 'runs/mine/vqvae'?",
        "older": "model.json: describes no tokenizer",
        "damaged": "model.json: describes no tokenizer",
        "huge": "model.json: describes no tokenizer",
        "unfinished": "checkpoints: no checkpoint",
        "empty": "no model.json, so no model was trained here",
        "nowhere": "no such file or folder: expected a tokenizer",
    }


def test_what_is_no_tokenizer_says_so(trained, tmp_path):
    for name, message in write_wrong(tmp_path, trained).items():
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            load_tokenizer(tmp_path / name)
        told = str(caught.value)
        assert told.startswith(str(tmp_path / name))
        assert message in told


def test_a_workdir_is_answered_with_its_tokenizer(trained):
    with pytest.raises(FileNotFoundError, match="holds no tokenizer: did you mean") as caught:
        load_tokenizer(trained)
    assert str(caught.value).endswith(f"{trained / 'vqvae'}?")


def test_the_command_tells_it_in_one_line(trained, tmp_path, monkeypatch):
    video_io.write_video(tmp_path / "a.mp4", np.zeros((8, 16, 16, 3), np.uint8), fps=8)
    captions = tmp_path / "captions.json"
    captions.write_text('[{"file": "a.mp4", "captions": ["a"]}]')
    command = runpy.run_path(str(ROOT / "data_prep" / "preprocess_data.py"))["main"]
    data = ["-c", captions, "-v", tmp_path, "-o", tmp_path / "out", "--text_model", tmp_path]
    for vqvae in (captions, trained):
        argv = ["preprocess_data.py", *data, "--vqvae", vqvae]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        with pytest.raises(SystemExit) as stop:
            cli.run(command)
        assert stop.value.code.startswith(f"error: {vqvae}: ")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_file_in_an_object_store(bucket):
    path = bucket / "models" / "vqvae.ckpt"
    path.parent.mkdir()
    path.write_bytes(CHECKPOINT.read_bytes())
    assert fingerprint(load_tokenizer(str(path))) == fingerprint(load_videogpt(CHECKPOINT))
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"^gs://bucket/models/vqvae\.ckpt: neither"):
        load(str(path))
    with pytest.raises(FileNotFoundError, match=r"^gs://bucket/models/nothing: no such file"):
        load_tokenizer("gs://bucket/models/nothing")


def test_folders_in_an_object_store(bucket, trained):
    """Its checkpoints are TensorStore's to read; that it is asked for them is seen here."""
    folder = bucket / "run" / "vqvae"
    folder.mkdir(parents=True)
    (folder / "model.json").write_bytes((trained / "vqvae" / "model.json").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"^gs://bucket/run/vqvae/checkpoints: no check"):
        load_tokenizer("gs://bucket/run/vqvae")
    with pytest.raises(FileNotFoundError, match=r"did you mean gs://bucket/run/vqvae\?"):
        load_tokenizer("gs://bucket/run")


def test_a_text_model_in_an_object_store(bucket, tmp_path):
    make_small_text_model(tmp_path / "text", ["a red circle"])
    (bucket / "text").mkdir()
    for path in (tmp_path / "text").iterdir():
        (bucket / "text" / path.name).write_bytes(path.read_bytes())
    there, here = (
        TextEncoder(folder).encode(["a red circle"])[0]
        for folder in ("gs://bucket/text", tmp_path / "text")
    )
    np.testing.assert_array_equal(there, here)
