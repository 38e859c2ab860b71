"""Known frames on moving shapes: whether they stay, and what is drawn around them.

    python benchmarks/frames.py --quickstart=runs/quickstart --workdir=runs/frames

Trains the quickstart's DiT with dit.conditioning=frames on the dataset of a finished quickstart,
where it is not trained yet, and grades what it draws around frames of videos that it never saw,
told the caption of each. Prints a table: PSNR of the kept frames, in the sample and in the
tokenizer's own reconstruction of the video, whole; the shares of the samples in which the caption's
direction, color and shape are read, and of longer videos color and shape of the last eight frames
that were drawn. Videos that go on are cut from some as long as the result, at a half or a third of
the speed, or the shapes would have nowhere to go. The standard error of a share p of n samples is
sqrt(p (1 - p) / n).
"""

import argparse
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in the place of this folder, which has a tokenizers.py

from configs.quickstart import get_config  # noqa: E402
from opensora_jax import mesh as mesh_lib  # noqa: E402
from opensora_jax import runtime  # noqa: E402
from opensora_jax.data import moving_shapes, video_io  # noqa: E402
from opensora_jax.diffusion.samplers import Sampling  # noqa: E402
from opensora_jax.inference.frames import Canvas, Given  # noqa: E402
from opensora_jax.inference.generator import Generator  # noqa: E402
from opensora_jax.inference.tokenizer import decode, load_tokenizer  # noqa: E402
from opensora_jax.metrics import shapes  # noqa: E402
from opensora_jax.stages import shapes as shapes_stage  # noqa: E402

# Of the table's rows: what is kept, of a video or an image, and frames of the whole video.
ROWS = (
    (None, False, 8),
    (("first", 1), True, 8),
    (("first", 1), False, 8),
    (("first", 2), False, 8),
    (("last", 1), False, 8),
    (("ends", 1), False, 8),
    (("every", 2), False, 8),
    (None, False, 16),
    (("first", 4), False, 16),
    (("last", 4), False, 16),
    (("first", 4), False, 24),
)
SEEN_AT_ONCE = 8  # frames, by which what a longer video shows is read
SCALE, GAP = 2, 3  # of the strips: pixels a pixel, and between frames


def train(quickstart: Path, workdir: Path, steps: int) -> None:
    """By the command that users have; where it is done it says so."""
    command = [sys.executable, "-m", "opensora_jax.main", "--config=configs/quickstart.py"]
    command += [f"--workdir={workdir}", "--config.stages=('dit',)"]
    command += [f"--config.data.dataset={quickstart / 'dataset'}", f"--config.dit.steps={steps}"]
    command += ["--config.dit.conditioning=frames"]
    subprocess.run(command, cwd=ROOT, check=True)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Of all together, dB."""
    return 10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2))


def newest(videos: np.ndarray, kept_T: np.ndarray) -> np.ndarray:
    """The last frames that were drawn, as many as are read at once."""
    backward = kept_T[-1] and not kept_T[0]
    return videos[:, :SEEN_AT_ONCE] if backward else videos[:, -SEEN_AT_ONCE:]


def strip(video_THWC: np.ndarray, kept_T: np.ndarray) -> np.ndarray:
    """The frames beside each other, those that are kept on black."""
    big = video_THWC.repeat(SCALE, axis=1).repeat(SCALE, axis=2)
    tiles = []
    for frame, is_kept in zip(big, kept_T, strict=True):
        tile = np.full((frame.shape[0] + 2 * GAP, frame.shape[1] + 2 * GAP, 3), 255, np.uint8)
        tile[:] = 0 if is_kept else 255
        tile[GAP:-GAP, GAP:-GAP] = frame
        tiles.append(tile)
    return np.concatenate(tiles, axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quickstart", type=Path, required=True, help="a finished one's workdir")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000, help="of the training")
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--strips", type=Path, help="a .png of one sample a row")
    args = parser.parse_args()
    quickstart = args.quickstart.resolve()
    train(quickstart, args.workdir.resolve(), args.steps)

    runtime.start()
    mesh = mesh_lib.make_mesh(dict.fromkeys(mesh_lib.AXES, 1) | {"data": -1})
    generator = Generator.load(args.workdir / "dit", mesh)
    how = {"params": generator.restore(args.workdir / "dit"), "batch_size": args.samples}
    how |= {"sampling": Sampling(30, args.guidance), "seed": 1}
    paths, labels = shapes_stage.labelled_videos(get_config(), quickstart, "held_out")
    paths, labels = paths[: args.samples], labels[: args.samples]
    real = np.stack([video_io.read_video(path) for path in paths])
    prompts = [moving_shapes.captions(*label)[0] for label in labels]
    tokenizer = load_tokenizer(quickstart / "vqvae")

    def rendered(n_frames: int) -> np.ndarray:
        rngs = [np.random.default_rng([1, i]) for i in range(len(labels))]
        return np.stack(
            [
                moving_shapes.render(rng, *label, n_frames, 32)
                for rng, label in zip(rngs, labels, strict=True)
            ]
        )

    def own(videos: np.ndarray) -> np.ndarray:
        return decode(tokenizer, generator.encode(videos))

    print("| kept | frames | PSNR | tokenizer's own | direction | color | shape | all |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    strips = []
    for kept, is_image, n_frames in ROWS:
        canvas = Canvas(generator, n_frames)
        there = real
        if n_frames > 8 and kept is not None:
            longer = rendered(n_frames)
            there = longer[:, -8:] if kept[0] == "last" else longer[:, :8]
        if kept is not None:
            canvas.keep(Given("", there[:, :1] if is_image else there, *kept, is_image=is_image))
        videos = canvas.draw(prompts, **how)
        kept_T = canvas.kept
        cells = ["", ""]
        if kept is not None:
            place = slice(-8, None) if kept[0] == "last" else slice(8)
            mask = kept_T[place]
            cells = [
                f"{psnr(found[:, mask], there[:, :8][:, mask]):.2f} dB"
                for found in (videos[:, place], own(there[:, :8]))
            ]
        if n_frames > SEEN_AT_ONCE:
            found = np.array([shapes.look(video) for video in newest(videos, kept_T)], object)
            right = found == np.array(labels, object)[:, :2]
            shares = ["", *(f"{x:.1%}" for x in (*right.mean(axis=0), right.all(axis=1).mean()))]
        else:
            score = shapes.score(videos, labels)
            shares = [f"{score[name]:.1%}" for name in ("direction", "color", "shape", "all")]
        what = "nothing"
        if kept is not None:
            what = f"{'image' if is_image else 'video'}, {kept[0]}:{kept[1]}"
        print(f"| {what} | {n_frames} | {' | '.join([*cells, *shares])} |", flush=True)
        strips.append(strip(videos[13 * len(strips) % len(videos)], kept_T))
    if args.strips:
        width = max(row.shape[1] for row in strips)
        rows = [
            np.pad(row, ((0, 2 * GAP), (0, width - row.shape[1]), (0, 0)), constant_values=255)
            for row in strips
        ]
        iio.imwrite(args.strips, np.concatenate(rows))


if __name__ == "__main__":
    main()
