"""Checkpoints: whole or absent, read in parts, and a folder belongs to one model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax import mesh as mesh_lib
from opensora_jax.train import checkpoint
from opensora_jax.train.state import TrainState


def state(step):
    params = {"layer": {"kernel": jnp.arange(32.0).reshape(8, 4) + step}}
    return TrainState(
        step=jnp.int32(step),
        params=params,
        ema=jax.tree.map(lambda x: x + 100, params),
        opt_state=(jax.tree.map(jnp.zeros_like, params),),
        extra={},
    )


def save(folder, *steps):
    checkpoints = checkpoint.Checkpoints(folder)
    for step in steps:
        checkpoints.save(step, state(step), {"next": step})
    checkpoints.close()


def assert_equal_states(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_latest_state_comes_back_with_the_iterator_s(tmp_path):
    save(tmp_path, 1, 2, 3)
    checkpoints = checkpoint.Checkpoints(tmp_path)
    assert checkpoints.latest_step == 3
    restored, data_state = checkpoints.restore(state(0))
    checkpoints.close()
    assert_equal_states(restored, state(3))
    assert data_state == {"next": 3}
    folders = sorted(p.name for p in (tmp_path / checkpoint.FOLDER).iterdir())
    assert folders == ["2", "3"]  # older ones are gone


def test_it_is_placed_as_asked(tmp_path):
    save(tmp_path, 1)
    mesh = mesh_lib.make_mesh({"data": 1, "fsdp": 8, "context": 1, "tensor": 1})
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    like = {
        "ema": {"layer": {"kernel": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=sharding)}}
    }
    checkpoints = checkpoint.Checkpoints(tmp_path)
    restored = checkpoints.restore_items(like)
    checkpoints.close()
    assert list(restored) == ["ema"]  # and nothing else was read
    kernel = restored["ema"]["layer"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(1, 4)}
    np.testing.assert_array_equal(kernel, state(1).ema["layer"]["kernel"])


def test_no_checkpoint_is_named(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path / "empty")
    assert checkpoints.latest_step is None
    with pytest.raises(FileNotFoundError, match=r"empty.*no checkpoint"):
        checkpoints.restore(state(0))
    checkpoints.close()


def test_a_half_written_checkpoint_is_not_one(tmp_path):
    save(tmp_path, 1)
    folder = tmp_path / checkpoint.FOLDER
    # What a kill in the middle of writing step 2 leaves behind.
    half = folder / "2.orbax-checkpoint-tmp" / "params"
    half.mkdir(parents=True)
    (half / "_METADATA").write_text('{"tree_meta')
    checkpoints = checkpoint.Checkpoints(tmp_path)
    assert checkpoints.latest_step == 1
    restored, _ = checkpoints.restore(state(0))
    assert_equal_states(restored, state(1))
    checkpoints.save(2, state(2), {"next": 2})
    checkpoints.close()
    checkpoints = checkpoint.Checkpoints(tmp_path)
    assert checkpoints.latest_step == 2
    assert_equal_states(checkpoints.restore(state(0))[0], state(2))
    checkpoints.close()


def test_a_folder_belongs_to_one_model(tmp_path):
    folder = tmp_path / "dit"
    description = {"width": 64, "downsample": (4, 4, 4), "name": "a"}
    checkpoint.claim(folder, description)
    assert checkpoint.read_description(folder) == {**description, "downsample": [4, 4, 4]}
    checkpoint.claim(folder, description)  # the same again
    before = (folder / checkpoint.MODEL_FILE).read_bytes()
    with pytest.raises(ValueError, match=r"dit: .*another model") as caught:
        checkpoint.claim(folder, {"width": 128, "downsample": (4, 4, 4), "depth": 2})
    for difference in ("width=128, there 64", "name=None, there 'a'", "depth=2, there None"):
        assert difference in str(caught.value)
    assert "downsample" not in str(caught.value)
    assert (folder / checkpoint.MODEL_FILE).read_bytes() == before
    assert [p.name for p in folder.iterdir()] == [checkpoint.MODEL_FILE]
    assert json.loads(before)["width"] == 64


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: no model.json"):
        checkpoint.read_description(tmp_path)
