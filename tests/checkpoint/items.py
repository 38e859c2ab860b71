"""Small items, checkpoints of them, and what harms those."""

import contextlib
import resource

import jax
import jax.numpy as jnp
import numpy as np

from opensora_jax.checkpoint import manager as checkpoint


def make_items(step):
    params = {"layer": {"kernel": jnp.arange(4096.0).reshape(64, 64) + step}}
    return {
        "params": params,
        "ema": jax.tree.map(lambda x: x + 100, params),
        "opt_state": (jax.tree.map(jnp.zeros_like, params),),
        "counters": {"step": jnp.int32(step)},
    }


def ema(step):
    """The item that inference reads, alone."""
    return {"ema": make_items(step)["ema"]}


def opened(folder, **options):
    return contextlib.closing(checkpoint.Checkpoints(folder, **options))


def save(folder, *steps, **options):
    with opened(folder, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_items(step), {"next": step})


def folders(folder):
    return {p.name for p in (folder / checkpoint.FOLDER).iterdir()}


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_bit(folder):
    path = largest(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@contextlib.contextmanager
def files_of_at_most(n_bytes):
    """Larger ones fail while they are written, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
