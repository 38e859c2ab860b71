"""TPU chips, as the pages that `hardware` names state them, and slices of them to compile for."""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from opensora_jax import hardware


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
        return hardware.peak_flops(self.device_kind)


_GIB = 2**30

CHIPS = {
    "v5e": Chip("TPU v5 lite", int(15.75 * _GIB), 819e9, 50e9, 16),
    "v5p": Chip("TPU v5", int(95.74 * _GIB), 2765e9, 100e9, 4),
    "v6e": Chip("TPU v6 lite", int(31.25 * _GIB), 1640e9, 100e9, 16),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice of TPU chips."""

    name: str
    chip: Chip
    devices: Sequence[jax.Device]


def tpu_slice(name: str) -> Slice:
    """The slice of a name such as v5p:4x4x8.

    Raises:
      ValueError: if there is none of this name.
      ModuleNotFoundError: without the TPU compiler.
    """
    kind, _, shape = name.partition(":")
    expected = "a chip and the shape of a slice, such as v5e:4x4, v5p:4x4x8 or v6e:16x16"
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise ValueError(f"--topology={name}: expected {expected}")
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError("the TPU compiler is missing: pip install -e '.[tpu]'")
    # Else the compiler's library asks the network what machine it is on, complains, and locks it.
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": f"{kind}-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_STDERR_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans at once
    }.items():
        os.environ.setdefault(variable, value)
    try:
        topology = topologies.get_topology_desc(name, platform="tpu")
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).split(": ", 1)[-1]
        raise ValueError(f"--topology={name}: expected {expected} ({reason})") from error
    return Slice(name, CHIPS[kind], topology.devices)
