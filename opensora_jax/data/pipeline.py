"""Grain input pipelines: batches of video clips for the VQ-VAE, of latents and text for the DiT.

Each process loads its own indices of every batch. The iterators have Grain's `get_state` and
`set_state`; the state is the number of batches drawn, so that a run goes on with the same batches
on any number of processes.
"""

import concurrent.futures
import dataclasses
import functools
import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import grain
import numpy as np

from opensora_jax.data import video_io
from opensora_jax.data.dataset import LatentDataset
from opensora_jax.data.parts import CODES, TEXT
from opensora_jax.data.video_file import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from opensora_jax.data.video_window import Timeline

logger = logging.getLogger(__name__)

# Videos whose timelines are kept, each some kilobytes.
_N_TIMELINES = 4096


def find_videos(folder: str | Path) -> list[Path]:
    """The video files under `folder`, sorted.

    Raises:
      FileNotFoundError: if there are none.
    """
    return _find(folder, VIDEO_SUFFIXES, "video")


def find_images(folder: str | Path) -> list[Path]:
    """As `find_videos`, of images."""
    return _find(folder, IMAGE_SUFFIXES, "image")


def _find(folder, suffixes, kind):
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in suffixes)
    if not paths:
        raise FileNotFoundError(f"{folder}: no {kind} files ({' '.join(suffixes)})")
    return paths


class ClipSource:
    """Clips of `n_frames` frames, each cut at random from one of the videos at `paths`.

    Args:
      resolution: height and width in pixels that videos are resized and cropped to.
      fps: frames per second that videos are resampled to; None keeps each video's own rate.
    """

    def __init__(
        self, paths: Sequence[Path], n_frames: int, resolution: int, fps: float | None = None
    ):
        self._paths, self._n_frames = list(paths), n_frames
        self._resolution, self._fps = resolution, fps
        self._timeline = functools.lru_cache(_N_TIMELINES)(self._read_timeline)
        self._named: set[int] = set()  # in the log
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"ClipSource({len(self._paths)} videos, {self._n_frames} frames)"

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> int:
        return index

    def clip(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray] | None:
        """{"video": uint8 (n_frames, H, W, 3)} from where in the video `rng` chooses.

        None where these frames cannot be read, or the video is too short; it is named once in the
        log.
        """
        try:
            timeline = self._timeline(index)
            start = int(rng.integers(len(timeline) - self._n_frames + 1))
            return {"video": timeline.window(start, self._n_frames, self._resolution)}
        except video_io.VideoError as error:
            self._left_out(index, error)
            return None

    def _left_out(self, index: int, error: Exception) -> None:
        with self._lock:
            is_new = index not in self._named
            self._named.add(index)
        if is_new:
            logger.warning("left out: %s", error)

    def _read_timeline(self, index):
        path = self._paths[index]
        timeline = Timeline.read(path, self._fps)
        if len(timeline) < self._n_frames:
            raise video_io.VideoError(
                path, f"{len(timeline)} frames, expected at least {self._n_frames}"
            )
        return timeline


class StillSource(ClipSource):
    """As `ClipSource`, of images: each is a clip in which nothing moves."""

    def clip(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray] | None:
        try:
            image_THWC = video_io.read_video(self._paths[index], resolution=self._resolution)
        except video_io.VideoError as error:
            self._left_out(index, error)
            return None
        return {"video": np.repeat(image_THWC[:1], self._n_frames, axis=0)}


