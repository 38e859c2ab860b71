"""Renders scenes: a world that asks more than that of one moving shape.

Each video shows a scene of one of five categories: how a thing looks and moves, two things and
where one is of the other, how many there are, what changes its color, what comes back from the
border. All that a caption says can be read from the pixels alone (`metrics.scenes`): things never
touch, so that each is one patch; and a speed, a change or a way back is said of the whole video.
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from opensora_jax.data import made_videos
from opensora_jax.data.buckets import Size
from opensora_jax.data.moving_shapes import (
    COLORS,
    DIRECTION_WORDS,
    DIRECTIONS,
    SHAPES,
    STEP,
    coverage,
    draw_background,
    draw_color,
    extent,
)

STILL = "still"
LEAST_FRAMES = 16  # in fewer, a change of color or a turn at the border is hardly there
LEAST_SIDE = 48  # pixels; in fewer, the shape of small things cannot be told

_SIZES = {"small": (0.2, 0.23), "large": (0.33, 0.36)}  # diameters, in frame sides
_SPEEDS = {"slow": (0.13, 0.18), "fast": (0.36, 0.46)}  # ways, from the first frame to the last
_USUAL_DIAMETER, _USUAL_WAY = (0.22, 0.28), (0.2, 0.32)
_BOUNCING_WAY = (0.44, 0.6)  # there and back
_MARGIN, _GAP = 0.02, 0.09  # to the border, and between things
_FADE = 0.2  # of the video, that a change of color takes
_SPEED_WORDS = {"slow": ("slowly",), "fast": ("fast", "quickly")}
_NUMBERS = {1: "one", 2: "two", 3: "three"}
_RELATION_WORDS = {
    "above": "above",
    "below": "below",
    "left": "on the left of",
    "right": "on the right of",
}


@dataclasses.dataclass(frozen=True)
class Thing:
    """What a caption says of one thing; empty: nothing.

    Attributes:
      direction: left, right, up, down or still; of what bounces, at first.
      size: small or large.
      speed: slow or fast.
      becomes: its color at the end.
      bounces: whether it comes back from the border.
    """

    color: str
    shape: str
    direction: str = STILL
    size: str = ""
    speed: str = ""
    becomes: str = ""
    bounces: bool = False


@dataclasses.dataclass(frozen=True)
class Scene:
    """All that a video shows.

    Attributes:
      things: of two, the first is the one that moves.
      relation: where the first is of the second all the time: above, below, left or right.
    """

    category: str
    things: tuple[Thing, ...]
    relation: str = ""

    def facts(self) -> dict[str, Any]:
        """What its captions say, as JSON has it and `metrics.scenes` compares it."""
        things = [
            {name: value for name, value in dataclasses.asdict(thing).items() if value}
            for thing in self.things
        ]
        facts = {"category": self.category, "things": things}
        return facts | ({"relation": self.relation} if self.relation else {})


def _others(color):
    return tuple(c for c in COLORS if c != color)


def _scenes() -> dict[str, list[tuple[Scene, int]]]:
    """Of each category all scenes, each with the sum of the places of its attributes' values."""
    moves = (*DIRECTIONS, STILL)
    found: dict[str, list[tuple[Scene, int]]] = {}

    def add(category: str, choices: tuple, make: Callable[..., Scene]) -> None:
        found[category] = [
            (make(*(values[i] for values, i in zip(choices, places, strict=True))), sum(places))
            for places in itertools.product(*(range(len(values)) for values in choices))
        ]

    add(
        "motion",
        (COLORS, SHAPES, DIRECTIONS, tuple(_SIZES), tuple(_SPEEDS)),
        lambda c, s, d, size, speed: Scene("motion", (Thing(c, s, d, size, speed),)),
    )
    add(
        "relation",
        (COLORS, SHAPES, DIRECTIONS, tuple(_RELATION_WORDS), range(3), SHAPES),
        lambda c, s, d, relation, i, other: Scene(
            "relation", (Thing(c, s, d), Thing(_others(c)[i], other)), relation
        ),
    )
    add(
        "count",
        (tuple(_NUMBERS), COLORS, SHAPES, moves),
        lambda n, c, s, d: Scene("count", (Thing(c, s, d),) * n),
    )
    add(
        "change",
        (COLORS, range(3), SHAPES, moves),
        lambda c, i, s, d: Scene("change", (Thing(c, s, d, becomes=_others(c)[i]),)),
    )
    add(
        "bounce",
        (COLORS, SHAPES, DIRECTIONS),
        lambda c, s, d: Scene("bounce", (Thing(c, s, d, bounces=True),)),
    )
    return found


