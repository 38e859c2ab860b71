"""DiT-B/2 on MSR-VTT that was preprocessed before (data_prep/preprocess_data.py).

    python -m opensora_jax.main --config=configs/msrvtt.py --workdir=runs/msrvtt \\
        --config.data.dataset=data/msrvtt/dataset

MSR-VTT has about 7,000 training videos with 20 captions each: a model this size learns its subjects
and motions roughly. Latents of 16 frames at 128 x 128 are 4 x 32 x 32 codes, 1024 tokens.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.stages = ("dit",)
    c.dit.size = "B"
    c.dit.patch = 2
    c.dit.n_latent_frames = 4
    c.dit.text_length = 77
    return c
