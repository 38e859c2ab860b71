"""Reads color, shape and direction of one moving shape back from the pixels.

Grades samples and reconstructions of the moving shapes dataset without knowing how a video was
made: it only assumes one saturated, upright shape on a muted background.
"""

import colorsys
import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

SHAPES = ("circle", "square", "triangle")
# Hue ranges in degrees, wide enough for what compression and a tokenizer do to a color; the gaps
# (orange, cyan, magenta) belong to none of the four.
_HUES = {"red": (-25, 25), "yellow": (36, 78), "green": (85, 165), "blue": (195, 262)}

LEAST_SATURATION = 60  # max - min over RGB of the shape's solid part, of 255
_LEAST_AREA, _MOST_AREA = 0.02, 0.4  # of the frame
_LEAST_FRAMES = 0.7  # share of frames in which the shape is to be found
_LEAST_TRAVEL = 0.1  # of the frame side
_MOST_UNEXPLAINED = 0.3  # energy that one shape on its background leaves, against the shape's
_LARGEST_MISFIT = 0.13  # squared error of the best silhouette, against the coverage's energy
_LEAST_MARGIN = 1.1  # the second best silhouette has to be worse by this factor


def detect(video: np.ndarray) -> tuple[str, str, str] | None:
    """Names (color, shape, direction) of the shape in a video, or None where it is not clear.

    Colors are red, green, blue, yellow; shapes circle, square, triangle (upright); directions left,
    right, up, down.

    Args:
      video: uint8 (T, H, W, 3), T at least 2, H and W at least 8.

    Raises:
      ValueError: the array is not such a video.
    """
    color, shape, direction = _read(video)
    return None if None in (color, shape, direction) else (color, shape, direction)


def look(video: np.ndarray) -> tuple[str | None, str | None]:
    """As `detect`, (color, shape) wherever it moves; None for what is not clear."""
    return _read(video)[:2]


def _read(video):
    """(color, shape, direction), each None where it is not clear."""
    video = np.asarray(video)
    good = video.dtype == np.uint8 and video.ndim == 4 and video.shape[-1] == 3
    if not good or len(video) < 2 or min(video.shape[1:3]) < 8:
        raise ValueError(
            f"video is {video.dtype} {video.shape}: expected uint8 (T, H, W, 3), T >= 2, H, W >= 8"
        )
    segmented = _segment(smooth(video.astype(np.float32)))
    if segmented is None:
        return None, None, None
    rgb_3, coverage_THW = segmented
    located = _locate(coverage_THW)
    if located is None:
        return None, None, None
    frames, center_T2, spread_2 = located
    color = name_color(rgb_3)
    shape = name_shape(coverage_THW[frames], center_T2, spread_2)
    return color, shape, _direction(frames, center_T2, len(video), video.shape[1:3])


def judge(video: np.ndarray, label: tuple[str, str, str]) -> dict[str, bool]:
    """Whether `detect` reads "all" of (color, shape, direction), and each of them."""
    found = detect(video) or (None, None, None)
    names = ("color", "shape", "direction")
    right = {name: a == b for name, a, b in zip(names, found, label, strict=True)}
    return {"all": all(right.values()), **right}


def shares(results: Sequence[Mapping[str, bool]]) -> dict[str, float]:
    """Of what `judge` said of videos, the share that is right of each name, where it has it."""
    names = dict.fromkeys(name for result in results for name in result)
    return {
        name: float(np.mean([result[name] for result in results if name in result]))
        for name in names
    }


def score(videos: Iterable[np.ndarray], labels: Sequence[tuple[str, str, str]]) -> dict[str, float]:
    """`shares` of the videos that show their labels.

    Args:
      videos: uint8 (T, H, W, 3) each.
      labels: (color, shape, direction) of each video.
    """
    return shares([judge(video, label) for video, label in zip(videos, labels, strict=True)])


