"""The Arrow dataset: rows come back, and what does not fit is named."""

import pickle
import time

import datasets
import numpy as np
import pytest
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

from opensora_jax.data import dataset, dataset_writer
from opensora_jax.data.dataset import DatasetError, open_dataset
from opensora_jax.data.dataset_writer import write_part


def test_rows_of_different_lengths_come_back_in_order_across_parts(tmp_path):
    rows = make_dataset(tmp_path)
    found = open_dataset(tmp_path)
    assert_same_rows(found, rows)
    assert [found.column(i, "caption") for i in range(9)] == [row["caption"] for row in rows]
    assert found.column(8, "fps") == 8.0
    np.testing.assert_array_equal(
        found.latent_frames, [len(row["video_latent_states"]) for row in rows]
    )
    assert found.grid == (3, 4)
    np.testing.assert_array_equal(
        found.text_lengths, [len(row["text_latent_states"]) for row in rows]
    )
    np.testing.assert_array_equal(found[-1]["text_latent_states"], rows[-1]["text_latent_states"])
    for outside in (9, -10):
        with pytest.raises(IndexError, match=f"row {outside} of 9"):
            found[outside]


def test_metadata_and_code_counts(tmp_path):
    rows = make_dataset(tmp_path)
    found = open_dataset(tmp_path)
    codes = np.concatenate([row["video_latent_states"].ravel() for row in rows])
    np.testing.assert_array_equal(found.code_counts, np.bincount(codes, minlength=N_CODES))
    np.testing.assert_array_equal(found.codebook, make_codebook())
    expected = {"n_rows": 9, "n_codes": N_CODES, "text_width": 5, "fps": 8.0, "latent_shape": None}
    assert found.metadata.items() >= (METADATA | expected).items()
    make_dataset(tmp_path / "even", n_latent_frames=2)
    assert open_dataset(tmp_path / "even").metadata["latent_shape"] == [2, 3, 4]


def test_rows_are_views_of_the_file_and_quick_to_read(tmp_path):
    make_dataset(tmp_path, (400, 100))
    found = open_dataset(tmp_path)
    row = found[7]
    codes, text = row["video_latent_states"], row["text_latent_states"]
    assert (codes.dtype, text.dtype) == (np.uint16, np.float32)
    assert not codes.flags.writeable
    assert not codes.flags.owndata
    start = time.perf_counter()
    for i in range(500):
        found[i]
    # It takes about 10 microseconds; the bound is wide for the sake of busy machines.
    assert (time.perf_counter() - start) / 500 < 5e-4


def test_a_large_codebook_takes_wider_integers(tmp_path):
    rows = make_rows(1)
    rows[0]["video_latent_states"][0, 0, 0] = 70_000
    write_part(tmp_path, 0, rows, 70_001, EMPTY_RECORD)
    dataset_writer.finish_dataset(tmp_path, METADATA, np.zeros((70_001, 2)))
    codes = open_dataset(tmp_path)[0]["video_latent_states"]
    assert codes.dtype == np.int32
    assert codes[0, 0, 0] == 70_000


def test_pickling_maps_the_files_anew_and_the_name_does_not_depend_on_the_place(tmp_path):
    rows = make_dataset(tmp_path / "here", (400,))
    found = open_dataset(tmp_path / "here")
    pickled = pickle.dumps(found)
    assert len(pickled) < 1000
    assert_same_rows(pickle.loads(pickled), rows)
    (tmp_path / "here").rename(tmp_path / "there")
    assert repr(open_dataset(tmp_path / "there")) == repr(found)


def nested(feature, depth, list_type=datasets.List):
    return feature if depth == 0 else list_type(nested(feature, depth - 1, list_type))


@pytest.mark.parametrize(
    ("codes", "text"),
    [
        (nested(datasets.Value("int64"), 3), nested(datasets.Value("float64"), 2)),
        (datasets.Array3D((2, 3, 4), "int32"), datasets.Array2D((None, 5), "float32")),
        (
            nested(datasets.Value("int16"), 3, datasets.LargeList),
            datasets.List(datasets.List(datasets.Value("float16"), length=5)),
        ),
    ],
    ids=["lists", "arrays", "large and fixed lists"],
)
def test_plain_datasets_of_others(tmp_path, codes, text):
    rows = make_rows(1100, n_latent_frames=2)  # more than one record batch
    features = {"video_latent_states": codes, "text_latent_states": text}
    columns = {name: [row[name].tolist() for row in rows] for name in features}
    write_plain(tmp_path, columns, datasets.Features(features), text_width=5)
    found = open_dataset(tmp_path)
    assert len(found) == len(rows)
    for i, row in enumerate(rows):
        assert found[i]["text_latent_states"].dtype == np.float32
        np.testing.assert_array_equal(found[i]["video_latent_states"], row["video_latent_states"])
        np.testing.assert_allclose(
            found[i]["text_latent_states"], row["text_latent_states"], rtol=1e-3, atol=1e-4
        )
    codes = np.stack([row["video_latent_states"] for row in rows])
    np.testing.assert_array_equal(found.code_counts, np.bincount(codes.ravel(), minlength=N_CODES))


