"""What accelerators can do, as their makers state it.

A device that is not listed has no figure, and what is derived from one is left out rather than
guessed. All peaks are of dense bfloat16 matrix products.

Sources: the "System architecture" pages of Cloud TPU (docs.cloud.google.com/tpu/docs/v4, v5e, v5p
and v6e) for TPUs; NVIDIA's data sheets of A100, H100 and H200, whose figures "with sparsity" are
halved here. GPUs of the same name but another form factor (H100 PCIe, H200 NVL) are slower and not
listed.
"""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU chip, both cores where it has two."""

    name: str
    device_kind: str  # what JAX calls it
    peak_flops: float  # bfloat16 FLOP/s
    hbm_bytes: int
    hbm_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s of one link to a neighbor, one way
    torus: int  # dimensions of the network, each with a link in either direction


_GIB = 2**30

# A link's bandwidth is the page's Gbit/s of a chip over its ports, two a dimension.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", 275e12, 32 * _GIB, 1228e9, 50e9, 3),
        Chip("v5e", "TPU v5 lite", 197e12, 16 * _GIB, 819e9, 50e9, 2),
        Chip("v5p", "TPU v5", 459e12, 95 * _GIB, 2765e9, 100e9, 3),
        Chip("v6e", "TPU v6 lite", 918e12, 32 * _GIB, 1640e9, 100e9, 2),
    )
}

_GPU_PEAKS = {
    r"NVIDIA A100\b.*": 312e12,
    r"NVIDIA H100 80GB HBM3": 989e12,  # SXM
    r"NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """bfloat16 FLOP/s of a `jax.Device.device_kind`; None where it is not known."""
    for chip in CHIPS.values():
        if device_kind == chip.device_kind:
            return chip.peak_flops
    for pattern, peak in _GPU_PEAKS.items():
        if re.fullmatch(pattern, device_kind):
            return peak
    return None