_SCENES = _scenes()
CATEGORIES = tuple(_SCENES)
# Never trained on, to see whether attributes recombine: the scenes whose attributes' values have
# places in their lists that sum to a multiple of six. Every pair of values is seen together.
_EVERY = 6
SEEN = {name: [s for s, n in scenes if n % _EVERY] for name, scenes in _SCENES.items()}
HELD_OUT = {name: [s for s, n in scenes if not n % _EVERY] for name, scenes in _SCENES.items()}
ALL = {name: [scene for scene, _ in scenes] for name, scenes in _SCENES.items()}
SPLITS = {"all": ALL, "seen": SEEN, "held_out": HELD_OUT}


def captions(scene: Scene) -> list[str]:
    """Ten phrasings, the plainest first; each says all of the scene's facts and nothing else."""
    first = scene.things[0]
    n = len(scene.things)
    noun = f"{first.color} {first.shape}"
    match scene.category:
        case "motion":
            noun = f"{first.size} {noun}"
            phrasings = (
                "a {noun} moves {how} {way}",
                "a {noun} is moving {how} {way}",
                "a {noun} goes {how} {way}",
                "{how} a {noun} moves {way}",
                "the {noun} is going {how} {way}",
            )
        case "relation":
            phrasings = (
                "a {noun} moves {way} {where} a {other} that stands still",
                "a {noun} is moving {way} {where} a {other} that does not move",
                "a {noun} goes {way} {where} a {other} that stands still",
                "{where} a {other} that stands still a {noun} moves {way}",
                "the {noun} moves {way} {where} the {other} that does not move",
            )
        case "count" if n > 1:
            noun = f"{_NUMBERS[n]} {noun}s"
            phrasings = (
                "{noun} {move}",
                "the {noun} {move}",
                "{noun} that {move}",
                "there are {noun} that {move}",
                "all {noun} {move}",
            )
        case "count":
            phrasings = (
                "one {noun} {moves}",
                "the one {noun} {moves}",
                "one {noun} that {moves}",
                "there is one {noun} that {moves}",
                "only one {noun} {moves}",
            )
        case "change":
            phrasings = (
                "a {noun} turns {becomes} while it {moves}",
                "the {noun} turns {becomes} while it {moves}",
                "a {noun} that {moves} turns {becomes}",
                "a {noun} {moves} and becomes {becomes}",
                "while it {moves} a {noun} becomes {becomes}",
            )
        case "bounce":
            phrasings = (
                "a {noun} moves {way} and bounces off the border",
                "a {noun} goes {way} and comes back from the border",
                "the {noun} moves {way} and bounces off the border",
                "a {noun} is moving {way} and then bounces off the border",
                "the {noun} goes {way}, bounces off the border and comes back",
            )
    texts = []
    for i in range(2):
        if first.direction == STILL:
            still = ("stands still", "stand still") if i == 0 else ("does not move", "do not move")
            moves, move = still
            way = ""
        else:
            way = DIRECTION_WORDS[first.direction][i]
            moves, move = f"moves {way}", f"move {way}"
        fields = {"noun": noun, "way": way, "moves": moves, "move": move, "becomes": first.becomes}
        if first.speed:
            fields["how"] = _SPEED_WORDS[first.speed][-i]
        if scene.relation:
            other = scene.things[1]
            fields |= {"where": _RELATION_WORDS[scene.relation]}
            fields |= {"other": f"{other.color} {other.shape}"}
        texts += [phrasing.format(**fields) for phrasing in phrasings]
    return texts


