"""Rows read where they are: the same as of a copy, whatever the store does, and a bounded cache."""

import contextlib
import itertools
import json
import os
import pickle
import subprocess
import sys
import threading

import faulty_server
import numpy as np
import pytest
from etils import epath
from made_datasets import (
    EMPTY_RECORD,
    METADATA,
    N_CODES,
    assert_same_rows,
    make_codebook,
    make_dataset,
    make_rows,
    write_plain,
)

from configs import default
from opensora_jax.build import training as build
from opensora_jax.data import dataset_writer, parts, pipeline, row_cache, store
from opensora_jax.data.dataset import DatasetError, open_dataset
from opensora_jax.data.row_cache import RowCache
from opensora_jax.data.streaming import Streaming, readings

N_ROWS = 30


@pytest.fixture(scope="module")
def proxy():
    with pytest.MonkeyPatch.context() as patch, faulty_server.run() as proxy:
        host, port = proxy.server_address
        for name, value in {
            **{"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"},
            **{"AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "1"},
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        }.items():
            patch.setenv(name, value)
        import s3fs

        # What this library tries again by itself is not to hide what we do.
        patch.setattr(s3fs.S3FileSystem, "retries", 1)
        epath.backend.fsspec_backend._get_filesystem.cache_clear()
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")
        yield proxy
        s3fs.S3FileSystem.clear_instance_cache()
        epath.backend.fsspec_backend._get_filesystem.cache_clear()


@pytest.fixture(scope="module")
def made(proxy, tmp_path_factory):
    """(rows, the folder of this machine, the same in the bucket): two captions of each video."""
    folder = tmp_path_factory.mktemp("dataset")
    rows = make_rows(N_ROWS)
    for i in range(1, N_ROWS, 2):
        for name in ("video_file", "video_latent_states"):
            rows[i][name] = rows[i - 1][name]
    for k, start in enumerate(range(0, N_ROWS, 10)):
        dataset_writer.write_part(folder, k, rows[start : start + 10], N_CODES, EMPTY_RECORD)
    dataset_writer.finish_dataset(folder, METADATA, make_codebook())
    return rows, folder, upload(folder, "made")


def upload(folder, name):
    import s3fs

    s3fs.S3FileSystem().put(str(folder), f"bucket/{name}", recursive=True)
    return epath.Path(f"s3://bucket/{name}")


@pytest.fixture(autouse=True)
def quick(proxy, tmp_path, monkeypatch):
    proxy.faults, proxy.is_down, proxy.ranges = [], False, []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "fetched"))
    monkeypatch.setattr(store, "PAUSE", 0.02)
    monkeypatch.setattr(store, "PATIENCE", 5.0)


@pytest.fixture
def streaming(tmp_path):
    return Streaming(tmp_path / "cache", 10**7)


def batches(found, seed=3):
    rows = np.flatnonzero(found.latent_frames >= 2)
    buckets = [
        pipeline.Bucket(found, rows, 2, 8),
        pipeline.Bucket(found, rows[found.latent_frames[rows] >= 4], 4, 4, [1, 3]),
    ]
    return pipeline.latents(buckets, text_length=6, seed=seed)


def draw(iterator, n):
    return list(itertools.islice(iterator, n))


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize(("where", "cache_bytes"), [("store", 10**7), ("folder", 0)])
def test_batches_are_those_of_a_copy_and_go_on_as_they_were(made, tmp_path, where, cache_bytes):
    rows, folder, bucket = made
    address = bucket if where == "store" else folder
    streaming = Streaming(tmp_path / "cache", cache_bytes)
    resident, streamed = open_dataset(folder), open_dataset(address, streaming)
    assert_same_rows(streamed, rows)
    assert [streamed.column(i, "caption") for i in (0, 21, 29)] == [
        rows[i]["caption"] for i in (0, 21, 29)
    ]
    assert streamed.column(15, "video_file") == "video14.mp4"
    assert (streamed.column(3, "fps"), streamed.has_column("nothing")) == (8.0, False)
    whole = draw(batches(resident), 12)
    reading = batches(streamed)
    assert_same(draw(reading, 5), whole[:5])
    # By what was streamed what is not goes on, and the other way round.
    for other in (resident, pickle.loads(pickle.dumps(streamed))):
        further = batches(other)
        further.set_state(json.loads(json.dumps(reading.get_state())))
        assert_same(draw(further, 7), whole[5:])
    first = batches(resident)
    draw(first, 5)
    assert first.get_state() == reading.get_state()


