"""What accelerators can do, as their makers state it.

A device that is not listed has no figure, and what is derived from one is left out rather than
guessed. All peaks are of dense bfloat16 matrix products.

Sources: the "System architecture" pages of Cloud TPU (docs.cloud.google.com/tpu/docs/v4, v5e, v5p
and v6e) for TPUs; NVIDIA's data sheets of A100, H100 and H200, whose figures "with sparsity" are
halved here. GPUs of the same name but another form factor (H100 PCIe, H200 NVL) are slower and not
listed.
"""

import re

_PEAKS = {
    r"TPU v4": 275e12,
    r"TPU v5 lite": 197e12,  # v5e
    r"TPU v5": 459e12,  # v5p
    r"TPU v6 lite": 918e12,  # v6e
    r"NVIDIA A100\b.*": 312e12,
    r"NVIDIA H100 80GB HBM3": 989e12,  # SXM
    r"NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """bfloat16 FLOP/s of a `jax.Device.device_kind`; None where it is not known."""
    for pattern, peak in _PEAKS.items():
        if re.fullmatch(pattern, device_kind):
            return peak
    return None
