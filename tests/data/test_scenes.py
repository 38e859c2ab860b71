"""The world of scenes: what there is, what is held out, what captions say, what is drawn."""

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest

from opensora_jax.data import buckets, made_videos, scenes, video_io
from opensora_jax.metrics import scenes as scenes_metrics

SMALL = dict(seed=3, n_frames=16, resolution=64, fps=8, n_captions=3)


def attributes(scene):
    """Each attribute's value by its name; of two things, those of the second by another name."""
    first = dataclasses.asdict(scene.things[0]) | {"relation": scene.relation}
    if scene.category == "count":
        return first | {"number": len(scene.things)}
    second = scene.things[1:] and dataclasses.asdict(scene.things[1])
    return first | ({f"other {name}": value for name, value in second.items()} if second else {})


@pytest.mark.parametrize("category", scenes.CATEGORIES)
def test_what_is_held_out_recombines_what_is_seen(category):
    seen, held_out = scenes.SEEN[category], scenes.HELD_OUT[category]
    every = scenes.ALL[category]
    assert len(set(every)) == len(every)
    assert set(seen) | set(held_out) == set(every)
    assert not set(seen) & set(held_out)
    assert 0.14 < len(held_out) / len(every) < 0.2

    def pairs(some):
        return {
            pair for scene in some for pair in itertools.combinations(attributes(scene).items(), 2)
        }

    # Every pair of values is seen in training: only more of them together are new.
    assert pairs(seen) == pairs(every)


def test_the_rule_does_not_change():
    assert {name: len(some) for name, some in scenes.HELD_OUT.items()} == {
        "motion": 35,
        "relation": 288,
        "count": 32,
        "change": 32,
        "bounce": 7,
    }
    thing = scenes.Thing("blue", "triangle", "up")
    assert scenes.Scene("count", (thing,) * 1) in scenes.HELD_OUT["count"]
    assert scenes.Scene("count", (thing,) * 2) in scenes.SEEN["count"]


def test_captions_say_all_of_a_scene_and_nothing_else():
    of = {}
    for scene in itertools.chain(*scenes.ALL.values()):
        phrasings = scenes.captions(scene)
        assert len(set(phrasings)) == len(phrasings) == 10
        facts = json.dumps(scene.facts())
        for caption in phrasings:
            assert of.setdefault(caption, facts) == facts  # no caption fits two scenes
            assert re.fullmatch(r"[a-z ,]+", caption)
            assert len(caption.split()) <= 28  # of the small text model's 32 tokens
    first = {scenes.captions(scenes.ALL[name][0])[0] for name in scenes.CATEGORIES}
    assert first == {
        "a small red circle moves slowly to the left",
        "a red circle moves to the left above a green circle that stands still",
        "one red circle moves to the left",
        "a red circle turns green while it moves to the left",
        "a red circle moves to the left and bounces off the border",
    }


@pytest.mark.parametrize("size", [(16, 64, 64), (32, 48, 64), (24, 96, 54)])
def test_things_are_drawn_whole_and_apart(size):
    n_frames, height, width = size
    for i in range(15):
        rng = np.random.default_rng(i)
        scene = scenes.draw(rng, "all", i)
        video = scenes.render(rng, scene, *size)
        assert video.shape == (*size, 3)
        assert video.dtype == np.uint8
        placed = scenes._place(rng, scene, n_frames, np.array([width, height]) / min(height, width))
        if placed is None:
            continue
        for thing, (diameter, center_T2) in zip(scene.things, placed, strict=True):
            low, high = scenes.extent(thing.shape, diameter)
            assert (center_T2 - low).min() > -1e-6
            assert (
                (center_T2 + high) * min(height, width) < np.array([width, height]) + 1e-6
            ).all()
        for (a, at_a), (b, at_b) in itertools.combinations(placed, 2):
            assert np.abs(at_a - at_b).max(axis=1).min() > 0.9 * (a + b) / 2 + 0.08


def test_sizes_in_which_nothing_can_be_told_are_refused():
    scene = scenes.ALL["motion"][0]
    for size in ((15, 64, 64), (16, 64, 40)):
        with pytest.raises(ValueError, match="expected at least 16 frames of at least 48 x 48"):
            scenes.render(np.random.default_rng(0), scene, *size)


