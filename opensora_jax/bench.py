"""Times the DiT's train step of a configuration on synthetic batches.

python -m opensora_jax.bench --config=configs/msrvtt.py --steps=20

Needs no data, and of the dependencies only jax, flax, optax and ml_collections.
"""

from opensora_jax import process

if __name__ == "__main__":
    process.use_huge_pages()  # before the imports, which take seconds

import dataclasses
import itertools
import statistics
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from opensora_jax import cli, hardware, rngs, runtime
from opensora_jax import config as config_lib
from opensora_jax import mesh as mesh_lib
from opensora_jax.models import flops
from opensora_jax.planning import programs, synthetic
from opensora_jax.train import state as state_lib
from opensora_jax.train import step as step_lib

# Steps before the clock starts: the first ones allocate.
WARMUP_STEPS = 2


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Of one training step on all devices."""

    device_kind: str
    n_devices: int
    n_parameters: int
    batch_size: int
    tokens: int  # video tokens of an example
    flops: float  # by formula, see `models.flops`
    seconds: float  # median
    peak_bytes: int  # of one device, evaluation and sampling included
    compile_seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.batch_size * self.tokens / self.seconds

    @property
    def flops_per_second(self) -> float:
        """Of one device."""
        return self.flops / self.seconds / self.n_devices

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization in [0, 1]; None where the device's peak is not known."""
        peak = hardware.peak_flops(self.device_kind)
        return None if peak is None else self.flops_per_second / peak


class Bench:
    """The compiled step of a configuration, its state and a batch, ready to be timed."""

    def __init__(self, config: ConfigDict):
        training = synthetic.training(config)
        mesh = mesh_lib.make_mesh(config.mesh)
        synthetic.check_sequence(config, mesh)
        self._state, shardings = state_lib.create(
            training.task, training.tx, mesh, rngs.key(config.seed, "init")
        )
        self._batch = mesh_lib.shard_batch(synthetic.batch(config, mesh), mesh)
        step = step_lib.jit_train_step(
            training.task, training.tx, training.schedule, training.step_settings, shardings
        )
        start = time.perf_counter()
        with jax.set_mesh(mesh):
            self._step = step.lower(self._state, self._batch).compile()
        self.compile_seconds = time.perf_counter() - start
        # What a training runs between steps may take more than a step does.
        self._between = []
        for make in (programs.evaluation, programs.sampling):
            program = make(config, training, mesh)
            with jax.set_mesh(mesh):
                compiled = program.lower(self._state.ema).compile()
            self._between.append((compiled, jax.tree.map(_ones, program.args)))
        self._facts = {
            "device_kind": jax.devices()[0].device_kind,
            "n_devices": mesh.size,
            "n_parameters": flops.dit_parameters(training.task.config),
            "batch_size": config.dit.batch_size,
            "tokens": synthetic.n_tokens(config),
            "flops": training.throughput.flops_per_step,
        }

    def run(self, steps: int) -> list[float]:
        """Seconds of each of so many steps, one step being queued while another runs."""
        ends, previous = [time.perf_counter()], None
        for _ in range(steps):
            self._state, metrics = self._step(self._state, self._batch)
            if previous is not None:
                jax.block_until_ready(previous)
                ends.append(time.perf_counter())
            previous = metrics
        jax.block_until_ready(previous)
        ends.append(time.perf_counter())
        return [end - start for start, end in itertools.pairwise(ends)]

    def peak_bytes(self) -> int:
        """Most bytes in use on a device; what the compiler plans for where none are counted."""
        counted = jax.local_devices()[0].memory_stats()
        if counted:
            return counted["peak_bytes_in_use"]
        step = self._step.memory_analysis()
        others = [compiled.memory_analysis() for compiled, _ in self._between]
        own = step.output_size_in_bytes + step.temp_size_in_bytes - step.alias_size_in_bytes
        new = [x.output_size_in_bytes + x.temp_size_in_bytes for x in others]
        return step.argument_size_in_bytes + max(own, *new)

    def measure(self, steps: int) -> Measurement:
        self.run(WARMUP_STEPS)
        for compiled, args in self._between:
            jax.block_until_ready(compiled(self._state.ema, *args))
        return Measurement(
            seconds=statistics.median(self.run(steps)),
            peak_bytes=self.peak_bytes(),
            compile_seconds=self.compile_seconds,
            **self._facts,
        )


def _ones(x: jax.ShapeDtypeStruct) -> jax.Array:
    """An array of this shape and sharding, or keys."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        key = rngs.key(0, "bench")
        return jax.device_put(jax.random.split(key, x.shape) if x.shape else key, x.sharding)
    return jnp.ones(x.shape, x.dtype, device=x.sharding)


def table(m: Measurement) -> str:
    """A measurement as a table in Markdown; what is not known is a dash."""
    columns = {
        "device": f"{m.n_devices} x {m.device_kind}",
        "parameters": f"{m.n_parameters / 1e6:.1f} M",
        "batch": f"{m.batch_size} x {m.tokens} tokens",
        "ms/step": f"{1e3 * m.seconds:.1f}",
        "tokens/s": f"{m.tokens_per_second:,.0f}",
        "TFLOP/s a device": f"{m.flops_per_second / 1e12:.3g}",
        "MFU": "-" if m.mfu is None else f"{m.mfu:.1%}",
        "peak memory a device": f"{m.peak_bytes / 2**30:.2f} GiB",
        "compile": f"{m.compile_seconds:.1f} s",
    }
    rows = (columns, ["---"] * len(columns), columns.values())
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__, prog="python -m opensora_jax.bench")
    parser.add_argument("--steps", type=cli.number(int, 1), default=10, help="steps to time")
    args, config = cli.parse_with_config(parser, argv)
    runtime.start()
    jax.config.update("jax_enable_compilation_cache", False)  # how long it takes is measured
    config.stages = ("dit",)  # others cannot run on several processes
    config_lib.check(config)
    measured = Bench(config).measure(args.steps)
    if jax.process_index() == 0:
        print(table(measured))


if __name__ == "__main__":
    cli.run(main)
