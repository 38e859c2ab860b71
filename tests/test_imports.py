"""What may import what, and what must never be loaded."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "opensora_jax"

BASE = {
    "process",
    "mesh",
    "rngs",
    "files",
    "hardware",
    "runtime",
    "lock",
    "peers",
    "windows",
    "coordinator",
    "web",
}
LIBRARY = {"models", "diffusion", "data", "convert", "metrics"}
COMMANDS = {"main", "sample", "bench", "plan", "inspect_data"}
# Every module and folder of the package, and the others that it may import.
ROOMS: dict[str, set[str]] = {
    "process": set(),
    "rngs": set(),
    "web": set(),
    "files": {"web"},
    "hardware": set(),
    "mesh": set(),
    "peers": set(),
    "coordinator": set(),
    "windows": set(),
    "runtime": {"coordinator", "files", "peers"},
    "lock": {"files", "runtime"},
    "models": BASE,
    "diffusion": BASE,
    "data": BASE,
    "metrics": BASE,
    "convert": BASE | {"models"},
    "checkpoint": BASE,
    "train": BASE | {"checkpoint"},
    "tasks": BASE | LIBRARY,
    "build": BASE | LIBRARY | {"tasks", "train"},
    "inference": BASE | LIBRARY | {"tasks", "checkpoint", "build"},
    "preprocessing": BASE | LIBRARY | {"inference"},
    "planning": BASE | LIBRARY | {"tasks", "train", "build", "config"},
    "report": BASE | LIBRARY | {"train"},
    "config": BASE | LIBRARY | {"tasks", "train", "build", "inference"},
    "stages": BASE
    | LIBRARY
    | {"tasks", "train", "checkpoint", "build", "inference", "report", "config", "preprocessing"},
    "cli": {"runtime"},
}
ROOMS |= {command: set(ROOMS) for command in COMMANDS}


def modules():
    """(name, path) of every module."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imported_rooms(path):
    """The rooms of opensora_jax that a file imports from."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            assert not name.startswith("data_prep"), f"{path} imports data_prep"
            parts = name.split(".")
            if parts[0] == "opensora_jax" and len(parts) > 1:
                yield parts[1]


def test_every_room_is_named():
    there = {path.stem for path in PACKAGE.iterdir() if path.name[0] not in "_."}
    assert there == set(ROOMS)


def test_imports_go_one_way():
    for name, path in modules():
        room = [*name.split("."), ""][1]
        for imported in set(imported_rooms(path)) - {room}:
            assert imported in ROOMS[room], f"{path}: {room} imports {imported}"


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("room", ["inference.generator", "inference.tokenizer"])
def test_inference_takes_nothing_of_training(room):
    code = f"import sys, opensora_jax.{room}; print(*sys.modules, sep='\\n')"
    loaded = run(code).splitlines()
    assert f"opensora_jax.{room}" in loaded
    for unwanted in ("train", "stages", "report", "planning"):
        assert f"opensora_jax.{unwanted}" not in loaded


def test_importing_the_package_is_cheap():
    code = "import sys, opensora_jax; assert 'jax' not in sys.modules; print(len(sys.modules))"
    assert int(run(code)) < 150


def test_no_module_loads_torch_or_tensorflow(tmp_path):
    names = [name for name, _ in modules()]
    assert {"opensora_jax.models.dit", "opensora_jax.stages.preprocess"} <= set(names)
    unwanted = ("torch", "tensorflow", "torchvision", "keras")
    for name in unwanted:  # libraries take what they find
        (tmp_path / f"{name}.py").touch()
    code = (
        "import importlib, sys\n"
        f"sys.path.append({str(tmp_path)!r})\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "loaded = {m.split('.')[0] for m in sys.modules}\n"
        f"print(sorted(loaded & {set(unwanted)!r}))"
    )
    assert run(code) == "[]"
