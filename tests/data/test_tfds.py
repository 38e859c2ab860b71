"""Datasets of TensorFlow Datasets, without TensorFlow: written, read by others, trained from."""

import itertools
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets
from made_datasets import (
    EMPTY_RECORD,
    METADATA,
    N_CODES,
    assert_same_rows,
    change_metadata,
    make_codebook,
    make_dataset,
    make_rows,
    write_plain,
)

from opensora_jax.data import dataset_writer, pipeline
from opensora_jax.data.dataset import DatasetError, open_dataset
from opensora_jax.data.streaming import Streaming
from opensora_jax.data.tfds_export import export

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(rows, folder of the Arrow dataset, of the other): two captions of each video."""
    folder = tmp_path_factory.mktemp("made")
    rows = make_rows(24)
    for i in range(1, 24, 2):
        for name in ("video_file", "video_latent_states"):
            rows[i][name] = rows[i - 1][name]
    for k in range(2):
        part = rows[12 * k : 12 * (k + 1)]
        dataset_writer.write_part(folder / "arrow", k, part, N_CODES, EMPTY_RECORD)
    dataset_writer.finish_dataset(folder / "arrow", METADATA, make_codebook())
    return rows, folder / "arrow", export(folder / "arrow", folder / "tfds", "mine")


def test_others_read_the_records_in_order(made):
    rows, _, folder = made
    source = tensorflow_datasets.builder_from_directory(folder).as_data_source(split="train")
    assert len(source) == len(rows)
    for record, row in zip(source, rows, strict=True):
        assert record.keys() == row.keys()
        assert record["video_file"].decode() == row["video_file"]
        assert record["caption"].decode() == row["caption"]
        assert record["fps"] == row["fps"]
        for name in ("video_latent_states", "text_latent_states"):
            np.testing.assert_array_equal(record[name], row[name])
    named = tensorflow_datasets.builder("mine", data_dir=folder.parents[1])
    assert len(named.as_data_source(split="train")) == len(rows)
    assert "tensorflow" not in sys.modules


def batches(found, rows):
    buckets = [pipeline.Bucket(found, rows[found.latent_frames[rows] >= 2], 2, 4)]
    return pipeline.latents(buckets, text_length=6, seed=1)


def test_batches_are_the_same_and_a_training_goes_on_from_either(made):
    rows, arrow, folder = made
    one, other = open_dataset(arrow), open_dataset(folder)
    assert_same_rows(other, rows)
    assert [other.column(i, "caption") for i in (0, 23)] == ["caption 0", "caption 23"]
    assert (other.column(5, "fps"), other.has_column("caption")) == (8.0, True)
    np.testing.assert_array_equal(one.code_counts, other.code_counts)
    np.testing.assert_array_equal(one.codebook, other.codebook)
    for ours, theirs in zip(
        pipeline.split_by_video(one, 0.3), pipeline.split_by_video(other, 0.3), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    training, _ = pipeline.split_by_video(one, 0.3)
    expected = list(itertools.islice(batches(one, training), 12))
    reading = batches(other, training)
    found = list(itertools.islice(reading, 5))
    further = batches(pickle.loads(pickle.dumps(other)), training)
    further.set_state(json.loads(json.dumps(reading.get_state())))
    found += itertools.islice(further, 7)
    for ours, theirs in zip(found, expected, strict=True):
        for name in theirs:
            assert ours[name].dtype == theirs[name].dtype
            np.testing.assert_array_equal(ours[name], theirs[name])
    back = batches(one, training)
    back.set_state(reading.get_state())
    np.testing.assert_array_equal(next(back)["codes"], expected[5]["codes"])


def test_again_it_stays_and_another_is_refused(made, tmp_path):
    _, arrow, folder = made
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert export(arrow, folder.parents[1], "mine") == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    make_dataset(tmp_path / "other")
    with pytest.raises(ValueError, match=r"mine/1\.0\.0: holds another dataset"):
        export(tmp_path / "other", folder.parents[1], "mine")
    for name in ("Mine", "a/b", "", "1"):
        with pytest.raises(ValueError, match=f"--name={name}: expected small letters"):
            export(arrow, folder.parents[1], name)


def test_what_was_killed_before_the_end_is_made_anew(made, tmp_path):
    rows, arrow, folder = made
    begun = tmp_path / "mine" / "1.0.0"
    begun.mkdir(parents=True)
    (begun.parent / ".1.0.0.begun").touch()
    for path in folder.iterdir():
        if path.is_file() and path.name != "metadata.json":
            (begun / path.name).write_bytes(path.read_bytes()[:100])
    assert_same_rows(open_dataset(export(arrow, tmp_path, "mine")), rows)
    assert {path.name for path in begun.parent.iterdir()} == {"1.0.0"}


def test_what_others_prepared_under_the_name_stays(made, tmp_path):
    target = tmp_path / "mine" / "1.0.0"
    target.mkdir(parents=True)
    (target / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match=r"mine/1\.0\.0: holds what was not written here"):
        export(made[1], tmp_path, "mine")
    assert (target / "dataset_info.json").read_text() == "{}"


def test_datasets_of_others_keep_all_digits(tmp_path):
    rows = make_rows(5, n_latent_frames=2)
    for row in rows:
        row["text_latent_states"] = row["text_latent_states"] + np.float32(1e-6)
    columns = {
        name: [row[name].tolist() for row in rows]
        for name in ("video_latent_states", "text_latent_states")
    }
    write_plain(tmp_path / "plain", columns, text_width=5)
    assert_same_rows(open_dataset(export(tmp_path / "plain", tmp_path, "plain")), rows)


def test_what_does_not_fit_is_told(made, tmp_path):
    _, _, folder = made
    with pytest.raises(DatasetError, match=r"a TFDS dataset: expected data\.stream=False"):
        open_dataset(folder, Streaming(tmp_path, 0))
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.rglob("*"):
        if path.is_file():
            target = copy / path.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    open_dataset(copy)
    next(copy.glob("*.array_record-*")).unlink()
    with pytest.raises(DatasetError, match=f"{copy}: not a TFDS dataset in ArrayRecord"):
        open_dataset(copy)
    (copy / "features.json").write_text("{}")
    with pytest.raises(DatasetError, match=f"{copy}: not a TFDS dataset in ArrayRecord"):
        open_dataset(copy)
    change_metadata(folder=copy, complete=False)
    with pytest.raises(DatasetError, match="not finished"):
        open_dataset(copy)


def test_the_command_needs_no_tensorflow(made, tmp_path):
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('TensorFlow was imported')")
    words = ["-i", made[1], "-o", tmp_path / "tfds", "--name", "by_command"]
    done = subprocess.run(
        [sys.executable, ROOT / "data_prep/export_tfds.py", *map(str, words)],
        capture_output=True,
        text=True,
        env={"PATH": "", "PYTHONPATH": f"{tmp_path}:{ROOT}", "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "tfds/by_command/1.0.0")
    assert len(open_dataset(tmp_path / "tfds/by_command/1.0.0")) == 24
