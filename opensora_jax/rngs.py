"""Random keys derived from a seed, a name and a step: nothing to thread, save or restore."""

import zlib

import jax


def key(seed: int, name: str, step: int | jax.Array = 0) -> jax.Array:
    """The key of use `name` at `step`; `step` may be a traced integer."""
    named = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()) & 0x7FFFFFFF)
    return jax.random.fold_in(named, step)
