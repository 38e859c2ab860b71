"""The stage that trains the VQ-VAE: its evaluation."""

import json

import jax
import numpy as np
import pytest

from configs import quickstart
from opensora_jax import config as config_lib
from opensora_jax import files, main
from opensora_jax.build import training as build
from opensora_jax.data import moving_shapes
from opensora_jax.inference.tokenizer import WindowEncoder, decode, load_tokenizer
from opensora_jax.tasks.vqvae import VQVAETask


@pytest.fixture
def config(tmp_path):
    moving_shapes.write_dataset(
        tmp_path / "shapes",
        n_videos=16,
        combinations=moving_shapes.SEEN,
        seed=0,
        n_frames=8,
        resolution=16,
        fps=8,
        n_captions=1,
    )
    c = quickstart.get_config()
    c.stages = ("vqvae",)
    c.data.videos = str(tmp_path / "shapes" / "videos")
    small = {"n_codes": 16, "n_hiddens": 8, "n_res_layers": 0, "resolution": 16, "n_frames": 8}
    c.vqvae.update(**small, steps=2, batch_size=16, log_every=1)
    config_lib.check(c)
    return c


def test_evaluation_takes_no_more_at_once_than_training(config, tmp_path, monkeypatch):
    """Or what fits in training runs out of memory there, and again after every restart."""
    seen, plain = [], VQVAETask.eval_step

    def eval_step(task, params, extra, batch):
        seen.append(len(batch["video"]))
        return plain(task, params, extra, batch)

    monkeypatch.setattr(VQVAETask, "eval_step", eval_step)
    found = []
    for accumulate in (1, 2):
        config.vqvae.accumulate = accumulate
        main.run(config, tmp_path / str(accumulate))
        found.append(files.read_json(tmp_path / str(accumulate) / "vqvae" / "reconstruction.json"))
    assert seen == [16, 8]
    # Batch statistics in training go by the microbatch, so only roughly the same.
    assert found[0]["psnr"] == pytest.approx(found[1]["psnr"], rel=0.1)


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({"quantizer": "fsq", "levels": (8, 5, 5)}, (4, 8, 8)),
        (
            {
                "quantizer": "fsq",
                "levels": (8, 5, 5),
                "adversarial": 0.1,
                "adversarial_from": 0.5,
                "adversarial_width": 4,
            },
            (4, 8, 8),
        ),
        pytest.param(
            {
                "architecture": "cosmos",
                "quantizer": "fsq",
                "levels": (8, 5, 5),
                "distance": "l1",
                "patch": 2,
                "multipliers": (1, 2),
                "n_hiddens": 8,
                "n_res_layers": 1,
                "n_frames": 7,
            },
            (4, 8, 8),
            marks=pytest.mark.slow,  # it compiles for a minute
        ),
    ],
    ids=["videogpt", "adversarial", "cosmos"],
)
def test_each_kind_is_trained_and_opened(config, tmp_path, fields, shape):
    """On eight devices, weights and clips sharded, and gone on with after an interruption."""
    config.vqvae.update(**fields, checkpoint_every=1)
    config.mesh.update(data=2, fsdp=2, tensor=2)
    config_lib.check(config)
    main.run(config, tmp_path)
    with config.ignore_type():
        config.vqvae.steps = 3
    main.run(config, tmp_path)
    folder = tmp_path / "vqvae"
    assert files.read_json(folder / "reconstruction.json")["step"] == 3
    assert np.load(folder / "code_counts.npy").shape == (200,)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    losses = [x["loss"] for x in map(json.loads, lines) if "loss" in x]
    assert np.isfinite(losses).all()
    model = load_tokenizer(folder)
    assert model.levels == (8, 5, 5)
    n_frames = config.vqvae.n_frames
    encoder = WindowEncoder(model, n_frames, 8)
    encoder.add(np.zeros((n_frames, 16, 16, 3), np.uint8))
    (codes,) = encoder.finish()
    assert codes.shape == shape
    assert decode(model, codes[None]).shape == (1, n_frames, 16, 16, 3)


