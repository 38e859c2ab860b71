"""Which of several sizes a clip is made to, so that it loses least, and which sizes suit clips.

Pure functions of numbers: frames at the rate of the dataset, pixels as shown. Fractions are exact,
so that the choice is the same everywhere.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction

from opensora_jax.windows import Windows

AUTO = "auto"

# Width over height that `suitable` chooses among, and the same upright.
_ASPECTS = ((1, 1), (5, 4), (4, 3), (3, 2), (16, 9), (2, 1), (21, 9))
# Sizes that it chooses at most, and the share of the clips of each but the first of its length.
_MOST_SIZES = 8
_LEAST_SHARE = 0.05
# Lengths of videos that it chooses at most, each about half of the one before.
_MOST_LENGTHS = 3


@dataclasses.dataclass(frozen=True, order=True)
class Size:
    """Of a clip, or of the clips of a bucket; an image has one frame."""

    n_frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.n_frames}x{self.height}x{self.width}"

    @property
    def is_image(self) -> bool:
        return self.n_frames == 1


def parse(text: str) -> tuple[Size, ...]:
    """Sizes of frames x height x width with a comma between two, as in "16x96x160,1x128x128".

    Raises:
      ValueError: something else, or a size that is there twice.
    """
    found = [re.fullmatch(r"\s*(\d+)x(\d+)x(\d+)\s*", part) for part in text.split(",")]
    if None in found or not all(int(n) for match in found for n in match.groups()):
        raise ValueError(
            f"buckets={text[:100]}: expected sizes of frames x height x width with a comma between "
            "two, as in 16x96x160,1x128x128"
        )
    sizes = [Size(*map(int, match.groups())) for match in found]
    for size, times in Counter(sizes).items():
        if times > 1:
            raise ValueError(f"buckets={text[:100]}: expected {size} once")
    return tuple(sizes)


def fits(clip: Size, bucket: Size) -> bool:
    """Images go with images; a video is to have as many frames as the bucket's."""
    return clip.is_image == bucket.is_image and clip.n_frames >= bucket.n_frames


def loss(clip: Size, bucket: Size) -> Fraction:
    """What a clip that fits loses where it is resized to cover a bucket, cropped, and cut.

    The sum of three shares: of its pixels, those that are cropped away; of its frames, those that
    are cut; of the bucket's pixels, those that were made up by making it larger. What is lost by
    making it smaller is not counted.
    """
    scale = max(Fraction(bucket.height, clip.height), Fraction(bucket.width, clip.width))
    seen = Fraction(bucket.height * bucket.width, clip.height * clip.width) / scale**2
    made_up = 1 - 1 / max(scale, 1) ** 2
    return (1 - seen) + (1 - Fraction(bucket.n_frames, clip.n_frames)) + made_up


def choose(clip: Size, buckets: Iterable[Size]) -> Size | None:
    """The bucket in which a clip loses least, of equal ones the largest; None: it fits none."""
    usable = [bucket for bucket in buckets if fits(clip, bucket)]
    return min(usable, key=lambda bucket: (loss(clip, bucket), _by_volume(bucket)), default=None)


def nearest(clip: Size, buckets: Sequence[Size]) -> Size:
    """As `choose`; for a clip that fits none the shortest bucket of its kind, which says why."""
    chosen = choose(clip, buckets)
    alike = [bucket for bucket in buckets if bucket.is_image == clip.is_image]
    return chosen or min(alike or buckets, key=lambda bucket: (bucket.n_frames, _by_volume(bucket)))


def suitable(
    clips: Sequence[Size],
    windows: Windows,
    cell: tuple[int, int],
    n_tokens: int,
    most_frames: int | None = None,
) -> tuple[Size, ...]:
    """A handful of sizes that suit these clips, those that most of them go to first, images last.

    Videos have as many frames as half of the clips have, about half of that and about a quarter, if
    there are so short ones; frames, of videos and images, have as many tokens as make a clip of the
    longest of `n_tokens`, or as few as the clips show: so they are of standard aspect ratios.

    Args:
      windows: how clips are cut in time.
      cell: (height, width) in pixels of a token.
      n_tokens: of a clip at most: latent frames times the cells of one.
      most_frames: of a video; None: as many as half of the clips have.

    Raises:
      ValueError: no clip is long enough, or a clip of one cell has more tokens.
    """
    lengths = _lengths(clips, windows, most_frames)
    if not lengths:
        raise ValueError(f"buckets={AUTO}: expected a clip of {windows.least} frames or more")
    latents = max(1, windows.latents(lengths[0]))
    areas = sorted(clip.height * clip.width // math.prod(cell) for clip in clips)
    n_cells = min(n_tokens // latents, max(1, areas[len(areas) // 2]))
    if n_cells < 1:
        raise ValueError(
            f"bucket_tokens={n_tokens}: expected at least {latents}, the latent frames of a clip "
            f"of {max(lengths)} frames"
        )
    aspects = {Fraction(*sides) for w, h in _ASPECTS for sides in ((w, h), (h, w))}
    grids = {_grid(n_cells, aspect * cell[0] / cell[1]) for aspect in aspects}
    frames = sorted((h * cell[0], w * cell[1]) for h, w in grids)
    sizes = [Size(n, height, width) for n in lengths for height, width in frames]
    taken = Counter(choose(clip, sizes) for clip in clips)
    del taken[None]
    if not taken:
        raise ValueError(
            f"buckets={AUTO}: no clip has as many frames as the shortest size, {lengths[-1]}"
        )
    ranked = sorted(taken, key=lambda size: (-taken[size], _by_volume(size)))
    first = {size.n_frames: size for size in reversed(ranked)}.values()
    least = _LEAST_SHARE * taken.total()
    others = [size for size in ranked if size not in first and taken[size] >= least]
    kept = {*first, *others[: _MOST_SIZES - len(first)]}
    return tuple(sorted(kept, key=lambda size: (size.is_image, ranked.index(size))))


def _by_volume(size: Size) -> tuple[int, Size]:
    """A key by which the largest comes first."""
    return -size.n_frames * size.height * size.width, size


def _lengths(clips: Sequence[Size], windows: Windows, most_frames: int | None) -> list[int]:
    """Frames of the sizes, of videos the longest first, 1 of images."""
    videos = sorted(clip.n_frames for clip in clips if not clip.is_image)
    usable = [n for n in videos if windows.fit(n) > 1]
    lengths = []
    if usable:
        n = usable[len(usable) // 2]
        n = windows.fit(min(n, most_frames or n))
        # Whole windows, where there are any: the rest of one costs as much to encode.
        lengths.append(n // windows.frames * windows.frames or n)
        while (n := windows.fit(lengths[-1] // 2)) > 1 and videos[0] < lengths[-1]:
            if len(lengths) == _MOST_LENGTHS:
                break
            lengths.append(n)
    return lengths + [1] * any(clip.is_image for clip in clips)


def _grid(n_cells: int, aspect: Fraction) -> tuple[int, int]:
    """(h, w) in cells, at most `n_cells` in all: nearest to a ratio of w to h, and to so many."""

    def far(grid: tuple[int, int]) -> tuple[Fraction, tuple[int, int]]:
        ratio = Fraction(grid[1], grid[0]) / aspect
        return max(ratio, 1 / ratio) ** 2 * Fraction(n_cells, math.prod(grid)), grid

    sides = ((h, int(h * aspect) + up) for h in range(1, n_cells + 1) for up in (0, 1))
    inside = [(h, max(1, min(w, n_cells // h))) for h, w in sides]
    return min(inside, key=far)
