"""The flag --config, which `main`, `bench` and `plan` share, and their errors in one line."""

import sys

from absl import app
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)

# What bad configurations, bad data, missing files or full disks raise, told without a traceback.
USER_ERRORS = (ValueError, OSError, FloatingPointError)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags; a config that cannot be read, or has no such field, is told in one line."""
    try:
        rest = app.parse_flags_with_usage(argv)
        CONFIG.value.lock()  # what could not be loaded says so only when it is used
    except (KeyError, AttributeError) as error:
        # ml_collections tells an unknown field by a KeyError, or by one made an AttributeError.
        unknown = error if isinstance(error, KeyError) else error.__context__
        if not isinstance(unknown, KeyError):
            raise
        sys.exit(f"error: --config has no such field: {' '.join(unknown.args[0].split())}")
    except OSError as error:
        sys.exit(f"error: --config: {str(error).splitlines()[-1].strip()}")
    return rest
