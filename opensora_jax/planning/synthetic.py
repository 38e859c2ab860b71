"""The training of a DiT without data, for what measures or plans it.

The sizes are those that the configuration's videos and captions have: latents by
`preprocess.buckets` or `preprocess.resolution` and `dit.n_latent_frames`, and the VQ-VAE's strides,
texts by `dit.text_length` and `bench.text_width`.
"""

import math

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from opensora_jax import mesh as mesh_lib
from opensora_jax.build import networks
from opensora_jax.build import training as build
from opensora_jax.data.buckets import AUTO, parse
from opensora_jax.models.fsq import FSQ
from opensora_jax.tasks.dit import Latents

# CLIP's longest text, for configurations that leave the length to the data.
_TEXT_LENGTH = 77
# About what codebooks of 256 dimensions turn out to have.
_COMPONENTS = 16


def latent_grid(config: ConfigDict) -> tuple[int, int, int]:
    """(T, H, W) of an example's latents; of several sizes the largest, all with as many tokens."""
    _, h, w = config.vqvae.downsample
    windows = networks.vqvae_windows(config.vqvae)
    n_frames = int(np.max(config.dit.n_latent_frames)) or windows.latents(windows.frames)
    if config.preprocess.buckets not in ("", AUTO):
        sizes = parse(config.preprocess.buckets)
        grids = [(max(1, windows.latents(s.n_frames)), s.height // h, s.width // w) for s in sizes]
        return max(grids, key=math.prod)
    resolution = int(np.max(config.preprocess.resolution))
    return n_frames, resolution // h, resolution // w


def n_tokens(config: ConfigDict) -> int:
    """Video tokens of an example."""
    return math.prod(latent_grid(config)) // config.dit.patch**2


def text_length(config: ConfigDict) -> int:
    return config.dit.text_length or _TEXT_LENGTH


def training(config: ConfigDict, platform: str | None = None) -> build.DiTTraining:
    """The training of `config.dit` on a random codebook of the size of `config.vqvae`.

    Args:
      platform: cpu, gpu or tpu, that it is to run on; None: what this process runs on.
    """
    tokenizer = networks.vqvae_config(config.vqvae)
    if tokenizer.levels and config.dit.components in ("auto", 0):
        table = np.asarray(FSQ(tokenizer.levels).codebook())
    else:
        channels = config.dit.components or tokenizer.embedding_dim
        if channels == "auto":
            channels = min(tokenizer.embedding_dim, _COMPONENTS)
        size = (tokenizer.n_codes, channels)
        table = np.random.default_rng(0).standard_normal(size, np.float32)
    latents = Latents(table, tokenizer.levels)
    config = config.copy_and_resolve_references()
    config.dit = build.choose(config.dit, latents)
    return build.dit_training(
        config,
        latents,
        grid=latent_grid(config),
        text_length=text_length(config),
        text_width=config.bench.text_width,
        platform=platform,
    )


def check_sequence(config: ConfigDict, mesh: Mesh) -> None:
    """`build.check_sequence` of these sizes."""
    build.check_sequence(config.dit, mesh, latent_grid(config), text_length(config))


def batch_shapes(config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global batch."""
    b, s = config.dit.batch_size, text_length(config)
    return {
        "codes": jax.ShapeDtypeStruct((b, *latent_grid(config)), np.int32),
        "text": jax.ShapeDtypeStruct((b, s, config.bench.text_width), np.float32),
        "text_length": jax.ShapeDtypeStruct((b,), np.int32),
    }


def batch(config: ConfigDict, mesh: Mesh) -> dict[str, np.ndarray]:
    """This process's part of a random batch, for `mesh.shard_batch`."""
    n = len(mesh_lib.local_batch_indices(mesh, config.dit.batch_size))
    shapes = {name: (n, *x.shape[1:]) for name, x in batch_shapes(config).items()}
    rng = np.random.default_rng(0)
    longest = text_length(config)
    return {
        "codes": rng.integers(
            networks.vqvae_config(config.vqvae).n_codes, size=shapes["codes"], dtype=np.int32
        ),
        "text": rng.standard_normal(shapes["text"], np.float32),
        "text_length": rng.integers(1, longest + 1, size=shapes["text_length"], dtype=np.int32),
    }
