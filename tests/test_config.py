"""Configurations: those that are shipped pass, and bad values are named before anything starts."""

import functools
import importlib
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from opensora_jax import config as config_lib
from opensora_jax.build import training as build
from opensora_jax.config import rules
from opensora_jax.data import moving_shapes, scenes, video_io
from opensora_jax.planning import synthetic

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def load(name, **fields):
    """A shipped configuration with some fields, `part__name` or `name`, set to other values."""
    c = importlib.import_module(f"configs.{name}").get_config()
    c.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return c


def flat(tree, prefix=""):
    """(dotted name, value) of every field."""
    for name, value in tree.items():
        if isinstance(value, ConfigDict | dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def refused(c):
    with pytest.raises(ValueError, match=r"^config\.") as caught:
        config_lib.check(c)
    return str(caught.value)


# ------------------------------------------------------------------- the configurations and fields


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configurations_pass_and_their_models_can_be_made(name):
    c = load(name)
    config_lib.check(c)
    tasks = {
        "vqvae": lambda: build.vqvae_task(c.vqvae),
        "dit": lambda: synthetic.training(c).task,
    }
    trained = [task for stage, task in tasks.items() if stage in c.stages]
    assert trained
    for make in trained:
        params, _ = jax.eval_shape(make().init, jax.random.key(0))
        assert jax.tree.leaves(params)


def test_every_field_has_a_rule_and_every_rule_a_field():
    assert set(dict(flat(config_lib.RULES))) == set(dict(flat(load("default"))))


def test_every_field_is_read_somewhere():
    package = ROOT / "opensora_jax"
    sources = [p.read_text() for p in package.rglob("*.py") if p.parent != package / "config"]
    for name, _ in flat(load("default")):
        field = name.rpartition(".")[2]
        if field not in load("default").mesh:  # which is read as a whole
            assert any(re.search(rf"\.{field}\b|[\"']{field}[\"']", s) for s in sources), name


def test_a_field_that_is_missing_or_not_known_is_named():
    c = load("default")
    c.dit.stepz = 1000  # in a file of one's own nothing stops this
    assert refused(c).startswith("config.dit.stepz: no such field")
    c = load("default")
    del c.vqvae["steps"]
    assert refused(c).startswith("config.vqvae.steps: missing")
    c = load("default")
    del c["sample"]
    c.sample = 3
    assert refused(c) == "config.sample=3: expected fields"


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, value in flat(load("default"))
        if isinstance(value, int | float) and not isinstance(value, bool)
    ],
)
def test_numbers_are_finite_of_the_right_type_and_not_negative(name):
    *parents, last = name.split(".")
    bad = ["0", True, None, float("nan"), float("inf")]
    if not name.startswith("mesh."):  # where -1 is the rest
        bad.append(-1)
    if isinstance(dict(flat(load("default")))[name], int):
        bad.append(2.5)
    for value in bad:
        c = load("default")
        part = functools.reduce(getattr, parents, c)
        del part[last]  # else the type of the field that is there counts
        part[last] = value
        message = refused(c)
        assert message.startswith(f"config.{name}={value!r}: expected "), message


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("stages", (), "some of shapes, vqvae"),
        ("stages", ("vqvae", "sample"), "some of shapes, vqvae"),
        ("stages", ("vqvae", "vqvae"), "each once"),
        ("stages", ("dit", "preprocess"), "in this order"),
        ("profile", (3,), "two steps"),
        ("profile", (5, 3), "two steps"),
        ("profile", (0, 3), "two steps"),
        ("profile", ("a", "b"), "two steps"),
        ("shapes.n_frames", 1, "at least 2"),
        ("shapes.resolution", 15, "16 or more"),
        ("shapes.resolution", 33, "even"),
        ("vqvae.steps", 0, "at least 1"),
        ("vqvae.keep_every", 1500, "a multiple of vqvae.checkpoint_every=1000"),
        ("dit.keep_checkpoints", 0, "at least 1"),
        ("vqvae.n_codes", 1, "at least 2"),
        ("vqvae.n_hiddens", 7, "an even number"),
        ("vqvae.downsample", (4, 4), "three powers of two"),
        ("vqvae.downsample", (4, 3, 4), "three powers of two"),
        ("vqvae.downsample", (4, 4, 4.0), "three powers of two"),
        ("vqvae.downsample", (1, 1, 1), "one of them above 1"),
        ("vqvae.dtype", "float16", "one of auto, float32, bfloat16"),
        ("vqvae.n_frames", 6, "a multiple of vqvae.downsample[0]=4"),
        ("vqvae.resolution", 30, "a multiple of vqvae.downsample[1:]=(4, 4)"),
        ("vqvae.quantize_to", 0.05, "at least vqvae.quantize_from=0.1"),
        ("vqvae.quantize_to", 1.5, "a number from 0 to 1"),
        ("vqvae.b2", 1.0, "below 1"),
        ("vqvae.batch_size", 12, "a multiple of 8: 8 data devices"),
        ("dit.size", "M", "one of empty, S, B, L, XL"),
        ("dit.depth", 6, "0, since dit.size=B says it: drop the one or the other"),
        ("dit.heads", 6, "0, since dit.size=B says it"),
        ("dit.text_mode", "concat", "one of cross_attention, in_context"),
        ("dit.objective", "edm", "one of flow, ddpm, masked, metric"),
        ("dit.code_head", "both", "one of auto, joint, factorized"),
        ("dit.code_head", "joint", "auto, since dit.objective is flow"),
        ("dit.beta_scale", 0.0, "a positive number"),
        ("sample.top_p", 0.0, "a number above 0, at most 1"),
        ("sample.temperature", 0.5, "1, since dit.objective is flow"),
        ("dit.prediction", "noise", "one of auto, velocity, data, since dit.objective is flow"),
        ("dit.prediction", "score", "one of auto, velocity, data, noise"),
        (
            "sample.sampler",
            "ancestral",
            "one of auto, euler, heun, dpm++, since dit.objective is flow",
        ),
        ("sample.eta", 0.5, "0, since it is ddim's alone"),
        ("sample.guidance_from", 1.5, "a number from 0 to 1"),
        ("sample.prompts", ("a", " "), "texts that are not blank"),
        ("dit.remat", "some", "one of none, dots, offload, full"),
        ("dit.attention", "flash", "one of auto, xla, cudnn, splash"),
        ("dit.attention", "cudnn", "one of auto, xla on a cpu"),
        ("dit.attention", "splash", "one of auto, xla on a cpu"),
        ("dit.dtype", "bf16", "one of auto, float32, bfloat16"),
        ("dit.caption_dropout", 1.1, "a number from 0 to 1"),
        ("dit.batch_size", 100, "a multiple of 8: 8 data devices"),
        ("sample.guidance", 0.0, "a positive number"),
    ],
)
def test_bad_values_are_named(name, value, expected):
    message = refused(load("default", **{name: value}))
    assert message.startswith(f"config.{name}={value!r}: expected ")
    assert expected in message


