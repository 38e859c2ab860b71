"""One step of training, apart from the loop: what `bench` measures and `plan` compiles as well."""

import functools

import jax
import jax.numpy as jnp
import optax

from opensora_jax import mesh, rngs
from opensora_jax.train.settings import StepSettings
from opensora_jax.train.state import Task, TrainState

Metrics = dict[str, jax.Array]


def train_step(
    task: Task,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    settings: StepSettings,
    state: TrainState,
    batch: dict[str, jax.Array],
) -> tuple[TrainState, Metrics]:
    """One update with the mean gradient over the microbatches of `batch`.

    Where loss or gradients are not finite, all but the counters stays as it was: the step is
    skipped, also for the schedule, and the next one sees the next batch.
    """
    key = rngs.key(settings.seed, "train", state.step)

    def gradient(extra, batch, index):
        grad = jax.value_and_grad(task.loss, has_aux=True)
        (loss, (extra, metrics)), grads = grad(
            state.params, extra, batch, jax.random.fold_in(key, index), state.step
        )
        return extra, (grads, {"loss": loss, **metrics})

    n = settings.accumulate
    if n == 1:
        extra, (grads, metrics) = gradient(state.extra, batch, 0)
    else:
        split = mesh.microbatches(batch, n)

        def add(carry, xs):
            extra, total = carry
            extra, new = gradient(extra, *xs)
            return (extra, jax.tree.map(jnp.add, total, new)), None

        shapes = jax.eval_shape(
            lambda: gradient(state.extra, jax.tree.map(lambda x: x[0], split), 0)
        )
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[1])
        (extra, total), _ = jax.lax.scan(add, (state.extra, zeros), (split, jnp.arange(n)))
        grads, metrics = jax.tree.map(lambda x: x / n, total)

    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # A young average follows closely, or early weights would linger in it.
    decay = jnp.minimum(settings.ema_decay, (1.0 + state.step) / (10.0 + state.step))
    ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, params)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
    updated = state.replace(params=params, ema=ema, opt_state=opt_state, extra=extra)
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
    skipped = {
        "total": state.skipped["total"] + ~finite,
        "in_a_row": jnp.where(finite, 0, state.skipped["in_a_row"] + 1),
    }
    metrics |= {
        "grad_norm": grad_norm,
        "learning_rate": schedule(state.step - state.skipped["total"]),
        "skipped_steps": skipped["total"],
        "skipped_in_a_row": skipped["in_a_row"],
    }
    return kept.replace(step=state.step + 1, skipped=skipped), metrics


# A TPU's compiler would else multiply by a weight, or write its gradient, one device's part at a
# time while the next is sent: for DiT-XL/2 on 16 chips, twice the bytes from and to memory.
_TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def jit_train_step(
    task: Task,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    settings: StepSettings,
    shardings: TrainState,
):
    """`train_step` of (state, batch) as it runs: compiled, sharded, the old state given away."""
    (device, *_) = shardings.step.device_set
    return jax.jit(
        functools.partial(train_step, task, tx, schedule, settings),
        donate_argnums=0,
        out_shardings=(shardings, None),
        compiler_options=_TPU_OPTIONS if device.platform == "tpu" else None,
    )