def test_the_decoder_learns_larger_frames_of_codes_that_stay(config, tmp_path):
    """The second phase: everything at low resolution first, then the decoder with an adversary."""
    main.run(config, tmp_path / "first")
    first = tmp_path / "first" / "vqvae"
    config.vqvae.update(
        init_from=str(first), train="decoder", adversarial=0.1, adversarial_from=0.0
    )
    config.vqvae.update(resolution=32, adversarial_width=4)
    config_lib.check(config)
    config_lib.check_inputs(config, tmp_path / "second")
    main.run(config, tmp_path / "second")
    begun, found = load_tokenizer(first), load_tokenizer(tmp_path / "second" / "vqvae")
    video = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 8, 16, 16, 3)).astype(np.float32)
    np.testing.assert_array_equal(begun.encode(video), found.encode(video))
    codes = begun.encode(video)
    assert not np.array_equal(begun.decode(codes), found.decode(codes))
    config.vqvae.n_codes = 32
    with pytest.raises(ValueError, match=r"init_from=.*same sizes: n_codes=32, there 16"):
        config_lib.check_inputs(config, tmp_path / "third")
    config.vqvae.init_from = ""
    with pytest.raises(ValueError, match=r"init_from='': expected a tokenizer, since vqvae\.train"):
        config_lib.check(config)


def test_gradients_pass_the_rounding(config):
    """Straight through: the encoder learns, though codes are whole numbers."""

    config.vqvae.update(quantizer="fsq", levels=(8, 5, 5), quantize_to=0.0, quantize_from=0.0)
    task = build.vqvae_task(config.vqvae)
    params, extra = task.init(jax.random.key(0))
    video = np.random.default_rng(0).integers(0, 255, (2, 8, 16, 16, 3), np.uint8)
    grads, _ = jax.jit(jax.grad(task.loss, has_aux=True))(
        params, extra, {"video": video}, jax.random.key(1), 1
    )
    assert all(float(abs(g).max()) > 0 for g in jax.tree.leaves(grads["pre_vq"]))
    assert float(abs(grads["encoder_convs"][0]["kernel"]).max()) > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "cosmos"}, r"vqvae\.quantizer='vq': expected fsq"),
        (
            {"architecture": "cosmos", "quantizer": "fsq", "n_res_layers": 1},
            r"vqvae\.n_frames=8: expected 1 and a multiple of vqvae\.downsample\[0\]=2",
        ),
        (
            {"architecture": "cosmos", "quantizer": "fsq", "n_res_layers": 1, "n_frames": 9},
            r"config\.vqvae: downsample=\(2, 2, 2\): not what patches of 4",
        ),
        ({"levels": (8, 1)}, r"vqvae\.levels=.*: expected integers of at least 2"),
        ({"quantizer": "lfq"}, r"vqvae\.quantizer='lfq': expected one of vq, fsq"),
    ],
)
def test_what_does_not_fit_is_named(config, fields, message):
    config.vqvae.update(fields)
    with pytest.raises(ValueError, match=message):
        config_lib.check(config)


def test_a_folder_is_taken_when_there_is_something_to_train_on(config, tmp_path):
    config.vqvae.n_frames = 16
    with pytest.raises(ValueError, match=r"at least vqvae\.n_frames=16 frames"):
        main.run(config, tmp_path / "run")
    config.vqvae.n_frames = 8
    main.run(config, tmp_path / "run")
    assert load_tokenizer(tmp_path / "run" / "vqvae").n_frames == 8


def test_a_tokenizer_is_not_trained_on_under_the_dataset_that_it_made(config, tmp_path):
    (tmp_path / "run" / "dataset").mkdir(parents=True)
    (tmp_path / "run" / "dataset" / "metadata.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"vqvae\.steps=2: expected no more than were trained when"
    ):
        config_lib.check_inputs(config, tmp_path / "run")
    config.data.vqvae = "another"
    config_lib.check_inputs(config, tmp_path / "run")