def clips(
    source: ClipSource,
    *,
    stills: StillSource | None = None,
    still_share: float = 0.0,
    batch_size: int,
    seed: int,
    indices: Sequence[int] | None = None,
    workers: int = 0,
) -> grain.DatasetIterator:
    """Endless shuffled batches {"video": uint8 (len(indices), T, H, W, 3)}.

    For a video that cannot be used the next one that can stands in.

    Args:
      stills: images that take the place of a video with a probability of `still_share`.
      batch_size: examples of a batch, over all processes.
      indices: the examples of each batch that this process loads; None means all.
      workers: threads that decode, a batch each; 0: one a core.
    """

    def load(index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        chosen = source
        if stills is not None and rng.random() < still_share:
            chosen, index = stills, int(rng.integers(len(stills)))
        candidates = (chosen.clip((index + i) % len(chosen), rng) for i in range(len(chosen)))
        return next(clip for clip in candidates if clip is not None)

    items = grain.MapDataset.source(source).shuffle(seed=seed).repeat()
    n = workers or len(os.sched_getaffinity(0))
    return iter(
        _batches(items, load, batch_size=batch_size, seed=seed, indices=indices, n_threads=n)
    )


def _batches(
    items: grain.MapDataset,
    load: Callable[[int, np.random.Generator], dict[str, np.ndarray]],
    *,
    batch_size: int,
    seed: int,
    indices: Sequence[int] | None,
    n_threads: int = 2,
    pool: concurrent.futures.Executor | None = None,
) -> grain.IterDataset:
    """Batches of what `load` makes of items, of which only `indices` are loaded.

    Items are dealt to indices, and each index has its generator, before anything is loaded: all
    processes together load the same batch, in the same order, however many they are.

    Args:
      n_threads: that load a batch each.
      pool: loads the examples of a batch beside each other; None: one after the other.
    """
    in_order = pool.map if pool else map
    chosen = range(batch_size) if indices is None else indices

    def load_batch(batch: list[int], rng: np.random.Generator) -> dict[str, np.ndarray]:
        seeds = rng.integers(2**63, size=batch_size)
        examples = list(in_order(lambda i: load(batch[i], np.random.default_rng(seeds[i])), chosen))
        return {name: np.stack([x[name] for x in examples]) for name in examples[0]}

    batches = items.batch(batch_size, drop_remainder=True, batch_fn=list)
    options = grain.ReadOptions(num_threads=n_threads, prefetch_buffer_size=2 * n_threads)
    return batches.random_map(load_batch, seed=seed).to_iter_dataset(options)


def pad_text(text_SD: np.ndarray, length: int) -> np.ndarray:
    """Text features padded with zeros, or cut, to `length` tokens."""
    text_SD = text_SD[:length]
    return np.pad(text_SD, ((0, length - len(text_SD)), (0, 0)))


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Examples of one size, (T, H, W) latents.

    Attributes:
      dataset: whose latents are (H, W).
      rows: of the dataset, as long as T or longer.
      n_latent_frames: T; of longer latents so many are cut out (the first without a seed).
      batch_size: examples of a batch, over all processes.
      indices: the examples of each batch that this process loads; None means all.
      stride: latent frames between two places where a cut may begin: those of an encoded window, as
        a tokenizer decodes nothing that begins elsewhere as it was.
    """

    dataset: LatentDataset
    rows: np.ndarray
    n_latent_frames: int
    batch_size: int
    indices: Sequence[int] | None = None
    stride: int = 1

    @property
    def grid(self) -> tuple[int, int, int]:
        """(T, H, W)."""
        return (self.n_latent_frames, *self.dataset.grid)


def latents(
    buckets: Sequence[Bucket], *, text_length: int, seed: int | None
) -> grain.DatasetIterator:
    """Batches, each of one bucket: shuffled and endless with a seed, else in order and once.

    Each holds codes (B, T, H, W) int32, text (B, S, D) float32 and text_length (B,) int32, B being
    the number of indices. Buckets take turns in proportion to their numbers of batches, in the same
    order in all processes, so that every row comes equally often.

    Args:
      text_length: S; longer texts are cut.
    """
    parts = [_bucket_batches(bucket, text_length, seed) for bucket in buckets]
    if len(parts) == 1:
        return iter(parts[0])
    turns = [len(bucket.rows) / bucket.batch_size for bucket in buckets]
    return iter(grain.IterDataset.mix(parts, turns))


def _bucket_batches(bucket: Bucket, text_length: int, seed: int | None) -> grain.IterDataset:
    dataset, n_frames = bucket.dataset, bucket.n_latent_frames

    def load(row: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        example = dataset[row]
        codes, text = example[CODES], example[TEXT]
        n_places = (len(codes) - n_frames) // bucket.stride + 1
        start = bucket.stride * int(rng.integers(n_places)) if seed is not None else 0
        return {
            "codes": codes[start : start + n_frames].astype(np.int32),
            "text": pad_text(text, text_length),
            "text_length": np.int32(min(len(text), text_length)),
        }

    items = grain.MapDataset.source(_Rows(bucket.rows, dataset))
    if seed is not None:
        items = items.shuffle(seed=seed).repeat()
    return _batches(
        items,
        load,
        batch_size=bucket.batch_size,
        seed=seed or 0,
        indices=bucket.indices,
        # A store's pauses are bridged by what is read ahead: two batches a thread.
        n_threads=4 if dataset.streamed else 2,
        pool=dataset.streamed.pool if dataset.streamed else None,
    )


class _Rows:
    """Row numbers as a source; its repr, in what Grain says of it, names the dataset."""

    def __init__(self, rows: np.ndarray, dataset: LatentDataset):
        self._rows, self._dataset = rows, dataset

    def __repr__(self) -> str:
        return f"{len(self._rows)} rows of {self._dataset!r}"

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> int:
        return int(self._rows[index])


def split_by_video(dataset: LatentDataset, share: float) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, validation rows); about `share` of the videos, with all their captions,
    are for validation: those of the smallest hashes of their names, so that few change where
    videos are added."""
    hashes = dataset.index.video_hashes
    if len(hashes):
        names = np.unique(hashes)
        n = round(share * len(names))
        is_validation = (hashes <= names[n - 1] if n else hashes < 0)[dataset.index.row_video]
    else:
        is_validation = _is_validation_by_name(dataset, share)
    return np.flatnonzero(~is_validation), np.flatnonzero(is_validation)


def _is_validation_by_name(dataset: LatentDataset, share: float) -> np.ndarray:
    """As it was before datasets had hashes, so that their trainings go on as they began."""
    n = len(dataset)
    if dataset.has_column("video_file"):
        names = np.array([dataset.column(i, "video_file") for i in range(n)])
    else:
        names = np.arange(n)  # who knows which rows are of one video
    videos = np.unique(names)
    chosen = np.random.default_rng(0).permutation(videos)[: round(share * len(videos))]
    return np.isin(names, chosen)
