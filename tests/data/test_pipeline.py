"""Input pipelines: the same batches on any number of processes."""

import itertools
import json
import logging

import numpy as np
import pytest

from opensora_jax.data import dataset, dataset_writer, pipeline, video_io

N_ROWS, BATCH = 24, 8
METADATA = {
    "downsample": [4, 4, 4],
    "vqvae": "vqvae",
    "text_model": "text_model",
    "resolution": [8, 8],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows that their text and codes tell apart, of five latent frames each."""
    folder = tmp_path_factory.mktemp("dataset")
    rows = [
        {
            "video_file": f"video{i}.mp4",
            "caption": f"caption {i}",
            "fps": 8.0,
            "video_latent_states": np.arange(5)[:, None, None] + np.zeros((5, 2, 2), int),
            "text_latent_states": np.full((1 + i % 3, 4), i, np.float32),
        }
        for i in range(N_ROWS)
    ]
    dataset_writer.write_part(folder, 0, rows, 50, {"kept": N_ROWS, "filtered": [], "failed": []})
    dataset_writer.finish_dataset(folder, METADATA, np.zeros((50, 4), np.float32))
    return dataset.open_dataset(folder)


def latents(data, indices=None, seed=0, stride=1):
    bucket = pipeline.Bucket(data, np.arange(N_ROWS), 3, BATCH, indices, stride)
    return pipeline.latents([bucket], text_length=3, seed=seed)


def draw(iterator, n):
    return list(itertools.islice(iterator, n))


def row_numbers(batches):
    return np.array([batch["text"][:, 0, 0] for batch in batches]).astype(int)


def starts(batches):
    return {int(codes[0, 0, 0]) for batch in batches for codes in batch["codes"]}


def test_examples_begin_where_windows_of_the_encoding_did(data):
    assert starts(draw(latents(data, stride=2), 6)) == {0, 2}
    assert starts(draw(latents(data, stride=4), 6)) == {0}


def test_an_epoch_has_every_row_once_and_the_next_another_order(data):
    batches = draw(latents(data), 6)
    first, second = row_numbers(batches).reshape(2, N_ROWS)
    assert sorted(first) == sorted(second) == list(range(N_ROWS))
    assert not np.array_equal(first, second)
    assert starts(batches) == {0, 1, 2}
    for batch in batches:
        assert batch["codes"].shape == (BATCH, 3, 2, 2)
        assert batch["text"].shape == (BATCH, 3, 4)
        np.testing.assert_array_equal(batch["text_length"], 1 + batch["text"][:, 0, 0] % 3)


@pytest.mark.parametrize("shares", [[[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 4], [1, 5], [2, 6], [3, 7]]])
def test_processes_together_load_the_batches_of_one(data, shares):
    whole = draw(latents(data), 6)
    for indices in shares:
        for batch, part in zip(whole, draw(latents(data, indices), 6), strict=True):
            for name, array in batch.items():
                np.testing.assert_array_equal(part[name], array[indices])


def test_a_process_reads_only_its_indices(data, monkeypatch):
    read = []
    get = dataset.LatentDataset.__getitem__
    monkeypatch.setattr(
        dataset.LatentDataset, "__getitem__", lambda self, i: read.append(i) or get(self, i)
    )
    batches = latents(data, indices=[2, 5])
    rows = row_numbers(draw(batches, 3)).reshape(-1)
    # Some batches more are read ahead.
    assert set(rows) <= set(read)
    assert len(read) <= (3 + 6) * 2


def test_the_state_goes_on_with_the_same_batches_on_other_processes(data):
    whole = draw(latents(data), 6)
    first = latents(data, indices=[0, 1, 2, 3])
    draw(first, 2)
    state = first.get_state()
    assert state == {"next_index": 2}
    for indices in ([0, 1], [6, 7], range(BATCH)):
        other = latents(data, indices)
        other.set_state(state)
        for batch, part in zip(whole[2:], draw(other, 4), strict=True):
            np.testing.assert_array_equal(part["codes"], batch["codes"][indices])
            np.testing.assert_array_equal(part["text"], batch["text"][indices])


def test_without_a_seed_rows_come_once_and_in_order(data):
    batches = list(latents(data, seed=None))
    np.testing.assert_array_equal(row_numbers(batches).reshape(-1), np.arange(N_ROWS))
    assert (batches[0]["codes"][:, 0] == 0).all()


def test_buckets_take_turns_by_their_batches_and_go_on_where_they_were(data):
    rows = np.arange(N_ROWS)

    def buckets():
        parts = [pipeline.Bucket(data, rows, 2, 12), pipeline.Bucket(data, rows, 4, 4)]
        return pipeline.latents(parts, text_length=3, seed=0)

    whole = draw(buckets(), 16)
    shapes = [batch["codes"].shape[:2] for batch in whole]
    # Two epochs of 24 rows.
    assert shapes.count((12, 2)) == 4
    assert shapes.count((4, 4)) == 12
    for n_frames in (2, 4):
        batches = [batch for batch in whole if batch["codes"].shape[1] == n_frames]
        numbers = [int(n) for batch in batches for n in batch["text"][:, 0, 0]]
        assert sorted(numbers) == sorted([*range(N_ROWS)] * 2)
    first, other = buckets(), buckets()
    draw(first, 7)
    other.set_state(json.loads(json.dumps(first.get_state())))
    for batch, again in zip(whole[7:], draw(other, 9), strict=True):
        for name, array in batch.items():
            np.testing.assert_array_equal(again[name], array)


def of_grid(folder, grid, n_rows):
    """A dataset of rows that are all of this grid."""
    rows = [
        {
            "video_file": f"video{i}.mp4",
            "caption": f"caption {i}",
            "fps": 8.0,
            "video_latent_states": np.full(grid, i),
            "text_latent_states": np.full((1, 4), i, np.float32),
        }
        for i in range(n_rows)
    ]
    dataset_writer.write_part(folder, 0, rows, 50, {"kept": n_rows, "filtered": [], "failed": []})
    sizes = {"resolution": [4 * n for n in grid[1:]]}
    dataset_writer.finish_dataset(folder, METADATA | sizes, np.zeros((50, 4), np.float32))
    return dataset.open_dataset(folder)


def test_buckets_of_any_shape_are_the_same_on_any_number_of_processes(tmp_path):
    """Lengths, heights and widths differ, and a batch has about as many tokens in each."""
    sizes = {(4, 2, 2): (24, 6), (4, 1, 4): (12, 6), (2, 2, 4): (12, 6), (1, 2, 4): (24, 12)}
    sets = {grid: of_grid(tmp_path / str(grid), grid, n) for grid, (n, _) in sizes.items()}

    def batches(part, of):
        found = []
        for grid, (n_rows, batch) in sizes.items():
            indices = None if of == 1 else range(part * batch // of, (part + 1) * batch // of)
            found.append(pipeline.Bucket(sets[grid], np.arange(n_rows), grid[0], batch, indices))
        return pipeline.latents(found, text_length=1, seed=3)

    n = sum(n_rows // batch for n_rows, batch in sizes.values())  # an epoch
    whole = draw(batches(0, 1), n)
    assert {batch["codes"].size for batch in whole} == {96}
    shapes = [batch["codes"].shape[1:] for batch in whole]
    assert {grid: shapes.count(grid) * sizes[grid][1] for grid in sizes} == {
        grid: n_rows for grid, (n_rows, _) in sizes.items()
    }
    for of in (2, 3):
        parts = [draw(batches(part, of), n) for part in range(of)]
        for batch, *pieces in zip(whole, *parts, strict=True):
            for name, array in batch.items():
                together = np.concatenate([piece[name] for piece in pieces])
                np.testing.assert_array_equal(together, array)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Six videos, each of one gray; the third is no video and the fifth too short."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(6):
        n_frames = 2 if i == 4 else 6
        frames = np.full((n_frames, 16, 16, 3), 40 * i, np.uint8)
        video_io.write_video(folder / f"video{i}.mp4", frames, 8.0)
    (folder / "video2.mp4").write_bytes(b"not a video")
    return folder


def clips(videos, indices=None):
    source = pipeline.ClipSource(pipeline.find_videos(videos), n_frames=4, resolution=16)
    return pipeline.clips(source, batch_size=6, seed=0, indices=indices)


def test_the_videos_of_a_folder_are_those_with_a_videos_suffix(tmp_path):
    (tmp_path / "more").mkdir()
    for name in ("b.mp4", "more/a.WEBM", "c.ts", ".b.mp4.1.tmp", "a.json", "a.m3u8", "mp4"):
        (tmp_path / name).touch()
    found = [str(path.relative_to(tmp_path)) for path in pipeline.find_videos(tmp_path)]
    assert found == ["b.mp4", "c.ts", "more/a.WEBM"]
    with pytest.raises(FileNotFoundError, match="no video files"):
        pipeline.find_videos(tmp_path / "nowhere")


def test_for_a_video_that_cannot_be_used_the_next_stands_in(videos, caplog):
    with caplog.at_level(logging.WARNING):
        batches = draw(clips(videos), 3)
    for batch in batches:
        assert batch["video"].shape == (6, 4, 16, 16, 3)
        grays = np.round(batch["video"][:, 0, 8, 8, 0] / 40).astype(int)
        assert sorted(grays) == [0, 1, 3, 3, 5, 5]
    for name in ("video2.mp4", "video4.mp4"):
        assert sum(name in record.getMessage() for record in caplog.records) == 1
    for indices in ([0, 1, 2], [3, 4, 5]):
        for batch, part in zip(batches, draw(clips(videos, indices), 3), strict=True):
            np.testing.assert_array_equal(part["video"], batch["video"][indices])
