"""Reads what things do in a video of the scenes' world back from its pixels, and judges captions.

A reading knows nothing of what was asked: it finds saturated patches on a muted background, follows
them, and names what is clear. A caption is right where the reading says the same.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from opensora_jax.metrics import shapes

# Lengths are in shorter sides of the frame, areas in their squares.
_LEAST_AREA = 0.008  # of a patch that is a thing
_MOST_THINGS = 4
_LEAST_FRAMES = 0.7  # share of frames that show as many things as most do
_LEAST_SHARE = 0.8  # of a thing's frames that have its color
_ENDS = 0.3  # share of the video at either end that says from what, and to what, a color changes
_SMALL = 0.259  # root of the area, up to which a thing is small
_LEAST_WAY, _STILL_WAY = 0.08, 0.05  # from which on a thing moves, and up to which it stands still
_SLOW = 0.255  # way up to which it is slow
_LEAST_LEG = 0.09  # way to the border, and back
_BORDER = 0.07  # how near to it a thing turns
_LEAST_EXPLAINED = 0.8  # of the variance of where a thing is, by a steady motion
_DILATION = 2  # pixels around a patch that belong to it


@dataclasses.dataclass(frozen=True)
class Thing:
    """What is read of one thing; None or empty: not clear, or nothing of the kind.

    Attributes:
      color, becomes: at the begin, and at the end where that is another one.
      direction: left, right, up, down or still; of what bounces, at first.
      frames, center_N2: when it was found, and its centroids (y, x) then, in sides of the frame.
      extent_2: half of its height and width.
    """

    color: str | None
    becomes: str
    shape: str | None
    size: str | None
    direction: str | None
    speed: str | None
    bounces: bool
    frames: np.ndarray
    center_N2: np.ndarray
    extent_2: np.ndarray


def read(video: np.ndarray) -> list[Thing]:
    """What a video shows; nothing where it is not clear what or how much.

    Args:
      video: uint8 (T, H, W, 3), T at least 8, H and W at least 32.

    Raises:
      ValueError: the array is not such a video.
    """
    video = np.asarray(video)
    good = video.dtype == np.uint8 and video.ndim == 4 and video.shape[-1] == 3
    if not good or len(video) < 8 or min(video.shape[1:3]) < 32:
        raise ValueError(
            f"video is {video.dtype} {video.shape}: expected uint8 (T, H, W, 3), T >= 8, H, W >= 32"
        )
    video_THW3 = shapes.smooth(video.astype(np.float32))
    saturation_THW = np.ptp(video_THW3, axis=-1)
    peak = np.quantile(saturation_THW, 0.995)
    muted_THW = saturation_THW < 0.35 * peak
    if peak < shapes.LEAST_SATURATION or muted_THW.mean() < 0.4:
        return []
    # What differs from the background in color, not in brightness alone.
    difference_THW3 = video_THW3 - shapes.fit_background(video_THW3, muted_THW)
    strength_THW = np.ptp(difference_THW3, axis=-1)
    labels_THW, n_T = _patches(strength_THW > 0.4 * np.quantile(strength_THW, 0.995))
    counts = Counter(n_T[n_T > 0].tolist())
    n = counts.most_common(1)[0][0] if counts else 0
    frames = np.flatnonzero(n_T == n)
    if not 0 < n <= _MOST_THINGS or len(frames) < _LEAST_FRAMES * len(video):
        return []
    tracks = _follow([_locate(labels_THW[t], n) for t in frames])
    return [
        _describe(
            *(video_THW3[frames], difference_THW3[frames], strength_THW[frames]),
            labels_THW[frames] == track_N[:, None, None],
            frames,
            len(video),
        )
        for track_N in tracks
    ]


def judge(video: np.ndarray, facts: Mapping[str, Any]) -> dict[str, bool]:
    """`compare` of what is read of a video."""
    return compare(read(video), facts)


def compare(things: Sequence[Thing], facts: Mapping[str, Any]) -> dict[str, bool]:
    """Which of a caption's facts a reading shows: "all", and each property that is asked for.

    A property of several things is shown where all of them have theirs; "all" also takes as many
    things as are asked for.

    Args:
      things: of `read`.
      facts: as `data.scenes.Scene.facts` has them.
    """
    asked = facts["things"]
    # Which thing is which: as agrees best.
    best: list[dict[str, bool]] = []
    slots = [*things, *[None] * max(len(asked) - len(things), 0)]
    for chosen in itertools.permutations(slots, len(asked)):
        results = [_compare(thing, wanted) for thing, wanted in zip(chosen, asked, strict=True)]
        if "relation" in facts:
            results.append({"relation": relation(*chosen) == facts["relation"]})
        if not best or _n_right(results) > _n_right(best):
            best = results
    names = dict.fromkeys(name for result in best for name in result)
    shown = {name: all(result.get(name, True) for result in best) for name in names}
    as_many = len(things) == len(asked)
    if facts["category"] == "count":
        shown["count"] = as_many
    return {"all": as_many and all(shown.values()), **shown}


def relation(thing: Thing | None, other: Thing | None) -> str | None:
    """Where one thing is of another all the time: above, below, left or right."""
    if thing is None or other is None:
        return None
    _, i, j = np.intersect1d(thing.frames, other.frames, return_indices=True)
    apart_N2 = thing.center_N2[i] - other.center_N2[j]
    mean_2 = apart_N2.mean(axis=0)
    axis = int(np.argmax(np.abs(mean_2)))
    sign = np.sign(mean_2[axis])
    least = 0.7 * (thing.extent_2 + other.extent_2)[axis]
    if abs(mean_2[axis]) < 1.5 * abs(mean_2[1 - axis]) or (sign * apart_N2[:, axis]).min() < least:
        return None
    return (("above", "below"), ("left", "right"))[axis][int(sign > 0)]


def _n_right(results):
    return sum(sum(result.values()) for result in results)


def _compare(thing, wanted):
    """Which properties of what is asked for one thing has; None has none."""
    found = thing or Thing(*(None,) * 6, False, *(None,) * 3)
    result = {
        "color": found.color == wanted["color"] and ("becomes" in wanted or not found.becomes),
        "shape": found.shape == wanted["shape"],
        "direction": found.direction == wanted["direction"]
        and ("bounces" in wanted or not found.bounces),
    }
    for name in ("size", "speed"):
        if name in wanted:
            result[name] = getattr(found, name) == wanted[name]
    if "becomes" in wanted:
        result["change"] = found.becomes == wanted["becomes"]
    if "bounces" in wanted:
        result["bounce"] = found.bounces
    return result


def _patches(mask_THW):
    """(labels (T, H, W) from 1 on in each frame, how many (T,)) of the patches large enough."""
    labels_THW = np.zeros(mask_THW.shape, np.int32)
    n_T = np.zeros(len(mask_THW), np.int32)
    least = _LEAST_AREA * min(mask_THW.shape[1:]) ** 2
    for t, mask_HW in enumerate(mask_THW):
        labels_HW, _ = ndimage.label(mask_HW)
        areas = np.bincount(labels_HW.reshape(-1))
        large = np.flatnonzero(areas[1:] >= least) + 1
        new = np.zeros(len(areas), np.int32)
        new[large] = np.arange(1, len(large) + 1)
        labels_THW[t], n_T[t] = new[labels_HW], len(large)
    return labels_THW, n_T


def _locate(labels_HW, n):
    """Centroids (n, 2) of the labels 1 to n."""
    return np.array(ndimage.center_of_mass(labels_HW > 0, labels_HW, range(1, n + 1)))


def _follow(centers):
    """Of each thing the label that it has in each frame: (n, N); nearest centroids are the same."""
    chosen = [np.arange(len(centers[0]))]
    for before, now in itertools.pairwise(centers):
        apart = np.linalg.norm(before[chosen[-1]][:, None] - now[None], axis=-1)
        chosen.append(linear_sum_assignment(apart)[1])
    return np.stack(chosen, axis=1) + 1


def _describe(video_NHW3, difference_NHW3, strength_NHW, mask_NHW, frames, n_frames):
    """Everything about the thing that covers `mask_NHW` of these frames."""
    height, width = mask_NHW.shape[1:]
    side = min(height, width)
    near_NHW = ndimage.binary_dilation(
        mask_NHW, ndimage.generate_binary_structure(3, 1)[1:2], iterations=_DILATION
    )
    coverage_NHW = np.zeros(mask_NHW.shape, np.float32)
    colors = []
    for i, mask_HW in enumerate(mask_NHW):
        core_HW = mask_HW & (strength_NHW[i] >= 0.75 * np.quantile(strength_NHW[i][mask_HW], 0.9))
        colors.append(shapes.name_color(np.median(video_NHW3[i][core_HW], axis=0)))
        # A pixel lies between the background's color and the thing's: how far along.
        towards_3 = np.median(difference_NHW3[i][core_HW], axis=0)
        along_HW = difference_NHW3[i] @ towards_3 / max(towards_3 @ towards_3, 1)
        coverage_NHW[i] = np.clip(along_HW, 0, 1) * near_NHW[i]
    mass_NHW = np.clip((coverage_NHW - 0.2) / 0.6, 0, 1)
    area_N = np.maximum(mass_NHW.sum((1, 2)), 1)
    y_H, x_W = np.arange(height) + 0.5, np.arange(width) + 0.5
    by_row_NH, by_column_NW = mass_NHW.sum(2), mass_NHW.sum(1)
    center_N2 = np.stack([by_row_NH @ y_H, by_column_NW @ x_W], 1) / area_N[:, None]
    variance_2 = [
        (by_row_NH * (y_H - center_N2[:, :1]) ** 2).sum() / area_N.sum(),
        (by_column_NW * (x_W - center_N2[:, 1:]) ** 2).sum() / area_N.sum(),
    ]
    usual = np.median(area_N)
    steady = np.mean((area_N > 0.6 * usual) & (area_N < 1.6 * usual)) >= _LEAST_SHARE
    color, becomes = _colors(colors, frames, n_frames)
    moved = _motion(frames, center_N2 / side, n_frames, (mask_NHW, side))
    return Thing(
        color=color,
        becomes=becomes,
        shape=_shape(coverage_NHW, center_N2, variance_2, usual),
        size=("large" if np.sqrt(usual) / side > _SMALL else "small") if steady else None,
        frames=frames,
        center_N2=center_N2 / side,
        extent_2=np.sqrt(np.array(variance_2) * 3) / side,
        **moved,
    )


def _colors(colors, frames, n_frames):
    """(color, what it becomes or empty), (None, empty) where it does not keep one at either end."""
    time_N = frames / (n_frames - 1)

    def usual(chosen_N):
        found = Counter(c for c, chosen in zip(colors, chosen_N, strict=True) if chosen)
        name, n = found.most_common(1)[0] if found else (None, 0)
        return name if n >= _LEAST_SHARE * max(chosen_N.sum(), 1) else None

    first, last = usual(time_N <= _ENDS), usual(time_N >= 1 - _ENDS)
    if first is None or last is None:
        return None, ""
    if first != last:
        return first, last
    return (first, "") if usual(time_N >= 0) == first else (None, "")


def _shape(coverage_NHW, center_N2, variance_2, area):
    # A filled shape of area A has variances of about A / 12 along each axis (a square exactly).
    height, width = np.sqrt(variance_2)
    if not (0.7 < 12 * height * width / area < 1.6 and 0.5 < height / width < 2):
        return None
    return shapes.name_shape(coverage_NHW, center_N2, np.array([height, width]))


def _motion(frames, center_N2, n_frames, masks):
    """direction, speed and bounces, from where a thing was (y, x)."""
    unclear = {"direction": None, "speed": None, "bounces": False}
    time_N = frames - frames.mean()
    slope_2 = time_N @ center_N2 / (time_N @ time_N)
    way_2 = slope_2 * (n_frames - 1)
    spread_2 = np.ptp(center_N2, axis=0)
    if spread_2.max() < _STILL_WAY:
        return unclear | {"direction": "still"}
    axis = int(np.argmax(spread_2))
    along_N = center_N2[:, axis] - center_N2[:, axis].mean()
    total = along_N @ along_N
    names = (("up", "down"), ("left", "right"))[axis]
    legs, left = _legs(frames, center_N2[:, axis])
    if left < 0.3 * ((along_N - time_N * slope_2[axis]) ** 2).sum() and left < 0.1 * total:
        first, last, turn = legs
        way_there, way_back = first * (turn - frames[0]), last * (frames[-1] - turn)
        if min(abs(way_there), abs(way_back)) >= _LEAST_LEG and way_there * way_back < 0:
            if np.ptp(center_N2[:, 1 - axis]) > 0.5 * spread_2[axis]:
                return unclear
            if not _at_border(masks, frames, turn, axis, way_there > 0):
                return unclear
            return unclear | {"direction": names[int(way_there > 0)], "bounces": True}
    if abs(way_2[axis]) < max(_LEAST_WAY, 2 * abs(way_2[1 - axis])):
        return unclear
    if (time_N * slope_2[axis]) @ along_N < _LEAST_EXPLAINED * total:
        return unclear
    speed = "slow" if abs(way_2[axis]) < _SLOW else "fast"
    return {"direction": names[int(way_2[axis] > 0)], "speed": speed, "bounces": False}


def _legs(frames, place_N):
    """((slope before, slope after, when it turns), squared error) of the best way with one turn."""
    best = (0.0, 0.0, 0.0), np.inf
    for turn in np.linspace(*np.quantile(frames, (0.25, 0.75)), 33):
        terms_N3 = np.stack(
            [np.ones(len(frames)), np.minimum(frames - turn, 0), np.maximum(frames - turn, 0)], 1
        )
        found, *_ = np.linalg.lstsq(terms_N3, place_N, rcond=None)
        error = ((terms_N3 @ found - place_N) ** 2).sum()
        if error < best[1]:
            best = (found[1], found[2], turn), error
    return best


def _at_border(masks, frames, turn, axis, towards_end):
    """Whether the thing is at the border that it came to, when it turns."""
    mask_NHW, side = masks
    mask_HW = mask_NHW[np.argmin(np.abs(frames - turn))]
    rows = np.flatnonzero(mask_HW.any(1 - axis))
    distance = mask_HW.shape[axis] - 1 - rows[-1] if towards_end else rows[0]
    return distance <= _BORDER * side
