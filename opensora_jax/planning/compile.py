"""Compiles a configuration's train step for a slice of TPU chips, none of which need be there."""

import dataclasses
import math
import time
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from opensora_jax import config as config_lib
from opensora_jax import mesh as mesh_lib
from opensora_jax.planning import programs, synthetic
from opensora_jax.planning.chips import Slice
from opensora_jax.planning.hlo import Collective, Program
from opensora_jax.train import state as state_lib
from opensora_jax.train import step as step_lib
from opensora_jax.train.summary import device_bytes


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the compiler makes of a training on a slice; bytes and seconds of one device and step.

    What comes of compiling is zero or empty where the program does not fit; `refusal` is what the
    compiler says then.
    """

    slice: Slice
    mesh: Mesh
    remat: str
    n_parameters: int
    tokens: int  # of a global batch
    model_flops: float  # by formula, over all devices
    state_bytes: dict[str, int]  # parameters, their average, optimizer
    weight_sizes: frozenset[tuple[int, ...]]  # of weights, whole and divided, see `_sizes`
    compile_seconds: float
    refusal: str = ""
    other_bytes: int = 0  # batch, padding of arrays, program
    temporary_bytes: int = 0  # activations, gradients, gathered weights
    evaluation_bytes: int = 0  # of the validation losses, in place of these
    sampling_bytes: int = 0  # of the videos drawn while training, likewise
    flops: float = 0.0
    hbm_bytes: float = 0.0
    collectives: tuple[Collective, ...] = ()
    unknown_loops: int = 0

    @property
    def total_bytes(self) -> int:
        temporary = max(self.temporary_bytes, self.evaluation_bytes, self.sampling_bytes)
        return sum(self.state_bytes.values()) + self.other_bytes + temporary

    @property
    def fits(self) -> bool:
        return not self.refusal and self.total_bytes <= self.slice.chip.hbm_bytes

    @property
    def compute_seconds(self) -> float:
        return self.flops / self.slice.chip.peak_flops

    @property
    def memory_seconds(self) -> float:
        return self.hbm_bytes / self.slice.chip.hbm_bandwidth

    @property
    def network_seconds(self) -> float:
        return sum(c.count * self.link_seconds(c) for c in self.collectives)

    @property
    def seconds(self) -> float:
        """No step is faster: the longest of the three, the others hidden behind it."""
        return max(self.compute_seconds, self.memory_seconds, self.network_seconds)

    @property
    def mfu_bound(self) -> float:
        peak = self.slice.chip.peak_flops * len(self.slice.devices)
        return self.model_flops / peak / self.seconds

    def link_seconds(self, collective: Collective) -> float:
        """Least time of one collective on the links between its chips.

        A ring along each dimension of the torus that a group extends over, both ways at once; where
        the slice has no link from its last chip to its first, a line of half the speed. See "How to
        Scale Your Model" (jax-ml.github.io/scaling-book), chapter "Sharded Matrices".
        """
        size = collective.groups.shape[1]
        if size == 1:
            return 0.0
        chip = self.slice.chip
        coordinates = np.array([device.coords for device in self.mesh.devices.flat])
        extent = coordinates.max(axis=0) + 1
        members = coordinates[collective.groups]  # (n_groups, size, dimensions)
        spans = (members.max(axis=1) - members.min(axis=1)).max(axis=0) + 1
        links = [
            2 if n == extent[axis] and n % chip.ring == 0 else 1
            for axis, n in enumerate(spans)
            if n > 1
        ]
        bandwidth = chip.link_bandwidth * sum(links)
        share = (size - 1) / size
        match collective.kind:
            case "collective-permute" | "collective-broadcast":
                return collective.bytes / chip.link_bandwidth
            case "all-to-all" | "ragged-all-to-all":
                return collective.bytes * max(share, max(spans) / 4) / bandwidth
            case "all-reduce":
                return 2 * collective.bytes * share / bandwidth
            case _:
                return collective.bytes * share / bandwidth

    def mesh_axes(self, collective: Collective) -> str:
        """The axes of the mesh that a collective goes over."""
        places = np.unravel_index(collective.groups, self.mesh.devices.shape)
        varies = [(place != place[:, :1]).any() for place in places]
        return ", ".join(n for n, v in zip(self.mesh.axis_names, varies, strict=True) if v)

    def purpose(self, collective: Collective) -> str:
        """What is sent, by the largest shape: that of weights (of a block, of all) or not."""
        if collective.largest.bytes <= 1024:
            return "scalars"
        if _sizes(collective.largest.dims) not in self.weight_sizes:
            return "activations"
        is_sum = "reduce" in collective.kind and not collective.gathers
        return "gradients" if is_sum else "weights"


def make(config: ConfigDict, where: Slice) -> Plan:
    """Compiles the train step of `config` for a slice.

    Raises:
      ValueError: for a configuration that does not fit the slice's number of devices.
    """
    config_lib.check(config, where.devices)
    mesh = mesh_lib.make_mesh(config.mesh, where.devices)
    synthetic.check_sequence(config, mesh)
    training = synthetic.training(config, platform="tpu")
    state = state_lib.abstract(training.task, training.tx, mesh)
    over_data = NamedSharding(mesh, mesh_lib.BATCH)
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=over_data)
        for name, x in synthetic.batch_shapes(config).items()
    }
    step = step_lib.jit_train_step(
        training.task,
        training.tx,
        training.schedule,
        training.step_settings,
        jax.tree.map(lambda x: x.sharding, state),
    )
    facts = {
        "slice": where,
        "mesh": mesh,
        "remat": config.dit.remat,
        "n_parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "tokens": config.dit.batch_size * synthetic.n_tokens(config),
        "model_flops": training.throughput.flops_per_step,
        "state_bytes": {
            "parameters": device_bytes(state.params),
            "their average": device_bytes(state.ema),
            "optimizer": device_bytes(state.opt_state),
        },
        "weight_sizes": _weight_sizes(state.params, mesh),
    }
    start = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            compiled = step.lower(state, batch).compile()
            between = {
                f"{program.__name__}_bytes": _new_bytes(
                    program(config, training, mesh).lower(state.ema).compile()
                )
                for program in (programs.evaluation, programs.sampling)
            }
    except jax.errors.JaxRuntimeError as error:
        refusal = _refusal(error)
        return Plan(refusal=refusal, compile_seconds=time.perf_counter() - start, **facts)
    seconds = time.perf_counter() - start
    return Plan(compile_seconds=seconds, **facts, **between, **_read(compiled, facts))


@dataclasses.dataclass(frozen=True)
class SamplingPlan:
    """What sampling takes on a slice, weights over fsdp; bytes of one device."""

    slice: Slice
    n_samples: int  # at once
    weight_bytes: int
    temporary_bytes: int
    refusal: str = ""

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.temporary_bytes

    @property
    def fits(self) -> bool:
        return not self.refusal and self.total_bytes <= self.slice.chip.hbm_bytes


def make_sampling(config: ConfigDict, where: Slice) -> SamplingPlan:
    """Compiles sampling from a model of `config`, as `opensora_jax.sample` does it, for a slice.

    Raises:
      ValueError: for a configuration that does not fit the slice's number of devices.
    """
    config = config.copy_and_resolve_references()
    config.mesh.update({**dict.fromkeys(mesh_lib.AXES, 1), "fsdp": -1})
    config.dit.batch_size = config.dit.accumulate * len(
        where.devices
    )  # which is not that of samples
    config_lib.check(config, where.devices)
    mesh = mesh_lib.make_mesh(config.mesh, where.devices)
    training = synthetic.training(config, platform="tpu")
    shapes, _ = jax.eval_shape(training.task.init, jax.random.key(0))
    params = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, np.dtype("bfloat16"), sharding=sharding),
        shapes,
        training.task.param_shardings(mesh),
    )
    program = programs.sampling(config, training, mesh)
    facts = {
        "slice": where,
        "n_samples": len(program.args[0]),
        "weight_bytes": device_bytes(params),
    }
    try:
        with jax.set_mesh(mesh):
            compiled = program.lower(params).compile()
    except jax.errors.JaxRuntimeError as error:
        return SamplingPlan(temporary_bytes=0, refusal=_refusal(error), **facts)
    return SamplingPlan(temporary_bytes=_new_bytes(compiled), **facts)


def _refusal(error: jax.errors.JaxRuntimeError) -> str:
    """What the compiler says of a program that does not fit; any other error is raised."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    return str(error).removeprefix("RESOURCE_EXHAUSTED: ").splitlines()[0]


