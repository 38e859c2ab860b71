"""The Arrow dataset: real parts on disk, read back by us and by Hugging Face."""

import json
import pickle
import time
from pathlib import Path

import datasets
import numpy as np
import pytest

from opensora_jax.data import dataset, dataset_writer, parts
from opensora_jax.data.dataset import DatasetError, open_dataset
from opensora_jax.data.dataset_writer import write_part
from opensora_jax.data.joined import load_joined
from opensora_jax.data.pipeline import split_by_video

N_CODES = 50
METADATA = {
    "downsample": [4, 4, 4],
    "vqvae": "vqvae",
    "vqvae_fingerprint": "abc",
    "text_model": "text_model",
    "resolution": [12, 16],
}
EMPTY_RECORD = {"kept": 0, "filtered": [], "failed": []}


def make_rows(n, seed=0, n_latent_frames=None):
    rng = np.random.default_rng(seed)
    return [
        {
            "video_file": f"video{i}.mp4",
            "caption": f"caption {i}",
            "fps": 8.0,
            "video_latent_states": rng.integers(
                0, N_CODES, (n_latent_frames or rng.integers(1, 6), 3, 4)
            ),
            # Of float16, in which it is stored.
            "text_latent_states": rng.standard_normal((rng.integers(1, 9), 5))
            .astype(np.float16)
            .astype(np.float32),
        }
        for i in range(n)
    ]


def make_codebook():
    return np.random.default_rng(7).standard_normal((N_CODES, 6)).astype(np.float32)


def make_dataset(folder, part_sizes=(3, 4, 2), **options):
    """A finished dataset of these parts; returns its rows."""
    rows = make_rows(sum(part_sizes), **options)
    remaining = iter(rows)
    for index, size in enumerate(part_sizes):
        write_part(folder, index, [next(remaining) for _ in range(size)], N_CODES, EMPTY_RECORD)
    dataset_writer.finish_dataset(folder, METADATA, make_codebook())
    return rows


def write_plain(folder, columns, features=None, text_width=2):
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(folder)
    np.save(folder / "codebook.npy", make_codebook())
    own = {"codebook": "codebook.npy", "n_codes": N_CODES, "text_width": text_width, "fps": 8}
    (folder / "metadata.json").write_text(json.dumps(METADATA | own))


def change_metadata(folder, **changes):
    path = folder / "metadata.json"
    metadata = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in metadata.items() if v is not None}))


def assert_same_rows(found, rows):
    assert len(found) == len(rows)
    for i, row in enumerate(rows):
        assert found[i].keys() == {"video_latent_states", "text_latent_states"}
        np.testing.assert_array_equal(found[i]["video_latent_states"], row["video_latent_states"])
        np.testing.assert_array_equal(found[i]["text_latent_states"], row["text_latent_states"])


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


def captioned(n_videos, n_captions, seed=0):
    """Rows of videos with several captions each, of which some are of two videos."""
    videos = make_rows(n_videos, seed)
    texts = make_rows(n_videos * n_captions, seed + 1)
    rows = []
    for i, video in enumerate(videos):
        for k in range(n_captions):
            text = texts[min(i * n_captions + k, (n_videos - 1) * n_captions)]
            own = {name: text[name] for name in ("caption", "text_latent_states")}
            rows.append({**video, **own})
    return rows


def write(folder, parts, **options):
    for number, rows in enumerate(parts):
        record = {"kept": 0, "filtered": [], "failed": []}
        write_part(folder, number, rows, N_CODES, record, **options)
    dataset_writer.finish_dataset(folder, METADATA, make_codebook())


@pytest.mark.parametrize("flat", [False, True])
def test_hugging_face_reads_a_row_a_caption(tmp_path, flat):
    rows = captioned(6, 4)
    write(tmp_path, [rows[:12], rows[12:]], flat=flat)
    joined = load_joined(tmp_path)
    assert isinstance(joined, datasets.Dataset)
    assert len(joined) == len(rows)
    assert_same_rows(open_dataset(tmp_path), rows)
    for found, row in zip(joined, rows, strict=True):
        assert found.keys() == row.keys()
        for name in ("video_file", "caption", "fps"):
            assert found[name] == row[name]
        for name in ("video_latent_states", "text_latent_states"):
            np.testing.assert_array_equal(found[name], row[name])
    batch = joined[10:14]
    np.testing.assert_array_equal(batch["video_latent_states"][3], rows[13]["video_latent_states"])
    part = datasets.load_from_disk(tmp_path / "part-00001" / ("" if flat else "videos"))
    assert part.num_rows == (12 if flat else 3)
    if flat:
        for found, row in zip(part, rows[12:], strict=True):
            assert found["video_latent_states"] == row["video_latent_states"].tolist()
            np.testing.assert_array_equal(found["text_latent_states"], row["text_latent_states"])


