"""Damaged checkpoints are told, and the one before is taken."""

import json
import logging
import re
import shutil

import pytest
from items import assert_equal, ema, flip_a_bit, folders, largest, make_items, opened

from opensora_jax.checkpoint import checksums
from opensora_jax.checkpoint import manager as checkpoint


def delete(folder):
    largest(folder).unlink()


def cut_off(folder):
    path = largest(folder)
    path.write_bytes(path.read_bytes()[:-10])


def lose_an_item(folder):
    shutil.rmtree(folder / "opt_state")


def empty_the_notes(folder):
    (folder / "about" / "metadata").write_bytes(b"")


def lose_the_checksums(folder):
    (folder / checksums.NAME).unlink()


def garble_the_checksums(folder):
    (folder / checksums.NAME).write_bytes(b"\xff{")


def empty_an_entry_of_the_checksums(folder):
    (folder / checksums.NAME).write_text(json.dumps({"ema/d/0": []}))


DAMAGE = {
    delete: "missing",
    cut_off: "bytes, expected",
    flip_a_bit: "its bytes have changed",
    lose_an_item: r"opt_state/.*: missing",
    empty_the_notes: "about/metadata': 0 bytes, expected",
    lose_the_checksums: r"no checksums\.json",
    garble_the_checksums: r"checksums\.json: not JSON: ",
    empty_an_entry_of_the_checksums: r"checksums\.json: expected a size and a CRC-32",
}


@pytest.mark.parametrize("harm", DAMAGE, ids=lambda harm: harm.__name__)
def test_of_a_damaged_checkpoint_the_one_before_is_taken(folder, caplog, harm):
    harm(folder / checkpoint.FOLDER / "2")
    with opened(folder) as checkpoints:
        assert checkpoints.latest_step == 1
        told = rf"{checkpoint.FOLDER}/2: this checkpoint is damaged: .*{DAMAGE[harm]}"
        assert any(r.levelno == logging.WARNING for r in caplog.records)
        assert any(re.search(told, r.getMessage()) for r in caplog.records)
    assert folders(folder) == {"1", "damaged-2"}


def test_a_training_goes_on_without_it(folder):
    flip_a_bit(folder / checkpoint.FOLDER / "2")
    with opened(folder) as checkpoints:
        restored, notes = checkpoints.restore(make_items(0))
        assert_equal(restored, make_items(1))
        assert notes == {"next": 1}
        checkpoints.save(2, make_items(2))
    assert folders(folder) == {"1", "2", "damaged-2"}
    assert checksums.damage(folder / checkpoint.FOLDER / "2") is None


def test_readers_leave_it_where_it_is(folder, caplog):
    lose_an_item(folder / checkpoint.FOLDER / "2")  # which is none of theirs
    assert_equal(checkpoint.restore_items(folder, ema(0)), ema(2))
    shutil.rmtree(folder / checkpoint.FOLDER / "2" / "ema" / "d")
    assert_equal(checkpoint.restore_items(folder, ema(0)), ema(1))
    assert "2: this checkpoint is damaged: 'ema/d/" in caplog.text
    assert folders(folder) == {"1", "2"}


def test_where_all_are_damaged_nothing_is_touched(folder):
    for step in "12":
        flip_a_bit(folder / checkpoint.FOLDER / step)
    with pytest.raises(FileNotFoundError, match=r"every checkpoint is damaged \(1, 2\)"):
        checkpoint.Checkpoints(folder)
    assert folders(folder) == {"1", "2"}


def test_notes_that_no_training_wrote_are_told(folder):
    for step in "12":
        path = folder / checkpoint.FOLDER / step
        (path / "about" / "metadata").write_text('{"arrays": [1]}')
        checksums.write(path)
    with pytest.raises(ValueError, match=r"checkpoints/2/about: expected what a training says"):
        checkpoint.restore_items(folder, ema(0))


@pytest.mark.parametrize(
    "entries", [{"x" * 10**6: [1, 2]}, {"ema/a": ["x" * 10**6, 2]}, {"ema/a": ["\0" * 10**6] * 2}]
)
def test_what_others_wrote_into_the_checksums_is_told_in_short(tmp_path, entries):
    (tmp_path / "ema").mkdir()
    (tmp_path / "ema" / "a").write_bytes(b"a")
    (tmp_path / checksums.NAME).write_text(json.dumps(entries))
    assert 5 < len(checksums.damage(tmp_path)) < 400
