"""Runs the stages of a configuration.

python -m opensora_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from opensora_jax import cli, files, runtime
from opensora_jax import config as config_lib

logger = logging.getLogger("opensora_jax.main")  # not __main__, which it runs as

# What these read is not in the workdir, if the configuration says where it is.
_REMOTE_STAGES = {"dit", "vqvae"}


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


def run(config: ConfigDict, workdir: Path) -> None:
    """Runs every stage of `config.stages` in order; what is done is skipped by the stage."""
    if files.is_remote(workdir) and not set(config.stages) <= _REMOTE_STAGES:
        raise ValueError(
            f"--workdir={workdir}: only {' and '.join(sorted(_REMOTE_STAGES))} can write to an "
            f"object store, config.stages={config.stages}"
        )
    workdir.mkdir(parents=True, exist_ok=True)
    runtime.expect_shared(workdir)
    # After the configuration is known to be good: these imports take seconds.
    from opensora_jax.stages import dit, fidelity, preprocess, report, shapes, vqvae

    stages = {
        "shapes": shapes.run,
        "vqvae": vqvae.run,
        "preprocess": preprocess.run,
        "dit": dit.run,
        "fidelity": fidelity.run,
        "report": report.run,
    }
    for stage in config.stages:
        logger.info("stage %s", stage)
        start = time.perf_counter()
        stages[stage](config, workdir)
        if jax.process_index() == 0:
            _add_seconds(workdir, stage, time.perf_counter() - start)
    logger.info("all stages done: %s", workdir)


def _add_seconds(workdir: Path, stage: str, seconds: float) -> None:
    """Adds to what the stage took so far, in seconds.json and, when there is one, fidelity.json."""
    path, fidelity = workdir / "seconds.json", workdir / "fidelity.json"
    total = json.loads(path.read_text()) if path.exists() else {}
    total[stage] = round(total.get(stage, 0.0) + seconds, 1)
    written = {path: total}
    if fidelity.exists():
        written[fidelity] = json.loads(fidelity.read_text()) | {"seconds": total}
    for path, value in written.items():
        files.write_json(path, value)


if __name__ == "__main__":
    runtime.use_huge_pages()
    cli.run(main)
