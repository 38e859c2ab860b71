"""What Orbax and TensorStore say beside the one clear error that a failed write ends in."""

import logging
import sys
from collections.abc import Callable


def silence() -> None:
    """Keeps it from the log and the screen; to be called once."""
    # Orbax logs the traceback of what it raises.
    logging.getLogger("absl").addFilter(
        lambda record: not (record.exc_info and "orbax" in record.pathname)
    )
    # And what became of each of its tasks.
    logging.getLogger("asyncio").addFilter(
        lambda record: not (record.exc_info and "orbax" in record.getMessage())
    )
    # TensorStore's threads, a hundred times, once Orbax gave a write up.
    sys.unraisablehook = _without_closed_loops(sys.unraisablehook)


def _without_closed_loops(hook: Callable[..., None]) -> Callable[..., None]:
    def filtered(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    return filtered