def test_nothing_is_stored_twice(tmp_path):
    """20 captions a video: bytes of codes once, of features once a distinct caption, of text."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(60):
        codes = rng.integers(0, N_CODES, (20 + i, 16, 16))
        for k in range(20):
            caption = f"caption {(20 * i + k) % 900} of a video that has many of them"
            text = np.random.default_rng(k).standard_normal((12, 64)).astype(np.float16)
            rows.append(
                {"video_file": f"video{i}.mp4", "caption": caption, "fps": 8.0}
                | {"video_latent_states": codes, "text_latent_states": text}
            )
    metadata = METADATA | {"resolution": [64, 64]}
    for number in range(3):
        write_part(tmp_path, number, rows[400 * number :][:400], N_CODES, EMPTY_RECORD)
    dataset_writer.finish_dataset(tmp_path, metadata, make_codebook())
    codes = {id(row["video_latent_states"]): row["video_latent_states"] for row in rows}.values()
    texts = {row["caption"]: row["text_latent_states"].nbytes + len(row["caption"]) for row in rows}
    least = 2 * sum(x.size for x in codes) + sum(texts.values())
    stored = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert stored < 1.15 * least
    assert_same_rows(open_dataset(tmp_path), rows)


def test_more_than_99_999_parts(tmp_path):
    for number in (0, 3, 99_999, 100_000, 1_234_567):
        (tmp_path / parts.name_of(number)).mkdir()
    (tmp_path / "part-00003.json").touch()
    found = [path.name for path in parts.find(tmp_path)]
    assert found == ["part-00000", "part-00003", "part-99999", "part-100000", "part-1234567"]


def test_few_parts_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_MOST_OPEN", 2)
    rows = make_dataset(tmp_path, (3,) * 8)
    found = open_dataset(tmp_path)
    for i in np.random.default_rng(0).integers(0, 24, 100):
        found[i]
    assert maps_of(tmp_path) <= 2 * 2
    assert_same_rows(found, rows)


def maps_of(folder):
    """Files in a folder that this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return len({line.split()[-1] for line in lines if str(folder) in line})


def test_validation_is_chosen_by_the_names_of_videos(tmp_path):
    rows = captioned(200, 3)
    write(tmp_path / "a", [rows])
    write(tmp_path / "b", [rows[300:], rows[:300][::-1]])  # others beside them, another order
    chosen = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        found = open_dataset(folder)
        train, validation = split_by_video(found, 0.1)
        assert sorted([*train, *validation]) == list(range(600))
        names = [{found.column(i, "video_file") for i in part} for part in (train, validation)]
        assert not names[0] & names[1]
        assert len(names[1]) == 20
        chosen.append(names[1])
    assert chosen[0] == chosen[1]
    assert len(split_by_video(found, 0.0)[1]) == 0


def read_all(folder):
    found = open_dataset(folder)
    for i in range(len(found)):
        found[i]


@pytest.mark.parametrize("flat", [False, True])
def test_changed_bytes_are_seen_when_a_part_is_first_used(tmp_path, flat):
    rows = captioned(8, 3)
    write(tmp_path, [rows[:12], rows[12:]], flat=flat)
    whole = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    told = 0
    for path, data in whole.items():
        is_read = path.suffix in (".arrow", ".npy") or path.name in ("metadata.json", "parts.json")
        if not is_read or path.parent.name == "rows":  # the index has what these say
            continue
        for place in np.random.default_rng(len(data)).integers(0, 8 * len(data), 8):
            changed = bytearray(data)
            changed[place // 8] ^= 1 << place % 8
            path.write_bytes(changed)
            with pytest.raises(DatasetError):
                read_all(tmp_path)
            told += 1
        path.write_bytes(data)
    assert told > 50
    assert_same_rows(open_dataset(tmp_path), rows)


def test_swapped_parts_are_told(tmp_path):
    rows = captioned(8, 3)
    write(tmp_path, [rows[:12], rows[12:]])
    (tmp_path / "part-00000").rename(tmp_path / "aside")
    (tmp_path / "part-00001").rename(tmp_path / "part-00000")
    (tmp_path / "aside").rename(tmp_path / "part-00001")
    with pytest.raises(DatasetError, match="the file was changed or taken from elsewhere"):
        open_dataset(tmp_path)


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