def test_an_unfinished_dataset_is_refused_with_the_command_to_finish_it(tmp_path):
    make_dataset(tmp_path)
    change_metadata(tmp_path, complete=False, command="python data_prep/preprocess_data.py -c x")
    with pytest.raises(DatasetError, match=r"not finished.* -c x"):
        open_dataset(tmp_path)
    change_metadata(tmp_path, complete=None)
    with pytest.raises(DatasetError, match="not finished"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("key", dataset.REQUIRED_KEYS)
def test_missing_keys_are_named(tmp_path, key):
    make_dataset(tmp_path)
    change_metadata(tmp_path, **{key: None})
    with pytest.raises(DatasetError, match=rf"metadata\.json: no key '{key}': expected"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_codes": 49}, r"codebook\.npy: float32 of shape \(50, 6\): expected .*n_codes=49"),
        ({"n_codes": "50"}, "n_codes='50': expected number of codes"),
        ({"downsample": [4, 4]}, r"downsample=\[4, 4\]: expected"),
        ({"fps": 0}, "fps=0: expected frames per second"),
        ({"text_width": 6}, "row 0: text_latent_states is 5 wide: expected text_width=6"),
        ({"resolution": [16, 16]}, r"has shape \[\d, 3, 4\]: expected \[T, 4, 4\], resolution"),
        ({"n_rows": 10}, "n_rows=10, but the parts hold 9"),
        (
            {"vqvae": "elsewhere"},
            r"metadata\.json: checksum .*: it was changed after it was written",
        ),
        ({"codebook": "other.npy"}, r"other\.npy: not a readable codebook"),
        ({"codebook": "../codebook.npy"}, r"codebook='\.\./codebook\.npy': expected file name"),
        ({"fps": float("inf")}, "fps=inf: expected frames per second"),
        ({"vqvae": ["x" * 10**6]}, "vqvae=.{50,99}: expected path of the VQ-VAE"),
        ({"text_width": 10**4000}, r"5 wide: expected text_width=.{50,99} as in"),
        ({"resolution": [10**4000, 16]}, r"expected \[T, .{50,99}, 4\], resolution over"),
        ({"n_rows": "x" * 10**6}, "n_rows=.{50,99}, but the parts hold 9"),
        ({"complete": False, "command": "x" * 10**6}, "To finish it, run: .{50,99}$"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(tmp_path, changes, message):
    make_dataset(tmp_path)
    change_metadata(tmp_path, **changes)
    with pytest.raises(DatasetError, match=message):
        open_dataset(tmp_path)


GOOD_CODES, GOOD_TEXT = [[[0] * 4] * 3], [[0.5, 1.0]]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([1] * N_CODES, r"code_counts has shape \(50,\) and sum 50: expected"),
        ("many", "code_counts='many': expected a list of counts"),
    ],
)
def test_counts_that_do_not_fit_are_refused(tmp_path, counts, message):
    write_plain(tmp_path, {"video_latent_states": [GOOD_CODES], "text_latent_states": [GOOD_TEXT]})
    change_metadata(tmp_path, code_counts=counts)
    with pytest.raises(DatasetError, match=message):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("second_codes", "second_text", "message"),
    [
        ([[[50] * 4] * 3], GOOD_TEXT, "video_latent_states holds 0 to 50: expected 0 to 49"),
        ([[[-1] * 4] * 3], GOOD_TEXT, "video_latent_states holds -1 to 0: expected 0 to 49"),
        ([[[0] * 4] * 2 + [[0] * 3]], GOOD_TEXT, "video_latent_states': row 1 is ragged"),
        ([[[0] * 4] * 3, [[0] * 4] * 2], GOOD_TEXT, "video_latent_states': row 1 is ragged"),
        (None, GOOD_TEXT, "video_latent_states': 1 values are null"),
        ([[[None] * 4] * 3], GOOD_TEXT, "video_latent_states': .* 12 values are null"),
        ([[[0] * 5] * 3], GOOD_TEXT, r"row 1: video_latent_states has shape \[1, 3, 5\]: expected"),
        (GOOD_CODES, [[0.5, 1.0], [0.5]], "text_latent_states': row 1 is ragged"),
        (GOOD_CODES, [], "text_latent_states': row 1 is empty"),
        (GOOD_CODES, [[0.5, 1.0, 2.0]], "row 1: text_latent_states is 3 wide: .*text_width=2"),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path, second_codes, second_text, message):
    columns = {
        "video_latent_states": [GOOD_CODES, second_codes],
        "text_latent_states": [GOOD_TEXT, second_text],
    }
    write_plain(tmp_path, columns)
    with pytest.raises(DatasetError, match=message):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text_latent_states": [GOOD_TEXT]}, "'video_latent_states' is missing: the columns are"),
        ({"video_latent_states": [GOOD_CODES]}, "'text_latent_states' is missing"),
        (
            {"video_latent_states": [[[[0.5]]]], "text_latent_states": [GOOD_TEXT]},
            "expected 3 nested lists of integer numbers",
        ),
        (
            {"video_latent_states": [GOOD_CODES], "text_latent_states": [[[1, 2]]]},
            "expected 2 nested lists of floating numbers",
        ),
        (
            {"video_latent_states": [GOOD_CODES[0]], "text_latent_states": [GOOD_TEXT]},
            "expected 3 nested lists",
        ),
        (
            {"video_latent_states": [[GOOD_CODES]], "text_latent_states": [GOOD_TEXT]},
            "expected 3 nested lists",
        ),
    ],
)
def test_columns_of_another_kind_are_refused(tmp_path, columns, message):
    write_plain(tmp_path, columns)
    with pytest.raises(DatasetError, match=message):
        open_dataset(tmp_path)