def test_flat_parts_are_streamed_as_well(proxy, tmp_path, streaming):
    rows = make_rows(9)
    dataset_writer.write_part(tmp_path / "flat", 0, rows, N_CODES, EMPTY_RECORD, flat=True)
    dataset_writer.finish_dataset(tmp_path / "flat", METADATA, make_codebook())
    found = open_dataset(tmp_path / "flat", streaming)
    assert_same_rows(found, rows)
    assert found.column(7, "caption") == "caption 7"


def test_of_parts_headers_and_rows_are_read_and_nothing_is_read_twice(proxy, tmp_path, streaming):
    folder = tmp_path / "large"
    rng = np.random.default_rng(0)
    rows = [
        {**row, "video_latent_states": rng.integers(0, N_CODES, (1000, 3, 4))}
        for row in make_rows(40)
    ]
    dataset_writer.write_part(folder, 0, rows, N_CODES, EMPTY_RECORD)
    dataset_writer.finish_dataset(folder, METADATA, make_codebook())
    address = upload(folder, "large")
    found = open_dataset(address, streaming)
    for i in (3, 30, 3, 30):
        np.testing.assert_array_equal(
            found[i]["video_latent_states"], rows[i]["video_latent_states"]
        )
    video_bytes = 1000 * 12 * 2
    sizes = [n for path, n in proxy.ranges if "/videos/" in path]
    assert sizes.count(video_bytes) == 3  # two, and that of row 0 when it was opened
    assert sum(sizes) < 3 * video_bytes + 2**17 < 40 * video_bytes
    again = open_dataset(address, streaming)
    proxy.ranges.clear()
    again[3], again[30]
    assert proxy.ranges == []
    assert readings([again.streamed], 2)["cache_share"] == 1.0
    copied = {path.name for path in (tmp_path / "fetched").rglob("*") if path.is_file()}
    assert not any(name.endswith(".arrow") for name in copied)


def test_a_store_that_fails_is_asked_again(made, proxy, streaming, monkeypatch, caplog):
    monkeypatch.setattr(store, "TIMEOUT", 0.5)
    _, folder, bucket = made
    found = open_dataset(bucket, streaming)
    proxy.faults = [500, None, 503, 503, "reset", "reset", None, "short", "short", "slow"] * 2
    assert_same(draw(batches(found), 4), draw(batches(open_dataset(folder)), 4))
    assert not proxy.faults
    assert readings([found.streamed], 1)["store_retries"] >= 10
    lines = [record.message for record in caplog.records if "trying again" in record.message]
    assert len(lines) == 1
    assert lines[0].startswith("s3://bucket/made/part-0000")


def test_a_store_that_stays_down_is_one_clear_error(made, proxy, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "PATIENCE", 0.5)
    found = open_dataset(made[2], Streaming(tmp_path, 0))
    reading = batches(found)
    draw(reading, 1)
    proxy.is_down = True
    expected = r"^s3://bucket/made/part-0000\d/\S+: cannot be read: .*; tried \d+ times in \d s"
    with pytest.raises(OSError, match=expected) as raised:
        draw(reading, 100)
    assert "\n" not in str(raised.value)


def test_what_is_not_there_or_not_ours_is_told_at_once(made, proxy, tmp_path, streaming):
    rows = make_rows(4)
    columns = {
        name: [row[name].tolist() for row in rows]
        for name in ("video_latent_states", "text_latent_states")
    }
    write_plain(tmp_path / "plain", columns, text_width=5)
    with pytest.raises(DatasetError, match=r"plain: has no index.*data\.stream=False"):
        open_dataset(tmp_path / "plain", streaming)
    make_dataset(tmp_path / "made")
    (tmp_path / "made/part-00002/videos" / parts.ARROW_FILE).unlink()
    found = open_dataset(tmp_path / "made", streaming)
    with pytest.raises(FileNotFoundError, match="part-00002/videos/data-00000"):
        found[8]


