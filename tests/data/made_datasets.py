"""Datasets of random codes and texts, for tests."""

import json

import datasets
import numpy as np

from opensora_jax.data import dataset_writer
from opensora_jax.data.dataset_writer import write_part

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