def test_long_values_are_cut():
    assert len(refused(load("default", dit__dtype="x" * 10_000))) < 300


def test_there_are_as_many_phrasings_as_captions_may_be_asked_for():
    n = min(len(moving_shapes.captions(*combination)) for combination in moving_shapes.ALL)
    config_lib.check(load("default", shapes__n_captions=n))
    assert "1 to 10" in refused(load("default", shapes__n_captions=n + 1))


# ------------------------------------------------------------------------------- fields and devices


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("dit.prediction", "velocity", "one of auto, noise, data"),
        ("sample.steps", 1001, "at most 1000"),
    ],
)
def test_what_ddpm_does_not_have_is_named(name, value, expected):
    fields = {"dit.objective": "ddpm", "sample.sampler": "ancestral"}
    config_lib.check(load("default", **fields))
    message = f"config.{name}={value!r}: expected {expected}, since dit.objective is ddpm"
    assert refused(load("default", **fields, **{name: value})) == message


def test_sizes_of_a_model_fit_each_other():
    assert refused(load("default", dit__size="")).startswith(
        "config.dit.depth=0: expected a positi"
    )
    message = refused(load("quickstart", dit__heads=7))
    assert message == "config.dit.width=128: expected an even multiple of dit.heads=7"


def test_batches_divide_over_devices_and_microbatches():
    fields = {"dit.accumulate": 2, "dit.batch_size": 24}
    assert "16: 8 data devices x dit.accumulate" in refused(load("default", **fields))
    config_lib.check(load("default", **fields, mesh__tensor=2))
    with pytest.raises(ValueError, match="8 devices"):
        config_lib.check(load("default", mesh__fsdp=3))


