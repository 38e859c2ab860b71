"""Encoding videos of any length, and telling tokenizers apart."""

from pathlib import Path

import numpy as np

from opensora_jax.inference import chunks, tokenizer

VQVAE_PATH = Path(__file__).parents[1] / "golden" / "videogpt_stride4x4x4.ckpt"


def test_any_lengths_take_one_compilation():
    rng = np.random.default_rng(0)
    videos = [rng.integers(0, 255, (n, 16, 8, 3), np.uint8) for n in (4, 8, 12, 20, 44)]
    compiled = chunks._encode._cache_size()
    model = tokenizer.load_tokenizer(VQVAE_PATH)
    encoder = tokenizer.WindowEncoder(model, window=8, batch_size=3)
    for video in videos:
        encoder.add(video)
    first = encoder.finish()
    assert [codes.shape for codes in first] == [(n, 4, 2) for n in (1, 2, 3, 5, 11)]
    # What is left of one round does not reach the next, and a batch's other rows change nothing.
    encoder.add(videos[3])
    (again,) = encoder.finish()
    np.testing.assert_array_equal(again, first[3])
    assert chunks._encode._cache_size() - compiled <= 1


def test_the_fingerprint_tells_models_apart():
    model, same = tokenizer.load_tokenizer(VQVAE_PATH), tokenizer.load_tokenizer(VQVAE_PATH)
    assert tokenizer.fingerprint(model) == tokenizer.fingerprint(same)
    kernel = same.pre_vq.kernel
    kernel[...] = kernel[...] + 1e-6
    assert tokenizer.fingerprint(model) != tokenizer.fingerprint(same)
