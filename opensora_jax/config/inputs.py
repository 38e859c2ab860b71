"""The check of what the stages will read, before the first of them runs."""

import functools
import os
from collections.abc import Callable
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from opensora_jax import files
from opensora_jax.config import rules
from opensora_jax.config.stages import STAGES

# Field -> (where in the workdir it is where the field is empty, the stage that makes it).
_DEFAULTS = {
    "data.captions": ("shapes/train/captions.json", "shapes"),
    "data.videos": ("shapes/train/videos", "shapes"),
    "data.vqvae": ("vqvae", "vqvae"),
    "data.dataset": ("dataset", "preprocess"),
}


def check_inputs(c: ConfigDict, workdir: epath.PathLike) -> None:
    """Checks the workdir and all that stages will read and no stage of this run makes.

    What only a finished stage would read need not be there, and nothing is downloaded.

    Args:
      c: a configuration that `check` lets pass.

    Raises:
      OSError, ValueError: naming the field or the folder, and what was expected.
    """
    workdir = epath.Path(workdir)
    _check_workdir(c, workdir)
    todo = [stage for stage in c.stages if not _is_done(c, workdir, stage)]
    read = functools.partial(_read_input, c, workdir)
    if "vqvae" in todo:
        _check_vqvae(c, workdir, read)
    if "preprocess" in todo:
        _check_preprocess(c, workdir, read)
    if "dit" in todo:
        _check_dit(c, workdir, read)
    if "fidelity" in todo:
        for stage, file in (("shapes", "shapes/train/captions.json"), ("dit", "dit/model.json")):
            if stage not in c.stages and not (workdir / file).exists():
                rules.raise_invalid(c, "stages", f"{stage} before fidelity, or {workdir / file}")


def _check_workdir(c: ConfigDict, workdir: epath.Path) -> None:
    if files.is_remote(workdir):
        remote = [name for name, stage in STAGES.items() if stage.remote]
        if not set(c.stages) <= set(remote):
            expected = f"only {' and '.join(remote)}, which can write to an object store"
            rules.raise_invalid(c, "stages", f"{expected}, with --workdir={workdir}")
        return
    there = next(path for path in (workdir, *workdir.parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"--workdir={workdir}: {there} is a file: expected a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"--workdir={workdir}: expected write permission in {there}")


def _is_done(c: ConfigDict, workdir: epath.Path, stage: str) -> bool:
    """Whether the stage has nothing left to do; of shapes and report, which read nothing, False."""
    match stage:
        case "vqvae" | "dit":
            from opensora_jax.build import training as build

            return build.is_trained(workdir / stage, c[stage].steps)
        case "preprocess":
            from opensora_jax.build import training as build

            return all(_is_made(path) for path in build.made_datasets(c, workdir))
        case "fidelity":
            return (workdir / "fidelity.json").exists()
    return False


def _is_made(folder: epath.Path) -> bool:
    """Whether a dataset, or all of a folder of buckets, is finished."""
    from opensora_jax.data import bucket_folders

    mark = folder / "metadata.json"
    if bucket_folders.read(folder) is not None:
        return bucket_folders.is_complete(folder)
    return mark.exists() and files.read_json(mark).get("complete", False)


def _read_input(
    c: ConfigDict, workdir: epath.Path, name: str, read: Callable[[epath.Path], Any]
) -> Any:
    """What `read` makes of a field's file or folder; None where none is asked for, or not yet made.

    Raises:
      ValueError: what `read` raises, with the name of the field.
    """
    value = rules.value_of(c, name)
    default, maker = _DEFAULTS.get(name, ("", None))
    if not value and (maker is None or maker in c.stages):
        return None
    try:
        return read(epath.Path(value or workdir / default))
    except (OSError, ValueError) as error:
        hint = "" if value else f"; name one, or put {maker} into config.stages"
        raise ValueError(f"config.{name}={files.short(value)}: {error}{hint}") from error


def _check_vqvae(c: ConfigDict, workdir: epath.Path, read: Callable) -> None:
    from opensora_jax.build import training as build
    from opensora_jax.convert import vgg
    from opensora_jax.data import bucket_folders, pipeline
    from opensora_jax.inference import tokenizer

    names = ("metadata.json", bucket_folders.LIST)
    made = [
        path
        for path in build.made_datasets(c, workdir)
        if any((path / name).exists() for name in names)
    ]
    if made and not c.data.vqvae:
        most = f"no more than were trained when {made[0]} was made"
        rules.raise_invalid(c, "vqvae.steps", f"{most}; remove that folder to train on")
    read("data.videos", pipeline.find_videos)
    read("data.held_out_videos", pipeline.find_videos)
    read("data.images", pipeline.find_images)
    start_from = read("vqvae.init_from", tokenizer.load_tokenizer)
    read("vqvae.perceptual", vgg.load_perceptual)
    if start_from is not None:
        build.expect_same_sizes(c.vqvae, start_from)


def _check_preprocess(c: ConfigDict, workdir: epath.Path, read: Callable) -> None:
    from opensora_jax.data import captions, shots
    from opensora_jax.inference import text_encoder, tokenizer

    if c.preprocess.split_scenes:
        shots.expect_installed()
    columns = (c.data.file_column, c.data.caption_column)
    strict = c.preprocess.strict
    entries = read(
        "data.captions", lambda path: captions.read_captions(path, columns, strict=strict)
    )
    for one, other in (("captions", "videos"), ("videos", "captions")):
        if c.data[one] and not c.data[other]:
            rules.raise_invalid(
                c, f"data.{other}", f"those of data.{one}={files.short(c.data[one])}"
            )
    if entries is not None:
        read("data.videos", lambda folder: captions.expect_a_video(entries, folder))
    read("data.text_model", text_encoder.check_text_model)
    model = read("data.vqvae", tokenizer.load_tokenizer)
    if model is not None:
        where = c.data.vqvae or workdir / "vqvae"
        rules.check_codes(
            *(c, model.downsample, f"downsample={model.downsample} of {where}"),
            causal=model.causal,
            window=model.n_frames,
        )


def _check_dit(c: ConfigDict, workdir: epath.Path, read: Callable) -> None:
    from opensora_jax.build import networks
    from opensora_jax.build import training as build
    from opensora_jax.convert.dit import open_blocks
    from opensora_jax.data import dataset

    def look(_: epath.Path) -> None:
        for folder in build.dataset_folders(c, workdir):
            dataset.complete_metadata(folder)

    read("data.dataset", look)
    config = networks.dit_config(c.dit, channels=1, out_channels=1, text_width=1)
    read("dit.init_from", lambda path: open_blocks(path, config))
