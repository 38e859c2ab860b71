"""What a DiT on codes of 256 dimensions learns, by what it predicts, of what, and at which noise.

    python benchmarks/auto_objective.py --workdir=runs/auto_objective --steps=500

The quickstart's moving shapes by a tokenizer of stride 2 x 4 x 4 whose codes have 256 dimensions,
and its DiT, of width 128, in patches of 2 x 2: 1,024 numbers a token as they are. Each choice is
trained for as many steps, and its samples are read from their pixels. Run again, it goes on.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

TOKENIZER = ("vqvae.embedding_dim=256", "vqvae.downsample=(2,4,4)")
SHARED = ("shapes", "vqvae", "dataset", "text_model")
# components, prediction, time_shift
CHOICES = [
    ("0", "velocity", "1.0"),
    ("0", "auto", "1.53"),
    ("auto", "velocity", "1.0"),
    ("auto", "velocity", "4.0"),
    ("auto", "velocity", "8.0"),
    ("auto", "data", "4.0"),
    ("auto", "data", "8.0"),
    ("auto", "auto", "auto"),
]


def run(workdir: Path, stages: tuple[str, ...], fields: list[str]) -> None:
    subprocess.run(
        [
            *(sys.executable, "-m", "opensora_jax.main", "--config=configs/quickstart.py"),
            *(f"--workdir={workdir}", f"--config.stages={stages!r}"),
            *(f"--config.{field}" for field in (*TOKENIZER, *fields)),
        ],
        cwd=ROOT,
        check=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    args = parser.parse_args()
    shared = args.workdir.resolve() / "shared"
    run(shared, ("shapes", "vqvae", "preprocess"), [])
    rows = []
    for components, prediction, shift in CHOICES:
        workdir = shared.with_name(f"{components}-{prediction}-{shift}-{args.steps}")
        workdir.mkdir(exist_ok=True)
        for part in SHARED:
            if not (workdir / part).exists():
                (workdir / part).symlink_to(shared / part)
        choice = [f"dit.components={components}", f"dit.prediction={prediction}"]
        every = [f"dit.{n}={args.steps}" for n in ("steps", "eval_every", "checkpoint_every")]
        more = ["dit.patch=2", "fidelity.n_samples=60", "sample.prompts=('a red circle moves up',)"]
        run(workdir, ("dit", "fidelity"), [*choice, f"dit.time_shift={shift}", *every, *more])
        lines = (workdir / "dit" / "metrics.jsonl").read_text().splitlines()
        losses = [line for line in map(json.loads, lines) if "validation_loss" in line][-1]
        seen = json.loads((workdir / "fidelity.json").read_text())["seen"]
        rows.append((components, prediction, shift, losses, seen))
    levels = [name for name in rows[0][3] if name.startswith("validation_loss/")]
    names = [level.partition("/")[2] for level in levels]
    print(f"| components | prediction | shift | {' | '.join(names)} | color | direction | all |")
    print("| --- | --- | ---: |" + " ---: |" * (len(levels) + 3))
    for *choice, losses, seen in rows:
        cells = [f"{losses[level]:.2f}" for level in levels]
        cells += [f"{seen[what]:.0%}" for what in ("color", "direction", "all")]
        print(f"| {' | '.join([*choice, *cells])} |")


if __name__ == "__main__":
    main()
