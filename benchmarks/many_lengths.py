"""The whole way of MSR-VTT on a set of its shape whose content is known, graded from pixels.

    python benchmarks/many_lengths.py --workdir=runs/many_lengths

Makes 300 videos of 2 to 40 seconds at 15, 24 and 30 frames a second, 64 x 64, of 20 captions each,
in the layout of MSR-VTT's archive. In each a colored shape moves one way; every 2 seconds it begins
anew, elsewhere and in another size. Then the README's commands: collate, a VQ-VAE, preprocess, a
DiT, sample, all by their defaults but for sizes and the length of the training. `metrics.shapes`
reads the samples. `--repository` takes the commands of another checkout; run again, it goes on.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in the place of this folder, which has a tokenizers.py

from opensora_jax import files  # noqa: E402
from opensora_jax.data import moving_shapes, video_io  # noqa: E402
from opensora_jax.inference.small_text_model import make_small_text_model  # noqa: E402
from opensora_jax.metrics import shapes  # noqa: E402

RATES = (15, 24, 30)
SCENE_SECONDS = 2
SPLITS = {"train": 270, "val": 15, "test": 15}

VQVAE = """
    vqvae.resolution=64 vqvae.n_hiddens=32 vqvae.n_res_layers=1 vqvae.batch_size=8
    vqvae.learning_rate=4e-3 vqvae.warmup_steps=50 vqvae.ema_decay=0.995
    vqvae.quantize_from=0.2 vqvae.quantize_to=0.4 vqvae.eval_every=350 vqvae.checkpoint_every=175
"""
DIT = """
    dit.size= dit.depth=6 dit.width=256 dit.heads=2 dit.patch=4 dit.remat=none dit.unroll=6
    dit.batch_size=32 dit.warmup_steps=100 dit.ema_decay=0.99
    dit.eval_every=1000 dit.checkpoint_every=250 dit.text_length=16
"""


def make_archive(folder: Path, seed: int = 0) -> None:
    """The set, in the files and folders of MSR-VTT's archive."""
    if (folder / "annotation" / "MSR_VTT.json").exists():
        return
    videos = folder / "videos" / "all"
    videos.mkdir(parents=True, exist_ok=True)
    annotations, names = [], []
    for i in tqdm.trange(sum(SPLITS.values()), desc="videos", unit="video"):
        name, combination = f"video{i}", moving_shapes.SEEN[i % len(moving_shapes.SEEN)]
        rng = np.random.default_rng([seed, i])
        fps, seconds = int(rng.choice(RATES)), rng.uniform(2, 40)
        n_scenes = int(np.ceil(seconds / SCENE_SECONDS))
        scene = (*combination, SCENE_SECONDS * fps, 64)
        frames = np.concatenate([moving_shapes.render(rng, *scene) for _ in range(n_scenes)])
        video_io.write_video(videos / f"{name}.mp4", frames[: round(seconds * fps)], fps)
        plain = moving_shapes.captions(*combination)
        annotations += [
            {"image_id": name, "caption": caption}
            for caption in [*plain, *(f"in this video {caption}" for caption in plain)]
        ]
        names.append(name)
    lists = folder / "structured-symlinks"
    lists.mkdir(exist_ok=True)
    start = 0
    for split, n in SPLITS.items():
        files.write_text(lists / f"{split}_list_full.txt", "\n".join(names[start : start + n]))
        start += n
    (folder / "annotation").mkdir(exist_ok=True)
    files.write_json(folder / "annotation" / "MSR_VTT.json", {"annotations": annotations})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--repository", type=Path, default=ROOT)
    parser.add_argument("--vqvae_steps", type=int, default=1000)
    parser.add_argument("--dit_steps", type=int, default=4500)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--n_samples", type=int, default=160)
    parser.add_argument("--fields", nargs="*", default=[], help="more fields of the DiT's config")
    args = parser.parse_args()
    work = args.workdir.resolve()
    archive, data = work / "MSRVTT", work / "msrvtt"
    make_archive(archive)
    train = data / "train"

    python_path = [str(args.repository.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]

    def run(*words: str | Path) -> None:
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=args.repository,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(python_path)},
            check=True,
        )
        print(f"{time.perf_counter() - start:7.0f} s  {words[0]} {words[1]}", flush=True)

    def fields(text: str) -> list[str]:
        return [f"--config.{field}" for field in text.split()]

    run("data_prep/collate_msrvtt.py", "-d", archive, "-o", data)
    entries = json.loads((train / "annotations.json").read_text())
    make_small_text_model(work / "text", [c for entry in entries for c in entry["captions"]])
    run(
        *("-m", "opensora_jax.main", "--config=configs/msrvtt_vqvae.py", f"--workdir={work}"),
        f"--config.data.videos={train / 'videos'}",
        f"--config.data.held_out_videos={data / 'test' / 'videos'}",
        *fields(f"{VQVAE} vqvae.steps={args.vqvae_steps}"),
    )
    run(
        *("data_prep/preprocess_data.py", "-c", train / "annotations.json"),
        *("-v", train / "videos", "-o", work / "dataset", "--resolution", 64),
        *("--vqvae", work / "vqvae", "--text_model", work / "text"),
    )
    training = f"{DIT} dit.steps={args.dit_steps} dit.learning_rate={args.learning_rate}"
    run(
        *("-m", "opensora_jax.main", "--config=configs/msrvtt.py", f"--workdir={work}"),
        f"--config.data.dataset={work / 'dataset'}",
        *fields(f"{training} {' '.join(args.fields)}"),
    )

    labels = [moving_shapes.SEEN[i % len(moving_shapes.SEEN)] for i in range(args.n_samples)]
    prompts = [moving_shapes.captions(*label)[i // 40 % 10] for i, label in enumerate(labels)]
    files.write_text(work / "prompts.txt", "\n".join(prompts))
    samples = work / "samples"
    samples.mkdir(exist_ok=True)
    run(
        *("-m", "opensora_jax.sample", f"--workdir={work}"),
        *(f"--prompts_file={work / 'prompts.txt'}", f"--output={samples / 'out.mp4'}"),
    )
    paths = sorted(samples.glob("out*.mp4"), key=lambda path: int(path.stem.split("-")[1]))
    result = shapes.score([video_io.read_video(path) for path in paths], labels)
    stored = sum(path.stat().st_size for path in (work / "dataset").rglob("*") if path.is_file())
    reconstruction = files.read_json(work / "vqvae" / "reconstruction.json")
    metadata = files.read_json(work / "dataset" / "metadata.json")
    print(f"VQ-VAE: {reconstruction['psnr']:.1f} dB; dataset: {stored / 1e6:.1f} MB, ", end="")
    print(f"{metadata['n_rows']} rows of {metadata['counts']}")
    print(f"{len(paths)} samples, read right: {json.dumps(result)}")


if __name__ == "__main__":
    main()
