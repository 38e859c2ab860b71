"""One page that shows what is in a dataset, as a model that is trained on it will see it.

    python -m opensora_jax.inspect_data runs/quickstart/dataset

Counts, what was left out and why, lengths, motion, words of captions, use of the codebook, videos
decoded from their codes, and those that are alike side by side. It needs nothing beside it.
"""

from opensora_jax import process

if __name__ == "__main__":
    process.start()  # before the imports, which take seconds

import base64
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tqdm
from etils import epath

from opensora_jax import cli, files, runtime
from opensora_jax.data import dataset as dataset_lib
from opensora_jax.data import survey as survey_lib
from opensora_jax.data import video_io
from opensora_jax.data.parts import CODES
from opensora_jax.inference.tokenizer import decode, fingerprint, load_tokenizer
from opensora_jax.models.tokenizer import Tokenizer
from opensora_jax.report import dataset_page

_LONGEST = 4  # windows of a video on the page


def inspect(
    folder: epath.PathLike,
    output: epath.PathLike,
    *,
    vqvae: epath.PathLike | None = None,
    n_videos: int = 1000,
    n_examples: int = 12,
) -> None:
    """Writes the page.

    Args:
      folder: of a dataset.
      output: the file to write.
      vqvae: the tokenizer, where it is no longer where the dataset says.
      n_videos: how many are looked at, at most.
      n_examples: how many are shown, at most.

    Raises:
      DatasetError: no dataset, or a damaged one.
      ValueError, FileNotFoundError: the tokenizer is not there, or another one.
    """
    dataset = dataset_lib.open_dataset(folder)
    model = load_tokenizer(vqvae or dataset.metadata["vqvae"])
    known = dataset.metadata.get("vqvae_fingerprint")
    if known is not None and known != fingerprint(model):
        raise ValueError(
            f"{vqvae or dataset.metadata['vqvae']}: fingerprint {fingerprint(model)}: expected "
            f"{files.short(known)}, the tokenizer that {folder} was encoded by"
        )
    found = survey_lib.survey(dataset, n_videos)
    spread = np.linspace(0, len(found.rows) - 1, n_examples).round().astype(int)
    chosen = [int(row) for row in found.rows[np.unique(spread)]]
    rows = dict.fromkeys([*chosen, *(row for pair in found.alike for row in pair[:2])])
    shown = {row: _example(dataset, model, row) for row in tqdm.tqdm(rows, unit="video")}
    dataset_page.write(
        output,
        dataset,
        found,
        [shown[row] for row in chosen],
        [(shown[i], shown[j], share) for i, j, share in found.alike],
    )


def _example(
    dataset: dataset_lib.LatentDataset, model: Tokenizer, row: int
) -> dataset_page.Example:
    codes_THW = dataset[row][CODES][: _LONGEST * dataset.window_latents]
    metadata = dataset.metadata
    window, tile = metadata.get("window"), metadata.get("tile")
    (video_THWC,) = decode(model, codes_THW[None].astype(np.int32), window, tile)
    named = {
        name: str(dataset.column(row, name)) if dataset.has_column(name) else ""
        for name in ("caption", "video_file")
    }
    with tempfile.TemporaryDirectory() as made:
        path = Path(made) / "video.mp4"
        video_io.write_video(path, video_THWC, metadata["fps"])
        data = base64.b64encode(path.read_bytes()).decode()
    file = named["video_file"]
    if dataset.has_column("start"):
        file = f"{file} at {dataset.column(row, 'start'):.3f} s"
    return dataset_page.Example(data, named["caption"], file)


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__, prog="python -m opensora_jax.inspect_data")
    parser.add_argument("dataset", help="folder of a dataset")
    parser.add_argument("--output", help="the page to write; without it DATASET.html")
    parser.add_argument("--vqvae", help="the tokenizer, where it is no longer where it was")
    parser.add_argument("--videos", type=cli.number(int, 1), default=1000, help="to look at")
    parser.add_argument("--examples", type=cli.number(int, 1), default=12, help="to show")
    args = parser.parse_args(argv)
    runtime.start()
    output = epath.Path(args.output or f"{args.dataset.rstrip('/')}.html")
    inspect(
        args.dataset,
        output,
        vqvae=args.vqvae,
        n_videos=args.videos,
        n_examples=args.examples,
    )
    print(f"inspect_data: {output}")


if __name__ == "__main__":
    cli.run(main)
