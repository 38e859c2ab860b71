"""One model for several sizes of videos: the quickstart's world, up to twice as large and as long.

    python -m opensora_jax.main --config=configs/sizes.py

The same videos, of 64 x 64 pixels and 16 frames, are encoded at 32 x 32, 48 x 48 and 64 x 64, and the
DiT learns from 8 and from 16 frames of each: `fidelity.json` has the shares that are right of every
size.

Cost: 50 minutes on 2 CPU cores.

Result: of 240 samples of each of the six sizes 100% show all of their caption. Of sizes that it never
saw, 16 frames of 32 x 64 are right in 48 of 48, 12 frames of 40 x 56 in 40 of 48.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    c = quickstart.get_config()
    c.shapes.resolution = 64
    c.shapes.n_frames = 16
    c.vqvae.resolution = 48
    c.preprocess.resolution = (32, 48, 64)
    c.dit.n_latent_frames = (4, 8)
    c.dit.batch_size = 8
    c.dit.steps = 4000
    c.dit.eval_every = 2000
    c.sample.guidance = 3.0
    return c
