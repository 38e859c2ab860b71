"""Writes the dataset that `data.dataset` describes: part by part, then what is counted over all."""

import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa

from opensora_jax import files
from opensora_jax.data import arrow, dataset, index, parts
from opensora_jax.data.index import Index, smallest
from opensora_jax.data.parts import (
    ARROW_FILE,
    CODES,
    ROWS,
    TEXT,
    TEXTS,
    VIDEOS,
    DatasetError,
    check_codes,
    count_codes,
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
    texts: dict[str, int] | None = None,
    flat: bool = False,
) -> None:
    """Writes one part; an interruption leaves either the whole part or none.

    Args:
      number: of the part; parts are read in order of their numbers, from 0 on.
      rows: dicts of video_file, caption (str), fps (float), video_latent_states ((T, H, W) integers
        in [0, n_codes)) and text_latent_states ((S, D) float). Rows of one video have the same
        array of codes; the same caption has the same features. May be empty: then only the record
        is written.
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
    tables, n_videos = {}, 0
    if rows:
        for row in rows:
            check_codes(row[CODES], n_codes, f"{part}: {row['video_file']}")
        if flat:
            tables, n_videos = {"": _flat(rows, n_codes)}, len(rows)
        else:
            tables, n_videos = _tables(rows, n_codes, texts)
        for name, table in tables.items():
            _save(table, temporary / name)
        os.replace(temporary, part)
    sums = {}
    for name in tables:
        path = part / name / ARROW_FILE
        sums[str(path.relative_to(part))] = parts.checksum(path)
    counted = {
        "videos": n_videos,
        "texts": len(rows) if flat else len(texts) - n_texts,
        "rows": len(rows),
        "flat": flat,
        dataset.FILES: sums,
    }
    files.write_json(_record(folder, number), {**record, **counted})


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
    return {
        "video_file": [_text(row["video_file"]) for row in rows],
        CODES: arrow.to_nested_list([row[CODES] for row in rows], code_dtype(n_codes)),
        "fps": pa.array([row["fps"] for row in rows], pa.float32()),
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


def _save(table: pa.Table, folder: Path) -> None:
    import datasets  # takes seconds to import, which those who only read need not wait for

    datasets.disable_progress_bars()  # one bar per part would tear up the caller's own
    datasets.Dataset(table).save_to_disk(folder, num_shards=1)
    for path in folder.iterdir():
        if path.is_file():
            files.sync(path)


def known_texts(folder: str | os.PathLike, n_parts: int) -> dict[str, int]:
    """The captions in the first parts, with their numbers."""
    found: dict[str, int] = {}
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


def write_metadata(folder: str | os.PathLike, metadata: dict) -> None:
    """Writes metadata.json; until it holds `"complete": true` the dataset cannot be opened."""
    sums = {dataset.CHECKSUM: dataset.checksum(metadata)} if metadata.get("complete") else {}
    files.write_json(Path(folder) / "metadata.json", {**metadata, **sums})


def finish_dataset(folder: str | os.PathLike, metadata: dict, codebook: np.ndarray) -> int:
    """Writes codebook, index and counts, then metadata.json with what is counted over all rows.

    Adds to `metadata`: codebook, n_codes, text_width, n_rows, n_videos, n_texts, latent_shape
    ([T, H, W], or None where videos differ), fps (the median of the videos), files (checksums) and
    complete.

    Returns:
      The number of rows.

    Raises:
      DatasetError: no rows, or a part is damaged.
    """
    folder = Path(folder)
    index.write_array(folder / "codebook.npy", np.asarray(codebook, np.float32))
    records = read_records(folder)
    found = _Counted(len(codebook))
    for k, record in enumerate(records):
        if record["rows"]:
            found.add(folder / parts.name_of(k), record)
    if not found.n_rows:
        raise DatasetError(f"{folder}: no rows")
    index.write_array(folder / dataset.CODE_COUNTS, found.code_counts)
    files.write_json(folder / dataset.PART_SUMS, [record[dataset.FILES] for record in records])
    sums = found.index(records).save(folder)
    for name in ("codebook.npy", dataset.CODE_COUNTS, dataset.PART_SUMS):
        sums[name] = parts.checksum(folder / name)
    shapes = np.concatenate(found.shapes)
    counted = {
        "codebook": "codebook.npy",
        "n_codes": len(codebook),
        "text_width": found.text_width,
        "n_rows": found.n_rows,
        "n_videos": len(shapes),
        "n_texts": sum(map(len, found.lengths)),
        "latent_shape": shapes[0].tolist() if (shapes == shapes[0]).all() else None,
        "fps": float(np.median(np.concatenate(found.fps))),
        dataset.FILES: sums,
    }
    write_metadata(folder, {**metadata, **counted, "complete": True})
    return found.n_rows


class _Counted:
    """What is gathered over the parts."""

    def __init__(self, n_codes: int):
        self.code_counts = np.zeros(n_codes, np.int64)
        self.n_rows, self.text_width = 0, 0
        self.shapes, self.fps, self.hashes = [], [], []  # of videos
        self.lengths = []  # of texts
        self._row_video, self._row_text = [], []

    def add(self, part: Path, record: dict) -> None:
        n_videos, n_texts = sum(map(len, self.shapes)), sum(map(len, self.lengths))
        if record["flat"]:
            table = parts.open_table(part, columns=(CODES, TEXT), sums=record[dataset.FILES])
            for batch in table:
                self._add_videos(batch)
                self._add_texts(batch)
            self._row_video.append(n_videos + np.arange(record["rows"]))
            self._row_text.append(n_texts + np.arange(record["rows"]))
        else:
            for batch in self._open(part, VIDEOS, CODES, record):
                self._add_videos(batch)
            for batch in self._open(part, TEXTS, TEXT, record) if record["texts"] else ():
                self._add_texts(batch)
            for batch in self._open(part, ROWS, None, record):
                self._row_video.append(n_videos + batch.table.column("video").to_numpy())
                self._row_text.append(batch.table.column("text").to_numpy())
        self.n_rows += record["rows"]

    def _open(self, part, name, column, record):
        sums = parts.below(record[dataset.FILES], name)
        return parts.open_table(part / name, columns=(column,) if column else (), sums=sums)

    def _add_videos(self, batch: parts.Batch) -> None:
        self.code_counts += count_codes(batch, len(self.code_counts))
        self.shapes.append(batch.codes.shapes)
        self.fps.append(batch.table.column("fps").to_numpy())
        names = batch.table.column("video_file").to_pylist()
        self.hashes.append(np.array([index.hash_of(name) for name in names], np.uint64))

    def _add_texts(self, batch: parts.Batch) -> None:
        self.lengths.append(batch.text.shapes[:, 0])
        self.text_width = int(batch.text.shapes[0, 1])

    def index(self, records: list[dict]) -> Index:
        return Index(
            row_video=smallest(np.concatenate(self._row_video)),
            row_text=smallest(np.concatenate(self._row_text)),
            video_frames=smallest(np.concatenate(self.shapes)[:, 0]),
            text_lengths=smallest(np.concatenate(self.lengths)),
            video_ends=np.cumsum([record["videos"] for record in records]),
            text_ends=np.cumsum([record["texts"] for record in records]),
            video_hashes=np.concatenate(self.hashes),
        )


def _record(folder: Path, number: int) -> Path:
    return folder / f"{parts.name_of(number)}.json"
