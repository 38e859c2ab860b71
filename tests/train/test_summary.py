"""The table of parameters that a training prints at its start."""

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from opensora_jax import mesh as mesh_lib
from opensora_jax.train import summary
from opensora_jax.train.state import TrainState


def test_modules_their_parts_on_a_device_and_the_axes_of_large_arrays():
    mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 2, "context": 1, "tensor": 2})

    def array(shape, *spec):
        return jax.device_put(np.zeros(shape, np.float32), NamedSharding(mesh, P(*spec)))

    kernels = {
        name: {"kernel": array((3, 16, 32), None, "fsdp", "tensor")} for name in ("query", "key")
    }
    params = {
        "blocks": {"attention": kernels},
        "final": {"kernel": array((16, 64), ("data", "fsdp")), "bias": array((64,))},
    }
    state = TrainState(
        step=array(()),
        params=params,
        ema=params,
        opt_state=optax.adam(1.0).init(params),
        extra={},
        skipped={},
    )
    title, header, *rows = summary.table(state).split("\n")
    # 4 bytes of a quarter of 3072 and 1024 numbers and the bias whole; Adam counts in 4 bytes.
    n = 4 * (2 * 1536 // 4 + 1024 // 4 + 64)
    assert title == (
        "4,160 parameters; a device holds: parameters 4.35 kB, their average 4.35 kB, "
        "optimizer 8.71 kB, the rest 0 B"
    )
    assert summary.device_bytes(params) == n == 4352
    assert header.split()[:3] == ["module", "parameters", "a"]
    assert [row.split(maxsplit=4) for row in rows] == [
        ["blocks.attention", "3,072", "3.07", "kB",
         "key.kernel, query.kernel: 3 x 16 x 32 (-, fsdp, tensor)"],
        ["final", "1,088", "1.28", "kB", "kernel: 16 x 64 (data+fsdp, -)"],
    ]  # fmt: skip
