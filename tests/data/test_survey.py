"""What a survey says of a dataset, against what was put into it."""

import numpy as np
import pytest
from made_datasets import EMPTY_RECORD, METADATA, N_CODES, make_codebook, make_rows

from opensora_jax.data import dataset_writer
from opensora_jax.data.dataset import open_dataset
from opensora_jax.data.survey import survey


@pytest.fixture
def rows():
    """Of 40 videos two are the same, one is nearly another, and one stands still."""
    made = make_rows(40, n_latent_frames=4)
    made[7]["video_latent_states"] = made[3]["video_latent_states"].copy()
    nearly = made[11]["video_latent_states"].copy()
    nearly[0, 0, 0] = (nearly[0, 0, 0] + 1) % N_CODES
    made[30]["video_latent_states"] = nearly
    made[20]["video_latent_states"] = np.repeat(made[20]["video_latent_states"][:1], 4, axis=0)
    made[21]["video_file"] = made[22]["video_file"]
    for i, row in enumerate(made):
        row["caption"] = f"The cat no {i} naps" if i % 2 else f"a dog's day, a day, Übung {i}"
    return made


def open_rows(folder, rows, **metadata):
    for k in range(0, len(rows), 16):
        dataset_writer.write_part(folder, k // 16, rows[k : k + 16], N_CODES, EMPTY_RECORD)
    dataset_writer.finish_dataset(folder, METADATA | metadata, make_codebook())
    return open_dataset(folder)


def test_what_is_in_it_is_said(tmp_path, rows):
    found = survey(open_rows(tmp_path, rows, window=8, causal=False))
    np.testing.assert_array_equal(found.rows, np.arange(40))
    assert found.seconds.tolist() == [16 / 8] * 40  # 4 latents of 4 frames, at 8 a second
    assert found.tokens.tolist() == [len(row["text_latent_states"]) for row in rows]
    moved = [np.diff(row["video_latent_states"], axis=0) != 0 for row in rows]
    np.testing.assert_allclose(found.motion, [m.mean() for m in moved])
    assert found.motion[20] == 0
    assert dict(found.words) == {
        **{"the": 20, "cat": 20, "no": 20, "naps": 20},
        **{"a": 20, "dog's": 20, "day": 20, "übung": 20},
    }
    assert [pair[:2] for pair in found.alike] == [(3, 7), (11, 30)]
    assert found.alike[0][2] == 1
    assert 0.9 < found.alike[1][2] < 1
    assert found.n_alike == 2
    assert found.same_names == 1


def test_some_videos_stand_for_all_and_each_is_looked_at_once(tmp_path, rows):
    twice = [row | {"caption": f"{row['caption']} {k}"} for row in rows for k in range(2)]
    dataset = open_rows(tmp_path, twice, window=5, causal=True)
    found = survey(dataset, 10)
    assert len(found.rows) == 10
    assert found.rows[0] == 0
    assert found.rows[-1] == 78  # the first of the last video's two
    assert len(found.motion) == len(found.captions) == 10
    assert len(found.seconds) == 40
    # Windows of 5 frames and 2 latents, the first of one frame: 4 latents are 10 frames.
    assert found.seconds.tolist() == [10 / 8] * 40


def test_alike_are_all_pairs_and_only_some_are_named(tmp_path):
    rows = make_rows(80, n_latent_frames=2)
    for row in rows[:70]:
        row["video_latent_states"] = rows[0]["video_latent_states"].copy()
    found = survey(open_rows(tmp_path, rows), most_pairs=5)
    assert found.n_alike == 70 * 69 // 2
    assert len(found.alike) == 5
