"""VideoGPT's VQ-VAE, stride 4 x 4 x 4, trained from the videos of MSR-VTT.

    python -m opensora_jax.main --config=configs/msrvtt_vqvae.py --workdir=runs/msrvtt_vqvae \\
        --config.data.videos=data/msrvtt/train/videos

Cost, by the shapes: 21 million parameters; 1.7e13 floating-point operations a step of 32 clips of
16 frames at 128 x 128, 1.7e18 for the 100,000 steps.

Expected result: nobody has trained it to the end yet. held_out/psnr rises, and held_out/codes_used
should come near 2048; where few codes are used, see the README's troubleshooting.

The result serves as `--vqvae runs/msrvtt_vqvae/vqvae` in data_prep/preprocess_data.py.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.stages = ("vqvae",)
    return c
