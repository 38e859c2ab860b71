"""The detector against real encoded files, their degraded copies, and things it must not accept."""

import numpy as np
import pytest

from opensora_jax.data import moving_shapes, video_io
from opensora_jax.metrics import shapes
from opensora_jax.metrics.shapes import detect

MIRRORED = {"left": "right", "right": "left", "up": "up", "down": "down"}
REVERSED = {"left": "right", "right": "left", "up": "down", "down": "up"}
TRANSPOSED = {"left": "up", "right": "down", "up": "left", "down": "right"}


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """{resolution: (videos, truths)}: written as H.264 and read back."""
    path = tmp_path_factory.mktemp("shapes") / "a.mp4"
    sets = {}
    for n_videos, n_frames, resolution in ((384, 8, 32), (96, 16, 64)):
        truths = [moving_shapes.ALL[i % 48] for i in range(n_videos)]
        videos = []
        for i, truth in enumerate(truths):
            rng = np.random.default_rng([resolution, i])
            video_io.write_video(path, moving_shapes.render(rng, *truth, n_frames, resolution), 8)
            videos.append(video_io.read_video(path))
        sets[resolution] = np.stack(videos), truths
    return sets


def accuracy(videos, truths):
    return np.mean([detect(v) == truth for v, truth in zip(videos, truths, strict=True)])


def as_uint8(video):
    return np.round(np.clip(video, 0, 255)).astype(np.uint8)


def blur(video, sigma):
    radius = int(np.ceil(3 * sigma))
    weights = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    for axis in (-3, -2):
        widths = [(0, 0)] * video.ndim
        widths[axis] = (radius, radius)
        padded = np.pad(video.astype(np.float32), widths, "edge")
        n = video.shape[axis]
        video = sum(w * np.take(padded, range(i, i + n), axis) for i, w in enumerate(weights))
    return as_uint8(video)


