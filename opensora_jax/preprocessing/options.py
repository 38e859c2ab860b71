"""What can be asked of preprocessing."""

import dataclasses
import importlib.util
import os
from typing import Any

from opensora_jax.data import shots, video_io
from opensora_jax.data.captions import COLUMNS

ENGINES = ("local", "ray")

# Seconds of decoding: a film of two hours in 4K takes two and a half hours on one core.
VIDEO_TIMEOUT = 21_600.0

# The options that say what of a video is kept: fields of `Decoding`, all off at 0.
CURATION = (
    *("clip_frames", "clip_stride", "split_scenes", "crop_bars", "min_side", "min_motion"),
    *("min_brightness", "max_frozen", "near_duplicates"),
)


class PreprocessError(ValueError):
    """The options do not fit each other, or the output folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How videos and captions become a dataset.

    Args:
      vqvae: what `load_tokenizer` reads.
      text_model: what `TextEncoder` reads.
      resolution: height and width in pixels that videos are resized and cropped to.
      fps: frames per second that videos are resampled to; None keeps each video's own rate.
      max_frames: a video with more frames than this (after resampling) is filtered. None: none is,
        as none is where `n_frames` cuts them.
      n_frames: cut every video to this many frames, and filter shorter ones. None keeps all frames
        but for a rest that the tokenizer has no latent for.
      clip_frames: cut every video into clips of this many frames, each with rows of its own and its
        start in seconds, and filter shorter ones. 0: a video is one clip.
      clip_stride: frames from the begin of a clip to that of the next; 0: clip_frames.
      window: frames that are encoded together; None takes the length the VQ-VAE was trained on. A
        last, partial window is padded with its last frame, and the codes of the padding dropped.
      tile: pixels of the tiles, a quarter of them shared, that larger videos are encoded in, and
        samples decoded in; None: whole.
      batch_size: windows encoded at a time, rounded up to a multiple of the number of devices.
      videos_per_part: videos between two points that an interrupted run can go on from, or fewer,
        so that a part stays small.
      flat: every row with all its columns, as `datasets.load_from_disk` reads a part; codes and
        features are stored as often as there are captions.
      columns: of captions in a table: the names of the column of files and of that of captions.
      strict: whether one entry or video that cannot be used ends it, instead of being left out.
      video_timeout: seconds, of copying it here and of decoding it, after which a video counts as
        failed and the process that decodes it is replaced; None: there is no limit.
      split_scenes: cut videos where another shot begins, too, so that no clip spans two; each shot
        is a clip of its own, or several of `clip_frames`.
      crop_bars, min_side, min_motion, min_brightness, max_frozen: what is cut off videos, and what
        a clip has to show to be kept, as `Decoding` says.
      near_duplicates: of 256 bits of what they look like, in how many two clips of different videos
        may differ and the later one be left out; 0: none is.
      dry_run: videos are looked at, and what would become of them is written into dry_run.json of
        the output; nothing is encoded.
      engine: `local`: this machine alone; `ray`: a cluster of them.
      ray_address: of the cluster; None: one of this machine alone, for as long as this lasts.
    """

    vqvae: str | os.PathLike
    text_model: str | os.PathLike
    resolution: int | tuple[int, int] = 128
    fps: float | None = None
    max_frames: int | None = None
    n_frames: int | None = None
    clip_frames: int = 0
    clip_stride: int = 0
    window: int | None = None
    tile: int | None = None
    batch_size: int = 8
    videos_per_part: int = 64
    flat: bool = False
    columns: tuple[str, str] = COLUMNS
    strict: bool = False
    video_timeout: float | None = VIDEO_TIMEOUT
    split_scenes: bool = False
    crop_bars: bool = False
    min_side: int = 0
    min_motion: float = 0.0
    min_brightness: float = 0.0
    max_frozen: float = 0.0
    near_duplicates: int = 0
    dry_run: bool = False
    engine: str = "local"
    ray_address: str | None = None

    @property
    def sides(self) -> list[int]:
        """[height, width] in pixels."""
        return [self.resolution] * 2 if isinstance(self.resolution, int) else list(self.resolution)

    @property
    def curation(self) -> dict[str, Any]:
        """Those of `CURATION` that are on."""
        return {name: value for name in CURATION if (value := getattr(self, name))}

    def check_engine(self) -> None:
        """Sees that the engine is there and can do what is asked.

        Raises:
          PreprocessError: naming the option.
        """
        if self.engine not in ENGINES:
            raise PreprocessError(f"engine={self.engine}: expected one of {', '.join(ENGINES)}")
        if self.engine == "local":
            if self.ray_address:
                raise PreprocessError(
                    f"ray_address={self.ray_address}: expected engine=ray with it"
                )
            return
        if self.flat:
            raise PreprocessError("flat=True: expected engine=local: Ray stores everything once")
        if self.dry_run:
            raise PreprocessError("dry_run=True: expected engine=local")
        if importlib.util.find_spec("ray") is None:
            raise PreprocessError(
                "engine=ray: Ray is not installed: pip install 'opensora_jax[ray]'"
            )

    def check(self) -> None:
        """Sees that numbers are possible, and that what is asked for fits together.

        Raises:
          ValueError: naming the option, its value and what is expected.
        """
        if self.fps is not None:
            video_io.check_fps(self.fps)
        timeout = self.video_timeout
        if timeout is not None and not 0 < timeout < float("inf"):
            raise PreprocessError(f"video_timeout={timeout}: expected a positive number, or None")
        for name in ("max_frames", "n_frames", "videos_per_part", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PreprocessError(f"{name}={value}: expected at least 1")
        for name, value in self.curation.items():
            if not 0 <= value < float("inf"):
                raise PreprocessError(f"{name}={value}: expected at least 0")
        if self.clip_stride and not self.clip_frames:
            raise PreprocessError(f"clip_stride={self.clip_stride}: expected clip_frames with it")
        if self.split_scenes:
            shots.expect_installed()

    def check_lengths(self) -> None:
        """Sees that clips have one length.

        Raises:
          PreprocessError: `n_frames` and `clip_frames` both say it.
        """
        if self.clip_frames and self.n_frames:
            with_it = f"clip_frames={self.clip_frames}"
            raise PreprocessError(f"n_frames={self.n_frames}: expected none with {with_it}")
