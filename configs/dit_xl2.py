"""DiT-XL/2 on 16 frames of 256 x 256, for a slice of 16 TPU chips: v5e-16 or v6e-16.

    python -m opensora_jax.main --config=configs/dit_xl2.py --workdir=gs://BUCKET/dit_xl2 \\
        --config.data.dataset=gs://BUCKET/dataset

Cost and fit, by `python -m opensora_jax.plan`: see docs/tpu.md. Nobody has trained it yet.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.stages = ("dit",)
    c.mesh.data, c.mesh.fsdp = 1, -1

    # 4 x 64 x 64 codes, 4096 tokens, from a VQ-VAE of stride 4 x 4 x 4.
    c.preprocess.resolution = 256
    c.dit.n_latent_frames = 4
    c.dit.text_length = 77
    c.bench.text_width = 768  # openai/clip-vit-large-patch14

    c.dit.size = "XL"
    c.dit.patch = 2
    c.dit.batch_size = 256
    c.dit.accumulate = 4
    c.dit.remat = "full"
    return c
