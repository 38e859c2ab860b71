"""Videos of which frames are given, and videos longer than a model was trained on.

A video is drawn in windows of the length of training. Each is told, by way of the tokenizer, the
frames in it that are given or that the window before it has drawn. So every window is encoded and
decoded as the training's videos were, from its own first frame on, and no code stands where it
would mean something else.

Legend: T frames of the whole video, H, W pixels; N videos, F frames and t latents of a window.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from opensora_jax.inference.generator import Generator


@dataclasses.dataclass(frozen=True)
class Given:
    """Videos, or images, of which some frames are to stay.

    Attributes:
      name: how errors call it.
      videos_NTHWC: uint8, at the rate and in the size of what is drawn, one a prompt or one for
        all; of an image one frame, which stands for a video in which nothing moves.
      kept: which: first, last, ends (both) or every.
      n: how many latent frames are kept at an end, or that every n-th is.
    """

    name: str
    videos_NTHWC: np.ndarray
    kept: str
    n: int
    is_image: bool = False

    def latents(self, n: int) -> np.ndarray:
        """Which of n latent frames are kept, (n,) bool.

        Raises:
          ValueError: all of them.
        """
        i = np.arange(n)
        match self.kept:
            case "first":
                kept = i < self.n
            case "last":
                kept = i >= n - self.n
            case "ends":
                kept = (i < self.n) | (i >= n - self.n)
            case _:
                kept = i % self.n == 0
        if kept.all():
            raise ValueError(
                f"--keep {self.kept}:{self.n}: all of the {n} latent frames that are asked for: "
                "expected to keep fewer, or more --frames"
            )
        return kept

    def place(self, kept_T: np.ndarray) -> np.ndarray:
        """Indices (T,) of its frames in a video of T: counted from the begin, up to the end, or
        each in one half; where there are none, of the nearest.

        Raises:
          ValueError: it has not all those that are kept.
        """
        n, there = len(kept_T), self.videos_NTHWC.shape[1]
        if self.is_image:
            return np.zeros(n, int)
        is_from_end_T = np.arange(n) >= {"last": 0, "ends": n // 2}.get(self.kept, n)
        index_T = np.arange(n) + np.where(is_from_end_T, there - n, 0)
        beyond_T = np.maximum(-index_T, index_T - there + 1)[kept_T]
        if beyond_T.max() > 0:
            raise ValueError(
                f"{self.name}: {there} frames at the model's rate: expected at least "
                f"{there + beyond_T.max()} for --keep {self.kept}:{self.n}"
            )
        return np.clip(index_T, 0, there - 1)


class Canvas:
    """A video that is to be drawn; None stands for the sizes of the training.

    Attributes:
      grid: (t, h, w), latents of a window.
      shape: (T, H, W).
      kept: bool (T,), frames that are given.

    Raises:
      ValueError: a size that does not fit, or a length beyond that of the training for a model that
        cannot be told what was drawn before.
    """

    def __init__(
        self,
        generator: Generator,
        n_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
    ):
        self._generator, windows = generator, generator.windows
        most = n_frames
        if n_frames is not None and generator.conditioning == "frames":
            window = windows.n_frames(generator.longest(height, width))
            over = (n_frames - window) % windows.stride
            if n_frames > window > windows.least:
                most = window
                if over:
                    near = f"{n_frames - over} or {n_frames - over + windows.stride}"
                    raise ValueError(
                        f"frames={n_frames}: expected {window} or more, such as {near}"
                    )
        self.grid = generator.latent_grid(most, height, width)
        window, *size = generator.pixels(self.grid)
        self.shape = (n_frames or window, *size)
        # In a window latents begin at these frames, and the last ends.
        self._borders = [windows.n_frames(i) for i in range(self.grid[0] + 1)]
        self._given: Given | None = None
        self.kept = np.zeros(self.shape[0], bool)

    def keep(self, given: Given) -> None:
        """Draws around these frames.

        Raises:
          ValueError: they do not reach, or leave nothing to draw, or the model knows no frames.
        """
        self._generator.expect_frames()
        more = range(self._borders[-1], self.shape[0] + 1, self._generator.windows.stride)
        borders = [*self._borders[:-1], *more]  # of the whole video
        self.kept = np.repeat(given.latents(len(borders) - 1), np.diff(borders))
        self._index_T = given.place(self.kept)
        self._given = given

    def draw(self, prompts: Sequence[str], **how: Any) -> np.ndarray:
        """Videos, uint8 (N, T, H, W, 3), one a prompt; of kept frames they show the reconstruction.

        Args:
          how: `params`, `sampling`, `seed` and `batch_size` of `Generator.sample`.
        """
        n, given, window = len(prompts), self._given, self._borders[-1]
        shown, shown_T = np.zeros((n, *self.shape, 3), np.uint8), np.zeros(self.shape[0], bool)
        seen = shown.copy()  # what windows are told of others
        if given is not None:
            seen[:] = given.videos_NTHWC[:, self._index_T]
        for i, start in enumerate(self._starts()):
            part = slice(start, start + window)
            is_known_F = (self.kept | shown_T)[part]
            known = None
            if is_known_F.any():
                if i == 0:
                    context = seen[: len(given.videos_NTHWC), part]
                else:  # what is not known looks like the nearest frame that is
                    context = seen[:, part][:, _nearest(is_known_F)]
                codes = np.broadcast_to(self._generator.encode(context), (n, *self.grid))
                known = codes, np.logical_and.reduceat(is_known_F, self._borders[:-1])
            videos = self._generator.sample(
                list(prompts), grid=self.grid, known=known, part=i, **how
            )
            is_new_F = ~shown_T[part]
            shown[:, part][:, is_new_F] = videos[:, is_new_F]
            is_new_F &= ~self.kept[part]
            seen[:, part][:, is_new_F] = videos[:, is_new_F]
            shown_T[part] = True
        return shown

    def _starts(self) -> list[int]:
        """Frames at which windows begin, in the order in which they are drawn: from the begin on,
        or where only the end is kept from there.

        Each has half of its latents in common with the one before, or more to end with the video.
        """
        t = self.grid[0]
        last = self.shape[0] - self._borders[t]
        if self._given is not None and self._given.kept == "last":
            step = self._borders[t - t // 2]
            return [max(last - i * step, 0) for i in range(-(-last // step) + 1)]
        step = self._borders[t] - self._borders[t // 2]
        return [min(i * step, last) for i in range(-(-last // step) + 1)]


def _nearest(is_there_F: np.ndarray) -> np.ndarray:
    """For each frame the index of the nearest one that is there."""
    there_K = np.flatnonzero(is_there_F)
    distances_FK = np.abs(np.arange(len(is_there_F))[:, None] - there_K)
    return there_K[distances_FK.argmin(axis=1)]
