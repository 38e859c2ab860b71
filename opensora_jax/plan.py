"""Says whether a configuration's training fits a TPU slice, and what bounds its speed.

python -m opensora_jax.plan --config=configs/dit_7b.py --topology=v5p:4x8x8
python -m opensora_jax.plan --config=configs/dit_7b.py --topology=v5p:4x8x8 --sweep
python -m opensora_jax.plan --config=configs/dit_7b.py --topology=v5e:2x2 --sample

Compiles the real train step, sharded as configured, for the slice; no TPU is needed, only its
compiler (pip install -e '.[tpu]').
"""

import collections
import math
import sys
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from opensora_jax import cli
from opensora_jax import mesh as mesh_lib
from opensora_jax.models.dit import REMAT_POLICIES
from opensora_jax.planning import chips
from opensora_jax.planning import compile as aot


def report(plan: aot.Plan) -> str:
    """Tables in Markdown."""
    gib, chip = 2**30, plan.slice.chip
    n_devices = len(plan.slice.devices)
    lines = [
        f"{plan.n_parameters:,} parameters, {4 * plan.n_parameters / 1e9:.1f} GB in float32; "
        f"{plan.tokens:,} tokens a step",
        f"{plan.slice.name}, {n_devices} x {chip.device_kind}; mesh {_mesh_text(plan)}; "
        f"remat {plan.remat}; compiled in {plan.compile_seconds:.0f} s",
        "",
        "| memory of a chip | GiB |",
        "| --- | ---: |",
        *(f"| {name} | {n / gib:.2f} |" for name, n in plan.state_bytes.items()),
    ]
    if plan.refusal:
        return "\n".join([*lines, "", f"Does not fit: {plan.refusal}"])
    totals = {"compute": plan.flops / 1e12, "memory": plan.hbm_bytes / 1e9}
    network = sum(c.count * c.bytes for c in plan.collectives) / 1e9
    lines += [
        f"| batch, padding, program | {plan.other_bytes / gib:.2f} |",
        f"| activations, gradients, gathered weights | {plan.temporary_bytes / gib:.2f} |",
        f"| in their place, while losses are validated | {plan.evaluation_bytes / gib:.2f} |",
        f"| in their place, while videos are drawn | {plan.sampling_bytes / gib:.2f} |",
        f"| total, at most | {plan.total_bytes / gib:.2f} |",
        f"| available | {chip.hbm_bytes / gib:.2f} |",
        f"| headroom | {(chip.hbm_bytes - plan.total_bytes) / gib:.2f} |",
        "",
        "| a step is bound by | of a chip | ms |",
        "| --- | ---: | ---: |",
        f"| compute | {totals['compute']:.2f} TFLOP | {1e3 * plan.compute_seconds:.1f} |",
        f"| memory | {totals['memory']:.1f} GB | {1e3 * plan.memory_seconds:.1f} |",
        f"| network | {network:.2f} GB | {1e3 * plan.network_seconds:.1f} |",
        "",
        "| collective | of | over | a step | GB | ms |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    rows = collections.defaultdict(lambda: np.zeros(3))
    for c in plan.collectives:
        row = c.kind, f"{plan.purpose(c)}, {c.largest.dtype}", plan.mesh_axes(c)
        rows[row] += c.count * np.array([1, c.bytes / 1e9, 1e3 * plan.link_seconds(c)])
    for row, (count, size, ms) in sorted(rows.items(), key=lambda item: -item[1][2]):
        lines.append(f"| {' | '.join(row)} | {count:.0f} | {size:.3f} | {ms:.2f} |")
    if plan.unknown_loops:
        lines += ["", f"{plan.unknown_loops} loops of unknown length are counted once."]
    model = plan.model_flops / n_devices / 1e12
    return "\n".join(
        [
            *lines,
            "",
            f"Model FLOPs of a chip, by formula: {model:.2f} T; the rest of what is computed is "
            "rematerialization.",
            f"No step is faster than {1e3 * plan.seconds:.1f} ms: MFU at most {plan.mfu_bound:.1%}."
            f" {'Fits' if plan.fits else 'Does not fit'}.",
        ]
    )


def sampling_report(plan: aot.SamplingPlan) -> str:
    """A table in Markdown."""
    gib, chip = 2**30, plan.slice.chip
    rows = {"weights, in bfloat16": plan.weight_bytes, "activations": plan.temporary_bytes}
    lines = [
        f"{plan.slice.name}, {len(plan.slice.devices)} x {chip.device_kind}; "
        f"{plan.n_samples} videos at once",
        "",
        "| memory of a chip | GiB |",
        "| --- | ---: |",
        *(f"| {name} | {n / gib:.2f} |" for name, n in rows.items()),
        f"| total | {plan.total_bytes / gib:.2f} |",
        f"| available | {chip.hbm_bytes / gib:.2f} |",
        "",
        "Fits." if plan.fits else f"Does not fit. {plan.refusal}".strip(),
    ]
    return "\n".join(lines)


def _mesh_text(plan: aot.Plan) -> str:
    return " ".join(f"{name}={n}" for name, n in plan.mesh.shape.items() if n > 1) or "of one"


def candidates(config: ConfigDict, n: int) -> Iterator[ConfigDict]:
    """Configurations with other meshes over n devices and other remat policies.

    Of a mesh, what takes the least memory comes first.
    """
    parts = (1, 2, 4, 8)
    shapes = [{"data": data} for data in sorted({*parts, n})]
    shapes += [{axis: part} for axis in ("context", "tensor") for part in parts[1:]]
    for shape in shapes:
        fsdp, rest = divmod(n, math.prod(shape.values()))
        if rest or not fsdp:
            continue
        for remat in reversed(REMAT_POLICIES):
            candidate = config.copy_and_resolve_references()
            candidate.mesh.update({**dict.fromkeys(mesh_lib.AXES, 1), "fsdp": fsdp, **shape})
            candidate.dit.remat = remat
            yield candidate


def sweep(config: ConfigDict, where: chips.Slice) -> str:
    """A table of the candidates that fit, the fastest first."""
    fitting, too_large = [], set()
    for candidate in candidates(config, len(where.devices)):
        mesh = tuple(candidate.mesh.items())
        if mesh in too_large:
            continue
        try:
            plan = aot.make(candidate, where)
        except ValueError as error:
            print(f"left out: {error}", file=sys.stderr)
            too_large.add(mesh)
            continue
        verdict = f"{1e3 * plan.seconds:.1f} ms" if plan.fits else "does not fit"
        print(f"{_mesh_text(plan)}, remat {plan.remat}: {verdict}", file=sys.stderr, flush=True)
        if plan.fits:
            fitting.append(plan)
        else:
            too_large.add(mesh)
    lines = [
        "| mesh | remat | memory, GiB | compute, ms | memory, ms | network, ms | MFU at most |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for plan in sorted(fitting, key=lambda plan: plan.seconds):
        bounds = (plan.compute_seconds, plan.memory_seconds, plan.network_seconds)
        times = " | ".join(f"{1e3 * seconds:.1f}" for seconds in bounds)
        lines.append(
            f"| {_mesh_text(plan)} | {plan.remat} | {plan.total_bytes / 2**30:.1f} | {times} "
            f"| {plan.mfu_bound:.1%} |"
        )
    return "\n".join(lines if fitting else ["Nothing fits."])


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__, prog="python -m opensora_jax.plan")
    add = parser.add_argument
    add("--topology", required=True, help="the slice: v5e:4x4, v5p:4x4x8, v6e:16x16, ...")
    add("--sweep", action="store_true", help="try mesh shapes and remat policies; minutes each")
    add("--sample", action="store_true", help="whether sampling fits, without a training")
    args, config = cli.parse_with_config(parser, argv)
    jax.config.update("jax_platforms", "cpu")  # to plan takes no accelerator, and leaves them alone
    where = chips.tpu_slice(args.topology)
    if args.sample:
        print(sampling_report(aot.make_sampling(config, where)))
    else:
        print(sweep(config, where) if args.sweep else report(aot.make(config, where)))


if __name__ == "__main__":
    cli.run(main)
