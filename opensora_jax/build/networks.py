"""Networks as a configuration describes them; what "auto" means is decided here."""

import logging
import math

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from opensora_jax.models import attention, dit
from opensora_jax.models.cosmos import CosmosConfig
from opensora_jax.models.dit import DiTConfig, Execution
from opensora_jax.models.vqvae import VQVAEConfig
from opensora_jax.tasks.vqvae import ARCHITECTURES
from opensora_jax.windows import Windows

logger = logging.getLogger(__name__)

HEAD_SIZE = 128


def compute_dtype(name: str, platform: str | None = None) -> jnp.dtype:
    """The dtype that `name` says; "auto" is bfloat16 but for CPUs, which only emulate it.

    Args:
      platform: cpu, gpu or tpu; None: what this process runs on.
    """
    if name == "auto":
        platform = platform or jax.default_backend()
        return jnp.dtype(jnp.float32 if platform == "cpu" else jnp.bfloat16)
    return jnp.dtype(name)


def attention_implementation(
    name: str,
    config: DiTConfig,
    dtype: jnp.dtype,
    platform: str | None = None,
    capability: str | None = None,
) -> str:
    """The key of `attention.BACKENDS` that `name` means for the heads of a DiT.

    "auto" is the fastest that the platform has: cuDNN's on GPUs, splash attention on TPUs, else
    plain XLA. Where a GPU cannot do cuDNN's, a line in the log says why.

    Args:
      capability: the GPU's compute capability; None: that of this process's, if it has one.

    Raises:
      ValueError: cuDNN's is asked for by name where it cannot be used.
    """
    if platform is None:
        platform = jax.default_backend()
        capability = capability or getattr(jax.local_devices()[0], "compute_capability", None)
    lack = attention.cudnn_lacks(config.head_size, dtype, capability)
    if name == "cudnn" and lack:
        raise ValueError(f"dit.attention='cudnn': expected {lack}; 'xla' can do it")
    if name != "auto":
        return name
    if platform != "gpu":
        return "splash" if platform == "tpu" else "xla"
    if lack:
        logger.info("dit.attention: xla, since cuDNN's attention needs %s", lack)
        return "xla"
    return "cudnn"


def execution(
    c: ConfigDict, config: DiTConfig, reduce_dtype: str, platform: str | None = None
) -> Execution:
    """How `config.dit` and `config.mesh.reduce_dtype` want a DiT to be computed in training."""
    dtype = compute_dtype(c.dtype, platform)
    return Execution(
        dtype=dtype,
        attention=attention_implementation(c.attention, config, dtype, platform),
        remat=c.remat,
        unroll=c.unroll,
        reduce_dtype=None if reduce_dtype == "auto" else jnp.dtype(reduce_dtype),
    )


def sampling_execution(config: DiTConfig) -> Execution:
    """How a DiT is computed where nothing is trained."""
    dtype = compute_dtype("auto")
    return Execution(dtype=dtype, attention=attention_implementation("auto", config, dtype))


def dit_size(c: ConfigDict) -> tuple[int, int, int]:
    """(depth, width, heads) of `config.dit`.

    What starts from a checkpoint has its heads, the paper's. Others have heads of 128, which fill a
    TPU's lanes.
    """
    if not c.size:
        return c.depth, c.width, c.heads
    depth, width, heads = dit.SIZES[c.size]
    return depth, width, heads if c.init_from else width // HEAD_SIZE


def dit_config(
    c: ConfigDict,
    *,
    channels: int,
    out_channels: int,
    text_width: int,
    n_codes: int | None = None,
    extent: tuple[int, int, int] | None = None,
) -> DiTConfig:
    """The DiT that `config.dit` describes, for latents and texts of these sizes."""
    depth, width, heads = dit_size(c)
    return DiTConfig(
        depth=depth,
        width=width,
        heads=heads,
        channels=channels,
        out_channels=out_channels,
        patch=c.patch,
        text_width=text_width,
        text_mode=c.text_mode,
        conditioning=c.conditioning,
        extent=extent,
        n_codes=n_codes,
    )


def vqvae_config(c: ConfigDict) -> VQVAEConfig | CosmosConfig:
    """The tokenizer that `config.vqvae` describes.

    Raises:
      ValueError: sizes that do not fit each other.
    """
    if c.architecture == "cosmos":
        return CosmosConfig(
            downsample=tuple(c.downsample),
            levels=tuple(c.levels),
            channels=c.n_hiddens,
            multipliers=tuple(c.multipliers),
            n_res_blocks=c.n_res_layers,
            patch=c.patch,
            n_frames=c.n_frames,
        )
    levels = tuple(c.levels) if c.quantizer == "fsq" else ()
    return VQVAEConfig(
        n_codes=math.prod(levels) if levels else c.n_codes,
        embedding_dim=len(levels) or c.embedding_dim,
        n_hiddens=c.n_hiddens,
        n_res_layers=c.n_res_layers,
        downsample=tuple(c.downsample),
        # What is rounded in each dimension needs none of it.
        normalize_latents=c.normalize_latents and not levels,
        n_frames=c.n_frames,
        levels=levels,
    )


def vqvae_windows(c: ConfigDict) -> Windows:
    """How the tokenizer of `config.vqvae` cuts time.

    Raises:
      ValueError: `vqvae.n_frames` does not fit.
    """
    _, network = ARCHITECTURES[c.architecture]
    return Windows(c.downsample[0], network.causal, c.n_frames)
