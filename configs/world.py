"""A world that asks more than the quickstart's, to try ideas on: a battery of properties, no download.

python -m opensora_jax.main --config=configs/world.py
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    c = quickstart.get_config()
    c.shapes.world = "scenes"
    c.shapes.n_videos = 4000
    c.shapes.resolution = 64
    c.shapes.n_frames = 16

    # The judge sees whole videos, so that reconstructions are of whole videos.
    c.vqvae.n_frames = 16
    c.vqvae.resolution = 64
    c.vqvae.batch_size = 8

    c.preprocess.resolution = 64
    c.preprocess.batch_size = 16

    c.dit.batch_size = 16
    c.dit.steps = 4000
    c.dit.eval_every = 1000
    c.fidelity.batch_size = 24

    c.sample.prompts = (
        "a small red circle moves slowly to the left",
        "a large blue square moves fast up",
        "a red circle moves left above a green square that stands still",
        "three yellow triangles move down",
        "a green circle turns blue while it moves to the right",
        "a blue square moves up and bounces off the border",
    )
    return c
