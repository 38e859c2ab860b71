"""What all commands share: their arguments, and errors told in one line.

Arguments are argparse's. The exception is a configuration's fields, `--config.FIELD=VALUE`, which
ml_collections reads by flags of absl's.
"""

import argparse
import contextlib
import logging
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ml_collections import ConfigDict

logger = logging.getLogger(__name__)

# What bad arguments, bad data, missing files, full disks, packages that are not installed (object
# stores need some of their own) and files too deep or too large to be read raise.
USER_ERRORS = (
    ValueError,
    OSError,
    FloatingPointError,
    ImportError,
    RecursionError,
    MemoryError,
)


def run(main: Callable[[], None]) -> None:
    """Runs a command. Errors that its user can mend become one line and exit status 1."""
    try:
        with _telling_peers():
            main()
        sys.stdout.flush()  # here, and not at exit, a reader that has gone away is noticed
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except USER_ERRORS as error:
        logger.debug("stopped", exc_info=True)
        sys.exit(f"error: {_one_line(error)}")


@contextlib.contextmanager
def _telling_peers() -> Iterator[None]:
    """Says to the other processes of a run, if there are any, how this one ends."""
    try:
        yield
    except Exception as error:
        peers = sys.modules.get("opensora_jax.peers")
        if peers is None or not peers.failed(error):
            raise
        # At once: the usual way would wait for the others.
        if isinstance(error, USER_ERRORS):
            print(f"error: {_one_line(error)}", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    if "opensora_jax.peers" in sys.modules:
        sys.modules["opensora_jax.peers"].done()


def parser(description: str, *, prog: str | None = None) -> argparse.ArgumentParser:
    """A parser whose help shows the description as it is, and the default of every argument."""
    return argparse.ArgumentParser(prog=prog, description=description, formatter_class=_Help)


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """An argument's type: a finite int or float from `low` to `high`."""
    expected = f"a number of at least {low}" if high == math.inf else f"one from {low} to {high}"

    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text}: expected {expected}")
        return value

    parse.__name__ = kind.__name__  # which argparse names where `kind` raises
    return parse


def parse_with_config(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> tuple[argparse.Namespace, "ConfigDict"]:
    """Parses arguments with `--config=FILE` and `--config.FIELD=VALUE` among them.

    Returns:
      (the arguments, `config` being the file's name; the configuration, locked).

    Raises:
      ValueError: a file that cannot be read, a field that it does not have, or a value of another
        type than the field's.
    """
    parser.add_argument(
        "--config",
        metavar="FILE",
        required=True,
        help="a file of configs/; --config.FIELD=VALUE sets a field of it, as in "
        "--config.dit.steps=1000",
    )
    args, fields = parser.parse_known_args(argv)
    from absl import flags
    from ml_collections import config_flags

    values = flags.FlagValues()
    argv = [parser.prog, f"--config={args.config}", *fields]
    config = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        rest = values(argv)[1:]
        config.value.lock()  # what could not be loaded says so only when it is used
    except flags.UnrecognizedFlagError as error:
        parser.error(str(error))
    except (KeyError, AttributeError) as error:
        # ml_collections tells an unknown field by a KeyError, or by one made an AttributeError.
        unknown = error if isinstance(error, KeyError) else error.__context__
        if not isinstance(unknown, KeyError):
            raise
        raise ValueError(f"--config has no such field: {unknown.args[0]}") from error
    except (flags.Error, OSError, SyntaxError, TypeError) as error:
        # Ahead of the reason stand a traceback or the places that were searched.
        raise ValueError(f"--config: {str(error).splitlines()[-1].strip()}") from error
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args, config.value


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(filter(None, lines)) or type(error).__name__


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default is not None and action.default is not False
        return super()._get_help_string(action) if has_default else action.help