def test_heads_divide_over_context_and_tensor():
    config_lib.check(load("default", mesh__data=4, mesh__context=1, mesh__tensor=2))
    message = refused(load("default", mesh__data=1, mesh__context=4, mesh__tensor=2))
    assert message.startswith("config.mesh.context=4, config.mesh.tensor=2: ")
    assert "the DiT's 6 heads, of 128 each" in message


# ------------------------------------------------------------------------------------------- stages


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # To the tokenizer: stride 2 x 2 x 2, patch 4.
        ({"preprocess.resolution": 130}, "expected a multiple of 8: vqvae.downsample=(2, 2, 2) x "),
        ({"preprocess.resolution": 28}, "expected a multiple of 8: vqvae.downsample=(2, 2, 2) x "),
        ({"preprocess.buckets": "8x32x36"}, "expected a multiple of 8: vqvae.downsample=(2, 2, 2)"),
        ({"preprocess.buckets": "7x32x32"}, "expected frames of a multiple of 2, not 7x32x32"),
        (
            {"preprocess.n_frames": 8, "preprocess.buckets": "8x32x32"},
            "expected 0, since preprocess",
        ),
        (
            {"preprocess.split_scenes": True, "preprocess.buckets": "auto"},
            "expected False with preprocess.buckets",
        ),
        (
            {"preprocess.clip_frames": 4, "preprocess.buckets": "8x32x32"},
            "expected 0, or at least the 8 of preprocess.buckets",
        ),
        (
            {"dit.n_latent_frames": 5, "preprocess.buckets": "8x32x32,1x32x32"},
            "expected at most 4: 8 frames by",
        ),
        ({"preprocess.n_frames": 5}, "expected a multiple of 2: vqvae.downsample=(2, 2, 2)"),
        ({"preprocess.window": 3}, "expected a multiple of 2: vqvae.downsample=(2, 2, 2)"),
        ({"dit.n_latent_frames": 5}, "expected at most 4: 8 frames by vqvae.downsample=(2, 2, 2)"),
        ({"dit.n_latent_frames": 3, "preprocess.n_frames": 4}, "expected at most 2: 4 frames by"),
        # From the moving shapes.
        ({"vqvae.n_frames": 16}, "expected at most 8, the frames of shapes.n_frames"),
        ({"vqvae.n_frames": 8, "vqvae.fps": 4.0}, "expected at most 4, the frames of shapes.n_fr"),
        ({"vqvae.resolution": 64}, "expected at most shapes.resolution=32"),
        ({"preprocess.n_frames": 10}, "expected at most 8, the frames of shapes.n_frames"),
        ({"preprocess.clip_frames": 10}, "expected at most 8, the frames of shapes.n_frames"),
        ({"preprocess.clip_frames": 5}, "expected a multiple of 2: vqvae.downsample=(2, 2, 2)"),
        (
            {"preprocess.n_frames": 4, "preprocess.clip_frames": 4},
            "expected 0 with preprocess.clip",
        ),
        ({"preprocess.clip_stride": 4}, "expected 0 without preprocess.clip_frames"),
        ({"preprocess.max_frames": 7}, "expected 0, or at least 8, the frames of shapes.n"),
        # Of what would be made for nothing.
        ({"data.vqvae": "runs/vqvae"}, "expected empty, since the stage vqvae trains one"),
        ({"data.dataset": "data/mine"}, "expected empty, since the stage preprocess makes one"),
    ],
    ids=str,
)
def test_stages_fit_each_other(fields, expected):
    first, value = next(iter(fields.items()))
    message = refused(load("quickstart", **fields))
    assert message.startswith(f"config.{first}={value!r}: {expected}")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"shapes.n_frames": 8}, "expected at least 16, since shapes.world is scenes"),
        ({"shapes.resolution": 32}, "expected at least 48, since shapes.world is scenes"),
        ({"vqvae.resolution": 32}, "expected at least 48, since shapes.world is scenes"),
        ({"preprocess.resolution": (64, 32)}, "expected at least 48, since shapes.world is sc"),
        ({"preprocess.n_frames": 8}, "expected 0 or 16: captions of scenes tell of whole videos"),
        ({"dit.n_latent_frames": 1}, "expected 0 or {}: captions of scenes tell of whole videos"),
        ({"shapes.world": "many"}, "expected one of single, scenes"),
        ({"shapes.sizes": "auto"}, "expected sizes of frames x height x width"),
        ({"shapes.sizes": "16x63x64"}, "expected sizes of frames x height x width, as"),
        ({"shapes.sizes": "16x64x64,8x64x64"}, "expected at least 16 frames of 48 x 48"),
        ({"preprocess.buckets": "8x64x64"}, "expected 16x64x64: captions of scenes tell of whole"),
    ],
    ids=str,
)
def test_scenes_are_long_and_large_enough_and_whole(fields, expected):
    first, value = next(iter(fields.items()))
    message = refused(load("world", **fields))
    whole = 16 // load("world").vqvae.downsample[0]
    assert message.startswith(f"config.{first}={value!r}: {expected.format(whole)}")
    config_lib.check(load("world", dit__n_latent_frames=whole, preprocess__n_frames=16))


