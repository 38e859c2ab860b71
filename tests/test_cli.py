"""Command lines: arguments, fields of a configuration among them, and errors in one line."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from opensora_jax import bench, cli, main, plan, sample

ROOT = Path(__file__).parents[1]
QUICKSTART = f"--config={ROOT / 'configs' / 'quickstart.py'}"


def parse(*argv):
    parser = cli.parser("A command.")
    parser.add_argument("--workdir")
    parser.add_argument("--steps", type=cli.number(int, 1), default=7, help="how many")
    return cli.parse_with_config(parser, argv)


def raising(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("steps=0:\n  expected\n\n another\r\n"), "steps=0: expected another"),
        (FileNotFoundError(2, "No such file", "a\u2028b"), "[Errno 2] No such file: 'a\\u2028b'"),
        (FloatingPointError("the loss is nan"), "the loss is nan"),
        (ModuleNotFoundError("No module named 'gcsfs'"), "No module named 'gcsfs'"),
        (RecursionError("too deep"), "too deep"),
        (MemoryError(), "MemoryError"),
    ],
)  # fmt: skip
def test_what_a_user_can_mend_is_told_in_one_line(error, line):
    with pytest.raises(SystemExit) as stop:
        cli.run(raising(error))
    assert stop.value.code == f"error: {line}"


def test_our_own_mistakes_keep_their_traceback():
    for error in (KeyError("name"), TypeError("of us"), AssertionError()):
        with pytest.raises(type(error)):
            cli.run(raising(error))


def test_a_reader_that_goes_away_is_no_traceback():
    code = "from opensora_jax import cli; cli.run(lambda: print('line\\n' * 100_000))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "line\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 1


def test_arguments_and_fields_in_any_order_and_both_forms():
    args, config = parse(
        *("--config.dit.steps=3", "--workdir", "runs/a", "--config.mesh.data", "-1"),
        *(QUICKSTART, "--config.preprocess.flat", "--config.vqvae.downsample=(1, 2, 4)"),
        *("--config.data.videos", "a folder", "--steps=2", "--config.stages=dit"),
    )
    assert (args.workdir, args.steps) == ("runs/a", 2)
    assert args.config == QUICKSTART.removeprefix("--config=")
    assert (config.dit.steps, config.mesh.data, config.preprocess.flat) == (3, -1, True)
    assert (config.vqvae.downsample, config.data.videos) == ((1, 2, 4), "a folder")
    assert config.stages == ("dit",)
    assert config.is_locked
    # Nothing stays from one command line to the next.
    assert parse(QUICKSTART)[1].dit.steps > 3
    assert parse(QUICKSTART, "--noconfig.preprocess.flat")[1].preprocess.flat is False


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([QUICKSTART, "--config.dit.stepz=1"], "(?s)no such field: .*stepz.*steps"),
        ([QUICKSTART, "--config.dot.steps=1"], "no such field: .*dot"),
        ([QUICKSTART, "--config.dit.steps=many"], "--config: .*dit.steps=many: invalid literal"),
        (["--config=nothing_here.py"], "--config: .*No such file.*nothing_here"),
        (["--config=nothing_here.py", "--config.seed=1"], "--config: .*nothing_here"),
        (["--config=/"], "--config: .*Is a directory"),
        ([f"--config={ROOT / 'README.md'}"], "--config: .*README.md, line"),
    ],
)
def test_a_bad_configuration_is_named(argv, message):
    with pytest.raises(ValueError, match=message):
        parse(*argv)


def test_a_configuration_that_raises_is_told_by_its_last_line(tmp_path):
    (tmp_path / "mine.py").write_text("def get_config():\n    raise ValueError('no such size')\n")
    with pytest.raises(ValueError, match=r"^--config: ValueError: no such size$"):
        parse(f"--config={tmp_path / 'mine.py'}")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: --config"),
        ([QUICKSTART, "--wrokdir=a"], "wrokdir"),
        ([QUICKSTART, "stray"], "unrecognized arguments: stray"),
        ([QUICKSTART, "--steps=0"], "--steps: 0: expected a number of at least 1"),
        ([QUICKSTART, "--steps=1.5"], "--steps: invalid int value: '1.5'"),
    ],
)
def test_a_bad_argument_is_told_with_the_usage(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "0", "1000.5"])
def test_numbers_are_finite_and_in_their_range(text):
    with pytest.raises(cli.argparse.ArgumentTypeError, match=f"{text}: expected one from 0.1 to"):
        cli.number(float, 0.1, 1000)(text)
    if text == "inf":
        with pytest.raises(cli.argparse.ArgumentTypeError, match=r"at least 0\.1"):
            cli.number(float, 0.1)(text)


def script(name):
    return runpy.run_path(str(ROOT / "data_prep" / f"{name}.py"))["main"]


@pytest.mark.parametrize(
    ("command", "defaults"),
    [
        (lambda: main.main, ["runs/ and the config's name"]),
        (lambda: bench.main, ["10"]),
        (lambda: plan.main, []),
        (lambda: sample.main, ["out.mp4", "16", "the training's sample.steps, or 50 if unknown"]),
        (lambda: script("moving_shapes"), ["1000", "all", "0"]),
        (lambda: script("preprocess_data"), ["openai/clip-vit-base-patch32", "128", "8"]),
        (lambda: script("import_videogpt"), ["as the checkpoint says"]),
        (lambda: script("collate_msrvtt"), []),
    ],
    ids=["main", "bench", "plan", "sample", "shapes", "preprocess", "videogpt", "msrvtt"],
)  # fmt: skip
def test_help_shows_what_is_the_default(command, defaults, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command", "--help"])
    with pytest.raises(SystemExit) as stop:
        command()()
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for default in defaults:
        assert f"(default: {default})" in text
    assert "default: None" not in text
    assert "default: False" not in text
