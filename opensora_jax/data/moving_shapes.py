"""Renders the dataset of moving shapes: small captioned videos whose content is known exactly.

Each video shows one colored shape that moves in a straight line over a muted background. Color,
shape and direction can be read from the pixels alone (`metrics.shapes.detect`), so a model trained
on these videos can be graded without a person looking at its samples.
"""

import colorsys
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from opensora_jax.data import made_videos
from opensora_jax.data.buckets import Size

COLORS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = ("left", "right", "up", "down")

# Never trained on, to see whether attributes recombine. Each color and each direction occurs twice,
# each shape two or three times, so that every pair of attributes is still seen in training.
HELD_OUT = (
    ("red", "circle", "right"),
    ("red", "square", "down"),
    ("green", "triangle", "up"),
    ("green", "circle", "left"),
    ("blue", "square", "down"),
    ("blue", "triangle", "right"),
    ("yellow", "circle", "left"),
    ("yellow", "square", "up"),
)
ALL = tuple((c, s, d) for c in COLORS for s in SHAPES for d in DIRECTIONS)
SEEN = tuple(combination for combination in ALL if combination not in HELD_OUT)

_HUE_DEGREES = {"red": (-7, 7), "green": (112, 134), "blue": (218, 236), "yellow": (52, 60)}
STEP = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y), y down
DIRECTION_WORDS = {
    "left": ("to the left", "left"),
    "right": ("to the right", "right"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
}
_PHRASINGS = (
    "a {color} {shape} moves {direction}",
    "a {color} {shape} is moving {direction}",
    "a {color} {shape} goes {direction}",
    "the {color} {shape} moves {direction}",
    "the {color} {shape} is going {direction}",
)


def captions(color: str, shape: str, direction: str) -> list[str]:
    """All phrasings of one combination, the plainest first; each names all three attributes."""
    _check_combination(color, shape, direction)
    return [
        phrasing.format(color=color, shape=shape, direction=words)
        for words in DIRECTION_WORDS[direction]
        for phrasing in _PHRASINGS
    ]


def render(
    rng: np.random.Generator,
    color: str,
    shape: str,
    direction: str,
    n_frames: int,
    resolution: int | tuple[int, int],
) -> np.ndarray:
    """Draws one video, uint8 (n_frames, height, width, 3).

    The generator decides size, start, speed, exact hue and background. The shape travels 25-50% of
    the frame's side along its way and is wholly visible throughout; its size is a share of the
    shorter side.

    Args:
      resolution: (height, width), or one number for both.

    Raises:
      ValueError: an unknown attribute, fewer than 2 frames or a resolution below 16.
    """
    _check_combination(color, shape, direction)
    height, width = _sides(resolution)
    shorter = min(height, width)
    if n_frames < 2 or shorter < 16:
        raise ValueError(
            f"n_frames={n_frames}, resolution={resolution}: expected at least 2 and at least 16"
        )
    # Lengths are fractions of the shorter side, x to the right and y down. "low" and "high" are how
    # far the shape reaches from its centroid towards smaller and larger coordinates.
    # Of the circle. The square is as wide, so that its corners stick out; one of the circle's area
    # differs from it by few pixels. The triangle has the circle's area, or it would be too wide.
    diameter = rng.uniform(0.4, 0.5)
    low, high = extent(shape, diameter)
    margin = 0.02
    frame = np.array([width, height]) / shorter
    room = frame - 2 * margin - low - high
    step = np.array(STEP[direction])
    axis = int(step[0] == 0)  # 0: moves along x, 1: along y
    travel = rng.uniform(0.25, min(0.5, room[axis] / frame[axis])) * frame[axis]
    start = (
        margin + low + rng.uniform(0, 1, 2) * np.where(np.arange(2) == axis, room - travel, room)
    )
    if step[axis] < 0:
        start[axis] += travel
    center_T2 = start + np.linspace(0, travel, n_frames)[:, None] * step

    y_H, x_W = (np.arange(height) + 0.5) / shorter, (np.arange(width) + 0.5) / shorter
    alpha_THW1 = coverage(shape, center_T2, diameter, y_H, x_W, shorter)

    shape_rgb = draw_color(rng, color)
    background_HW3 = draw_background(rng, y_H / frame[1], x_W / frame[0])
    video_THW3 = alpha_THW1 * shape_rgb + (1 - alpha_THW1) * background_HW3
    return np.round(255 * np.clip(video_THW3, 0, 1)).astype(np.uint8)


def write_dataset(
    folder: str | os.PathLike,
    *,
    n_videos: int,
    combinations: tuple[tuple[str, str, str], ...],
    seed: int,
    n_frames: int | None = None,
    resolution: int | tuple[int, int] | None = None,
    sizes: Sequence[Size] = (),
    fps: float,
    n_captions: int,
) -> bool:
    """Writes a folder as `made_videos.write` does.

    Video i depends on seed, i and sizes only and shows combinations[i % len(combinations)].

    Args:
      sizes: instead of `n_frames` and `resolution`: of each video one is drawn.

    Returns:
      False if the folder was whole already, True if anything was written.

    Raises:
      ValueError: a bad parameter, or the folder was made with other parameters.
    """
    n_phrasings = min(len(captions(*combination)) for combination in combinations)
    params = {
        "n_videos": n_videos,
        "combinations": [list(combination) for combination in combinations],
        "seed": seed,
        **made_videos.sizes(n_frames, resolution, sizes),
        "fps": fps,
        "n_captions": n_captions,
    }
    made_videos.check(params, n_phrasings=n_phrasings, least_frames=2, least_side=16)

    def make(i: int) -> tuple[dict[str, Any], Callable[[], np.ndarray]]:
        combination = combinations[i % len(combinations)]
        rng = np.random.default_rng([seed, i])
        chosen = rng.choice(n_phrasings, n_captions, replace=False)
        phrasings = captions(*combination)
        entry = {"captions": [phrasings[j] for j in chosen]}
        entry |= dict(zip(("color", "shape", "direction"), combination, strict=True))
        size = made_videos.size_of(params, i)
        frame = (size.height, size.width)
        return entry, lambda: render(rng, *combination, size.n_frames, frame)

    return made_videos.write(folder, make, params)


def _sides(resolution):
    """(height, width)."""
    return (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)


def _check_combination(color, shape, direction):
    for name, value, known in (
        ("color", color, COLORS),
        ("shape", shape, SHAPES),
        ("direction", direction, DIRECTIONS),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(known)}")


def _triangle_side(diameter):
    return diameter * np.sqrt(np.pi / np.sqrt(3))


def coverage(
    shape: str,
    center_T2: np.ndarray,
    diameter: float,
    y_H: np.ndarray,
    x_W: np.ndarray,
    resolution: float,
) -> np.ndarray:
    """How much of each pixel a shape covers, from 0 to 1: (T, H, W, 1).

    Args:
      center_T2: (x, y) of its centroid, y down.
      y_H, x_W: of the pixels' centers.
      resolution: pixels a unit of length.
    """
    x_T1W = (x_W - center_T2[:, :1])[:, None, :]
    y_TH1 = (y_H - center_T2[:, 1:])[:, :, None]
    distance_THW = signed_distance(shape, x_T1W, y_TH1, diameter)
    # Coverage falls from 1 to 0 over one pixel around the edge: antialiasing.
    return np.clip(0.5 - distance_THW * resolution, 0, 1)[..., None]


def extent(shape, diameter):
    """How far the shape reaches from its centroid: (left, up), (right, down)."""
    if shape == "triangle":
        side = _triangle_side(diameter)
        height = side * np.sqrt(3) / 2
        return np.array([side / 2, 2 / 3 * height]), np.array([side / 2, height / 3])
    half = diameter / 2
    return np.array([half, half]), np.array([half, half])


def signed_distance(shape, x, y, diameter):
    """Distance to the outline, negative inside; x and y are relative to the centroid, y down."""
    if shape == "circle":
        return np.hypot(x, y) - diameter / 2
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - diameter / 2
    # Equilateral, one corner up: all three sides lie an inradius from the centroid.
    inradius = _triangle_side(diameter) / (2 * np.sqrt(3))
    return np.maximum(np.abs(x) * np.sqrt(3) / 2 - y / 2, y) - inradius


def draw_color(rng: np.random.Generator, color: str) -> np.ndarray:
    """A saturated tone of one of `COLORS`: RGB from 0 to 1."""
    hue = rng.uniform(*_HUE_DEGREES[color]) / 360
    return np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.85, 1), rng.uniform(0.85, 1)))


def draw_background(rng: np.random.Generator, y_H: np.ndarray, x_W: np.ndarray) -> np.ndarray:
    """A dark to light, barely tinted color with a soft linear gradient: floats (H, W, 3)."""
    base_3 = rng.uniform(0.15, 0.85) + rng.uniform(-0.04, 0.04, 3)
    slope_x, slope_y = rng.uniform(-0.15, 0.15, 2)
    gradient_HW = (x_W - 0.5) * slope_x + (y_H[:, None] - 0.5) * slope_y
    return base_3 + gradient_HW[..., None]
