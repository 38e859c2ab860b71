"""VideoGPT's VQ-VAE, stride 4 x 4 x 4, trained from the videos of MSR-VTT.

    python -m opensora_jax.main --config=configs/msrvtt_vqvae.py --workdir=runs/msrvtt_vqvae \\
        --config.data.videos=data/msrvtt/train/videos

The result serves as `--vqvae runs/msrvtt_vqvae/vqvae` in data_prep/preprocess_data.py.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.stages = ("vqvae",)
    c.data.held_out_videos = ""
    return c
