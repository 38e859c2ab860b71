"""The stage that trains the VQ-VAE: its evaluation."""

import pytest

from configs import quickstart
from opensora_jax import config as config_lib
from opensora_jax import files, main
from opensora_jax.data import moving_shapes
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
