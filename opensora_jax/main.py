"""Runs the stages of a configuration.

python -m opensora_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

from opensora_jax import process

if __name__ == "__main__":
    process.start()  # before the imports, which take seconds

import contextlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from etils import epath
from ml_collections import ConfigDict

from opensora_jax import cli, files, lock, runtime
from opensora_jax import config as config_lib

logger = logging.getLogger("opensora_jax.main")  # not __main__, which it runs as


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__, prog="python -m opensora_jax.main")
    parser.add_argument(
        "--workdir", help="where everything is written (default: runs/ and the config's name)"
    )
    args, config = cli.parse_with_config(parser, argv)
    workdir = files.absolute(args.workdir or Path("runs") / Path(args.config).stem)
    runtime.start()
    config_lib.check(config)
    run(config, workdir)


def run(config: ConfigDict, workdir: epath.Path) -> None:
    """Runs every stage of `config.stages` in order; what is done is skipped by the stage.

    Raises:
      ValueError, OSError: what a stage will read is not there, told before the first one runs;
        another run is at work in the workdir; and what the stages raise.
    """
    config_lib.check_inputs(config, workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    runtime.expect_shared(workdir)
    with lock.exclusive(workdir):
        if jax.process_index() == 0:
            # Of what the stages make: the user's own samples may be on their way to the workdir.
            from opensora_jax.build import training as build

            made = [path.name for path in build.made_datasets(config, workdir)]
            for name in ("shapes", "vqvae", "text_model", "dit", *made):
                files.remove_leftovers(workdir / name)
        for stage in config.stages:
            logger.info("stage %s", stage)
            start = time.perf_counter()
            try:
                config_lib.STAGES[stage].run(config, workdir)
            except BaseException:  # stopped or failed, it took its time all the same
                with contextlib.suppress(OSError):  # the disk may be full
                    _add_seconds(workdir, stage, time.perf_counter() - start)
                raise
            _add_seconds(workdir, stage, time.perf_counter() - start)
    logger.info("all stages done: %s", workdir)


def _add_seconds(workdir: epath.Path, stage: str, seconds: float) -> None:
    """Adds to what the stage took so far, in seconds.json and, when there is one, fidelity.json."""
    if jax.process_index():
        return
    path, fidelity = workdir / "seconds.json", workdir / "fidelity.json"
    total = files.read_json(path) if path.exists() else {}
    total[stage] = round(total.get(stage, 0.0) + seconds, 1)
    files.write_json(path, total)
    if fidelity.exists():
        files.write_json(fidelity, files.read_json(fidelity) | {"seconds": total})


if __name__ == "__main__":
    cli.run(main)
