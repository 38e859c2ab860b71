"""One step of training, apart from the loop: what `bench` measures and `plan` compiles as well."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from opensora_jax import rngs
from opensora_jax.train.state import Task, TrainState

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long to train and how often to look; units are optimizer steps."""

    steps: int
    seed: int
    ema_decay: float
    accumulate: int  # microbatches a step
    log_every: int
    checkpoint_every: int
    tokens_per_step: int  # for tokens/s


def train_step(
    task: Task,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    settings: Settings,
    state: TrainState,
    batch: dict[str, jax.Array],
) -> tuple[TrainState, Metrics]:
    """One update with the mean gradient over the microbatches of `batch`."""
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
        # Strided, so that every microbatch is spread over all devices.
        split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, n, *x.shape[1:]), 1, 0), batch)

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
    metrics |= {"grad_norm": optax.global_norm(grads), "learning_rate": schedule(state.step)}
    new_state = TrainState(
        step=state.step + 1, params=params, ema=ema, opt_state=opt_state, extra=extra
    )
    return new_state, metrics


def jit_train_step(
    task: Task,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    settings: Settings,
    shardings: TrainState,
):
    """`train_step` of (state, batch) as it runs: compiled, sharded, the old state given away."""
    return jax.jit(
        functools.partial(train_step, task, tx, schedule, settings),
        donate_argnums=0,
        out_shardings=(shardings, None),
    )
