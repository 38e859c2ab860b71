"""The rows of a dataset as one Hugging Face dataset, for those who read it with `datasets`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from opensora_jax import files
from opensora_jax.data import parts
from opensora_jax.data.dataset import complete_metadata
from opensora_jax.data.parts import CODES, ROWS, TEXT, TEXTS, VIDEOS

if TYPE_CHECKING:
    import datasets


def load_joined(folder: str | os.PathLike) -> "datasets.Dataset":
    """A row a caption: video_file, video_latent_states (T, H, W), fps, caption,
    text_latent_states (S, D) and of clips start, as numpy arrays and Python values.

    What a row needs of the tables of videos and of texts is looked up when it is asked for: codes
    are neither copied nor stored for each caption. `column_names` are those of the table of rows,
    `video` and `text`: the numbers of both.

    Raises:
      DatasetError: not a finished dataset.
    """
    import datasets
    import numpy as np

    folder = files.fetch(folder, "metadata.json")
    complete_metadata(folder)
    tables = {VIDEOS: [], TEXTS: [], ROWS: []}
    n_videos = 0
    for part in parts.find(Path(folder)):
        if (part / "state.json").exists():  # flat
            tables[ROWS].append(datasets.load_from_disk(part))
            continue
        if (part / TEXTS).exists():
            tables[TEXTS].append(datasets.load_from_disk(part / TEXTS))
        if not (part / VIDEOS).exists():
            continue
        videos = datasets.load_from_disk(part / VIDEOS)
        rows = datasets.load_from_disk(part / ROWS).data.table
        video = rows.column("video").to_numpy().astype(np.int64) + n_videos
        tables[ROWS].append(
            datasets.Dataset.from_dict({"video": video, "text": rows.column("text").to_numpy()})
        )
        tables[VIDEOS].append(videos)
        n_videos += len(videos)
    rows = datasets.concatenate_datasets(tables[ROWS])
    if not tables[VIDEOS]:
        return rows.with_format("numpy")
    videos, texts = (
        datasets.concatenate_datasets(tables[name]).with_format("numpy") for name in (VIDEOS, TEXTS)
    )

    def join(batch):
        video, text = videos[list(batch["video"])], texts[list(batch["text"])]
        return {**video, **text, CODES: list(video[CODES]), TEXT: list(text[TEXT])}

    return rows.with_transform(join)
