"""Tokenizers trained alike, compared: VideoGPT's with a codebook and with FSQ, and Cosmos's.

    python benchmarks/tokenizers.py --workdir=runs/tokenizers [--videos=FOLDER] [--seconds=120]

All have the same codes per second of video and are trained equally long, after their compilation: a
few steps tell how many fit into the seconds. On moving shapes, unseen ones are reconstructed; of
`--videos`, which are few, the training videos themselves, so that nothing is said of others. Run
nothing else meanwhile. Prints a table, and writes it to WORKDIR/tokenizers.json.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in the place of this folder, which has a tokenizers.py

from configs import quickstart  # noqa: E402
from opensora_jax import files  # noqa: E402
from opensora_jax.build import networks  # noqa: E402
from opensora_jax.stages import vqvae  # noqa: E402

# Fields of config.vqvae, beside the quickstart's.
KINDS = {
    "videogpt, vq": {"n_codes": 1000, "embedding_dim": 4},
    "videogpt, fsq": {"quantizer": "fsq", "levels": (8, 5, 5, 5)},
    "cosmos, fsq": {
        "architecture": "cosmos",
        "quantizer": "fsq",
        "levels": (8, 5, 5, 5),
        "multipliers": (1, 2),
        "n_res_layers": 1,
        "learning_rate": 1e-3,  # of 4e-3 it learns nothing
    },
}
DATA = {
    "shapes": {"downsample": (2, 2, 2), "n_frames": 8, "resolution": 32, "patch": 2},
    "videos": {"downsample": (4, 8, 8), "n_frames": 16, "resolution": 64, "patch": 4},
}
# Steps that tell how long a step takes, from their second half.
PROBE = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--videos", type=Path, help="folder of videos to train on as well")
    parser.add_argument("--seconds", type=float, default=120, help="of each training")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), help="some of the kinds")
    args = parser.parse_args()
    work, found = args.workdir.resolve(), []
    run(work / "shapes", {}, "shapes", "shapes.n_frames=9", "shapes.n_held_out=120")
    for data in ("shapes", "videos") if args.videos else ("shapes",):
        for kind in args.kinds:
            fields = DATA[data] | KINDS[kind]
            if fields.get("architecture") == "cosmos":
                fields["n_frames"] += 1
            folder = work / f"{data}-{kind.replace(', ', '-')}"
            folder.mkdir(parents=True, exist_ok=True)
            if data == "videos":
                source = [f"data.videos={args.videos.resolve()}"]
            else:
                source = ["shapes.n_frames=9", "shapes.n_held_out=120"]
                link = folder / "shapes"
                if not link.exists():
                    link.symlink_to(work / "shapes" / "shapes")
            probe = folder / "probe"
            probe.mkdir(exist_ok=True)
            if data == "shapes" and not (probe / "shapes").exists():
                (probe / "shapes").symlink_to(work / "shapes" / "shapes")
            run(probe, fields | {"steps": PROBE, "log_every": PROBE // 2}, "vqvae", *source)
            lines = (probe / "vqvae" / "metrics.jsonl").read_text().splitlines()
            rates = [x["tokens_per_second"] for x in map(json.loads, lines) if "loss" in x]
            config = quickstart.get_config().vqvae
            config.update(fields)
            n_tokens = vqvae.tokens(config)
            steps = max(round(rates[-1] * args.seconds / n_tokens), 2 * PROBE)
            start = time.perf_counter()
            run(folder, fields | {"steps": steps}, "vqvae", *source)
            seconds = time.perf_counter() - start
            result = files.read_json(folder / "vqvae" / "reconstruction.json")
            n_codes = networks.vqvae_config(config).n_codes
            found.append(
                {"data": data, "kind": kind, "steps": steps, "seconds": round(seconds)}
                | {"bits_per_pixel": math.log2(n_codes) / math.prod(config.downsample)}
                | {name: x for name, x in result.items() if name not in ("step", "videos")}
            )
            report(found[-1])
    files.write_json(work / "tokenizers.json", {"found": found})
    print()
    for row in found:
        report(row)


def run(workdir: Path, fields: dict, stage: str, *more: str) -> None:
    """One stage of the quickstart with other fields of config.vqvae."""
    chosen = {"eval_every": 100_000, "checkpoint_every": 100_000, **fields} if fields else {}
    words = [f"vqvae.{name}={value}" for name, value in chosen.items()]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "opensora_jax.main", "--config=configs/quickstart.py"),
            *(f"--workdir={workdir}", f"--config.stages=('{stage}',)"),
            *(f"--config.{word}" for word in (*words, *more)),
        ],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{workdir}: {done.stderr.strip().splitlines()[-1]}")


def report(row: dict) -> None:
    print(
        "{data:7} {kind:14} {psnr:5.2f} dB, SSIM {ssim:.3f}, {codes_used:4} codes used, perplexity "
        "{perplexity:4.0f}, {bits_per_pixel:.3f} bits a pixel, {steps} steps in {seconds} s".format(
            **row
        ),
        f"outline {row['outline_mean']:.3f}, worst tenth {row['outline_worst_tenth']:.3f}"
        if "outline_mean" in row
        else "",
        flush=True,
    )


if __name__ == "__main__":
    main()
