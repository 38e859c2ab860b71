"""The optimizer and its schedule."""

import jax
import optax


def schedule(learning_rate: float, warmup_steps: int, steps: int) -> optax.Schedule:
    """Linear warm-up, then cosine to a hundredth of `learning_rate` at `steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=learning_rate,
        warmup_steps=min(warmup_steps, max(steps - 1, 0)),
        decay_steps=max(steps, 1),
        end_value=learning_rate / 100,
    )


def adamw(
    learning_rate: optax.Schedule, *, b1: float, b2: float, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
    """AdamW after clipping to a global norm; kernels decay, biases, scales and tables do not."""

    def kernels(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)

    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=kernels),
    )
