"""The Arrow dataset on disk: nothing twice, read by Hugging Face, changed bytes told."""

from pathlib import Path

import datasets
import numpy as np
import pytest
from made_datasets import (
    EMPTY_RECORD,
    METADATA,
    N_CODES,
    assert_same_rows,
    make_codebook,
    make_dataset,
    make_rows,
)

from opensora_jax.data import dataset_writer, parts
from opensora_jax.data.dataset import DatasetError, open_dataset
from opensora_jax.data.dataset_writer import write_part
from opensora_jax.data.joined import load_joined
from opensora_jax.data.pipeline import split_by_video


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


@pytest.mark.parametrize("flat", [False, True])
def test_file_names_that_are_not_text_are_stored_escaped(tmp_path, flat):
    rows = make_rows(1)
    rows[0]["video_file"] = "caf\udce9.mp4"
    write_part(tmp_path, 0, rows, N_CODES, EMPTY_RECORD, flat=flat)
    dataset_writer.finish_dataset(tmp_path, METADATA, make_codebook())
    assert open_dataset(tmp_path).column(0, "video_file") == r"caf\udce9.mp4"