def render(
    rng: np.random.Generator, scene: Scene, n_frames: int, height: int, width: int
) -> np.ndarray:
    """Draws one video, uint8 (n_frames, height, width, 3).

    The generator decides what the scene leaves open: sizes, places, ways, tones and background.
    Things are wholly visible throughout and never touch. Lengths are in shorter sides of the frame.

    Raises:
      ValueError: fewer frames than `LEAST_FRAMES`, or a side below `LEAST_SIDE`.
    """
    side = min(height, width)
    if n_frames < LEAST_FRAMES or side < LEAST_SIDE:
        raise ValueError(
            f"n_frames={n_frames}, height={height}, width={width}: expected at least "
            f"{LEAST_FRAMES} frames of at least {LEAST_SIDE} x {LEAST_SIDE}"
        )
    size_2 = np.array([width, height]) / side
    while (placed := _place(rng, scene, n_frames, size_2)) is None:
        pass  # it did not fit into the frame: drawn anew
    y_H, x_W = (np.arange(height) + 0.5) / side, (np.arange(width) + 0.5) / side
    background_HW3 = draw_background(rng, y_H / size_2[1], x_W / size_2[0])
    video_THW3 = np.broadcast_to(background_HW3, (n_frames, height, width, 3))
    tone = draw_color(rng, scene.things[0].color)  # things of one color have one tone
    for thing, (diameter, center_T2) in zip(scene.things, placed, strict=True):
        if thing.color != scene.things[0].color:
            tone = draw_color(rng, thing.color)
        rgb_T3 = np.broadcast_to(tone, (n_frames, 3))
        if thing.becomes:
            middle = rng.uniform(0.45, 0.55)
            time_T = np.linspace(0, 1, n_frames)
            along_T1 = np.clip((time_T - middle) / _FADE + 0.5, 0, 1)[:, None]
            rgb_T3 = (1 - along_T1) * tone + along_T1 * draw_color(rng, thing.becomes)
        alpha_THW1 = coverage(thing.shape, center_T2, diameter, y_H, x_W, side)
        video_THW3 = alpha_THW1 * rgb_T3[:, None, None] + (1 - alpha_THW1) * video_THW3
    return np.round(255 * np.clip(video_THW3, 0, 1)).astype(np.uint8)