def test_made_videos_of_several_sizes_are_whole_in_their_buckets():
    sizes = {"shapes.sizes": "16x64x64,32x48x80"}
    assert "config.preprocess.buckets='': expected 16x64x64,32x48x80" in refused(
        load("world", **sizes, **{"vqvae.resolution": 48})
    )
    sizes["preprocess.buckets"] = "32x48x80,16x64x64"
    message = refused(load("world", **sizes))
    assert message.startswith("config.vqvae.resolution=64: expected at most shapes.sizes=48")
    config_lib.check(load("world", **sizes, **{"vqvae.resolution": 48}))
    message = refused(load("world", **sizes, **{"vqvae.resolution": 48, "vqvae.n_frames": 32}))
    assert "expected at most 16, the frames of shapes.sizes" in message


def test_what_scenes_need_is_what_the_rules_say():
    needed = scenes.LEAST_FRAMES, scenes.LEAST_SIDE
    assert needed == (rules.SCENES_FRAMES, rules.SCENES_SIDE)


def test_what_no_stage_of_the_run_reads_need_not_fit():
    config_lib.check(load("quickstart", preprocess__resolution=130, stages=("shapes", "vqvae")))
    fields = {"preprocess.resolution": 130, "data.vqvae": "runs/vqvae"}
    config_lib.check(load("quickstart", **fields, stages=("preprocess",)))
    fields = {"preprocess.resolution": 130, "preprocess.buckets": "8x32x64,1x32x32"}
    config_lib.check(load("quickstart", **fields))
    fields = {"shapes.n_frames": 4, "data.videos": "videos"}
    config_lib.check(load("quickstart", **fields, stages=("shapes", "vqvae")))


def test_the_table_of_stages_names_modules_with_a_run():
    for name, stage in config_lib.STAGES.items():
        assert stage.module.endswith(f".{name}")
        assert callable(importlib.import_module(stage.module).run)


# ------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config=configs/quickstart.py", "--config.vqvae.stepz=1"], "stepz.*steps"),
        (["--config=configs/quickstart.py", "--config.profile=(5,3)"], r"profile=\(5, 3\): exp"),
        (["--config=configs/quickstart.py", "--config.data.captions=/nope"], r"captions='/nope': "),
    ],
)
def test_a_bad_command_line_ends_with_one_line(arguments, expected, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "opensora_jax.main", *arguments, f"--workdir={tmp_path / 'run'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert re.search(expected, line)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", ["shapes", "vqvae", "preprocess"])
def test_frame_rates_are_those_that_files_can_have(part):
    rule = config_lib.RULES[part]["fps"]
    for fps in (video_io.MIN_FPS, video_io.MAX_FPS):
        video_io.check_fps(fps)
        assert rule.test(fps)
    for fps in (video_io.MIN_FPS / 2, video_io.MAX_FPS * 2, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="fps="):
            video_io.check_fps(fps)
        assert not rule.test(fps)
