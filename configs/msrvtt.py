"""DiT-B/2 on MSR-VTT that was preprocessed before (data_prep/preprocess_data.py).

    python -m opensora_jax.main --config=configs/msrvtt.py --workdir=runs/msrvtt \\
        --config.data.dataset=data/msrvtt/dataset

Cost, by the shapes: 161 million parameters; 1.9e14 floating-point operations a step of 256 examples
of 1024 tokens (16 frames at 128 x 128), 1.9e19 for the 100,000 steps.

Expected result: nobody has trained it to the end yet. MSR-VTT has 20 captions for each of about
10,000 videos, so expect rough subjects and motions; the loss by noise level in the report and the
sample videos show whether it learns.
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
