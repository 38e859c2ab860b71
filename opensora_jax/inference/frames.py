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
from opensora_jax.windows import Windows


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


@dataclasses.dataclass(frozen=True)
class Part:
    """A window of a video that is drawn, in the order in which they are.

    Attributes:
      start: its first frame.
      known_F: frames of it that are given, or drawn before.
      known_t: latents that it is told: those of which every frame is known.
      new_F: frames that are shown of it: what is not shown yet, and all of a latent that it is not
        told, also what was drawn of it before, so that none is of two drawings.
    """

    start: int
    known_F: np.ndarray
    known_t: np.ndarray
    new_F: np.ndarray


def unit(windows: Windows, t: int) -> int:
    """Frames by multiples of which windows of t latents lie apart, so that a latent of one is also
    a latent of another: where a causal tokenizer begins anew within them, whole windows of it."""
    begins_anew = t > windows.latents(windows.frames)
    return windows.frames if windows.causal and begins_anew else windows.stride


def borders(windows: Windows, t: int, n_frames: int) -> list[int]:
    """Where latents begin in a video drawn in windows of t latents, and the last ends."""
    size = windows.n_frames(t)
    if unit(windows, t) == windows.stride:
        more = range(size + windows.stride, n_frames + 1, windows.stride)
        return [*(windows.n_frames(i) for i in range(t + 1)), *more]
    return [windows.n_frames(i) for i in range(windows.latents(n_frames) + 1)]


def parts(windows: Windows, t: int, kept_T: np.ndarray, is_backward: bool) -> list[Part]:
    """The windows of t latents that a video is drawn in, from its begin on, or from its end.

    Each has about half of its latents in common with the one before, or more to end with the video.

    Args:
      kept_T: frames that are given; T is `windows.n_frames(t)` and a multiple of `unit` more.

    Raises:
      ValueError: of a window no latent is known, so that it would not go on with the others.
    """
    borders_t = borders(windows, t, windows.n_frames(t))
    size, by = borders_t[-1], unit(windows, t)
    last = len(kept_T) - size
    # The first latent of a window of a causal tokenizer is the end of one of the window before it.
    is_cut = is_backward and windows.causal and by == windows.stride
    step = max((size - borders_t[min(t // 2 + is_cut, t - 1)]) // by, 1) * by
    starts = [min(i * step, last) for i in range(-(-last // step) + 1)]
    shown_T, found = np.zeros(len(kept_T), bool), []
    for start in [last - start for start in starts] if is_backward else starts:
        part = slice(start, start + size)
        known_F = (kept_T | shown_T)[part]
        known_t = np.logical_and.reduceat(known_F, borders_t[:-1])
        new_F = ~shown_T[part] | ~np.repeat(known_t, np.diff(borders_t))
        if found and not known_t.any():
            raise ValueError(
                f"frames={len(kept_T)}: expected {size}, those of the model's {t} latents: too few "
                "to be told what comes after a window"
            )
        found.append(Part(start, known_F, known_t, new_F))
        shown_T[part] = True
    return found


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
            t = generator.longest(height, width)
            window, by = windows.n_frames(t), unit(windows, t)
            over = (n_frames - window) % by
            if n_frames > window > windows.least:
                most = window
                if over:
                    near = f"{n_frames - over} or {n_frames - over + by}"
                    raise ValueError(
                        f"frames={n_frames}: expected {window} or more, such as {near}"
                    )
        self.grid = generator.latent_grid(most, height, width)
        window, *size = generator.pixels(self.grid)
        self.shape = (n_frames or window, *size)
        self._given: Given | None = None
        self.kept = np.zeros(self.shape[0], bool)

    def keep(self, given: Given) -> None:
        """Draws around these frames.

        Raises:
          ValueError: they do not reach, or leave nothing to draw, or the model knows no frames, or
            too few for a longer video.
        """
        self._generator.expect_frames()
        whole = borders(self._generator.windows, self.grid[0], self.shape[0])
        self.kept = np.repeat(given.latents(len(whole) - 1), np.diff(whole))
        self._index_T = given.place(self.kept)
        self._given = given
        self._parts()

    def draw(self, prompts: Sequence[str], **how: Any) -> np.ndarray:
        """Videos, uint8 (N, T, H, W, 3), one a prompt; of kept frames they show the reconstruction.

        Args:
          how: `params`, `sampling`, `seed` and `batch_size` of `Generator.sample`.
        """
        n, given = len(prompts), self._given
        shown = np.zeros((n, *self.shape, 3), np.uint8)
        seen = shown.copy()  # what windows are told of others
        if given is not None:
            seen[:] = given.videos_NTHWC[:, self._index_T]
        for i, part in enumerate(self._parts()):
            here = slice(part.start, part.start + len(part.new_F))
            known = None
            if part.known_t.any():
                if i == 0:
                    context = seen[: len(given.videos_NTHWC), here]
                else:  # what is not known looks like the nearest frame that is
                    context = seen[:, here][:, _nearest(part.known_F)]
                codes = np.broadcast_to(self._generator.encode(context), (n, *self.grid))
                known = codes, part.known_t
            videos = self._generator.sample(
                list(prompts), grid=self.grid, known=known, part=i, **how
            )
            shown[:, here][:, part.new_F] = videos[:, part.new_F]
            told_F = part.new_F & ~self.kept[here]
            seen[:, here][:, told_F] = videos[:, told_F]
        return shown

    def _parts(self) -> list[Part]:
        is_backward = self._given is not None and self._given.kept == "last"
        return parts(self._generator.windows, self.grid[0], self.kept, is_backward)


def _nearest(is_there_F: np.ndarray) -> np.ndarray:
    """For each frame the index of the nearest one that is there."""
    there_K = np.flatnonzero(is_there_F)
    distances_FK = np.abs(np.arange(len(is_there_F))[:, None] - there_K)
    return there_K[distances_FK.argmin(axis=1)]