def test_a_part_of_another_dataset_and_a_torn_one_are_told(tmp_path):
    make_dataset(tmp_path / "made", (5, 5))
    make_dataset(tmp_path / "other", (5, 5), seed=1)
    path = tmp_path / "made/part-00001/videos" / parts.ARROW_FILE
    whole = path.read_bytes()
    for data, message in [
        ((tmp_path / "other" / path.relative_to(tmp_path / "made")).read_bytes(), "than the index"),
        (whole[: len(whole) // 2], "not a whole"),
        (whole[:7], "not a whole"),
        (b"", "not a whole"),
        (b"\xff" * len(whole), "not a whole"),
    ]:
        path.write_bytes(data)
        found = open_dataset(tmp_path / "made", Streaming(tmp_path, 0))
        with pytest.raises(DatasetError, match=f"part-00001/videos/data.*{message}"):
            found[9]


def test_a_full_cache_stays_as_it_is_and_makes_room_for_what_is_in_use(tmp_path):
    first = RowCache(tmp_path, "first", 10 * 4096)
    for i in range(20):
        first.put(f"row-{i}", bytes([i]) * 3000)
    assert [first.get(f"row-{i}") is not None for i in range(20)] == [True] * 10 + [False] * 10
    assert bytes(first.get("row-3", 3000)) == bytes([3]) * 3000
    second = RowCache(tmp_path, "second", 10 * 4096)
    second.put("row-0", b"a")
    assert second.get("row-0") is None  # the first is in use
    del first
    second = RowCache(tmp_path, "second", 10 * 4096)
    second.put("row-0", b"a")
    assert bytes(second.get("row-0")) == b"a"
    assert not (tmp_path / "first").exists()


def test_a_cache_touches_nothing_that_is_not_its_own(tmp_path):
    others = [tmp_path / "videos" / "raw" / name for name in ("a.mp4", "b.tmp")]
    others[0].parent.mkdir(parents=True)
    for path in others:
        path.write_bytes(bytes(50_000))
    cache = RowCache(tmp_path, "data", 3 * 4096)
    for i in range(6):
        cache.put(f"row-{i}", bytes(3000))
    assert [cache.get(f"row-{i}") is not None for i in range(6)] == [True] * 3 + [False] * 3
    assert all(path.stat().st_size == 50_000 for path in others)
    assert {path.name for path in (tmp_path / "videos").iterdir()} == {"raw"}
    # And what a configuration names is the folder that it lies in.
    c = default.get_config().data
    c.stream, c.cache_dir = True, str(tmp_path)
    assert build.streaming(c).cache_folder == tmp_path / "opensora_jax_rows"


def test_a_damaged_piece_is_read_anew(made, streaming):
    rows, folder, _ = made
    found = open_dataset(folder, streaming)
    assert_same_rows(found, rows)
    for i, path in enumerate(streaming.cache_folder.rglob("*-*")):
        data = path.read_bytes()
        half = len(data) // 2
        flipped = data[:half] + bytes([data[half] ^ 4]) + data[half + 1 :]
        path.write_bytes([data[:-1], flipped, b""][i % 3])
    assert_same_rows(open_dataset(folder, streaming), rows)
    counts = open_dataset(folder, streaming).streamed.close_meters()
    assert counts["found"] == counts["asked"] > 0


def test_what_a_killed_process_left_is_cleaned_away(tmp_path):
    cache = RowCache(tmp_path, "data", 10**5)
    cache.put("row-0", b"whole")
    (piece,) = tmp_path.rglob("row-0")
    left = piece.with_name("row-1.123.456.tmp")
    left.write_bytes(bytes(9000))
    RowCache(tmp_path, "data", 10**5)
    assert left.exists()  # another process may be writing it
    del cache
    cache = RowCache(tmp_path, "data", 10**5)
    assert not left.exists()
    assert bytes(cache.get("row-0")) == b"whole"


READER = """
import sys, pathlib
import numpy as np
from concurrent.futures import ThreadPoolExecutor
from opensora_jax.data.dataset import open_dataset
from opensora_jax.data.streaming import Streaming
found = open_dataset(sys.argv[1], Streaming(pathlib.Path(sys.argv[2]), int(sys.argv[3])))
order = np.random.default_rng(int(sys.argv[4])).permutation(len(found)).tolist()
total = 0
for _ in range(3):
    for row in found.streamed.pool.map(found.__getitem__, order):
        total += int(row["video_latent_states"].sum())
counts = found.streamed.close_meters()
print(total, counts["found"])
"""


def test_many_readers_share_a_cache_that_stays_bounded(made, tmp_path):
    rows, folder, _ = made
    most, cache = 25 * row_cache._BLOCK, tmp_path / "cache"
    words = [sys.executable, "-c", READER, str(folder), str(cache), str(most)]
    readers = [
        subprocess.Popen([*words, str(i)], stdout=subprocess.PIPE, text=True) for i in range(2)
    ]
    sizes, ended = [], threading.Event()

    def watch():
        while not ended.wait(0.002):
            if cache.exists():
                sizes.append(used(cache))

    watching = threading.Thread(target=watch)
    watching.start()
    answers = [reader.communicate()[0].split() for reader in readers]
    ended.set()
    watching.join()
    expected = 3 * sum(int(row["video_latent_states"].sum()) for row in rows)
    assert [int(total) for total, _ in answers] == [expected] * 2
    assert all(int(n_found) > 0 for _, n_found in answers)
    assert 0.5 * most < max(sizes) <= most + row_cache._BLOCK  # that of the total


def used(folder):
    """Bytes on the disk, while files come and go."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, name)).st_blocks * 512
    return total
