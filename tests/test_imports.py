"""What may import what, and what must never be loaded."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "opensora_jax"
# Imported by all, importing nothing.
ROOT = {"files"}
# Imported by all but those.
DEVICES = {"mesh", "rngs"}
BASE = DEVICES | {"models", "diffusion", "data", "convert", "metrics"}


def module_names():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_parts(path):
    """First parts below opensora_jax of all that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "opensora_jax" and len(parts) > 1:
                yield parts[1]
            if parts[0] == "data_prep":
                yield "data_prep"


def allowed(part):
    """What the modules of `opensora_jax.part` may import besides their own kind."""
    if part in ROOT:
        return set()
    if part in DEVICES:
        return ROOT
    if part == "convert":
        return ROOT | DEVICES | {"models"}
    if part in BASE:
        return ROOT | DEVICES
    if part in ("tasks", "train"):
        return ROOT | BASE
    return None  # commands join everything


def test_imports_go_one_way():
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).with_suffix("").parts[0]
        may = allowed(part)
        for imported in imported_parts(path):
            assert imported != "data_prep", f"{path} imports data_prep"
            if may is not None and imported != part:
                assert imported in may, f"{path}: {part} imports {imported}"


@pytest.mark.parametrize("package", ["opensora_jax"])
def test_importing_the_package_is_cheap(package):
    code = f"import sys; import {package}; assert 'jax' not in sys.modules; print(len(sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert int(out) < 150


def test_no_module_loads_torch_or_tensorflow(tmp_path):
    names = list(module_names())
    assert "opensora_jax.models.dit" in names
    assert "opensora_jax.stages.preprocess" in names
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
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
