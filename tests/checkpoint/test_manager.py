"""Checkpoints: whole or absent, read in parts; a folder belongs to one model."""

import json
import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from items import assert_equal, ema, files_of_at_most, folders, largest, make_items, opened, save

from opensora_jax import mesh as mesh_lib
from opensora_jax.checkpoint import manager as checkpoint


def test_the_latest_state_comes_back_with_its_notes(folder):
    with opened(folder) as checkpoints:
        assert checkpoints.latest_step == 2
        restored, notes = checkpoints.restore(make_items(0))
    assert_equal(restored, make_items(2))
    assert notes == {"next": 2}


def test_the_last_ones_stay_and_some_for_good(folder):
    with opened(folder, keep=2, keep_every=3) as checkpoints:
        for step in (3, 4, 5):
            checkpoints.save(step, make_items(step))
        checkpoints.wait()
        assert folders(folder) == {"3", "4", "5"}
        checkpoints.save(6, make_items(6))
    assert folders(folder) == {"3", "5", "6"}


def test_they_are_placed_as_asked(folder):
    mesh = mesh_lib.make_mesh({"data": 1, "fsdp": 8, "context": 1, "tensor": 1})
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    like = {
        "ema": {"layer": {"kernel": jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=sharding)}}
    }
    restored = checkpoint.restore_items(folder, like)
    assert list(restored) == ["ema"]  # and nothing else was read
    kernel = restored["ema"]["layer"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(8, 64)}
    np.testing.assert_array_equal(kernel, ema(2)["ema"]["layer"]["kernel"])


def test_no_checkpoint_is_named(tmp_path):
    with opened(tmp_path / "empty") as checkpoints:
        assert checkpoints.latest_step is None
    for folder in (tmp_path / "empty", tmp_path / "nothing"):
        with pytest.raises(FileNotFoundError, match=rf"{folder.name}.*no checkpoint"):
            checkpoint.restore_items(folder, ema(0))
    assert not (tmp_path / "nothing").exists()


def test_what_is_written_is_the_state_of_then(tmp_path):
    # The next step takes the state's buffers while they are still being written.
    move = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = make_items(1)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        for _ in range(3):
            state = move(state)
        checkpoints.wait()
        restored, _ = checkpoints.restore(make_items(0))
    assert_equal(restored, make_items(1))


def test_a_half_written_checkpoint_is_told_and_not_one(folder, caplog):
    # What a kill in the middle of writing step 3 leaves behind.
    half = folder / checkpoint.FOLDER / "3.orbax-checkpoint-tmp"
    (half / "params").mkdir(parents=True)
    (half / "params" / "_METADATA").write_text('{"tree_meta')
    assert_equal(checkpoint.restore_items(folder, ema(0)), ema(2))
    assert half.exists()  # to a reader it may be one that is being written
    with opened(folder) as checkpoints:
        assert f"{half}: a half-written checkpoint" in caplog.text
        assert checkpoints.latest_step == 2
        checkpoints.save(3, make_items(3))
    with opened(folder) as checkpoints:
        assert_equal(checkpoints.restore(make_items(0))[0], make_items(3))


def test_a_removal_that_was_cut_off_leaves_none_that_looks_whole(folder):
    class Killed(BaseException):
        pass

    def rmtree(path, missing_ok=False):
        largest(Path(path)).unlink()  # it got so far
        raise Killed

    with pytest.MonkeyPatch.context() as patch, opened(folder) as checkpoints:
        checkpoints.save(3, make_items(3))
        patch.setattr(type(epath.Path("/")), "rmtree", rmtree)
        with pytest.raises(Killed):
            checkpoints.wait()
    assert "1" not in folders(folder)
    with opened(folder):
        assert folders(folder) == {"2", "3"}


def test_room_is_asked_for_what_is_being_written_too(folder):
    first, best = checkpoint.Checkpoints(folder), checkpoint.Checkpoints(folder, name="best")
    free = shutil.disk_usage(folder).free
    half = np.broadcast_to(np.float32(0), (int(0.6 * free / 4),))
    first._expect_room({"ema": {"kernel": half}})
    with pytest.raises(OSError, match=r"MB beside .* MB that are being written"):
        best._expect_room({"ema": {"kernel": half}})
    first.close()
    best.close()
    checkpoint._being_written.clear()


