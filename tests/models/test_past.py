"""A causal tokenizer gives in chunks what it gives for the whole."""

import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from opensora_jax.convert.cosmos import load_cosmos
from opensora_jax.models.cosmos import Cosmos, CosmosConfig
from opensora_jax.models.past import Past

GOLDEN = Path(__file__).parents[1] / "golden"


def compiled(model, n_chunks):
    """(latents, codes, video, what the next has to know) of a chunk, its codes decoded."""
    graph, state = nnx.split(model)

    def outputs(state, video, kept, i):
        model = nnx.merge(graph, state)
        encoding, decoding = (Past(k, i, n_chunks) for k in kept or (None, None))
        latents = model.latents(video, encoding)
        codes = model.quantizer.codes(latents)
        return latents, codes, model.decode(codes, decoding), (encoding.kept, decoding.kept)

    run = jax.jit(outputs, compiler_options={"xla_backend_optimization_level": 0})
    return lambda *args: run(state, *args), run._cache_size


def in_chunks(model, video, size):
    """(latents, codes, video) in chunks of `size` latents, the first of one more."""
    frames, kept, found = size * model.downsample[0], None, []
    n_chunks = (video.shape[1] - 1) // frames
    run, n_compiled = compiled(model, n_chunks)
    for i in range(n_chunks):
        chunk = video[:, 1 + i * frames - (i == 0) : 1 + (i + 1) * frames]
        *outputs, kept = run(chunk, kept, i)
        found.append(outputs)
    assert n_compiled() == min(n_chunks, 2)
    return [np.concatenate(parts, axis=1) for parts in zip(*found, strict=True)]


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cosmos") / "Cosmos-Tokenizer-DV4x8x8"
    with tarfile.open(GOLDEN / "cosmos_dv4x8x8.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return load_cosmos(folder)


# 9 frames of 32 x 48, 17 frames of 24 x 40.
@pytest.mark.parametrize(("case", "size"), [("", 1), pytest.param("_2", 2, marks=pytest.mark.slow)])
def test_chunks_of_the_original(golden, case, size):
    known = np.load(GOLDEN / "cosmos_dv4x8x8.npz")
    latents, codes, recon = in_chunks(golden, known[f"video{case}"] / 2, size)
    np.testing.assert_array_equal(codes, known[f"indices{case}"])
    np.testing.assert_allclose(latents, known[f"pre_quant{case}"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(2 * recon, known[f"recon{case}"], atol=1e-4, rtol=0)


SMALL = {"channels": 2, "multipliers": (1, 2), "n_res_blocks": 1}
CONFIGS = {
    "attention everywhere": CosmosConfig(
        (2, 4, 4), channels=2, multipliers=(1, 2), n_res_blocks=1, patch=2, attention_levels=(0, 1)
    ),
    "time halved twice": CosmosConfig((8, 8, 8), patch=2, **SMALL | {"multipliers": (1, 2, 1, 1)}),
    "no stride in time": CosmosConfig((1, 2, 2), patch=1, **SMALL),
    "wavelets alone": CosmosConfig((4, 4, 4), channels=2, multipliers=(2,), n_res_blocks=1),
    "space more than time": CosmosConfig((8, 16, 16), **SMALL | {"multipliers": (1, 2, 1)}),
}


SLOW = {
    "attention everywhere": 2,
    "time halved twice": 1,
    "no stride in time": 3,
    "wavelets alone": 1,
    "space more than time": 2,
}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("attention everywhere", 1),
        *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in SLOW.items()),
    ],
)
def test_three_chunks_are_the_whole(name, size):
    config = CONFIGS[name]
    model, rng = Cosmos(config, rngs=nnx.Rngs(0)), np.random.default_rng(0)
    k, h, w = config.downsample
    video = rng.uniform(-0.5, 0.5, (2, 1 + 3 * size * k, 2 * h, w, 3)).astype(np.float32)
    whole, chunks = in_chunks(model, video, 3 * size), in_chunks(model, video, size)
    np.testing.assert_array_equal(chunks[1], whole[1])
    for found, expected in zip(chunks, whole, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_a_chunk_that_does_not_fit():
    model = Cosmos(CONFIGS["attention everywhere"], rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="with T a multiple of 2, and"):
        model.encode(np.zeros((1, 3, 8, 8, 3), np.float32), Past([], 1, 2))
