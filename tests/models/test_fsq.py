"""Finite scalar quantization: its codes count levels, and the nearest code is found by rounding."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.models.fsq import FSQ

SMALL = FSQ((4, 3, 2))


def test_codes_are_digits_the_first_the_fastest():
    # Levels over half their number, rounded down: 4 -> -2..1 over 2, 3 -> -1..1, 2 -> -1..0.
    digits = itertools.product((-1.0, 0.0), (-1.0, 0.0, 1.0), (-1.0, -0.5, 0.0, 0.5))
    expected = np.array([values[::-1] for values in digits])
    np.testing.assert_array_equal(SMALL.codebook(), expected)
    assert SMALL.n_codes == len(expected)


@pytest.mark.parametrize("fsq", [SMALL, FSQ((8, 8, 8, 5, 5, 5)), FSQ((2,))])
def test_nearest_is_the_nearest(fsq):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, fsq.n_codes, 200)
    embeddings = np.asarray(fsq.lookup(jnp.asarray(codes)))
    np.testing.assert_array_equal(fsq.nearest(embeddings), codes)
    noisy = embeddings + rng.normal(size=embeddings.shape).astype(np.float32)
    book = np.asarray(fsq.codebook())
    distances = ((noisy[:, None, :] - book) ** 2).sum(-1) if fsq.n_codes < 100 else None
    if distances is not None:
        np.testing.assert_array_equal(fsq.nearest(noisy), distances.argmin(1))


def test_quantizing_reaches_every_level_and_no_other():
    z = np.linspace(-20, 20, 4001, dtype=np.float32)[:, None]
    for n in (2, 3, 5, 8):
        codes = np.asarray(FSQ((n,)).codes(jnp.asarray(z)))
        assert sorted(set(codes.tolist())) == list(range(n))
        assert (np.diff(codes) >= 0).all()


def test_zero_is_the_middle_level():
    assert FSQ((8, 5)).codes(jnp.zeros((2,))) == 4 + 8 * 2


@pytest.mark.parametrize("levels", [(), (8, 1), (2,) * 31])
def test_impossible_levels(levels):
    with pytest.raises(ValueError, match="levels="):
        FSQ(levels)
