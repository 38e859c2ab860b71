"""VideoGPT's VQ-VAE checkpoints (https://github.com/wilson1yan/VideoGPT) to `models.vqvae`."""

import re
import reprlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from opensora_jax.convert import table, torch_file
from opensora_jax.convert.unpickle import Placeholder
from opensora_jax.files import short
from opensora_jax.models.vqvae import VQVAE, VQVAEConfig

CONV = (2, 3, 4, 1, 0)  # (out, in, T, H, W) to (T, H, W, in, out)
CONV_TRANSPOSE = (2, 3, 4, 0, 1)  # (in, out, T, H, W) to (T, H, W, in, out)
DENSE = (1, 0)  # (out, in) to (in, out)


def _norm(theirs: str, ours: str) -> list[table.Row]:
    return [
        (f"{theirs}.weight", f"{ours}.scale", None),
        (f"{theirs}.bias", f"{ours}.bias", None),
        (f"{theirs}.running_mean", f"{ours}.mean", None),
        (f"{theirs}.running_var", f"{ours}.var", None),
    ]


def _conv(theirs: str, ours: str, axes: tuple[int, ...] = CONV) -> list[table.Row]:
    return [(f"{theirs}.weight", f"{ours}.kernel", axes), (f"{theirs}.bias", f"{ours}.bias", None)]


def _attention(theirs: str, ours: str) -> list[table.Row]:
    return [
        (f"{theirs}.w_qs.weight", f"{ours}.query.kernel", DENSE),
        (f"{theirs}.w_ks.weight", f"{ours}.key.kernel", DENSE),
        (f"{theirs}.w_vs.weight", f"{ours}.value.kernel", DENSE),
        (f"{theirs}.fc.weight", f"{ours}.out.kernel", DENSE),
        (f"{theirs}.fc.bias", f"{ours}.out.bias", None),
    ]


def _stack(theirs: str, ours: str, depth: int) -> list[table.Row]:
    """Residual stack: theirs is one sequence, the final norm after `depth` blocks."""
    block, our_block = f"{theirs}.*.block", f"{ours}.blocks.*"
    return [
        *_norm(f"{block}.0", f"{our_block}.norms.0"),
        *_conv(f"{block}.2.conv", f"{our_block}.conv_3"),
        *_norm(f"{block}.3", f"{our_block}.norms.1"),
        *_conv(f"{block}.5.conv", f"{our_block}.conv_1"),
        *_norm(f"{block}.6", f"{our_block}.norms.2"),
        *_attention(f"{block}.8.attn_t", f"{our_block}.attention.0"),
        *_attention(f"{block}.8.attn_h", f"{our_block}.attention.1"),
        *_attention(f"{block}.8.attn_w", f"{our_block}.attention.2"),
        *_norm(f"{theirs}.{depth}", f"{ours}.norm"),
    ]


def name_table(depth: int) -> list[table.Row]:
    """Rows for `table.fill`, given the number of residual blocks."""
    return [
        *_conv("encoder.convs.*.conv", "encoder_convs.*"),
        *_conv("encoder.conv_last.conv", "encoder_last"),
        *_stack("encoder.res_stack", "encoder_stack", depth),
        *_conv("pre_vq_conv.conv", "pre_vq"),
        ("codebook.embeddings", "codebook_state.embeddings", None),
        ("codebook.N", "codebook_state.counts", None),
        ("codebook.z_avg", "codebook_state.sums", None),
        ("is_initialized", "codebook_state.is_initialized", None),
        *_conv("post_vq_conv.conv", "post_vq"),
        *_stack("decoder.res_stack", "decoder_stack", depth),
        *_conv("decoder.convts.*.convt", "decoder_convs.*", CONV_TRANSPOSE),
    ]


