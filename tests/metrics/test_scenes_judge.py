"""The judge of scenes against real files, their degraded copies, and what it must refuse."""

import dataclasses

import numpy as np
import pytest
from scipy import ndimage

from opensora_jax.data import scenes, video_io
from opensora_jax.metrics import scenes as judge
from opensora_jax.metrics.shapes import shares


def encoded(folder, n, size, seed=0):
    """(videos, facts) of n scenes, written as H.264 and read back."""
    videos, facts = [], []
    for i in range(n):
        rng = np.random.default_rng([seed, *size, i])
        scene = scenes.draw(rng, "all", i)
        video_io.write_video(folder / "a.mp4", scenes.render(rng, scene, *size), 8)
        videos.append(video_io.read_video(folder / "a.mp4"))
        facts.append(scene.facts())
    return videos, facts


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return encoded(tmp_path_factory.mktemp("scenes"), 100, (16, 64, 64))


@pytest.fixture(scope="module")
def things(files):
    return [judge.read(video) for video in files[0]]


def as_uint8(video):
    return np.round(np.clip(video, 0, 255)).astype(np.uint8)


def right(videos, facts):
    return shares([judge.judge(video, fact) for video, fact in zip(videos, facts, strict=True)])


def as_read(facts):
    """What the judge would read of a video that shows these facts and nothing else, exactly."""
    n = len(facts["things"])
    # Things that stand beside each other, or where the relation says.
    places = {"above": (-1, 0), "below": (1, 0), "left": (0, -1), "right": (0, 1)}
    at = [places.get(facts.get("relation"), (0, -1)), (0, 0), (0, 1)]
    return [
        judge.Thing(
            *(thing["color"], thing.get("becomes", ""), thing["shape"]),
            *(thing.get("size"), thing["direction"], thing.get("speed")),
            bounces=thing.get("bounces", False),
            frames=np.arange(4),
            center_N2=np.tile(np.array(place, float), (4, 1)),
            extent_2=np.array([0.1, 0.1]),
        )
        for thing, place in zip(facts["things"], at[:n], strict=True)
    ]


def test_right_on_encoded_files(files, things):
    found = shares([judge.compare(a, b) for a, b in zip(things, files[1], strict=True)])
    assert set(found) == {
        *("all", "color", "shape", "size", "direction", "speed"),
        *("relation", "count", "change", "bounce"),
    }
    assert all(share >= 0.99 for share in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "size"),
    [(300, (16, 64, 64)), (90, (32, 48, 64)), (90, (24, 96, 54)), (45, (16, 96, 128))],
)
def test_right_on_many_files_of_many_sizes(tmp_path, n, size):
    found = right(*encoded(tmp_path, n, size, seed=1))
    assert all(share >= 0.99 for share in found.values()), found


def test_right_on_blurred_noisy_and_pale_videos(files):
    some, facts = files[0][:20], files[1][:20]
    blurred = [as_uint8(ndimage.gaussian_filter(v * 1.0, (0.7, 1, 1, 0))) for v in some]
    noise = np.random.default_rng(0).normal(0, 15, some[0].shape)
    noisy = [as_uint8(video + noise) for video in some]
    pale = [as_uint8(128 + (video - 128.0) / 2) for video in some]
    for videos in (blurred, noisy, pale):
        assert right(videos, facts)["all"] >= 0.96


def test_right_on_wobbling_outlines(files):
    """Pixels swing by up to one and a half around where they belong, as in poor reconstructions."""
    rng, videos = np.random.default_rng(0), []
    for video in files[0][:20]:
        moved_2THW = [
            ndimage.gaussian_filter(rng.normal(0, 1, video.shape[:3]), (1, 4, 4)) for _ in range(2)
        ]
        moved_2THW = [1.5 * m / np.abs(m).max() for m in moved_2THW]
        t, y, x = np.indices(video.shape[:3])
        at = [t, y + moved_2THW[0], x + moved_2THW[1]]
        videos.append(
            as_uint8(
                np.stack(
                    [
                        ndimage.map_coordinates(video[..., c] * 1.0, at, order=1, mode="nearest")
                        for c in range(3)
                    ],
                    -1,
                )
            )
        )
    assert right(videos, files[1][:20])["all"] >= 0.9


def test_wrong_captions_are_right_as_often_as_chance_has_it(files, things):
    """Of real files with other captions the judge finds exactly what the two have in common."""
    facts = files[1]
    found, chance = [], []
    for i, read in enumerate(things):
        for j in range(i % 5, len(facts), 5):  # of the same category, which have most in common
            if facts[i] != facts[j]:
                found.append(judge.compare(read, facts[j]))
                chance.append(judge.compare(as_read(facts[i]), facts[j]))
        for j in range(len(facts)):
            if facts[i]["category"] != facts[j]["category"]:
                shown = judge.compare(read, facts[j])["all"]
                # That one thing moves, without a size or speed, is also said of larger scenes.
                assert not shown or len(facts[j]["things"]) == len(facts[i]["things"]) == 1
    assert np.mean([a == b for a, b in zip(found, chance, strict=True)]) > 0.99
    found = shares(found)
    assert found["all"] < 0.01
    assert found["color"] < 0.35
    assert found["shape"] < 0.45
    assert found["direction"] < 0.35
    assert found["change"] < 0.4