def blocky(video, size):
    """Halfway to the mean of each block of pixels."""
    *lead, height, width, _ = video.shape
    blocks = video.reshape(*lead, height // size, size, width // size, size, 3).astype(float)
    return as_uint8((blocks + blocks.mean((-4, -2), keepdims=True)).reshape(video.shape) / 2)


@pytest.mark.parametrize("resolution", [32, 64])
def test_right_on_encoded_files(encoded, resolution):
    assert accuracy(*encoded[resolution]) >= 0.99


@pytest.mark.parametrize("sigma", [0.7, 1.0])
def test_right_on_blurred_videos(encoded, sigma):
    videos, truths = encoded[32]
    assert accuracy(blur(videos[:192], sigma), truths[:192]) >= 0.97


def test_right_on_noisy_videos(encoded):
    videos, truths = encoded[32]
    noise = np.random.default_rng(0).normal(0, 15, videos[:192].shape)
    assert accuracy(as_uint8(videos[:192] + noise), truths[:192]) >= 0.97


def test_right_on_blocky_and_pale_videos(encoded):
    videos, truths = encoded[32]
    assert accuracy(blocky(videos[:96], 4), truths[:96]) >= 0.97
    assert accuracy(as_uint8(128 + (videos[:96] - 128.0) / 2), truths[:96]) >= 0.97


def test_symmetries(encoded):
    videos, truths = encoded[32]
    videos, truths = videos[:96], truths[:96]
    mirrored = [(c, s, MIRRORED[d]) for c, s, d in truths]
    assert accuracy(videos[:, :, :, ::-1], mirrored) >= 0.98
    backwards = [(c, s, REVERSED[d]) for c, s, d in truths]
    assert accuracy(videos[:, ::-1], backwards) >= 0.98
    # A transposed triangle points sideways: only the other two keep their shape.
    keep = [i for i, (_, s, _) in enumerate(truths) if s != "triangle"]
    transposed = [(truths[i][0], truths[i][1], TRANSPOSED[truths[i][2]]) for i in keep]
    assert accuracy(videos[keep].swapaxes(2, 3), transposed) >= 0.98


def test_colors_follow_the_channels(encoded):
    videos, truths = encoded[32]
    keep = [i for i, (c, _, _) in enumerate(truths[:96]) if c != "yellow"]
    cycled = {"red": "green", "green": "blue", "blue": "red"}  # each channel moves on by one
    expected = [(cycled[truths[i][0]], *truths[i][1:]) for i in keep]
    assert accuracy(np.roll(videos[keep], 1, axis=-1), expected) >= 0.95
    # Cyan is none of the four.
    yellow = [i for i, (c, _, _) in enumerate(truths[:96]) if c == "yellow"]
    assert all(detect(v) is None for v in np.roll(videos[yellow], 1, axis=-1))


def unclear(rng, name):
    shape = (8, 32, 32, 3)
    truth = moving_shapes.ALL[rng.integers(48)]
    video = moving_shapes.render(rng, *truth, 8, 32)
    match name:
        case "noise":
            return rng.integers(0, 256, shape, np.uint8)
        case "soft noise":
            return blur(as_uint8(128 + rng.normal(0, 255, shape)), 3.0)
        case "plain":
            return np.full(shape, rng.integers(0, 256, 3), np.uint8)
        case "static":
            return video[:1].repeat(8, 0)
        case "gray":
            return as_uint8(video.mean(-1, keepdims=True).repeat(3, -1))
        case "diagonal":
            return np.stack([np.roll(video[0], (t, t), (0, 1)) for t in range(8)])
        case "jumping":
            return np.stack([moving_shapes.render(rng, *truth, 2, 32)[0] for _ in range(8)])
        case "shuffled patches":
            patches = video.reshape(8, 8, 4, 8, 4, 3).swapaxes(2, 3).reshape(8, 64, 4, 4, 3)
            patches = patches[:, rng.permutation(64)].reshape(8, 8, 8, 4, 4, 3)
            return patches.swapaxes(2, 3).reshape(shape)
        case "inverted triangle":
            return moving_shapes.render(rng, truth[0], "triangle", truth[2], 8, 32)[:, ::-1]
    raise ValueError(name)


@pytest.mark.parametrize(
    "name",
    [
        "noise",
        "soft noise",
        "plain",
        "static",
        "gray",
        "diagonal",
        "jumping",
        "shuffled patches",
        "inverted triangle",
    ],
)
def test_unclear_videos_are_none(name):
    rng = np.random.default_rng(1)
    accepted = [found for _ in range(100) if (found := detect(unclear(rng, name)))]
    assert len(accepted) <= 1, accepted


def test_color_and_shape_are_seen_of_what_stands_still():
    still = moving_shapes.render(np.random.default_rng(0), "green", "square", "up", 8, 32)[:1]
    still = still.repeat(8, axis=0)
    assert detect(still) is None
    assert shapes.look(still) == ("green", "square")


def test_two_shapes_of_different_colors_are_none():
    rng = np.random.default_rng(0)
    first = moving_shapes.render(rng, "red", "circle", "right", 8, 64)
    second = moving_shapes.render(rng, "green", "square", "right", 8, 64)
    assert detect(first) == ("red", "circle", "right")
    assert detect(np.concatenate([first, second], axis=1)) is None


@pytest.mark.parametrize(
    "video",
    [
        np.zeros((8, 32, 32, 3), np.float32),
        np.zeros((1, 32, 32, 3), np.uint8),
        np.zeros((8, 32, 32), np.uint8),
        np.zeros((8, 4, 32, 3), np.uint8),
    ],
)
def test_not_such_a_video(video):
    with pytest.raises(ValueError, match="expected uint8"):
        detect(video)


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_a_rigid_outline_covers_a_rigid_shape_and_no_other(shape):
    rng = np.random.default_rng(0)
    video = moving_shapes.render(rng, "red", shape, "left", 8, 32)
    assert shapes.outline(video, shape) > 0.9
    for other in set(shapes.SHAPES) - {shape}:
        assert shapes.outline(video, other) < shapes.outline(video, shape) - 0.05
    # One that swells from frame to frame is not rigid.
    swelling = np.stack(
        [np.kron(f, np.ones((1 + i % 2, 1, 1), np.uint8))[:32] for i, f in enumerate(video)]
    )
    assert shapes.outline(swelling, shape) < shapes.outline(video, shape) - 0.05
    assert shapes.outline(np.full((8, 32, 32, 3), 128, np.uint8), shape) == 0.0


def test_outlines_of_many_videos():
    rng = np.random.default_rng(0)
    labels = [moving_shapes.ALL[i % len(moving_shapes.ALL)] for i in range(20)]
    videos = [moving_shapes.render(rng, *label, 8, 32) for label in labels]
    score = shapes.outline_score(videos, labels)
    assert 0.85 < score["worst_tenth"] <= score["mean"] <= 1
    grey = np.full_like(videos[0], 128)
    with_one = shapes.outline_score([grey, *videos[1:]], labels)
    assert with_one["worst_tenth"] < score["worst_tenth"] / 1.5