def _place(rng, scene, n_frames, size_2):
    """Of each thing (diameter, centroids (T, 2) as (x, y)); None where that does not fit."""
    first, n = scene.things[0], len(scene.things)
    ways = _SPEEDS[first.speed] if first.speed else _USUAL_WAY
    step = np.array(STEP.get(first.direction, (0, 0)))
    time_T = np.linspace(0, 1, n_frames)
    if first.bounces:
        turn = rng.uniform(0.42, 0.58)
        path_T2 = rng.uniform(*_BOUNCING_WAY) * (turn - np.abs(time_T - turn))[:, None] * step
    else:
        path_T2 = rng.uniform(*ways) * time_T[:, None] * step
    diameters = [
        rng.uniform(*(_SIZES[thing.size] if thing.size else _USUAL_DIAMETER))
        for thing in scene.things
    ]
    # Things of one count are of one size and go one way together.
    diameters = diameters[:1] * n if scene.category == "count" else diameters
    paths = [path_T2 * (thing.direction != STILL) for thing in scene.things]
    extents = [extent(t.shape, d) for t, d in zip(scene.things, diameters, strict=True)]
    # Of each thing the box that its way takes, from where it starts.
    lows = [path.min(0) - low for path, (low, _) in zip(paths, extents, strict=True)]
    highs = [path.max(0) + high for path, (_, high) in zip(paths, extents, strict=True)]
    if scene.relation:
        sign, axis = _towards(scene.relation)
        offset_2 = -(paths[0][0] + paths[0][-1]) / 2  # the middle of its way is at the other thing
        offset_2[1 - axis] += rng.uniform(-0.05, 0.05)
        far = highs[1] - (lows[0] + offset_2) if sign > 0 else (highs[0] + offset_2) - lows[1]
        offset_2[axis] += sign * (far[axis] + _GAP + rng.uniform(0, 0.1))
        lows[0], highs[0] = lows[0] + offset_2, highs[0] + offset_2
        low, high = np.minimum(*lows), np.maximum(*highs)
        room = size_2 - 2 * _MARGIN - (high - low)
        if room.min() < 0:
            return None
        origin = _MARGIN - low + rng.uniform(0, 1, 2) * room
        starts = [origin + offset_2, origin]
    else:
        room = size_2 - 2 * _MARGIN - (highs[0] - lows[0])
        if room.min() < 0:
            return None
        starts = [_MARGIN - lows[0] + rng.uniform(0, 1, 2) * room for _ in scene.things]
        if first.bounces:
            axis = int(step[0] == 0)
            border = size_2[axis] - highs[0][axis] if step[axis] > 0 else -lows[0][axis]
            starts[0][axis] = border
        apart = np.array(highs[0]) - lows[0] - np.abs(path_T2[-1] - path_T2[0]) + _GAP
        for a, b in itertools.combinations(starts, 2):
            if (np.abs(a - b) < apart).all():
                return None
    return [
        (diameter, start + path)
        for diameter, start, path in zip(diameters, starts, paths, strict=True)
    ]


def _towards(relation):
    """(sign, axis) of where a relation says that the first thing is: axis 0 is x, 1 is y, down."""
    direction = {"above": "up", "below": "down"}.get(relation, relation)
    step = STEP[direction]
    axis = int(step[0] == 0)
    return step[axis], axis


def draw(rng: np.random.Generator, split: str, i: int) -> Scene:
    """A scene of a split of `SPLITS`; categories take turns in i."""
    scenes = SPLITS[split][CATEGORIES[i % len(CATEGORIES)]]
    return scenes[rng.integers(len(scenes))]


def write_dataset(
    folder: str | os.PathLike,
    *,
    n_videos: int,
    split: str,
    seed: int,
    n_frames: int | None = None,
    resolution: int | tuple[int, int] | None = None,
    sizes: Sequence[Size] = (),
    fps: float,
    n_captions: int,
) -> bool:
    """Writes a folder as `made_videos.write` does; video i depends on seed, split and i only, and
    on sizes.

    Each entry of captions.json has its scene's facts.

    Args:
      split: seen, held_out or all.
      sizes: instead of `n_frames` and `resolution`: of each video one is drawn.

    Returns:
      False if the folder was whole already, True if anything was written.

    Raises:
      ValueError: a bad parameter, or the folder was made with other parameters.
    """
    params = {
        "world": "scenes",
        "n_videos": n_videos,
        "split": split,
        "seed": seed,
        **made_videos.sizes(n_frames, resolution, sizes),
        "fps": fps,
        "n_captions": n_captions,
    }
    made_videos.check(params, n_phrasings=10, least_frames=LEAST_FRAMES, least_side=LEAST_SIDE)

    def make(i: int) -> tuple[dict[str, Any], Callable[[], np.ndarray]]:
        rng = np.random.default_rng([seed, i])
        scene = draw(rng, split, i)
        phrasings = captions(scene)
        chosen = rng.choice(len(phrasings), n_captions, replace=False)
        entry = {"captions": [phrasings[j] for j in chosen], "facts": scene.facts()}
        size = made_videos.size_of(params, i)
        return entry, lambda: render(rng, scene, size.n_frames, size.height, size.width)

    return made_videos.write(folder, make, params)
