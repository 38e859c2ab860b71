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


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU that programs are planned for."""

    device_kind: str
    hbm_bytes: int  # that the compiler lets a program have, a little less than there is
    hbm_bandwidth: float  # bytes/s
    # Of one link to a neighbor, one way, bytes/s: the page's Gbit/s of a chip over its ports.
    link_bandwidth: float
    ring: int  # along dimensions of multiples of this a slice's last chip is linked to the first

    @property
    def peak_flops(self) -> float:
        return peak_flops(self.device_kind)


_GIB = 2**30

CHIPS = {
    "v5e": Chip("TPU v5 lite", int(15.75 * _GIB), 819e9, 50e9, 16),
    "v5p": Chip("TPU v5", int(95.74 * _GIB), 2765e9, 100e9, 4),
    "v6e": Chip("TPU v6 lite", int(31.25 * _GIB), 1640e9, 100e9, 16),
}
