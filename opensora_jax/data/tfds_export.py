"""Writes a dataset as one of `tensorflow-datasets`: ArrayRecord files, a record a row.

The folder, DATA_DIR/NAME/1.0.0, is read by `tfds.builder_from_directory(folder).as_data_source()`
without anything of ours. What a trainer needs beside the rows lies there as well: metadata.json,
the codebook, and an index; so the same batches come from it as from the Arrow dataset.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from opensora_jax import files
from opensora_jax.data import dataset_writer, parts, tfds
from opensora_jax.data.dataset import (
    CHECKSUM,
    CODE_COUNTS,
    FILES,
    LatentDataset,
    open_dataset,
    read_metadata,
)
from opensora_jax.data.index import Index, smallest
from opensora_jax.data.parts import CODES, TEXT

VERSION = "1.0.0"
# Columns beside codes and features, and what they are.
_COLUMNS = {"video_file": str, "caption": str, "fps": np.float32}


def export(folder: epath.PathLike, data_dir: Path, name: str) -> Path:
    """Writes the finished dataset in `folder`; returns the new one's folder.

    One that is there already, of the same dataset, stays as it is.

    Raises:
      DatasetError: `folder` holds no finished dataset.
      ValueError: the name is none for TFDS, or another dataset is there.
    """
    library = tfds.library()
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"--name={name}: expected small letters, digits and _, as in my_videos")
    dataset = open_dataset(folder)
    target = Path(data_dir) / name / VERSION
    # Of datasets of others and of earlier versions, their place.
    origin = dataset.metadata.get(CHECKSUM) or str(files.absolute(folder))
    begun = target.with_name(f".{VERSION}.begun")
    if (target / "metadata.json").exists():
        found = read_metadata(target).get("exported_from")
        if found != origin:
            raise ValueError(f"{target}: holds another dataset: expected none; use another --name")
        return target
    if target.exists() and not begun.exists():
        raise ValueError(
            f"{target}: holds what was not written here: expected none; use another --name, or "
            "remove it"
        )
    shutil.rmtree(target, ignore_errors=True)  # of a run that was killed before the end
    target.parent.mkdir(parents=True, exist_ok=True)
    begun.touch()
    _write(library, dataset, Path(data_dir), name)
    n, by_row = len(dataset), dataset.index
    sums = Index(
        row_video=smallest(np.arange(n)),
        row_text=smallest(np.arange(n)),
        video_frames=smallest(dataset.latent_frames),
        text_lengths=smallest(dataset.text_lengths),
        video_ends=np.array([n]),
        text_ends=np.array([n]),
        video_hashes=by_row.video_hashes[by_row.row_video]
        if len(by_row.video_hashes)
        else by_row.video_hashes,
    ).save(epath.Path(target))
    files.write_array(target / "codebook.npy", dataset.codebook)
    files.write_array(target / CODE_COUNTS, dataset.code_counts)
    for file in ("codebook.npy", CODE_COUNTS):
        sums[file] = parts.checksum(target / file)
    own = {
        "codebook": "codebook.npy",
        "n_rows": n,
        "exported_from": origin,
        tfds.FORMAT_KEY: tfds.FORMAT,
        FILES: sums,
        "complete": True,
    }
    kept = {key: value for key, value in dataset.metadata.items() if key != CHECKSUM}
    dataset_writer.write_metadata(target, {**kept, **own})
    begun.unlink()
    return target


def _write(library: Any, dataset: LatentDataset, data_dir: Path, name: str) -> None:
    """Writes the records, in order; they are there whole or not at all."""
    columns = {key: kind for key, kind in _COLUMNS.items() if dataset.has_column(key)}
    features = library.features
    codes, text = dataset[0][CODES], dataset[0][TEXT]
    # As which we store them; others may have more digits.
    is_half = np.array_equal(text.astype(np.float16), text)
    text_dtype = np.dtype(np.float16 if is_half else np.float32)
    as_bytes = {"encoding": features.Encoding.BYTES}  # else a list of numbers, slow to read
    kinds = {
        CODES: features.Tensor(shape=(None, *dataset.grid), dtype=codes.dtype, **as_bytes),
        TEXT: features.Tensor(shape=(None, text.shape[1]), dtype=text_dtype, **as_bytes),
    }
    for key, kind in columns.items():
        kinds[key] = features.Text() if kind is str else features.Scalar(dtype=kind)

    class Builder(library.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = library.core.Version(VERSION)
        code_path = None  # beside which it would look for checksums of downloads

        def _info(self):
            return library.core.DatasetInfo(
                builder=self,
                description="VQ codes of videos and text features of their captions, a row each.",
                features=features.FeaturesDict(kinds),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {tfds.SPLIT: self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
            for i in range(len(dataset)):
                row = dataset[i]
                record = {CODES: row[CODES], TEXT: row[TEXT].astype(text_dtype)}
                yield i, record | {key: dataset.column(i, key) for key in columns}

    Builder.name = name
    Builder(data_dir=data_dir, file_format="array_record").download_and_prepare()
