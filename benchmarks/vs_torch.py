"""Our train step of the DiT beside one in plain good PyTorch, at the same sizes and batch.

    pip install torch
    python benchmarks/vs_torch.py                              # DiT-S/2 on a CPU
    python benchmarks/vs_torch.py --size XL --cases 1024x32 4096x8 16384x2 --rounds 1   # on a GPU

Ours, PyTorch as it is and PyTorch under torch.compile run in a process each and are timed by turns,
with `--rounds 1` one after the other, each with the whole memory. The ratio is of our speed to that
of the faster PyTorch, median over rounds: above 1, ours is faster. On CPUs all compute in float32,
on GPUs in bfloat16.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for configs

# Tokens of an example -> video resolution and latent frames; a token is 4 x 8 x 8 pixels.
GRIDS = {256: (64, 4), 1024: (128, 4), 4096: (128, 16), 16384: (256, 16)}

Run = Callable[[int], list[float]]  # number of steps -> seconds of each


def configuration(args: argparse.Namespace, case: str):
    from configs import default

    tokens, batch_size = map(int, case.split("x"))
    if tokens not in GRIDS:
        raise SystemExit(f"error: --cases {case}: expected tokens of {', '.join(map(str, GRIDS))}")
    c = default.get_config()
    c.stages = ("dit",)
    c.dit.size, c.dit.batch_size = args.size, batch_size
    c.dit.remat, c.dit.unroll = args.remat, args.unroll
    c.preprocess.resolution, c.dit.n_latent_frames = GRIDS[tokens]
    return c


def ours(config) -> tuple[dict, Run]:
    from opensora_jax import bench

    timed = bench.Bench(config)
    first = timed.measure(1)
    facts = ("device_kind", "n_parameters", "flops", "peak_bytes", "compile_seconds")
    return {name: getattr(first, name) for name in facts}, timed.run


def pytorch(config, compiled: bool) -> tuple[dict, Run]:
    import torch
    from torch_dit import Training

    from opensora_jax import mesh
    from opensora_jax.planning import synthetic

    training = synthetic.training(config)
    names = ("depth", "width", "heads", "channels", "patch", "text_width")
    sizes = {name: getattr(training.task.config, name) for name in names}
    step = Training(
        sizes | {"grid": synthetic.latent_grid(config)},
        training.task.latents.table,
        synthetic.batch(config, mesh.make_mesh(config.mesh)),
        compiled=compiled,
    )
    is_gpu = step.device.type == "cuda"

    def run(steps: int) -> list[float]:
        if not is_gpu:
            marks = [time.perf_counter(), *((step(), time.perf_counter())[1] for _ in range(steps))]
            return [b - a for a, b in itertools.pairwise(marks)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        events[0].record()
        for event in events[1:]:
            step()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]

    start = time.perf_counter()
    run(1)
    compile_seconds = time.perf_counter() - start
    run(2)
    return {
        "device_kind": torch.cuda.get_device_name() if is_gpu else "cpu",
        "n_parameters": sum(p.numel() for p in step.parameters),
        "flops": training.throughput.flops_per_step,
        "peak_bytes": torch.cuda.max_memory_allocated() if is_gpu else None,
        "compile_seconds": compile_seconds,
    }, run


KINDS = {
    "ours": ours,
    "PyTorch": lambda config: pytorch(config, compiled=False),
    "PyTorch, compiled": lambda config: pytorch(config, compiled=True),
}


def work(args: argparse.Namespace) -> None:
    """A process of one kind: prints its facts, then seconds for each number of steps it reads."""
    if args.worker == "ours":
        from opensora_jax import process

        process.use_huge_pages()  # as main does
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    facts, run = KINDS[args.worker](configuration(args, args.cases[0]))
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        run(1)  # while another had its turn this one's memory went cold
        print(json.dumps(run(int(line))), file=answers, flush=True)


class Worker:
    """A process that runs `work`; `facts` is None where it could not start."""

    def __init__(self, kind: str, case: str):
        self._process = subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--worker", kind, "--cases", case],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        answer = self._process.stdout.readline()
        self.facts = json.loads(answer) if answer else None
        self.rounds: list[list[float]] = []  # seconds of each step

    def run(self, steps: int) -> None:
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        self.rounds.append(json.loads(self._process.stdout.readline()))

    @property
    def seconds(self) -> float:
        """The median step."""
        return statistics.median(itertools.chain(*self.rounds))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def compare(args: argparse.Namespace, case: str) -> None:
    workers: dict[str, Worker] = {}
    for _ in range(args.rounds):
        for kind in KINDS:
            if kind not in workers:
                workers[kind] = Worker(kind, case)
                if workers[kind].facts is None:
                    print(f"{kind}: does not work here, see above", file=sys.stderr)
            if workers[kind].facts is not None:
                workers[kind].run(args.steps)
            if args.rounds == 1:
                workers[kind].close()
    for worker in workers.values():
        worker.close()
    report(args, case, {k: w for k, w in workers.items() if w.facts is not None})


def report(args: argparse.Namespace, case: str, workers: dict[str, Worker]) -> None:
    from opensora_jax import hardware

    sizes = {worker.facts["n_parameters"] for worker in workers.values()}
    if len(sizes) > 1:
        raise SystemExit(f"error: models of different sizes, {sizes} parameters")
    device = workers["ours"].facts["device_kind"]
    tokens, batch_size = map(int, case.split("x"))
    print(f"\nDiT-{args.size}/2, {sizes.pop() / 1e6:.1f} M parameters, {device}:")
    print(f"{batch_size} examples of {tokens} tokens, {args.rounds} x {args.steps} steps each\n")
    print("| | ms/step | tokens/s | TFLOP/s | MFU | peak memory | compile |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    peak = hardware.peak_flops(device)
    for kind, worker in workers.items():
        facts, seconds = worker.facts, worker.seconds
        flops, memory = facts["flops"] / seconds, facts["peak_bytes"]
        cells = (
            kind,
            f"{1e3 * seconds:.1f}",
            f"{batch_size * tokens / seconds:,.0f}",
            f"{flops / 1e12:.3g}",
            f"{flops / peak:.1%}" if peak else "-",
            f"{memory / 2**30:.2f} GiB" if memory else "-",
            f"{facts['compile_seconds']:.1f} s",
        )
        print(f"| {' | '.join(cells)} |")
    mine = workers.pop("ours")
    if workers:
        theirs = min(workers.values(), key=lambda worker: worker.seconds)
        # Of each round, as the machine may have other work at one time than at another.
        ratios = sorted(
            statistics.median(b) / statistics.median(a)
            for a, b in zip(mine.rounds, theirs.rounds, strict=True)
        )
        print(
            f"\nratio: {statistics.median(ratios):.2f}, of {len(ratios)} rounds from "
            f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="S", choices=("S", "B", "L", "XL"))
    parser.add_argument(
        "--cases", nargs="+", default=["256x8", "1024x2"], help="tokens x batch size, one or more"
    )
    parser.add_argument("--steps", type=int, default=3, help="steps a round")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--remat", default="none", help="config.dit.remat of ours")
    parser.add_argument("--unroll", type=int, default=12, help="config.dit.unroll of ours")
    parser.add_argument("--worker", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
    else:
        for case in args.cases:
            compare(args, case)


if __name__ == "__main__":
    main()
