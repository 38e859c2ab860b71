"""What became of all videos: on the screen, in metadata.json, and in the file of a dry run."""

from typing import Any

import numpy as np

from opensora_jax import files
from opensora_jax.data import dataset_writer
from opensora_jax.data.looks import FIGURES
from opensora_jax.data.survey import by_reason
from opensora_jax.preprocessing.job import Job, Made, NothingKeptError, n_entries

DRY_RUN = "dry_run.json"

_MOST_NAMES = 50  # of left-out videos on the screen; metadata.json names all
_LONGEST_NAME = 255  # characters of each


def counted(job: Job, records: list[dict[str, Any]]) -> dict[str, Any]:
    """What metadata.json says of the videos: which were left out and why, and `counts`.

    Each video counts once, kept where one of its clips is, so that kept, filtered and failed are
    all entries. Where videos are cut, `clip_counts` says the same of clips. `figures` says how much
    clips show, of what was measured: how many of those kept, and of those filtered, lie between
    two edges.
    """
    left_out = {
        kind: [video for record in records for video in record[kind]]
        for kind in ("filtered", "failed")
    }
    n_kept, n_failed = sum(record["kept"] for record in records), len(left_out["failed"])
    n_filtered = sum(map(n_entries, records)) - n_kept - n_failed
    found = left_out | {"counts": {"kept": n_kept, "filtered": n_filtered, "failed": n_failed}}
    if job.cuts:
        n_clips = sum(record["clips"] for record in records)
        found["clip_counts"] = {"kept": n_clips, "filtered": len(left_out["filtered"])}
    figures = [record["figures"] for record in records if "figures" in record]
    for name in FIGURES:
        counts = [of[name] for of in figures if name in of]
        if counts:
            found.setdefault("figures", {})[name] = {"edges": FIGURES[name]} | {
                kind: np.sum([c[kind] for c in counts], axis=0).tolist()
                for kind in ("kept", "filtered")
            }
    return found


def finish_dry_run(job: Job, found: dict[str, Any]) -> None:
    """Writes and tells what `local.look` found."""
    found |= counted(job, [found])
    found.pop("hashes", None)
    found["reasons"] = {
        kind: {reason: len(videos) for reason, videos in by_reason(found[kind]).items()}
        for kind in ("filtered", "failed")
    }
    files.write_json(job.output / DRY_RUN, found)
    _tell(found)
    hours = sum(found["seconds"]) / 3600
    print(f"preprocess: {_kept(found)}, {hours:.2f} hours, would be kept: ", end="")
    print(job.output / DRY_RUN)


def finish(job: Job, metadata: dict[str, Any], made: Made) -> None:
    """Completes the dataset, and tells what is in it.

    Raises:
      NothingKeptError: nothing is.
    """
    output, found = job.output, counted(job, made.records)
    if found["counts"]["kept"]:
        n_rows = dataset_writer.finish_dataset(
            output,
            metadata | found,
            np.asarray(job.model.codebook),
            records=made.parts,
            counts=made.counts,
        )
        print(f"preprocess: {output}: {n_rows} rows of {_kept(found)}")
    _tell(found)
    if not found["counts"]["kept"]:
        raise NothingKeptError(output, {kind: found[kind] for kind in ("filtered", "failed")})


def _kept(found):
    n_videos, n_clips = found["counts"]["kept"], found.get("clip_counts", {}).get("kept")
    return f"{n_videos} videos" if n_clips is None else f"{n_clips} clips of {n_videos} videos"


def _tell(found):
    """Names what was left out."""
    for kind in ("filtered", "failed"):
        cut = found.get("clip_counts", {}).get(kind)
        of_clips = "" if cut is None else f", {cut} clips of these and others"
        print(f"preprocess: {found['counts'][kind]} videos {kind}{of_clips}")
        _name(found[kind])


def _name(videos):
    for video in videos[:_MOST_NAMES]:
        file = video["file"]
        file = file if len(file) <= _LONGEST_NAME else files.short(file)
        file = "".join(c if c.isprintable() else repr(c)[1:-1] for c in file)
        file = f"{file} at {video['start']:.3f} s" if "start" in video else file
        # A file name need not be text.
        print(f"  {file}: {video['reason']}".encode(errors="backslashreplace").decode())
    if len(videos) > _MOST_NAMES:
        print(f"  ... and {len(videos) - _MOST_NAMES} more: see the file that names all")
