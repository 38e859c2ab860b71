"""Configurations: those that are shipped pass, and bad values are named before anything starts."""

import functools
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from opensora_jax import config as config_lib

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.py"))

sys.path.insert(0, str(ROOT))  # the configurations import each other


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def numbers(c, prefix=""):
    """The dotted names of all fields that hold a number."""
    for name, value in c.items():
        if isinstance(value, ConfigDict):
            yield from numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_pass(path):
    config_lib.check(load(path.stem))


def test_every_shipped_configuration_is_tried():
    assert {"default", "quickstart", "msrvtt", "msrvtt_vqvae"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize(
    "name", [n for n in numbers(load("quickstart")) if not n.startswith("mesh.")]
)
def test_no_number_may_be_negative(name):
    c = load("quickstart")
    *parents, last = name.split(".")
    part = functools.reduce(getattr, parents, c)
    part[last] = type(part[last])(-1)
    with pytest.raises(ValueError, match=rf"^config\.{name}=-1(\.0)?: expected "):
        config_lib.check(c)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("stages", (), "some of shapes, vqvae"),
        ("stages", ("vqvae", "sample"), "some of shapes, vqvae"),
        ("shapes.n_frames", 1, "at least 2"),
        ("vqvae.steps", 0, "a positive number"),
        ("vqvae.keep_every", 1500, r"a multiple of vqvae\.checkpoint_every=1000"),
        ("dit.keep_checkpoints", 0, "a positive number"),
        ("vqvae.n_codes", 1, "at least 2"),
        ("vqvae.downsample", (4, 4), "three powers of two"),
        ("vqvae.downsample", (4, 3, 4), "three powers of two"),
        ("vqvae.downsample", (1, 1, 1), "one of them above 1"),
        ("vqvae.dtype", "float16", "one of auto, float32, bfloat16"),
        ("vqvae.n_frames", 6, r"a multiple of vqvae\.downsample\[0\]=4"),
        ("vqvae.resolution", 30, r"a multiple of vqvae\.downsample\[1:\]=\(4, 4\)"),
        ("vqvae.quantize_to", 0.05, r"at least vqvae\.quantize_from=0\.1"),
        ("vqvae.quantize_to", 1.5, "a number from 0 to 1"),
        ("vqvae.batch_size", 12, "a multiple of 8: 8 data devices"),
        ("dit.size", "M", "one of S, B, L, XL"),
        ("dit.size", "", "a positive number, since dit.size is empty"),
        ("dit.text_mode", "concat", "one of cross_attention, in_context"),
        ("dit.init_from", "nothing_here.pt", "a file that is there, or empty"),
        ("dit.objective", "edm", "one of flow, ddpm"),
        ("dit.prediction", "noise", "one of velocity, data"),
        ("sample.ancestral", True, r"False, since dit\.objective is flow"),
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
    c = load("default")
    c.update_from_flattened_dict({name: value})
    field = "dit.depth" if (name, value) == ("dit.size", "") else name
    with pytest.raises(ValueError, match=rf"^config\.{field}=.*: expected .*{expected}") as caught:
        config_lib.check(c)
    assert field != name or repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("dit.prediction", "data", "velocity"),
        ("dit.time_shift", 2.0, "1"),
        ("sample.steps", 1001, "at most 1000"),
    ],
)
def test_what_ddpm_does_not_have_is_named(name, value, expected):
    c = load("default")
    c.update_from_flattened_dict({"dit.objective": "ddpm", "sample.ancestral": True})
    config_lib.check(c)
    c.update_from_flattened_dict({name: value})
    message = rf"^config\.{name}={value!r}: expected {expected}, since dit\.objective is ddpm$"
    with pytest.raises(ValueError, match=message):
        config_lib.check(c)


def test_sizes_of_a_model_fit_each_other():
    c = load("quickstart")
    config_lib.check(c)
    c.dit.heads = 7
    with pytest.raises(ValueError, match=rf"config\.dit\.width={c.dit.width}: .*dit\.heads=7"):
        config_lib.check(c)


def test_batches_divide_over_devices_and_microbatches():
    c = load("default")
    c.dit.accumulate, c.dit.batch_size = 2, 24
    with pytest.raises(ValueError, match=r"batch_size=24: .* 16: 8 data devices x dit.accumulate"):
        config_lib.check(c)
    c.mesh.data, c.mesh.tensor = -1, 4
    config_lib.check(c)
    c.mesh.fsdp = 3
    with pytest.raises(ValueError, match="8 devices"):
        config_lib.check(c)


def test_heads_divide_over_context_and_tensor():
    c = load("default")
    c.mesh.data, c.mesh.context, c.mesh.tensor = 2, 2, 2
    config_lib.check(c)
    c.mesh.data, c.mesh.context = 1, 4
    with pytest.raises(ValueError, match=r"mesh\.context=4, .*mesh\.tensor=2: .* DiT's 12 heads"):
        config_lib.check(c)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config=configs/quickstart.py", "--config.nope=1"], "nope"),
        (["--config=configs/quickstart.py", "--config.vqvae.stepz=1"], "stepz.*steps"),
        (["--config=configs/quickstart.py", "--config.vqva.steps=1"], "vqva.*vqvae"),
        (["--config=configs/quickstart.py", "--config.vqvae.steps=many"], "vqvae.steps=many"),
        (["--config=configs/quickstart.py", "--config.vqvae.steps=0"], r"vqvae\.steps=0: expected"),
        (["--config=configs/nothing_here.py"], r"configs/nothing_here\.py"),
        (["--config=configs/nothing_here.py", "--config.seed=1"], r"configs/nothing_here\.py"),
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
    lines = [line for line in done.stderr.splitlines() if not line.startswith("Pass --help")]
    assert len(lines) == 1
    assert re.search(expected, lines[0])
    assert not (tmp_path / "run").exists()
