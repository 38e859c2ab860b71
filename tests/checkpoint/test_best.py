"""The best of a training, by its validation loss."""

import contextlib

import pytest
from items import assert_equal, ema, files_of_at_most, largest

from opensora_jax.checkpoint import manager as checkpoint
from opensora_jax.checkpoint.best import Best


def save_if_better(folder, *losses):
    with contextlib.closing(Best(folder)) as best:
        for step, loss in losses:
            best.save_if_better(step, loss, ema(step))


def best(folder):
    return checkpoint.restore_items(folder, ema(0), name=checkpoint.BEST)


def test_it_is_that_of_the_lowest_loss(tmp_path, caplog):
    save_if_better(tmp_path, (1, 3.0), (2, 1.0), (3, 2.0), (4, float("nan")))
    assert_equal(best(tmp_path), ema(2))
    save_if_better(tmp_path, (2, 1.0), (3, 1.5))  # after resuming from step 1
    assert_equal(best(tmp_path), ema(2))
    save_if_better(tmp_path, (1, 0.5))
    assert_equal(best(tmp_path), ema(1))
    (only,) = (tmp_path / checkpoint.BEST).iterdir()
    largest(only).unlink()
    save_if_better(tmp_path, (7, 9.0))  # which the training outlives
    assert "damaged" in caplog.text
    assert_equal(best(tmp_path), ema(7))


def test_a_failed_write_names_the_step_of_the_training(tmp_path):
    save_if_better(tmp_path, (100, 2.0))
    with (
        pytest.raises(OSError, match=r"best: the checkpoint of step 200 could not .* best/1\."),
        files_of_at_most(10_000),
    ):
        save_if_better(tmp_path, (200, 1.0))
    assert_equal(best(tmp_path), ema(100))