def _new_bytes(compiled: jax.stages.Compiled) -> int:
    """What a program takes beside its arguments."""
    memory = compiled.memory_analysis()
    return (
        memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        + memory.generated_code_size_in_bytes
    )


def _read(compiled: jax.stages.Compiled, facts: dict) -> dict:
    """Fields of `Plan` that come of compiling."""
    program = Program(compiled.as_text(), len(facts["slice"].devices))
    memory = compiled.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.generated_code_size_in_bytes
    kept += memory.output_size_in_bytes - memory.alias_size_in_bytes
    loops = program.matmul_flops() / program.matmul_flops(loops=False)
    return {
        "other_bytes": kept - sum(facts["state_bytes"].values()),
        "temporary_bytes": memory.temp_size_in_bytes,
        "flops": compiled.cost_analysis()["flops"] * loops + program.attention_flops(),
        "hbm_bytes": program.hbm_bytes(),
        "collectives": tuple(program.collectives()),
        "unknown_loops": len(program.unknown_loops),
    }


def _sizes(dims: Sequence[int]) -> tuple[int, ...]:
    """Dimensions in whatever order, those of one left out."""
    return tuple(sorted(n for n in dims if n > 1))


def _weight_sizes(params, mesh: Mesh) -> frozenset[tuple[int, ...]]:
    """`_sizes` of all parameters as they lie on a device, and gathered over fsdp."""
    found = set()
    for x in jax.tree.leaves(params):
        gathered = [
            n // math.prod(mesh.shape[axis] for axis in np.atleast_1d(axes or ()) if axis != "fsdp")
            for n, axes in zip(x.shape, x.sharding.spec, strict=True)
        ]
        for dims in (gathered, x.sharding.shard_shape(x.shape)):
            found |= {_sizes(dims), _sizes(dims[1:])}  # all blocks, and one
    return frozenset(found)
