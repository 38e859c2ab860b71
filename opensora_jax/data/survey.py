"""A look at a dataset as numbers: lengths, motion, words, and what is in it twice.

Lengths are of all rows; for the rest some videos, evenly spread, stand for all.
"""

import collections
import dataclasses
import re

import numpy as np

from opensora_jax.data.dataset import LatentDataset
from opensora_jax.data.parts import CODES

# Codes of a video by which it is compared with others.
_COMPARED = 128
_CHUNK = 64  # videos compared with all others at a time
_NUMBER = re.compile(r"\d+(\.\d+)?")
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")


@dataclasses.dataclass(frozen=True)
class Survey:
    """Attributes:
    rows: (videos looked at,), of each one of its rows.
    seconds: (all videos,), of each, at the dataset's median rate.
    tokens: (all texts,), of each caption.
    motion: (videos looked at with two latents or more,), share of codes that are others one latent
      frame later.
    captions: of the videos looked at, one each.
    words: how many of these captions hold a word, the most frequent first.
    alike: pairs of those rows whose videos have this share of their codes in common, (i, j, share),
      most alike first.
    n_alike: how many such pairs there are.
    same_names: how many videos have the name of one before them.
    """

    rows: np.ndarray
    seconds: np.ndarray
    tokens: np.ndarray
    motion: np.ndarray
    captions: list[str]
    words: list[tuple[str, int]]
    alike: list[tuple[int, int, float]]
    n_alike: int
    same_names: int


def survey(
    dataset: LatentDataset,
    n_videos: int = 1000,
    *,
    least_alike: float = 0.9,
    most_pairs: int = 12,
    most_words: int = 60,
) -> Survey:
    """Looks at a dataset.

    Args:
      n_videos: how many are looked at, at most.
      least_alike: share of codes in common from which on two videos are taken for one.
    """
    index = dataset.index
    _, first_rows = np.unique(index.row_video, return_index=True)
    chosen = np.unique(np.linspace(0, len(first_rows) - 1, n_videos).round().astype(int))
    rows = first_rows[chosen]
    motion, some_codes, captions = [], [], []
    has_captions = dataset.has_column("caption")
    for row in rows:
        codes_THW = dataset[int(row)][CODES]
        if len(codes_THW) > 1:
            motion.append(float((codes_THW[1:] != codes_THW[:-1]).mean()))
        flat = codes_THW.reshape(-1)
        some_codes.append(flat[np.linspace(0, len(flat) - 1, _COMPARED).round().astype(int)])
        if has_captions:
            captions.append(dataset.column(int(row), "caption"))
    words = collections.Counter(
        word for caption in captions for word in set(_WORD.findall(caption.lower()))
    )
    pairs = _alike(np.stack(some_codes), least_alike)
    lengths, place = np.unique(index.video_frames, return_inverse=True)
    frames = np.array([dataset.windows.n_frames(int(t)) for t in lengths])
    return Survey(
        rows=rows,
        seconds=frames[place] / dataset.metadata["fps"],
        tokens=index.text_lengths.astype(np.int64),
        motion=np.array(motion),
        captions=captions,
        words=words.most_common(most_words),
        alike=[(int(rows[i]), int(rows[j]), share) for i, j, share in pairs[:most_pairs]],
        n_alike=len(pairs),
        same_names=len(index.video_hashes) - len(np.unique(index.video_hashes)),
    )


def by_reason(left_out: list[dict]) -> dict[str, list[dict]]:
    """What metadata.json says of videos left out, by reasons, those that differ in numbers alone
    together, the most frequent first."""
    found = collections.defaultdict(list)
    for video in left_out:
        found[_NUMBER.sub("N", video["reason"])].append(video)
    return dict(sorted(found.items(), key=lambda group: -len(group[1])))


def _alike(codes_NK: np.ndarray, least: float) -> list[tuple[int, int, float]]:
    """Pairs of rows that agree in this share of their columns, most alike first."""
    found = []
    for start in range(0, len(codes_NK), _CHUNK):
        some = codes_NK[start : start + _CHUNK]
        shares = (some[:, None] == codes_NK[None]).mean(axis=2)
        for i, j in np.argwhere(shares >= least):
            if start + i < j:
                found.append((int(start + i), int(j), float(shares[i, j])))
    return sorted(found, key=lambda pair: -pair[2])