def load_videogpt(
    path: epath.PathLike,
    *,
    downsample: tuple[int, int, int] | None = None,
    n_frames: int | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> VQVAE:
    """A VideoGPT VQ-VAE: a Lightning checkpoint or its bare state_dict.

    All other sizes follow from the shapes of the weights.

    Args:
      path: the file, of any kind that `torch_file.load` reads.
      downsample: (T, H, W) factors; the checkpoint's own by default. A bare state_dict does not
        say them.
      n_frames: length of the videos it was trained on; the checkpoint's own by default, 16 where
        it says none.
      dtype: compute dtype.

    Returns:
      The model in evaluation mode.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not such a checkpoint; a missing, unexpected or misshapen weight; unknown or
        impossible `downsample`.
    """
    checkpoint = torch_file.load(path)
    tensors, hyper_parameters = _contents(checkpoint, path)
    if downsample is None:
        downsample = hyper_parameters.get("downsample")
    if downsample is None:
        raise ValueError(
            f"{path}: the checkpoint does not say its downsampling; give downsample, for instance "
            "(4, 4, 4), as in the name stride4x4x4"
        )
    n_codes, embedding_dim = _shape(tensors, "codebook.embeddings", 2, path)
    n_hiddens = _shape(tensors, "encoder.conv_last.conv.weight", 5, path)[0]
    blocks = {re.match(r"encoder\.res_stack\.(\d+)\.block\.", name) for name in tensors}
    n_res_layers = len({match[1] for match in blocks if match})
    levels = len({name.split(".")[2] for name in tensors if name.startswith("encoder.convs.")})
    _check_downsample(downsample, levels, path)

    config = VQVAEConfig(
        n_codes=n_codes,
        embedding_dim=embedding_dim,
        n_hiddens=n_hiddens,
        n_res_layers=n_res_layers,
        downsample=downsample,
        n_frames=n_frames or hyper_parameters.get("sequence_length") or 16,
    )
    model = table.fill(
        lambda: VQVAE(config, rngs=nnx.Rngs(0), dtype=dtype),
        # Its codes were learned: training on from here must not draw them again.
        {**tensors, "is_initialized": np.array(True)},
        name_table(n_res_layers),
        source=str(path),
        ignored=r".*\.num_batches_tracked",
    )
    model.eval()
    return model


def _contents(
    checkpoint: Any, path: epath.PathLike
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(state_dict, hyper-parameters), the latter empty for a bare state_dict."""
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: holds a {type(checkpoint).__name__}, expected a checkpoint")
    tensors = checkpoint.get("state_dict", checkpoint)
    if not isinstance(tensors, dict) or "codebook.embeddings" not in tensors:
        raise ValueError(f"{path}: no codebook.embeddings; expected a VQ-VAE of VideoGPT")
    for name, x in tensors.items():
        if not isinstance(name, str) or not isinstance(x, np.ndarray):
            raise ValueError(
                f"{path}: {short(name)} is a {type(x).__name__}, expected only tensors"
            )
    # Older Lightning writes hparams; either holds the values, or one Namespace of them as args.
    hyper_parameters = _attributes(checkpoint.get("hyper_parameters", checkpoint.get("hparams")))
    hyper_parameters = {**hyper_parameters, **_attributes(hyper_parameters.get("args"))}
    n_frames = hyper_parameters.get("sequence_length")
    if n_frames is not None and (type(n_frames) is not int or n_frames < 1):
        raise ValueError(f"{path}: sequence_length={_shown(n_frames)}, expected a positive number")
    return tensors, hyper_parameters


def _attributes(value: Any) -> dict[str, Any]:
    if isinstance(value, Placeholder):
        value = {**value.entries, **(value.state if isinstance(value.state, dict) else {})}
    return value if isinstance(value, dict) else {}


def _shape(
    tensors: dict[str, np.ndarray], name: str, n_axes: int, path: epath.PathLike
) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(f"{path}: missing {name}; expected a VQ-VAE of VideoGPT")
    shape = np.shape(tensors[name])
    if len(shape) != n_axes:
        raise ValueError(f"{path}: {name} has shape {short(shape)}, expected {n_axes} axes")
    return shape


def _shown(value: Any) -> str:
    """A value of a pickle, where a few bytes can make one of any size and depth."""
    return reprlib.repr(value)[:80]


def _check_downsample(downsample: Any, levels: int, path: epath.PathLike) -> None:
    """An encoder has as many strided convolutions as its largest factor has doublings."""
    is_valid = isinstance(downsample, tuple | list) and len(downsample) == 3
    if not is_valid or not all(type(n) is int and n > 0 for n in downsample):
        raise ValueError(
            f"{path}: downsample={_shown(downsample)}, expected three numbers (T, H, W)"
        )
    if max(downsample) != 2**levels:
        raise ValueError(
            f"{path}: downsample={_shown(tuple(downsample))}, expected 2**{levels} as its largest "
            f"factor: the encoder has {levels} strided convolutions"
        )
