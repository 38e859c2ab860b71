"""The stage that shows what a run made."""

from pathlib import Path

import jax
from ml_collections import ConfigDict

from opensora_jax.report import page


def run(config: ConfigDict, workdir: Path) -> None:
    """Writes `workdir`/report.html from what the other stages left; always anew.

    Raises:
      FileNotFoundError: no workdir.
      ValueError: a file of another stage is not JSON.
    """
    if jax.process_index() == 0:
        page.write(config, workdir)
