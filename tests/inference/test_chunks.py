"""Windows longer than a causal tokenizer was trained on give in chunks what they give at once."""

import numpy as np
import pytest
from flax import nnx

from opensora_jax.inference import chunks
from opensora_jax.inference.tokenizer import WindowEncoder, decode
from opensora_jax.models.cosmos import Cosmos, CosmosConfig

WINDOW = 21  # in three chunks, of 1 + 8 frames and of 8


def tokenizer(n_frames):
    config = CosmosConfig(
        (2, 4, 4), channels=2, multipliers=(1, 2), n_res_blocks=1, patch=2, n_frames=n_frames
    )
    return Cosmos(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def videos():
    """A window and a little more, less than a window, less than a chunk, and a frame."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (n, 8, 12, 3), np.uint8) for n in (WINDOW + 3, 11, 5, 1)]


def encoded(model, videos, **options):
    encoder = WindowEncoder(model, WINDOW, 8, **options)
    for video in videos:
        encoder.add(video)
    return encoder.finish()


def test_long_windows_in_chunks(videos):
    whole, model = tokenizer(WINDOW), tokenizer(9)
    expected = encoded(whole, videos)
    before = chunks._encode._cache_size()
    found = encoded(model, videos)
    assert chunks._encode._cache_size() - before == 2
    assert [len(codes) for codes in found] == [11 + 2, 6, 3, 1]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    before = chunks._decode._cache_size()
    frames = decode(model, found[0][None], WINDOW)
    assert chunks._decode._cache_size() - before == 2
    assert frames.shape == (1, *videos[0].shape)
    expected = decode(whole, found[0][None], WINDOW)
    assert abs(frames.astype(int) - expected).max() <= 1  # rounded to 8 bits


@pytest.mark.slow
def test_tiles_in_chunks(videos):
    (codes,), (expected,) = (encoded(tokenizer(n), videos[:1], tile=8) for n in (9, WINDOW))
    np.testing.assert_array_equal(codes, expected)
    frames, expected = (decode(tokenizer(n), codes[None], WINDOW, 8) for n in (9, WINDOW))
    assert frames.shape == (1, *videos[0].shape)
    assert abs(frames.astype(int) - expected).max() <= 1
