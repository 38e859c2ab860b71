"""What is counted over the parts of a dataset when it is finished: codes, sizes, where rows lie."""

import dataclasses

import numpy as np
from etils import epath

from opensora_jax import files
from opensora_jax.data import index, parts
from opensora_jax.data.dataset import FILES
from opensora_jax.data.index import Index, smallest
from opensora_jax.data.parts import CODES, ROWS, TEXT, TEXTS, VIDEOS, count_codes


@dataclasses.dataclass
class Counts:
    """Attributes:
    code_counts: (n_codes,), how often each occurs in the part.
    shapes: (videos, 3), of their codes; fps and hashes: (videos,), of their names.
    lengths: (texts,), valid tokens.
    text_width: 0 where there are none.
    row_video, row_text: (rows,), the numbers as they are stored.
    """

    code_counts: np.ndarray
    shapes: np.ndarray
    fps: np.ndarray
    hashes: np.ndarray
    lengths: np.ndarray
    text_width: int
    row_video: np.ndarray
    row_text: np.ndarray


def count_part(part: epath.PathLike, record: dict, n_codes: int) -> Counts:
    """Reads a part of which `record` says `rows`, `videos`, `texts`, `flat` and `files`.

    Raises:
      DatasetError: it is damaged.
    """
    found = Counts(
        *(np.zeros(n_codes, np.int64), np.zeros((0, 3), np.int64), np.zeros(0, np.float32)),
        *(np.zeros(0, np.uint64), np.zeros(0, np.int64), 0),
        *(np.zeros(0, np.int64), np.zeros(0, np.int64)),
    )
    if not (record["rows"] or record["texts"]):
        return found
    with files.nearby(part) as near:
        if record["flat"]:
            table = parts.open_table(near, columns=(CODES, TEXT), sums=record[FILES])
            for batch in table:
                _count_videos(found, batch)
                _count_texts(found, batch)
            found.row_video = found.row_text = np.arange(record["rows"])
            return found

        def table(name, *columns):
            sums = parts.below(record[FILES], name)
            return parts.open_table(near / name, columns=columns, sums=sums)

        for batch in table(TEXTS, TEXT) if record["texts"] else ():
            _count_texts(found, batch)
        if record["rows"]:
            for batch in table(VIDEOS, CODES):
                _count_videos(found, batch)
            rows = [batch.table for batch in table(ROWS)]
            for name in ("video", "text"):
                column = np.concatenate([batch.column(name).to_numpy() for batch in rows])
                setattr(found, f"row_{name}", column)
    return found


def _count_videos(found: Counts, batch: parts.Batch) -> None:
    names = batch.table.column("video_file").to_pylist()
    found.code_counts += count_codes(batch, len(found.code_counts))
    found.shapes = np.concatenate([found.shapes, batch.codes.shapes])
    found.fps = np.concatenate([found.fps, batch.table.column("fps").to_numpy()])
    hashes = np.array([index.hash_of(name) for name in names], np.uint64)
    found.hashes = np.concatenate([found.hashes, hashes])


def _count_texts(found: Counts, batch: parts.Batch) -> None:
    found.lengths = np.concatenate([found.lengths, batch.text.shapes[:, 0]])
    found.text_width = int(batch.text.shapes[0, 1])


class Total:
    """What is gathered over the parts, in their order."""

    def __init__(self, n_codes: int):
        self.code_counts = np.zeros(n_codes, np.int64)
        self.n_rows, self.n_videos, self.n_texts, self.text_width = 0, 0, 0, 0
        self.shapes, self.fps, self.hashes = [], [], []  # of videos
        self.lengths = []  # of texts
        self._row_video, self._row_text = [], []

    def add(self, record: dict, found: Counts) -> None:
        self._row_video.append(self.n_videos + found.row_video)
        self._row_text.append(found.row_text + (self.n_texts if record["flat"] else 0))
        self.code_counts += found.code_counts
        self.n_videos += len(found.shapes)
        self.n_texts += len(found.lengths)
        self.n_rows += len(found.row_video)
        self.text_width = found.text_width or self.text_width
        self.shapes.append(found.shapes)
        self.fps.append(found.fps)
        self.hashes.append(found.hashes)
        self.lengths.append(found.lengths)

    def index(self, records: list[dict]) -> Index:
        return Index(
            row_video=smallest(np.concatenate(self._row_video)),
            row_text=smallest(np.concatenate(self._row_text)),
            video_frames=smallest(np.concatenate(self.shapes)[:, 0]),
            text_lengths=smallest(np.concatenate(self.lengths)),
            video_ends=np.cumsum([record["videos"] for record in records]),
            text_ends=np.cumsum([record["texts"] for record in records]),
            video_hashes=np.concatenate(self.hashes),
        )
