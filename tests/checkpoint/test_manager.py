"""Checkpoints: whole or absent, read in parts; damage is told; a folder belongs to one model."""

import contextlib
import json
import logging
import re
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax import mesh as mesh_lib
from opensora_jax.checkpoint import checksums
from opensora_jax.checkpoint import manager as checkpoint
from opensora_jax.train.state import TrainState


def make_state(step):
    params = {"layer": {"kernel": jnp.arange(4096.0).reshape(64, 64) + step}}
    return TrainState(
        step=jnp.int32(step),
        params=params,
        ema=jax.tree.map(lambda x: x + 100, params),
        opt_state=(jax.tree.map(jnp.zeros_like, params),),
        extra={},
        skipped={"total": jnp.int32(0), "in_a_row": jnp.int32(0)},
    )


def opened(folder, **options):
    return contextlib.closing(checkpoint.Checkpoints(folder, **options))


def save(folder, *steps, **options):
    with opened(folder, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"next": step})


def folders(folder):
    return {p.name for p in (folder / checkpoint.FOLDER).iterdir()}


def assert_equal_states(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("two")
    save(folder, 1, 2)
    return folder


@pytest.fixture
def folder(two, tmp_path):
    return shutil.copytree(two, tmp_path / "dit")


def test_the_latest_state_comes_back_with_its_notes(folder):
    with opened(folder) as checkpoints:
        assert checkpoints.latest_step == 2
        restored, notes = checkpoints.restore(make_state(0))
    assert_equal_states(restored, make_state(2))
    assert notes == {"next": 2}


def test_the_last_ones_stay_and_some_for_good(folder):
    with opened(folder, keep=2, keep_every=3) as checkpoints:
        for step in (3, 4, 5):
            checkpoints.save(step, make_state(step), {})
        checkpoints.wait()
        assert folders(folder) == {"3", "4", "5"}
        checkpoints.save(6, make_state(6), {})
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
    np.testing.assert_array_equal(kernel, make_state(2).ema["layer"]["kernel"])


def test_no_checkpoint_is_named(tmp_path):
    with opened(tmp_path / "empty") as checkpoints:
        assert checkpoints.latest_step is None
    for folder in (tmp_path / "empty", tmp_path / "nothing"):
        with pytest.raises(FileNotFoundError, match=rf"{folder.name}.*no checkpoint"):
            checkpoint.restore_items(folder, {"ema": make_state(0).ema})
    assert not (tmp_path / "nothing").exists()


def test_what_is_written_is_the_state_of_then(tmp_path):
    # The next step takes the state's buffers while they are still being written.
    move = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = make_state(1)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        for _ in range(3):
            state = move(state)
        checkpoints.wait()
        restored, _ = checkpoints.restore(make_state(0))
    assert_equal_states(restored, make_state(1))


def test_a_half_written_checkpoint_is_told_and_not_one(folder, caplog):
    # What a kill in the middle of writing step 3 leaves behind.
    half = folder / checkpoint.FOLDER / "3.orbax-checkpoint-tmp"
    (half / "params").mkdir(parents=True)
    (half / "params" / "_METADATA").write_text('{"tree_meta')
    kernel = {"ema": make_state(0).ema}
    np.testing.assert_array_equal(
        checkpoint.restore_items(folder, kernel)["ema"]["layer"]["kernel"],
        make_state(2).ema["layer"]["kernel"],
    )
    assert half.exists()  # to a reader it may be one that is being written
    with opened(folder) as checkpoints:
        assert f"{half}: a half-written checkpoint" in caplog.text
        assert checkpoints.latest_step == 2
        checkpoints.save(3, make_state(3), {})
    with opened(folder) as checkpoints:
        assert_equal_states(checkpoints.restore(make_state(0))[0], make_state(3))


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def delete(folder):
    largest(folder).unlink()


def cut_off(folder):
    path = largest(folder)
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(folder):
    path = largest(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def lose_an_item(folder):
    shutil.rmtree(folder / "opt_state")


def empty_the_notes(folder):
    (folder / "about" / "metadata").write_bytes(b"")


def lose_the_checksums(folder):
    (folder / checksums.NAME).unlink()


def garble_the_checksums(folder):
    (folder / checksums.NAME).write_bytes(b"\xff{")


DAMAGE = {
    delete: "missing",
    cut_off: "bytes, expected",
    flip_a_bit: "its bytes have changed",
    lose_an_item: r"opt_state/.*: missing",
    empty_the_notes: "about/metadata: 0 bytes, expected",
    lose_the_checksums: r"no checksums\.json",
    garble_the_checksums: r"checksums\.json: ",
}


@pytest.mark.parametrize("harm", DAMAGE, ids=lambda harm: harm.__name__)
def test_of_a_damaged_checkpoint_the_one_before_is_taken(folder, caplog, harm):
    harm(folder / checkpoint.FOLDER / "2")
    with opened(folder) as checkpoints:
        assert checkpoints.latest_step == 1
        told = rf"{checkpoint.FOLDER}/2: this checkpoint is damaged: .*{DAMAGE[harm]}"
        assert any(r.levelno == logging.WARNING for r in caplog.records)
        assert any(re.search(told, r.getMessage()) for r in caplog.records)
        restored, notes = checkpoints.restore(make_state(0))
        assert_equal_states(restored, make_state(1))
        assert notes == {"next": 1}
        checkpoints.save(2, make_state(2), {})
    assert folders(folder) == {"1", "2", "damaged-2"}
    assert checksums.damage(folder / checkpoint.FOLDER / "2") is None


def test_readers_leave_a_damaged_checkpoint_where_it_is(folder, caplog):
    ema = {"ema": make_state(0).ema}
    lose_an_item(folder / checkpoint.FOLDER / "2")  # which is none of theirs
    restored = checkpoint.restore_items(folder, ema)["ema"]
    np.testing.assert_array_equal(restored["layer"]["kernel"], make_state(2).ema["layer"]["kernel"])
    shutil.rmtree(folder / checkpoint.FOLDER / "2" / "ema" / "d")
    restored = checkpoint.restore_items(folder, ema)["ema"]
    np.testing.assert_array_equal(restored["layer"]["kernel"], make_state(1).ema["layer"]["kernel"])
    assert "2: this checkpoint is damaged: ema/d/" in caplog.text
    assert folders(folder) == {"1", "2"}


def test_where_all_are_damaged_nothing_is_touched(folder):
    for step in "12":
        flip_a_bit(folder / checkpoint.FOLDER / step)
    with pytest.raises(FileNotFoundError, match=r"every checkpoint is damaged \(1, 2\)"):
        checkpoint.Checkpoints(folder)
    assert folders(folder) == {"1", "2"}


def test_another_state_is_no_damage(folder):
    other = make_state(0).replace(opt_state=({"count": jnp.int32(0)},))
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
            checkpoints.restore(make_state(0))
    changes = [r.getMessage() for r in caplog.records if "changed" in r.getMessage()]
    assert len(changes) == 1
    assert changes[0].endswith("since then changed: config.dit.learning_rate=0.2, there 0.1")
    about = json.loads((tmp_path / checkpoint.FOLDER / "1" / "about" / "metadata").read_text())
    assert about["run"]["versions"]["jax"] == jax.__version__
    assert about["run"]["config"]["dit"]["steps"] == 5


def test_the_best_is_that_of_the_lowest_loss(tmp_path, caplog):
    def save_if_better(*losses):
        with contextlib.closing(checkpoint.Best(tmp_path)) as best:
            for step, loss in losses:
                best.save_if_better(step, loss, make_state(step))

    def kernel():
        like = {"ema": make_state(0).ema}
        return checkpoint.restore_items(tmp_path, like, name=checkpoint.BEST)["ema"]["layer"][
            "kernel"
        ]

    save_if_better((1, 3.0), (2, 1.0), (3, 2.0), (4, float("nan")))
    np.testing.assert_array_equal(kernel(), make_state(2).ema["layer"]["kernel"])
    save_if_better((2, 1.0), (3, 1.5))  # after resuming from step 1
    np.testing.assert_array_equal(kernel(), make_state(2).ema["layer"]["kernel"])
    save_if_better((1, 0.5))
    np.testing.assert_array_equal(kernel(), make_state(1).ema["layer"]["kernel"])
    (only,) = (tmp_path / checkpoint.BEST).iterdir()
    assert not (only / "params").exists()
    delete(only)
    save_if_better((7, 9.0))  # which the training outlives
    assert "damaged" in caplog.text
    np.testing.assert_array_equal(kernel(), make_state(7).ema["layer"]["kernel"])


@contextlib.contextmanager
def files_of_at_most(n_bytes):
    """Larger ones fail while they are written, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_cannot_be_written_is_one_error_and_loses_nothing(folder, caplog):
    checkpoints = checkpoint.Checkpoints(folder)
    with files_of_at_most(10_000):
        checkpoints.save(3, make_state(3), {})
        with pytest.raises(OSError, match="the checkpoint of step 3 could not") as caught:
            checkpoints.wait()
    assert "\n" not in str(caught.value)
    assert "File too large" in str(caught.value)
    assert "The last whole one is of step 2" in str(caught.value)
    checkpoints.close()
    assert not [r for r in caplog.records if r.exc_info]  # no traceback beside it
    with opened(folder) as checkpoints:
        assert_equal_states(checkpoints.restore(make_state(0))[0], make_state(2))
        checkpoints.save(3, make_state(3), {})
        checkpoints.wait()
        checkpoints.check()
    assert folders(folder) == {"2", "3"}


def test_a_full_disk_is_seen_before_writing(folder):
    with opened(folder) as checkpoints:
        huge = np.broadcast_to(np.float32(0), (2**50,))
        with pytest.raises(OSError, match=r"step 3 could not .*: it needs up to [0-9.]+ MB"):
            checkpoints.save_items(3, {"ema": {"kernel": huge}})
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
    with pytest.raises(ValueError, match=r"dit: .*another model") as caught:
        checkpoint.record_model(folder, other)
    for difference in ("dit.width=128, there 64", "depth=2, there None", "table=[0.5, "):
        assert difference in str(caught.value)
    assert "downsample" not in str(caught.value)
    assert len(str(caught.value)) < 500  # not a thousand numbers
    assert (folder / checkpoint.MODEL_FILE).read_bytes() == before
    assert [p.name for p in folder.iterdir()] == [checkpoint.MODEL_FILE]


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: no model.json"):
        checkpoint.read_model(tmp_path)
