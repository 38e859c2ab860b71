"""A DiT of 7 billion parameters on 64 frames of 256 x 256, for v5p-128 (64 chips) to v5p-512 (256).

    python -m opensora_jax.main --config=configs/dit_7b.py --workdir=gs://BUCKET/dit_7b \\
        --config.data.dataset=gs://BUCKET/dataset

Cost and fit, by `python -m opensora_jax.plan`: see docs/tpu.md. Nobody has trained it yet.
"""

from ml_collections import ConfigDict

from configs import dit_3b


def get_config() -> ConfigDict:
    c = dit_3b.get_config()
    c.dit.depth, c.dit.width, c.dit.heads = 34, 3072, 24
    return c