def outline(video: np.ndarray, shape: str) -> float:
    """How well one rigid outline of `shape` covers what a video shows, from 0 to 1.

    The outline may be anywhere in each frame, but keeps its width and height: of the best one, the
    mean over the frames of the intersection over the union of its pixels and the shape's.

    Args:
      video: uint8 (T, H, W, 3).
      shape: one of `SHAPES`.
    """
    segmented = _segment(video.astype(np.float32))
    if segmented is None:
        return 0.0
    mask_THW = segmented[1] > 0.5
    located = _locate(mask_THW.astype(np.float32))
    if located is None:
        return 0.0
    frames, center_N2, spread_2 = located
    mask_NHW, best = mask_THW[frames], (-1.0, spread_2, center_N2)

    def overlap_N(spread, center):
        inside_NHW = _distances(mask_NHW.shape[1:], center, spread)[shape] < 0
        union_N = (inside_NHW | mask_NHW).sum((1, 2))
        return (inside_NHW & mask_NHW).sum((1, 2)) / np.maximum(union_N, 1)

    steps = np.linspace(-1, 1, 5)  # pixels
    for scale in (0.06, 0.06, 0.02):
        _, spread, center = best
        for factors in itertools.product(1 + scale * np.arange(-3, 4), repeat=2):
            overlap = float(overlap_N(spread * factors, center).mean())
            best = max(best, (overlap, spread * factors, center), key=lambda found: found[0])
        _, spread, center = best
        moved = [center + offset for offset in itertools.product(steps, repeat=2)]
        overlaps_KN = np.stack([overlap_N(spread, place) for place in moved])
        chosen_N = overlaps_KN.argmax(axis=0)
        center = np.stack(moved)[chosen_N, np.arange(len(chosen_N))]
        best = (float(overlaps_KN.max(axis=0).mean()), spread, center)
    # Where there is no shape, nothing is covered.
    return best[0] * len(frames) / len(mask_THW)