def test_a_dataset_holds_facts_and_depends_on_its_seed_alone(tmp_path):
    options = SMALL | {"split": "seen"}
    assert scenes.write_dataset(tmp_path / "a", n_videos=6, **options)
    assert not scenes.write_dataset(tmp_path / "a", n_videos=6, **options)
    entries = json.loads((tmp_path / "a" / "captions.json").read_text())
    found = [entry["facts"]["category"] for entry in entries]
    assert found == [*scenes.CATEGORIES, scenes.CATEGORIES[0]]
    seen = {json.dumps(scene.facts()): scene for scene in itertools.chain(*scenes.SEEN.values())}
    for entry in entries:
        scene = seen[json.dumps(entry["facts"])]
        assert len(set(entry["captions"])) == 3
        assert set(entry["captions"]) <= set(scenes.captions(scene))
    info = video_io.probe(tmp_path / "a" / "videos" / "video0.mp4")
    assert (info.n_frames, info.height, info.width) == (16, 64, 64)
    scenes.write_dataset(tmp_path / "b", n_videos=3, **options)
    for name in ("video0.mp4", "video2.mp4"):
        a, b = ((tmp_path / folder / "videos" / name).read_bytes() for folder in "ab")
        assert a == b
    with pytest.raises(ValueError, match=r"params\.json: made with other settings: split"):
        scenes.write_dataset(tmp_path / "a", n_videos=6, **SMALL | {"split": "all"})


def test_a_dataset_may_be_of_several_sizes(tmp_path):
    options = {"split": "all", "seed": 1, "fps": 8.0, "n_captions": 1}
    sizes = buckets.parse("16x64x64,24x48x72,32x64x48")
    scenes.write_dataset(tmp_path, n_videos=30, sizes=sizes, **options)
    params = json.loads((tmp_path / "params.json").read_text())
    assert params["sizes"] == ["16x64x64", "24x48x72", "32x64x48"]
    assert not {"n_frames", "resolution"} & set(params)
    entries = json.loads((tmp_path / "captions.json").read_text())
    found = {}
    for entry in entries:
        info = video_io.probe(tmp_path / "videos" / entry["file"])
        size = buckets.Size(info.n_frames, info.height, info.width)
        found.setdefault(size, set()).add(entry["facts"]["category"])
        video = video_io.read_video(tmp_path / "videos" / entry["file"])
        assert scenes_metrics.judge(video, entry["facts"])["all"], entry
    assert set(found) == set(sizes)
    assert all(len(categories) >= 4 for categories in found.values())  # of any size anything
    with pytest.raises(ValueError, match="either n_frames and resolution, or several sizes"):
        scenes.write_dataset(tmp_path / "b", n_videos=3, sizes=sizes, **SMALL | options)
    few = buckets.parse("8x64x64")
    with pytest.raises(ValueError, match=r"sizes=.*expected at least 16 frames"):
        scenes.write_dataset(tmp_path / "b", n_videos=3, sizes=few, **options)


@pytest.mark.parametrize("wrong", [{"n_frames": 8}, {"resolution": 32}, {"n_captions": 11}])
def test_bad_parameters_leave_nothing(tmp_path, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        scenes.write_dataset(tmp_path / "a", n_videos=3, **SMALL | {"split": "all"} | wrong)
    assert not (tmp_path / "a").exists()


def test_what_is_interrupted_goes_on(tmp_path):
    def make(i):
        if i == 2 and not (tmp_path / "mended").exists():
            raise KeyboardInterrupt
        rng = np.random.default_rng(i)
        return {"n": i}, lambda: rng.integers(0, 256, (4, 16, 16, 3), np.uint8)

    params = {"n_videos": 3, "fps": 8}
    with pytest.raises(KeyboardInterrupt):
        made_videos.write(tmp_path / "a", make, params)
    assert not (tmp_path / "a" / "captions.json").exists()
    first = tmp_path / "a" / "videos" / "video0.mp4"
    before = first.stat().st_mtime_ns
    (tmp_path / "mended").touch()
    assert made_videos.write(tmp_path / "a", make, params)
    assert first.stat().st_mtime_ns == before
    entries = json.loads((tmp_path / "a" / "captions.json").read_text())
    assert entries == [{"file": f"video{i}.mp4", "n": i} for i in range(3)]
