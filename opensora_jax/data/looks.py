"""What the frames of a clip show: figures of motion and brightness, and a perceptual hash."""

from collections.abc import Iterable

import numpy as np

# Figures, and between which edges they are counted.
# motion: by how much pixels differ on average from one frame to the next, of 255; 0 of one frame.
# brightness: of pixels on average in the brightest frame, of 255.
# frozen: share of the frames in the longest run of equal ones; 0 where no two are.
# side: pixels of the file's shorter side, without bars where these are cropped.
FIGURES: dict[str, list[float]] = {
    "motion": [0, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 255],
    "brightness": list(range(0, 256, 15)),
    "frozen": [round(0.1 * i, 1) for i in range(11)],
    "side": [0, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192],
}
# Frames that change by less, of 255, are equal: an encoder keeps none quite.
_EQUAL = 0.1

HASH_BITS = 256
_HASHED = 4  # frames of a clip, evenly spread
_CELLS = (8, 9)  # of each: a bit for each two neighbours in a row
# By how much the right one is to be brighter, of 255: less is noise of an encoder.
_BRIGHTER = 2

# Black bars.
_BLACK = 24  # of 255: what is not brighter
_SPECKS = 0.02  # share of a black line that may be
_LEAST = 0.01  # of the height, or width: a bar's
_UNEVEN = 0.02  # likewise: by how much two bars differ at most
_SMEARED = 2  # lines
_LEAST_CONTENT = 0.1  # of the height, or width: between bars


class Look:
    """Takes the frames of a clip, some at a time, and keeps little of them.

    Args:
      wanted: of FIGURES those that are asked for; "side" is not known here.
      is_hashed: whether the hash is.
    """

    def __init__(self, wanted: frozenset[str], is_hashed: bool = False):
        self._wanted, self._is_hashed = wanted, is_hashed
        self._brightest = 0.0
        self._changes: list[float] = []  # from each frame to the next
        self._last_HWC: np.ndarray | None = None
        self._thumbnails: list[np.ndarray] = []  # uint8, of each frame

    def add(self, frames_THWC: np.ndarray) -> None:
        """Takes the next frames, uint8 (T, H, W, 3)."""
        if "brightness" in self._wanted:
            self._brightest = max(self._brightest, *(frame.mean() for frame in frames_THWC))
        if self._wanted & {"motion", "frozen"}:
            for frame_HWC in frames_THWC.astype(np.int16):
                if self._last_HWC is not None:
                    self._changes.append(float(abs(frame_HWC - self._last_HWC).mean()))
                self._last_HWC = frame_HWC
        if self._is_hashed:
            self._thumbnails += map(_thumbnail, frames_THWC)

    def figures(self) -> dict[str, float]:
        """Those that were asked for, by name."""
        run = longest = 0
        for change in self._changes:
            run = run + 1 if change < _EQUAL else 0
            longest = max(longest, run)
        found = {
            "motion": float(np.mean(self._changes or [0.0])),
            "brightness": float(self._brightest),
            "frozen": (longest + 1) / (len(self._changes) + 1) if longest else 0.0,
        }
        return {name: value for name, value in found.items() if name in self._wanted}

    def hash(self) -> str | None:
        """HASH_BITS as hexadecimal digits, if it was asked for: clips that look alike, also in
        another size or encoding, differ in few bits. Colors are not looked at."""
        if not self._thumbnails:
            return None
        chosen = np.linspace(0, len(self._thumbnails) - 1, _HASHED).round().astype(int)
        cells = np.stack([self._thumbnails[i] for i in chosen]).astype(np.int16)
        return np.packbits(cells[:, :, 1:] - cells[:, :, :-1] > _BRIGHTER).tobytes().hex()


def _thumbnail(frame_HWC: np.ndarray) -> np.ndarray:
    """The mean brightness of each of _CELLS, uint8."""
    sums = frame_HWC.sum(axis=2, dtype=np.float32)
    size = np.float32(3)
    for axis, n in enumerate(_CELLS):
        side = frame_HWC.shape[axis]
        edges = np.arange(n) * side // n
        sums = np.add.reduceat(sums, edges, axis=axis)
        lengths = np.maximum(np.diff(edges, append=side), 1)
        size = size * (lengths[:, None] if axis == 0 else lengths[None])
    return (sums / size).round().astype(np.uint8)


def content(
    frames_THWC: Iterable[np.ndarray], size: tuple[int, int]
) -> tuple[float, float, float, float] | None:
    """Where in a video with black bars, of the same width on both sides, its content is.

    Args:
      frames_THWC: some frames of it, one by one, of this (height, width).

    Returns:
      (top, bottom, left, right) as shares of height and width; None: there are no bars.
    """
    lit = [np.zeros(n, bool) for n in size]  # rows and columns that are not black throughout
    for frame_HWC in frames_THWC:
        is_lit = frame_HWC.max(axis=2) > _BLACK
        for axis, lines in enumerate(lit):
            lines |= is_lit.mean(axis=1 - axis) > _SPECKS
    box, found = [], False
    for lines in lit:
        n, at = len(lines), np.flatnonzero(lines)
        before, after = (int(at[0]), n - 1 - int(at[-1])) if len(at) else (0, 0)
        is_bar = min(before, after) >= _LEAST * n and abs(before - after) <= _UNEVEN * n
        # A bar's last lines are smeared into the content's first.
        is_bar &= n - before - after - 2 * _SMEARED >= _LEAST_CONTENT * n
        first, last = (before + _SMEARED, n - after - _SMEARED) if is_bar else (0, n)
        found |= is_bar
        box += [first / n, last / n]
    return tuple(box) if found else None
