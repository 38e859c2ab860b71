"""A DiT of 3 billion parameters on 64 frames of 256 x 256, for v5p-128 (64 chips) to v5p-512 (256).

    python -m opensora_jax.main --config=configs/dit_3b.py --workdir=gs://BUCKET/dit_3b \\
        --config.data.dataset=gs://BUCKET/dataset

Cost and fit, by `python -m opensora_jax.plan`: see docs/tpu.md. Nobody has trained it yet.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.stages = ("dit",)
    # Over two of the three dimensions of a v5p slice: over all three, gathering takes twice as long.
    c.mesh.data, c.mesh.fsdp = 4, -1

    # 16 x 64 x 64 codes, 16,384 tokens, from a VQ-VAE of stride 4 x 4 x 4.
    c.preprocess.resolution = 256
    c.dit.n_latent_frames = 16
    c.dit.text_length = 77
    c.bench.text_width = 768  # openai/clip-vit-large-patch14

    c.dit.size = ""
    c.dit.depth, c.dit.width, c.dit.heads = 32, 2048, 16
    c.dit.patch = 2
    c.dit.batch_size = 256
    c.dit.learning_rate = 1e-4
    c.dit.remat = "full"
    return c
