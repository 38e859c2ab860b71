"""What the README names is there: configurations, their fields, scripts, flags, files."""

import ast
import importlib
import os
import re
import runpy
import shlex
import sys
from importlib import metadata
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from opensora_jax import sample
from opensora_jax.config import STAGES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MAIN_FLAGS = {"--config", "--workdir"}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands():
    """The words of every command, in its order; `a && b` are two."""
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split("&&"):
                yield shlex.split(command)
    for command in re.findall(r"`(python [^`]+)`", README):
        yield shlex.split(command)


COMMANDS = list(commands())


def config(path):
    assert (ROOT / path).is_file(), path
    return importlib.import_module(path.removesuffix(".py").replace("/", ".")).get_config()


def field(config, name):
    """Fails where the configuration has no such field."""
    for part in name.split("."):
        assert isinstance(config, ConfigDict), name
        assert part in config, name
        config = config[part]
    return config


def flags(words):
    return [word.split("=", 1)[0] for word in words if word.startswith("-")]


def known_flags(monkeypatch, capsys, main):
    monkeypatch.setattr(sys, "argv", ["command", "--help"])
    with pytest.raises(SystemExit):
        main()
    return set(re.findall(r"(?<![\w-])--?\w+", capsys.readouterr().out))


def test_the_two_commands_come_first():
    assert blocks("bash")[:2] == [
        "pip install -e . && python -m opensora_jax.main --config=configs/quickstart.py\n",
        "pip install -e '.[test]' && python -m pytest\n",
    ]


def test_the_slow_tests_are_said_to_be_left_out():
    beginning = README[: README.index("## What you get")]
    assert "`python -m pytest -m slow`" in beginning


def test_every_command_is_known():
    for words in COMMANDS:
        match words:
            case ["pip", "install", "-e", *_] | ["python", "-m", "pytest", *_]:
                pass
            case ["hf", "download", *_]:  # of huggingface-hub
                assert any(x.name == "hf" for x in metadata.entry_points(group="console_scripts"))
            case ["python", "-m", module, *_]:
                assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
            case ["python", script, *_]:
                assert (ROOT / script).is_file()
            case [script, *_]:
                assert os.access(ROOT / script, os.X_OK)


def test_main_gets_configurations_and_fields_that_exist():
    seen = 0
    for words in COMMANDS:
        if words[:3] != ["python", "-m", "opensora_jax.main"]:
            continue
        options = dict(word.split("=", 1) for word in words[3:])
        found = config(options["--config"])
        for name, value in options.items():
            if name.startswith("--config."):
                seen += 1
                old = field(found, name.removeprefix("--config."))
                if value.startswith("("):
                    assert isinstance(ast.literal_eval(value), tuple)
                else:
                    type(old)(value)  # raises where the field is a number and the value is none
            else:
                assert name in MAIN_FLAGS
    assert seen > 5


def test_sample_knows_its_flags(monkeypatch, capsys):
    known = known_flags(monkeypatch, capsys, sample.main)
    used = [words[3:] for words in COMMANDS if words[1:3] == ["-m", "opensora_jax.sample"]]
    assert len(used) >= 2
    for words in used:
        assert set(flags(words)) <= known


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("data_prep/*.py")))
def test_scripts_know_their_flags(monkeypatch, capsys, script):
    main = runpy.run_path(str(ROOT / "data_prep" / script))["main"]
    known = known_flags(monkeypatch, capsys, main)
    used = [words[2:] for words in COMMANDS if words[1] == f"data_prep/{script}"]
    assert used, f"the README does not show how to run {script}"
    for words in used:
        assert set(flags(words)) <= known


def test_flags_named_in_the_text_exist(monkeypatch, capsys):
    known = known_flags(monkeypatch, capsys, sample.main)
    for path in ROOT.glob("data_prep/*.py"):
        known |= known_flags(monkeypatch, capsys, runpy.run_path(str(path))["main"])
    named = re.findall(r"`(--(?!config)\w+)", README)
    assert len(named) > 5
    assert set(named) <= known


def test_fields_named_in_the_text_exist():
    default = config("configs/default.py")
    groups = "|".join(name for name, value in default.items() if isinstance(value, ConfigDict))
    names = re.findall(rf"`(?:--config\.)?((?:{groups})\.(?!json)\w+)[`=]", README)
    assert len(names) > 10
    for name in names:
        field(default, name)


def test_every_configuration_and_stage_is_in_a_table():
    for path in ROOT.glob("configs/*.py"):
        assert f"| `configs/{path.name}` |" in README
    for stage in STAGES:
        assert f"| `{stage}` |" in README


def test_extras_are_declared():
    declared = re.findall(r'"(\w+)": \[', (ROOT / "setup.py").read_text())
    named = re.findall(r"\.\[(\w+)\]", README)
    assert {"tpu", "cuda", "test"} <= set(named) <= set(declared)


def test_the_layout_and_links_name_files():
    layout = next(block for block in blocks("text") if block.startswith("configs/"))
    folder = ""
    for line in layout.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name
        path = name if folder == name else folder + name
        assert (ROOT / path).exists(), path
    links = re.findall(r"(?<!!)\[[^]]*\]\(((?!https://)[^)]+)\)", README)
    assert "LICENSE" in links
    for link in links:
        assert (ROOT / link).exists(), link