def test_mirrored_and_backwards(files):
    mirror = {"left": "right", "right": "left"}
    back = {"left": "right", "right": "left", "up": "down", "down": "up"}
    for video, fact in list(zip(*files, strict=True))[:15]:
        mirrored = {**fact, "things": []}
        if "relation" in fact:
            mirrored["relation"] = mirror.get(fact["relation"], fact["relation"])
        backwards = {**fact, "things": []}
        for thing in fact["things"]:
            way = thing["direction"]
            mirrored["things"].append(thing | {"direction": mirror.get(way, way)})
            turned = dict(thing)
            if "becomes" in thing:
                turned |= {"color": thing["becomes"], "becomes": thing["color"]}
            if "bounces" not in thing:  # which comes back the way it went
                turned["direction"] = back.get(way, way)
            backwards["things"].append(turned)
        assert judge.judge(video[:, :, ::-1], mirrored)["all"]
        assert judge.judge(video[::-1], backwards)["all"]


def scene(category, *things, relation=""):
    return scenes.Scene(category, tuple(scenes.Thing(*thing) for thing in things), relation)


def draw(one, seed=0):
    return scenes.render(np.random.default_rng(seed), one, 16, 64, 64)


@pytest.mark.parametrize(
    "video",
    [
        np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), np.uint8),
        np.full((16, 64, 64, 3), 90, np.uint8),
        np.full((16, 64, 64, 3), (220, 10, 10), np.uint8),
        draw(scene("count", ("red", "circle"))).mean(-1, keepdims=True).astype(np.uint8)
        * np.ones(3, np.uint8),
    ],
    ids=["noise", "gray", "red", "colorless"],
)
def test_nothing_is_read_of_nothing(video):
    assert judge.read(video) == []
    for some in scenes.ALL.values():
        assert not any(judge.judge(video, some[0].facts()).values())


def test_one_thing_too_many_and_one_missing():
    two, three = (scene("count", *[("red", "circle")] * n) for n in (2, 3))
    shown = judge.judge(draw(three), two.facts())
    assert shown == {"all": False, "color": True, "shape": True, "direction": True, "count": False}
    assert not any(judge.judge(draw(two), three.facts()).values())


def test_colors_belong_to_their_shapes():
    def two(first, second):
        things = ((*first, "left"), second)
        return scene("relation", *things, relation="above")

    video = draw(two(("red", "circle"), ("green", "square")))
    assert judge.judge(video, two(("red", "circle"), ("green", "square")).facts())["all"]
    swapped = judge.judge(video, two(("green", "circle"), ("red", "square")).facts())
    assert not swapped["all"]
    assert not (swapped["color"] and swapped["shape"])


def test_what_does_not_happen_is_not_read():
    bounce = scenes.Scene("bounce", (scenes.Thing("red", "circle", "left", bounces=True),))
    straight = scene("count", ("red", "circle", "left"))
    video = draw(bounce)
    assert judge.judge(video, bounce.facts())["all"]
    assert not judge.judge(draw(straight), bounce.facts())["bounce"]
    assert not judge.judge(video, straight.facts())["direction"]
    # It turned back before it was at the border.
    inside = np.pad(video[:, :, 12:], ((0, 0), (0, 0), (24, 0), (0, 0)), "edge")[:, :, :64]
    inside[:, :, :24] = video[:, :1, :1]
    assert not judge.judge(inside, bounce.facts())["bounce"]
    change = scenes.Scene("change", (scenes.Thing("red", "circle", "up", becomes="blue"),))
    video = draw(change)
    assert judge.judge(video, change.facts())["all"]
    (thing,) = judge.read(video)
    assert (thing.color, thing.becomes) == ("red", "blue")
    assert not judge.judge(video, scene("count", ("red", "circle", "up")).facts())["color"]
    # It jumps, or flickers.
    video = draw(scene("count", ("red", "circle", "right")))
    rng = np.random.default_rng(0)
    jumping = video[rng.permutation(16)]
    assert not judge.judge(jumping, scene("count", ("red", "circle", "right")).facts())["direction"]
    flickering = np.where((np.arange(16) % 2)[:, None, None, None] == 0, video, video[:, :1, :1])
    assert judge.read(flickering) == []


def test_not_such_a_video():
    for video in (np.zeros((16, 64, 64, 3)), np.zeros((4, 64, 64, 3), np.uint8)):
        with pytest.raises(ValueError, match="expected uint8"):
            judge.read(video)


def test_a_reading_is_plain():
    (thing,) = judge.read(draw(scene("count", ("yellow", "square", "up"))))
    found = dataclasses.asdict(thing)
    for name in ("frames", "center_N2", "extent_2", "size", "speed"):
        found.pop(name)
    assert found == {
        "color": "yellow",
        "becomes": "",
        "shape": "square",
        "direction": "up",
        "bounces": False,
    }
