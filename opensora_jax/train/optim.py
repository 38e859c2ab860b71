"""The optimizer and its schedule."""

import jax
import optax
import optax.contrib

OPTIMIZERS = ("adamw", "muon")


def schedule(learning_rate: float, warmup_steps: int, steps: int) -> optax.Schedule:
    """Linear warm-up, then cosine to a hundredth of `learning_rate` at `steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=learning_rate,
        warmup_steps=min(warmup_steps, max(steps - 1, 0)),
        decay_steps=max(steps, 1),
        end_value=learning_rate / 100,
    )


def make(
    name: str,
    learning_rate: optax.Schedule,
    *,
    b1: float,
    b2: float,
    weight_decay: float,
    clip_norm: float,
) -> optax.GradientTransformation:
    """One of `OPTIMIZERS` after clipping to a global norm; only kernels decay.

    "muon" orthogonalizes the updates of the kernels of blocks (Jordan et al.; arXiv:2502.16982, by
    whose scaling it takes AdamW's learning rates) and is AdamW for everything else.

    Raises:
      ValueError: for an unknown name.
    """
    if name == "adamw":
        tx = optax.adamw(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=_is_kernel)
    elif name == "muon":
        tx = optax.contrib.muon(
            learning_rate,
            weight_decay=weight_decay,
            adam_b1=b1,
            adam_b2=b2,
            adam_weight_decay=weight_decay,
            weight_decay_mask=_is_kernel,
            muon_weight_dimension_numbers=_block_kernels,
            consistent_rms=0.2,
        )
    else:
        raise ValueError(f"optimizer={name!r}: expected one of {', '.join(OPTIMIZERS)}")
    return optax.chain(optax.clip_by_global_norm(clip_norm), tx)


def _is_kernel(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def _block_kernels(params):
    """Which parameters Muon takes: the kernels (..., in, out) of stacked blocks."""
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

    def choose(path, _):
        keys = [entry.key for entry in path]
        return matrix if keys[0] == "blocks" and keys[-1] == "kernel" else None

    return jax.tree_util.tree_map_with_path(choose, params)
