"""Networks as a configuration describes them; what "auto" means is decided here."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from opensora_jax.models import attention, dit
from opensora_jax.models.dit import DiTConfig, Execution
from opensora_jax.models.vqvae import VQVAEConfig


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
    name: str, config: DiTConfig, dtype: jnp.dtype, platform: str | None = None
) -> str:
    """The key of `attention.BACKENDS` that `name` means for the heads of a DiT.

    "auto" is the fastest that the platform has: cuDNN's on GPUs, splash attention on TPUs, else
    plain XLA.

    Raises:
      ValueError: heads that cuDNN cannot do.
    """
    platform = platform or jax.default_backend()
    can = attention.cudnn_can(config.head_size, dtype)
    if name == "cudnn" and not can:
        raise ValueError(
            "dit.attention='cudnn': expected bfloat16 or float16 and a head size that is a "
            f"multiple of 8 up to 128, not {jnp.dtype(dtype).name} and {config.head_size}"
        )
    if name != "auto":
        return name
    if platform == "gpu" and can:
        return "cudnn"
    return "splash" if platform == "tpu" else "xla"


def execution(c: ConfigDict, config: DiTConfig, platform: str | None = None) -> Execution:
    """How `config.dit` wants a DiT to be computed in training."""
    dtype = compute_dtype(c.dtype, platform)
    return Execution(
        dtype=dtype,
        attention=attention_implementation(c.attention, config, dtype, platform),
        remat=c.remat,
        unroll=c.unroll,
    )


def sampling_execution(config: DiTConfig) -> Execution:
    """How a DiT is computed where nothing is trained."""
    dtype = compute_dtype("auto")
    return Execution(dtype=dtype, attention=attention_implementation("auto", config, dtype))


def dit_config(c: ConfigDict, *, channels: int, out_channels: int, text_width: int) -> DiTConfig:
    """The DiT that `config.dit` describes, for latents and texts of these sizes."""
    depth, width, heads = dit.SIZES[c.size] if c.size else (c.depth, c.width, c.heads)
    return DiTConfig(
        depth=depth,
        width=width,
        heads=heads,
        channels=channels,
        out_channels=out_channels,
        patch=c.patch,
        text_width=text_width,
        text_mode=c.text_mode,
    )


def vqvae_config(c: ConfigDict) -> VQVAEConfig:
    """The VQ-VAE that `config.vqvae` describes."""
    return VQVAEConfig(
        n_codes=c.n_codes,
        embedding_dim=c.embedding_dim,
        n_hiddens=c.n_hiddens,
        n_res_layers=c.n_res_layers,
        downsample=tuple(c.downsample),
        normalize_latents=c.normalize_latents,
        n_frames=c.n_frames,
    )
