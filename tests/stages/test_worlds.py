"""The worlds from their configuration to the grades, with videos of the world as samples."""

import ml_collections
import numpy as np
import pytest

from configs import quickstart, world
from opensora_jax.data import scenes, video_io
from opensora_jax.stages import fidelity, vqvae, worlds
from opensora_jax.stages import shapes as shapes_stage


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(configuration, workdir) after the stage `shapes`."""
    config, workdir = world.get_config(), tmp_path_factory.mktemp("world")
    config.shapes.n_videos, config.shapes.n_held_out = 10, 20
    shapes_stage.run(config, workdir)
    return config, workdir


def render(question, i):
    things = tuple(scenes.Thing(**thing) for thing in question.label["things"])
    scene = scenes.Scene(question.category, things, question.label.get("relation", ""))
    return scenes.render(np.random.default_rng(i), scene, 16, 64, 64)


def test_the_training_split_has_what_is_seen_alone(made):
    config, workdir = made
    _, shown = shapes_stage.labelled_videos(config, workdir, "train")
    seen = [scene.facts() for some in scenes.SEEN.values() for scene in some]
    assert len(shown) == 10
    assert all(facts in seen for facts in shown)
    config = config.copy_and_resolve_references()
    config.shapes.world = "single"
    with pytest.raises(ValueError, match="made with other settings"):
        shapes_stage.run(config, workdir)


def test_questions_take_turns():
    for name in worlds.WORLDS:
        config = ml_collections.ConfigDict({"shapes": {"world": name}})
        asked = worlds.of(config).questions(240)
        assert len(asked) == 240
        assert asked == worlds.of(config).questions(240)
        assert asked[:50] == worlds.of(config).questions(50)
    for category in scenes.CATEGORIES:
        of = [question for question in asked if question.category == category]
        assert [len(of), sum(question.is_held_out for question in of)] == [48, 24]
        held_out = [scene.facts() for scene in scenes.HELD_OUT[category]]
        for question in of:
            assert (question.label in held_out) == question.is_held_out


def test_samples_of_scenes_are_graded(made):
    config, workdir = made
    one = worlds.of(config)
    asked = one.questions(20)
    real, shown = shapes_stage.labelled_videos(config, workdir, "held_out")
    real = list(map(video_io.read_video, real))
    videos = [render(question, i) for i, question in enumerate(asked)]
    result = fidelity.grade(one, asked, videos, real, shown)
    assert result["n_samples"] == {"seen": 10, "held_out": 10}
    for split in ("seen", "held_out", "real"):
        assert set(result[split]) == {
            *("all", "color", "shape", "size", "direction", "speed"),
            *("relation", "count", "change", "bounce"),
        }
        assert set(result[split].values()) == {1.0}, result[split]
    assert result["guessing"]["all"] == 0.0
    assert set(result["categories"]) == set(scenes.CATEGORIES)
    assert set(result["categories"]["relation"]) == {"seen", "held_out"}
    assert "relation" in result["categories"]["relation"]["seen"]
    # One that shows nothing is right in nothing, and no other is the worse for it.
    videos[0] = np.full_like(videos[0], 128)
    result = fidelity.grade(one, asked, videos, real, shown)
    assert result["seen"]["all"] == 0.9
    assert result["held_out"]["all"] == 1.0


def test_single_shapes_are_graded_as_ever(tmp_path):
    config = quickstart.get_config()
    config.shapes.n_videos, config.shapes.n_held_out = 2, 4
    shapes_stage.run(config, tmp_path)
    one = worlds.of(config)
    real, shown = shapes_stage.labelled_videos(config, tmp_path, "held_out")
    videos = list(map(video_io.read_video, real))
    asked = [worlds.Question("", label, "", i == 3) for i, label in enumerate(shown)]
    result = fidelity.grade(one, asked, videos, videos, shown)
    assert set(result) == {"n_samples", "seen", "held_out", "outline"}
    assert result["n_samples"] == {"seen": 3, "held_out": 1}
    assert result["seen"] == {"all": 1.0, "color": 1.0, "shape": 1.0, "direction": 1.0}
    assert result["outline"]["samples"] == result["outline"]["real"]


def test_reconstructions_are_judged_where_they_are_of_whole_videos(made):
    config, workdir = made
    config = config.copy_and_resolve_references()
    training = sorted((workdir / "shapes" / "train" / "videos").glob("*.mp4"))
    kind, videos = vqvae.evaluation_videos(config, workdir, training)
    assert (kind, len(videos.labels)) == ("held_out", 20)
    config.vqvae.n_frames = 8
    _, videos = vqvae.evaluation_videos(config, workdir, training)
    assert videos.labels is None
    assert videos.clips.shape == (20, 8, 64, 64, 3)
