"""Writes the dataset that `data.dataset` describes: part by part, then what is counted over all."""

import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa

from opensora_jax import files
from opensora_jax.data import arrow
from opensora_jax.data.dataset import (
    CODES,
    TEXT,
    DatasetError,
    check_codes,
    count_codes,
    read_batches,
    read_json,
)
from opensora_jax.files import short


def write_part(
    folder: str | os.PathLike, index: int, rows: list[dict], n_codes: int, record: dict
) -> None:
    """Writes one part; an interruption leaves either the whole part or none.

    Args:
      index: the part's number; parts are read in order of their numbers.
      rows: dicts of video_file, caption (str), fps (float), video_latent_states ((T, H, W) integers
        in [0, n_codes)) and text_latent_states ((S, D) float). May be empty: then only the record
        is written.
      n_codes: size of the codebook; codes are stored in the smallest type that holds it.
      record: what else is to be remembered of this part, as JSON.

    Raises:
      DatasetError: a code outside the codebook.
    """
    import datasets  # takes seconds to import, which those who only read need not wait for

    folder = Path(folder)
    part = _part(folder, index)
    temporary = folder / f".{part.name}.tmp"
    for leftover in (temporary, part):  # a part without its record is not whole
        shutil.rmtree(leftover, ignore_errors=True)
    if rows:
        for row in rows:
            check_codes(row[CODES], n_codes, f"{part}: {row['video_file']}")
        code_type = np.uint16 if n_codes <= 2**16 else np.int32
        table = pa.table(
            {
                "video_file": [row["video_file"] for row in rows],
                CODES: arrow.to_nested_list([row[CODES] for row in rows], code_type),
                TEXT: arrow.to_nested_list([row[TEXT] for row in rows], np.float32),
                "caption": [row["caption"] for row in rows],
                "fps": pa.array([row["fps"] for row in rows], pa.float32()),
            }
        )
        datasets.disable_progress_bars()  # one bar per part would tear up the caller's own
        datasets.Dataset(table).save_to_disk(temporary)
        os.replace(temporary, part)
    files.write_json(_record(folder, index), record)


def read_records(folder: str | os.PathLike) -> list[dict]:
    """The records of the whole parts from part 0 on, up to the first that is missing."""
    records = []
    while (path := _record(Path(folder), len(records))).exists():
        record = read_json(path)
        if not isinstance(record.get("kept"), int):
            raise DatasetError(
                f"{path}: kept={short(record.get('kept'))}: expected how many videos the part "
                "holds; remove the file, and it is made again"
            )
        records.append(record)
    return records


def write_metadata(folder: str | os.PathLike, metadata: dict) -> None:
    """Writes metadata.json; until it holds `"complete": true` the dataset cannot be opened."""
    files.write_json(Path(folder) / "metadata.json", metadata)


def finish_dataset(folder: str | os.PathLike, metadata: dict, codebook: np.ndarray) -> int:
    """Writes codebook.npy, then metadata.json with what is counted over all rows.

    Adds to `metadata`: codebook, n_codes, text_width, n_rows, code_counts (how often each code
    occurs), latent_shape ([T, H, W], or None where rows differ), fps (the median of the rows) and
    complete.

    Returns:
      The number of rows.

    Raises:
      DatasetError: no rows.
    """
    folder = Path(folder)
    temporary = folder / ".codebook.tmp.npy"
    np.save(temporary, np.asarray(codebook, np.float32))
    os.replace(temporary, folder / "codebook.npy")
    batches = list(read_batches(folder))
    if not batches:
        raise DatasetError(f"{folder}: no rows")
    shapes = np.concatenate([batch.codes.shapes for batch in batches])
    fps = np.concatenate([batch.table.column("fps").to_numpy() for batch in batches])
    counts = sum(count_codes(batch, len(codebook)) for batch in batches)
    counted = {
        "codebook": "codebook.npy",
        "n_codes": len(codebook),
        "text_width": int(batches[0].text.shapes[0, 1]),
        "n_rows": len(shapes),
        "latent_shape": shapes[0].tolist() if (shapes == shapes[0]).all() else None,
        "fps": float(np.median(fps)),
        "code_counts": counts.tolist(),
    }
    write_metadata(folder, {**metadata, **counted, "complete": True})
    return len(shapes)


def _part(folder, index):
    return folder / f"part-{index:05d}"


def _record(folder, index):
    return folder / f"part-{index:05d}.json"