def outline_score(
    videos: Iterable[np.ndarray], labels: Sequence[tuple[str, str, str]]
) -> dict[str, float]:
    """`outline` of the labels' shapes: the mean over the videos, and that of the worst tenth."""
    found = sorted(
        outline(video, shape) for video, (_, shape, _) in zip(videos, labels, strict=True)
    )
    worst = found[: max(len(found) // 10, 1)]
    return {"mean": float(np.mean(found)), "worst_tenth": float(np.mean(worst))}


def smooth(video_THW3):
    """Binomial 3x3 filter: takes noise away and leaves a silhouette of several pixels as it is."""
    for axis in (1, 2):
        before = np.take(video_THW3, [0, *range(video_THW3.shape[axis] - 1)], axis)
        after = np.take(video_THW3, [*range(1, video_THW3.shape[axis]), -1], axis)
        video_THW3 = (before + 2 * video_THW3 + after) / 4
    return video_THW3


def _segment(video_THW3):
    """Splits a video into the shape's color and how much of each pixel the shape covers.

    Returns (rgb (3,), coverage (T, H, W) in [0, 1]), or None if nothing is saturated or if one
    color over a plain background does not explain the video.
    """
    saturation_THW = np.ptp(video_THW3, axis=-1)
    peak = np.quantile(saturation_THW, 0.98)
    if peak < LEAST_SATURATION:
        return None
    rgb_3 = np.median(video_THW3[saturation_THW > 0.75 * peak], axis=0)
    muted_THW = saturation_THW < 0.35 * peak
    if muted_THW.mean() < 1 - _MOST_AREA - 0.2:
        return None
    background_HW3 = fit_background(video_THW3, muted_THW)
    # A pixel lies between the background's color and the shape's: how far along is the coverage.
    towards_HW3 = rgb_3 - background_HW3
    coverage_THW = ((video_THW3 - background_HW3) * towards_HW3).sum(-1)
    coverage_THW = np.clip(coverage_THW / np.maximum((towards_HW3**2).sum(-1), 1), 0, 1)
    shape_THW3 = coverage_THW[..., None] * towards_HW3
    unexplained = ((video_THW3 - background_HW3 - shape_THW3) ** 2).sum() / (shape_THW3**2).sum()
    return None if unexplained > _MOST_UNEXPLAINED else (rgb_3, coverage_THW)


def fit_background(video_THW3: np.ndarray, muted_THW: np.ndarray) -> np.ndarray:
    """The plane per color channel, (H, W, 3), that fits a video best where nothing is saturated."""
    n_frames, height, width, _ = video_THW3.shape
    y_H, x_W = np.linspace(-1, 1, height), np.linspace(-1, 1, width)
    terms_HW3 = np.stack(np.broadcast_arrays(1.0, y_H[:, None], x_W), axis=-1)
    terms_N3 = np.broadcast_to(terms_HW3, (n_frames, height, width, 3))[muted_THW]
    plane_33 = np.linalg.solve(terms_N3.T @ terms_N3, terms_N3.T @ video_THW3[muted_THW])
    return terms_HW3 @ plane_33


def _locate(coverage_THW):
    """Finds where the shape is: (indices of frames with it, centroids (N, 2) (y, x), spread (2,)).

    The spread is the root mean square distance of the shape's pixels from its centroid along y and
    x, over all frames. None if the coverage is not one compact patch in most frames.
    """
    height, width = coverage_THW.shape[1:]
    # Noise of the background, spread over the frame, would outweigh the shape in the moments.
    mass_THW = np.clip((coverage_THW - 0.2) / 0.6, 0, 1)
    area_T = mass_THW.sum((1, 2))
    usual = np.median(area_T)
    if not _LEAST_AREA < usual / (height * width) < _MOST_AREA:
        return None
    frames = np.flatnonzero((area_T > 0.5 * usual) & (area_T < 2 * usual))
    if len(frames) < max(2, _LEAST_FRAMES * len(area_T)):
        return None
    mass_NHW, area_N = mass_THW[frames], area_T[frames]
    y_H, x_W = np.arange(height) + 0.5, np.arange(width) + 0.5
    by_row_NH, by_column_NW = mass_NHW.sum(2), mass_NHW.sum(1)
    y_N, x_N = by_row_NH @ y_H / area_N, by_column_NW @ x_W / area_N
    variance_y = (by_row_NH * (y_H - y_N[:, None]) ** 2).sum() / area_N.sum()
    variance_x = (by_column_NW * (x_W - x_N[:, None]) ** 2).sum() / area_N.sum()
    # A filled shape of area A has variances of about A / 12 along each axis (a square exactly).
    if not 0.7 < 12 * np.sqrt(variance_y * variance_x) / usual < 1.6:
        return None
    if not 0.5 < np.sqrt(variance_y / variance_x) < 2:
        return None
    return frames, np.stack([y_N, x_N], 1), np.sqrt([variance_y, variance_x])


def name_color(rgb_3: np.ndarray) -> str | None:
    """The color of an RGB value, of 255; None between two."""
    hue, _, _ = colorsys.rgb_to_hsv(*(rgb_3 / 255))
    for color, (low, high) in _HUES.items():
        if (360 * hue - low) % 360 <= high - low:
            return color
    return None


def name_shape(coverage_NHW: np.ndarray, center_N2: np.ndarray, spread_2: np.ndarray) -> str | None:
    """The shape whose silhouette of the same position and spread resembles the coverage most."""
    distances = _distances(coverage_NHW.shape[1:], center_N2, spread_2)
    # Edges are about three pixels wide after compression and smoothing.
    softness = 3 / np.sqrt(spread_2[0] * spread_2[1])
    energy = (coverage_NHW**2).sum()
    misfit = {}
    for shape, distance_NHW in distances.items():
        silhouette_NHW = np.clip(0.5 - distance_NHW / softness, 0, 1)
        misfit[shape] = ((coverage_NHW - silhouette_NHW) ** 2).sum() / energy
    best, second, _ = sorted(misfit, key=misfit.get)
    clear = misfit[best] < min(_LARGEST_MISFIT, misfit[second] / _LEAST_MARGIN)
    return best if clear else None


def _distances(sides, center_N2, spread_2):
    """Of each pixel to the outlines of a circle, a square and a triangle of this spread, in units
    of the spread, negative inside: (N, H, W) each."""
    height, width = sides
    y_NH1 = (np.arange(height) + 0.5 - center_N2[:, :1])[:, :, None] / spread_2[0]
    x_N1W = (np.arange(width) + 0.5 - center_N2[:, 1:])[:, None, :] / spread_2[1]
    half_base = np.sqrt(6)
    below = np.sqrt(2)  # from the centroid down to the base; the apex is 2 * below above it
    slope = 3 * below / half_base
    return {
        "circle": np.hypot(x_N1W, y_NH1) - 2,
        "square": np.maximum(np.abs(x_N1W), np.abs(y_NH1)) - np.sqrt(3),
        "triangle": np.maximum(
            y_NH1 - below, (np.abs(x_N1W) * slope - y_NH1 - 2 * below) / np.hypot(slope, 1)
        ),
    }


def _direction(frames, center_N2, n_frames, sides):
    """The axis direction along which the centroid travels steadily, by a least-squares line."""
    time_N = frames - frames.mean()
    speed_2 = time_N @ center_N2 / (time_N @ time_N)
    travel_2 = speed_2 * (n_frames - 1) / np.array(sides)
    axis = int(np.argmax(np.abs(travel_2)))
    if abs(travel_2[axis]) < max(_LEAST_TRAVEL, 2 * abs(travel_2[1 - axis])):
        return None
    along_N = center_N2[:, axis] - center_N2[:, axis].mean()
    explained = (time_N * speed_2[axis]) @ along_N / (along_N @ along_N)
    if explained < 0.8:
        return None
    names = (("up", "down"), ("left", "right"))[axis]
    return names[int(travel_2[axis] > 0)]
