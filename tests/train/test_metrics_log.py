"""What a training measures: metrics.jsonl and TensorBoard, on disks and on object stores."""

import contextlib
import json
import resource
import time

import pytest
from object_store import Store
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opensora_jax.train import growing_file
from opensora_jax.train.metrics_log import MetricsWriter, read_metrics


def shown(folder):
    """(step, loss) that TensorBoard shows."""
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(e.step, e.value) for e in events.Scalars("loss")]


def write(folder, done, *steps):
    log = MetricsWriter(folder, done)
    for step in steps:
        log.write(step, {"loss": float(step)})
    log.close()


def test_what_a_run_before_wrote_of_later_steps_is_forgotten(tmp_path):
    write(tmp_path, 0, 1, 2, 3)
    events = next((tmp_path / "tensorboard").iterdir())
    events.rename(events.with_name("events.out.tfevents.1.earlier.1"))
    write(tmp_path, 1, 2, 4)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": i, "loss": i} for i in (1, 2, 4)]
    assert shown(tmp_path) == [(1, 1.0), (2, 2.0), (4, 4.0)]


def test_a_line_that_a_kill_cut_off_is_left_out_and_any_other_told_in_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
    for line in ("{'step': 1}", '{"loss": 1.0}', '{"a":' * 10**5 + "}" * 10**5, "[1]}"):
        path.write_text(line + "\n")
        with pytest.raises(
            ValueError, match=r"metrics\.jsonl: expected lines with a step"
        ) as caught:
            read_metrics(path)
        assert len(str(caught.value)) < 400


def test_what_is_no_finite_number_is_null_and_what_a_power_cut_left_is_cut(tmp_path):
    with contextlib.closing(MetricsWriter(tmp_path, 0)) as log:
        log.write(1, {"loss": float("nan"), "norm": float("inf")})
        log.write(2, {"loss": 0.5})
    path = tmp_path / "metrics.jsonl"
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert lines == [{"step": 1, "loss": None, "norm": None}, {"step": 2, "loss": 0.5}]
    assert read_metrics(path) == lines
    with path.open("ab") as file:
        file.write(bytes(100))
    assert read_metrics(path) == lines
    with contextlib.closing(MetricsWriter(tmp_path, 2)) as log:
        log.write(3, {"loss": 0.25})
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    path.write_bytes(b'{"step": 1}\n\xff\xfe}\n')
    with pytest.raises(ValueError, match=f"{path}: expected lines with a step"):
        read_metrics(path)


def test_a_training_outlives_what_tensorboard_cannot_write(tmp_path, caplog):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = MetricsWriter(tmp_path, 3)
    log.write(4, {"loss": 1.0})
    (events,) = (tmp_path / "tensorboard").iterdir()
    size = events.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))  # as on a full disk
    try:
        log.write(5, {"loss": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    for i in range(6, 30):
        log.write(i, {"loss": 3.0})
    log.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 26
    assert events.stat().st_size == size
    told = [r.getMessage() for r in caplog.records]
    assert len(told) == 1
    assert "tensorboard: TensorBoard's logs end here: " in told[0]


def steps(folder):
    return [line["step"] for line in read_metrics(folder / "metrics.jsonl")]


def objects(folder):
    return sorted(path.name for path in folder.iterdir())


def download(folder, target):
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


def test_no_line_waits_for_an_object_store_and_none_is_written_twice(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(growing_file, "PIECE_SECONDS", 0.0)  # as fast as the store takes them
    log, took = MetricsWriter(bucket, 0), []
    monkeypatch.setattr(Store, "seconds", 0.1)
    for step in range(1, 201):
        start = time.monotonic()
        log.write(step, {"loss": float(step)})
        took.append(time.monotonic() - start)
        time.sleep(0.002)
    assert sum(took) < 0.5 < 200 * Store.seconds
    while_it_runs = steps(bucket)
    assert while_it_runs == list(range(1, len(while_it_runs) + 1))
    assert 1 < len(while_it_runs) < 200
    log.close()
    assert steps(bucket) == list(range(1, 201))
    text = "".join(json.dumps(line) + "\n" for line in read_metrics(bucket / "metrics.jsonl"))
    assert sum(n for name, n in Store.written if "metrics" in name) == len(text)
    download(bucket / "tensorboard", tmp_path / "tensorboard")
    assert shown(tmp_path) == [(step, float(step)) for step in range(1, 201)]
    n_bytes = sum(path.stat().st_size for path in (tmp_path / "tensorboard").iterdir())
    assert sum(n for name, n in Store.written if "tfevents" in name) == n_bytes


def test_there_lines_gather_until_a_piece_is_due_or_all_is_to_be_there(bucket):
    log = MetricsWriter(bucket, 0)
    for step in range(1, 101):
        log.write(step, {"loss": 1.0})
    log.flush()
    assert steps(bucket) == list(range(1, 101))
    log.write(101, {"loss": 1.0})
    log.close()
    assert objects(bucket) == [
        *("metrics-000001.jsonl", "metrics-000002.jsonl", "metrics-000003.jsonl"),
        *("metrics.jsonl", "tensorboard"),
    ]


def test_there_a_resumed_run_forgets_later_steps(bucket):
    write(bucket, 0, 1, 2, 3)
    before = {name: (bucket / name).read_bytes() for name in objects(bucket)[:-1]}
    (bucket / "metrics-mine.jsonl").write_text("not one of its pieces")
    log = MetricsWriter(bucket, 2)
    assert objects(bucket) == ["metrics-mine.jsonl", "metrics.jsonl", "tensorboard"]
    assert steps(bucket) == [1, 2]
    for name in set(before) - {"metrics.jsonl"}:
        (bucket / name).write_bytes(before[name])  # as if killed before it was removed
    assert steps(bucket) == [1, 2, 3]
    log = MetricsWriter(bucket, 2)
    assert log.has(2, "loss")
    log.write(3, {"loss": 30.0})
    log.close()
    lines = read_metrics(bucket / "metrics.jsonl")
    assert [line["loss"] for line in lines] == [1.0, 2.0, 30.0]


def test_there_what_cannot_be_written_is_an_error(bucket, monkeypatch, caplog):
    log = MetricsWriter(bucket, 0)
    log.flush()
    monkeypatch.setattr(Store, "refused", "tfevents")
    log.write(1, {"loss": 1.0})
    log.flush()
    (told,) = [r.getMessage() for r in caplog.records]
    assert "tensorboard: TensorBoard's logs end here: " in told
    monkeypatch.setattr(Store, "refused", "metrics")
    log.write(2, {"loss": 1.0})
    with pytest.raises(OSError, match=r"gs://bucket/metrics\.jsonl: could not be written: quota"):
        log.flush()