def test_damaged_files_of_others_are_named(tmp_path):
    write_plain(tmp_path, {"video_latent_states": [GOOD_CODES], "text_latent_states": [GOOD_TEXT]})
    (file,) = tmp_path.glob("*.arrow")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match=rf"{file}: not a whole Arrow file"):
        open_dataset(tmp_path)
    file.write_bytes(whole)
    state = tmp_path / "state.json"
    for text in ("{}", '{"_data_files": 3}', '{"_data_files": [{"filename": "../x.arrow"}]}'):
        state.write_text(text)
        with pytest.raises(DatasetError, match=r"state\.json: _data_files=.*: expected a list of"):
            open_dataset(tmp_path)


def test_damaged_files_are_named(tmp_path):
    make_dataset(tmp_path)
    np.save(tmp_path / "codebook.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DatasetError, match=r"codebook\.npy: not a readable codebook"):
        open_dataset(tmp_path)
    np.save(tmp_path / "codebook.npy", make_codebook().astype(str))
    with pytest.raises(DatasetError, match=r"codebook\.npy: <U32 of shape \(50, 6\): expected"):
        open_dataset(tmp_path)
    (tmp_path / "metadata.json").write_text("{")
    with pytest.raises(DatasetError, match=r"metadata\.json: not JSON"):
        open_dataset(tmp_path)
    with pytest.raises(DatasetError, match=r"metadata\.json: no such file"):
        open_dataset(tmp_path / "nowhere")


def test_a_part_is_whole_or_not_there(tmp_path):
    rows = make_rows(4)
    write_part(tmp_path, 0, rows[:2], N_CODES, EMPTY_RECORD)
    # Interrupted between the rows and the record that makes them count: written anew.
    write_part(tmp_path, 1, rows, N_CODES, EMPTY_RECORD)
    (tmp_path / "part-00001.json").unlink()
    assert len(dataset_writer.read_records(tmp_path)) == 1
    write_part(tmp_path, 1, rows[2:], N_CODES, EMPTY_RECORD)
    # A part of which no video could be used has a record and no rows.
    write_part(tmp_path, 2, [], N_CODES, {"kept": 0, "filtered": ["x"], "failed": []})
    assert dataset_writer.read_records(tmp_path)[2]["filtered"] == ["x"]
    dataset_writer.finish_dataset(tmp_path, METADATA, make_codebook())
    assert_same_rows(open_dataset(tmp_path), rows)
    assert not list(tmp_path.glob(".*"))


def test_codes_outside_the_codebook_are_not_written(tmp_path):
    rows = make_rows(2)
    rows[1]["video_latent_states"][0, 0, 0] = N_CODES
    with pytest.raises(DatasetError, match=r"video1\.mp4: video_latent_states holds .* to 50: exp"):
        write_part(tmp_path, 0, rows, N_CODES, EMPTY_RECORD)
    assert not list(tmp_path.iterdir())


def test_a_dataset_without_rows_is_refused(tmp_path):
    write_part(tmp_path, 0, [], N_CODES, EMPTY_RECORD)
    with pytest.raises(DatasetError, match="no rows"):
        dataset_writer.finish_dataset(tmp_path, METADATA, make_codebook())
