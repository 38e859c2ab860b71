"""Writes the dataset that `data.dataset` describes: part by part, then what is counted over all."""

import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
from etils import epath

from opensora_jax import files
from opensora_jax.data import arrow, dataset, parts
from opensora_jax.data.on_disk import Numbers
from opensora_jax.data.part_counts import Counts, Total, count_part
from opensora_jax.data.parts import (
    ARROW_FILE,
    CODES,
    ROWS,
    TEXT,
    TEXTS,
    VIDEOS,
    DatasetError,
    check_codes,
    read_json,
)
from opensora_jax.files import short


def write_part(
    folder: str | os.PathLike,
    number: int,
    rows: list[dict],
    n_codes: int,
    record: dict,
    *,
    texts: Numbers | None = None,
    flat: bool = False,
) -> None:
    """Writes one part; an interruption leaves either the whole part or none.

    Args:
      number: of the part; parts are read in order of their numbers, from 0 on.
      rows: dicts of video_file, caption (str), fps (float), video_latent_states ((T, H, W) integers
        in [0, n_codes)) and text_latent_states ((S, D) float; of a caption that earlier parts hold
        it is not looked at); of clips of videos all have start, too, in seconds. Rows of one clip
        have the same array of codes; the same caption has the same features. May be empty: then
        only the record is written.
      n_codes: size of the codebook; codes are stored in the smallest type that holds it.
      record: what else is to be remembered of this part, as JSON.
      texts: the numbers of the captions that earlier parts hold, to which this part's are added;
        None: `known_texts` says them.
      flat: a row a caption with all columns, codes and features as often as there are.

    Raises:
      DatasetError: a code outside the codebook.
    """
    folder = Path(folder)
    texts = known_texts(folder, number) if texts is None else texts
    part, temporary = folder / parts.name_of(number), folder / f".{parts.name_of(number)}.tmp"
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed before the record
    shutil.rmtree(temporary, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    n_texts = len(texts)
    tables, n_videos, sums = {}, 0, {}
    if rows:
        for row in rows:
            check_codes(row[CODES], n_codes, f"{part}: {row['video_file']}")
        if flat:
            tables, n_videos = {"": _flat(rows, n_codes)}, len(rows)
        else:
            tables, n_videos = _tables(rows, n_codes, texts)
        sums = _save(tables, temporary)
        os.replace(temporary, part)
    counted = {
        "videos": n_videos,
        "texts": len(rows) if flat else len(texts) - n_texts,
        "rows": len(rows),
        "flat": flat,
        dataset.FILES: sums,
    }
    files.write_json(_record(folder, number), {**record, **counted})


def write_videos(folder: epath.PathLike, start: str, videos: list[dict], n_codes: int) -> dict:
    """Writes a part that holds videos and rows, whose texts are in parts of their own.

    Any number of processes may do so at once: a part is named by its content, so that written
    again it is the same.

    Args:
      folder: of the dataset, of this machine or in an object store.
      start: what the part's name begins with.
      videos: dicts of video_file, fps, start, video_latent_states as in `write_part`, and texts: of
        each caption its number among all texts.

    Returns:
      What `finish_dataset` is to know of the part.
    """
    for video in videos:
        check_codes(video[CODES], n_codes, f"{folder}: {video['video_file']}")
    numbers = [len(video["texts"]) for video in videos]
    row_video = np.repeat(np.arange(len(videos), dtype=np.int32), numbers)
    row_text = [text for video in videos for text in video["texts"]]
    tables = {
        VIDEOS: pa.table(_video_columns(videos, n_codes)),
        ROWS: pa.table({"video": row_video, "text": pa.array(row_text, pa.int64())}),
    }
    counted = {"videos": len(videos), "texts": 0, "rows": len(row_text), "flat": False}
    return {**counted, **_place(tables, epath.Path(folder), start)}


def write_texts(
    folder: epath.PathLike, start: str, captions: list[str], features: list[np.ndarray]
) -> dict:
    """As `write_videos`, a part that holds texts, (S, D) float features of each."""
    rows = [{"caption": c, TEXT: x_SD} for c, x_SD in zip(captions, features, strict=True)]
    counted = {"videos": 0, "texts": len(rows), "rows": 0, "flat": False}
    tables = {TEXTS: pa.table(_text_columns(rows))}
    return {**counted, **_place(tables, epath.Path(folder), start)}


def _place(tables: dict[str, pa.Table], folder: epath.Path, start: str) -> dict:
    """Writes a part into a folder named by what is in it; returns its name and checksums."""
    near = tempfile.gettempdir() if files.is_remote(folder) else folder
    with tempfile.TemporaryDirectory(prefix=f".{start}.", suffix=".tmp", dir=near) as made:
        part = Path(made) / "part"
        sums = _save(tables, part)
        digest = zlib.crc32("".join(f"{name} {sums[name]} " for name in sorted(sums)).encode())
        name = f"{start}-{digest:08x}"
        if files.is_remote(folder):
            for path in files.walk(part):
                path.copy(folder / name / path.relative_to(part), overwrite=True)
        else:
            try:
                os.replace(part, folder / name)
            except OSError:
                if not (folder / name).is_dir():
                    raise
                # The same, written before.
            files.sync(folder)
    return {"name": name, dataset.FILES: sums}


def remove_all_but(folder: epath.PathLike, names: Iterable[str]) -> None:
    """Removes what processes that died left of parts, and parts of other names."""
    names = set(names)
    for path in epath.Path(folder).iterdir():
        is_part = re.fullmatch(r"(part|texts)-\d{5,}-[0-9a-f]{8}", path.name)
        is_begun = re.fullmatch(r"\.(part|texts)-\d{5,}\..*\.tmp", path.name)
        if (is_part or is_begun) and path.name not in names and path.is_dir():
            path.rmtree()


def _tables(rows, n_codes, texts) -> tuple[dict[str, pa.Table], int]:
    """The three tables of a part, by name, and how many videos there are; adds to `texts`."""
    videos, video_rows, new, row_video, row_text = {}, [], [], [], []
    for row in rows:
        key = id(row[CODES])
        if key not in videos:
            videos[key] = len(videos)
            video_rows.append(row)
        if row["caption"] not in texts:
            texts[row["caption"]] = len(texts)
            new.append(row)
        row_video.append(videos[key])
        row_text.append(texts[row["caption"]])
    tables = {
        VIDEOS: pa.table(_video_columns(video_rows, n_codes)),
        ROWS: pa.table({"video": pa.array(row_video, pa.int32()), "text": pa.array(row_text)}),
    }
    if new:
        tables[TEXTS] = pa.table(_text_columns(new))
    return tables, len(videos)


def _flat(rows, n_codes) -> pa.Table:
    return pa.table(_video_columns(rows, n_codes) | _text_columns(rows))


def _video_columns(rows, n_codes):
    starts = [row["start"] for row in rows if "start" in row]
    return {
        "video_file": [_text(row["video_file"]) for row in rows],
        CODES: arrow.to_nested_list([row[CODES] for row in rows], code_dtype(n_codes)),
        "fps": pa.array([row["fps"] for row in rows], pa.float32()),
        **({"start": pa.array(starts, pa.float64())} if starts else {}),
    }


def _text(name: str) -> str:
    """A file name, which need not be text, with escapes for what is none."""
    return name.encode(errors="backslashreplace").decode()


def code_dtype(n_codes: int) -> np.dtype:
    """What codes are stored as."""
    return np.dtype(np.uint16 if n_codes <= 2**16 else np.int32)


def _text_columns(rows):
    return {
        "caption": [row["caption"] for row in rows],
        TEXT: arrow.to_nested_list([row[TEXT] for row in rows], np.float16),
    }


def _save(tables: dict[str, pa.Table], folder: Path) -> dict[str, str]:
    """Writes tables by their names below a folder; returns the checksums of their files."""
    import datasets  # takes seconds to import, which those who only read need not wait for

    datasets.disable_progress_bars()  # one bar per part would tear up the caller's own
    sums = {}
    for name, table in tables.items():
        datasets.Dataset(table).save_to_disk(folder / name, num_shards=1)
        for path in (folder / name).iterdir():
            if path.is_file():
                files.sync(path)
        path = folder / name / ARROW_FILE
        sums[str(path.relative_to(folder))] = parts.checksum(path)
    return sums


def known_texts(folder: str | os.PathLike, n_parts: int) -> Numbers:
    """The captions in the first parts, with their numbers."""
    found = Numbers()
    for k in range(n_parts):
        record = read_json(_record(Path(folder), k))
        if record.get("texts") and not record.get("flat"):
            table = parts.open_table(
                Path(folder) / parts.name_of(k) / TEXTS,
                columns=(TEXT,),
                sums=parts.below(record[dataset.FILES], TEXTS),
            )
            for batch in table:
                for caption in batch.table.column("caption").to_pylist():
                    found[caption] = len(found)
    return found


def read_records(folder: str | os.PathLike) -> list[dict]:
    """The records of the whole parts from part 0 on, up to the first that is missing.

    Raises:
      DatasetError: one is damaged, or of an earlier version.
    """
    records = []
    while (path := _record(Path(folder), len(records))).exists():
        record = read_json(path)
        if not isinstance(record.get("kept"), int):
            raise DatasetError(
                f"{path}: kept={short(record.get('kept'))}: expected how many videos the part "
                "holds; remove the file, and it is made again"
            )
        if dataset.FILES not in record:
            raise DatasetError(
                f"{path}: of a dataset that an earlier version began: expected checksums; finish "
                "it with that version, or use another folder"
            )
        records.append(record)
    return records


def write_metadata(folder: epath.PathLike, metadata: dict) -> None:
    """Writes metadata.json; until it holds `"complete": true` the dataset cannot be opened."""
    sums = {dataset.CHECKSUM: dataset.checksum(metadata)} if metadata.get("complete") else {}
    files.write_json(epath.Path(folder) / "metadata.json", {**metadata, **sums})


def finish_dataset(
    folder: epath.PathLike,
    metadata: dict,
    codebook: np.ndarray,
    *,
    records: list[dict] | None = None,
    counts: Iterable[Counts] | None = None,
) -> int:
    """Writes codebook, index and counts, then metadata.json with what is counted over all rows.

    Adds to `metadata`: codebook, n_codes, text_width, n_rows, n_videos, n_texts, latent_shape
    ([T, H, W], or None where videos differ), fps (the median of the videos), files (checksums) and
    complete.

    Args:
      records: what is known of each part; None: what `write_part` wrote beside them.
      counts: `count_part` of each; None: it is called here.

    Returns:
      The number of rows.

    Raises:
      DatasetError: no rows, or a part is damaged.
    """
    folder = epath.Path(folder)
    files.write_array(folder / "codebook.npy", np.asarray(codebook, np.float32))
    if records is None:
        records = [
            {"name": parts.name_of(k), **record} for k, record in enumerate(read_records(folder))
        ]
    if counts is None:
        counts = (count_part(folder / record["name"], record, len(codebook)) for record in records)
    total = Total(len(codebook))
    for record, counted in zip(records, counts, strict=True):
        total.add(record, counted)
    if not total.n_rows:
        raise DatasetError(f"{folder}: no rows")
    files.write_array(folder / dataset.CODE_COUNTS, total.code_counts)
    listed = [{"name": record["name"], "files": record[dataset.FILES]} for record in records]
    files.write_json(folder / parts.LIST, listed)
    sums = total.index(records).save(folder)
    for name in ("codebook.npy", dataset.CODE_COUNTS, parts.LIST):
        sums[name] = parts.checksum(folder / name)
    shapes = np.concatenate(total.shapes)
    counted = {
        "codebook": "codebook.npy",
        "n_codes": len(codebook),
        "text_width": total.text_width,
        "n_rows": total.n_rows,
        "n_videos": total.n_videos,
        "n_texts": total.n_texts,
        "latent_shape": shapes[0].tolist() if (shapes == shapes[0]).all() else None,
        "fps": float(np.median(np.concatenate(total.fps))),
        dataset.FILES: sums,
    }
    write_metadata(folder, {**metadata, **counted, "complete": True})
    return total.n_rows


def _record(folder: Path, number: int) -> Path:
    return folder / f"{parts.name_of(number)}.json"