def test_another_state_is_no_damage(folder):
    other = make_items(0) | {"opt_state": ({"count": jnp.int32(0)},)}
    with (
        opened(folder, config={"optimizer": "muon"}) as checkpoints,
        pytest.raises(ValueError, match=r"2: holds the state of another training") as caught,
    ):
        checkpoints.restore(other)
    assert "opt_state/0/count='int32[]', there None" in str(caught.value)
    assert "config.optimizer='muon', there None" in str(caught.value)
    assert folders(folder) == {"1", "2"}


def test_changes_of_configuration_are_told(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    save(tmp_path, 1, config={"dit": {"learning_rate": 0.1, "sizes": (1, 2), "steps": 5}})
    for rate in (0.1, 0.2):
        config = {"dit": {"learning_rate": rate, "sizes": (1, 2), "steps": 5}}
        with opened(tmp_path, config=config) as checkpoints:
            checkpoints.restore(make_items(0))
    changes = [r.getMessage() for r in caplog.records if "changed" in r.getMessage()]
    assert len(changes) == 1
    assert changes[0].endswith("since then changed: config.dit.learning_rate=0.2, there 0.1")
    about = json.loads((tmp_path / checkpoint.FOLDER / "1" / "about" / "metadata").read_text())
    assert about["run"]["versions"]["jax"] == jax.__version__
    assert about["run"]["config"]["dit"]["steps"] == 5


def test_what_cannot_be_written_is_one_error_and_loses_nothing(folder, caplog):
    checkpoints = checkpoint.Checkpoints(folder)
    with files_of_at_most(10_000):
        checkpoints.save(3, make_items(3))
        with pytest.raises(OSError, match="the checkpoint of step 3 could not") as caught:
            checkpoints.wait()
    assert "\n" not in str(caught.value)
    assert "File too large" in str(caught.value)
    assert "The last whole one is checkpoints/2." in str(caught.value)
    checkpoints.close()
    assert not [r for r in caplog.records if r.exc_info]  # no traceback beside it
    with opened(folder) as checkpoints:
        assert_equal(checkpoints.restore(make_items(0))[0], make_items(2))
        checkpoints.save(3, make_items(3))
        checkpoints.wait()
        checkpoints.check()
    assert folders(folder) == {"2", "3"}


def test_a_full_disk_is_seen_before_writing(folder):
    with opened(folder) as checkpoints:
        huge = np.broadcast_to(np.float32(0), (2**50,))
        with pytest.raises(OSError, match=r"step 3 could not .*: it needs up to [0-9.]+ MB"):
            checkpoints.save(3, {"ema": {"kernel": huge}})
    assert folders(folder) == {"1", "2"}


def test_a_folder_that_cannot_be_one_is_named(tmp_path):
    (tmp_path / "dit").write_text("a file")
    with pytest.raises(OSError, match=str(tmp_path / "dit")):
        checkpoint.record_model(tmp_path / "dit", {"width": 64})
    with pytest.raises(OSError, match=str(tmp_path / "dit")):
        checkpoint.Checkpoints(tmp_path / "dit")


def test_a_folder_belongs_to_one_model(tmp_path):
    folder = tmp_path / "dit"
    description = {"dit": {"width": 64}, "downsample": (4, 4, 4), "table": [0.5] * 1000}
    checkpoint.record_model(folder, description)
    assert checkpoint.read_model(folder) == {**description, "downsample": [4, 4, 4]}
    checkpoint.record_model(folder, description)  # the same again
    before = (folder / checkpoint.MODEL_FILE).read_bytes()
    other = {"dit": {"width": 128}, "downsample": (4, 4, 4), "table": [0.5] * 999, "depth": 2}
    with pytest.raises(ValueError, match=r"model.json: made with other settings: ") as caught:
        checkpoint.record_model(folder, other)
    for difference in ("dit.width=128, there 64", "depth=2, there None", "table='[0.5, "):
        assert difference in str(caught.value)
    assert "downsample" not in str(caught.value)
    assert len(str(caught.value)) < 500  # not a thousand numbers
    assert (folder / checkpoint.MODEL_FILE).read_bytes() == before
    assert [p.name for p in folder.iterdir()] == [checkpoint.MODEL_FILE]


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: no model.json"):
        checkpoint.read_model(tmp_path)
