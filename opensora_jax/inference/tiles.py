"""Tiles: videos that are too large for a device go through a tokenizer piece by piece in space.

Neighbouring tiles overlap by a quarter. Of codes each cell is taken from the tile in which it lies
further from the edge; of pixels the tiles' weighted mean, so that no border shows.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import numpy as np

Size2 = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How (H, W) cells of codes are cut into tiles, all of one size.

    Attributes:
      cells: (H, W) of the whole.
      tile: (H, W) of a tile, of which only what is smaller than the whole counts.
    """

    cells: Size2
    tile: Size2

    @classmethod
    def of(cls, cells: Size2, downsample: Size2, pixels: int | None) -> "Tiles":
        """Of tiles of so many pixels a side; None: one tile of all.

        Raises:
          ValueError: pixels that are no multiple of the downsampling, or only one code.
        """
        if pixels is None:
            return cls(cells, cells)
        if any(pixels % d or pixels < 2 * d for d in downsample):
            h, w = downsample
            raise ValueError(f"tile={pixels}: expected a multiple of {h} and {w}, of two or more")
        height, width = (min(n, pixels // d) for n, d in zip(cells, downsample, strict=True))
        return cls(cells, (height, width))

    def encode(self, encode: Callable, video: np.ndarray, downsample: Size2) -> np.ndarray:
        """Codes (B, t, H, W) of a video (B, T, H', W', 3) by what `encode` makes of its tiles."""
        codes = None
        for (y, top, bottom), (x, left, right) in self._places():
            (h, w), (dy, dx) = self.tile, downsample
            piece = video[:, :, y * dy : (y + h) * dy, x * dx : (x + w) * dx]
            found = np.asarray(encode(piece))
            if codes is None:
                codes = np.zeros((*found.shape[:2], *self.cells), found.dtype)
            kept = found[:, :, top - y : bottom - y, left - x : right - x]
            codes[:, :, top:bottom, left:right] = kept
        return codes

    def decode(self, decode: Callable, codes: np.ndarray, downsample: Size2) -> np.ndarray:
        """A video uint8 (B, T, H', W', 3) of codes (B, t, H, W) by what `decode` makes of tiles."""
        if self.tile == self.cells:
            return np.asarray(decode(codes))
        total, weights = 0.0, 0.0
        (h, w), (dy, dx) = self.tile, downsample
        sides = [n * d for n, d in zip(self.cells, downsample, strict=True)]
        for (y, *_), (x, *_) in self._places():
            found = np.asarray(decode(codes[:, :, y : y + h, x : x + w]))
            if isinstance(total, float):
                total = np.zeros((*found.shape[:2], *sides, 3), np.float32)
                weights = np.zeros((*sides, 1), np.float32)
            ramp = np.outer(
                _ramp(h * dy, self._overlap(0) * dy), _ramp(w * dx, self._overlap(1) * dx)
            )
            place = (slice(y * dy, (y + h) * dy), slice(x * dx, (x + w) * dx))
            total[(slice(None), slice(None), *place)] += ramp[..., None] * found
            weights[place] += ramp[..., None]
        return np.round(total / weights).astype(np.uint8)

    def _overlap(self, axis: int) -> int:
        return max(self.tile[axis] // 4, 1) if self.tile[axis] < self.cells[axis] else 0

    def _places(self) -> Iterator[tuple[tuple[int, int, int], tuple[int, int, int]]]:
        """Of each tile, along both axes, (start, first cell that is kept, the one after it)."""
        return itertools.product(*(self._cuts(axis) for axis in (0, 1)))

    def _cuts(self, axis):
        n, tile = self.cells[axis], self.tile[axis]
        starts = [*range(0, n - tile, tile - self._overlap(axis)), n - tile]
        edges = [0, *((a + tile + b) // 2 for a, b in itertools.pairwise(starts)), n]
        return zip(starts, edges[:-1], edges[1:], strict=True)


def _ramp(n: int, overlap: int) -> np.ndarray:
    """Weights (n,): 1, but rising from 0 and falling to 0 over `overlap` at the ends."""
    place = np.arange(n) + 0.5
    return np.minimum(1, np.minimum(place, place[::-1]) / max(overlap, 1)).astype(np.float32)
