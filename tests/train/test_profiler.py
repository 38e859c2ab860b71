"""Some steps of a training are traced."""

import gzip
import json

import jax.numpy as jnp
import pytest
from linear import fit

from opensora_jax.train import loop
from opensora_jax.train.profiler import Profiler


def traced(folder):
    """Run -> the numbers of the steps that its trace shows, and what they called."""
    found = {}
    for path in (folder / "profile").rglob("process0.*.trace.json.gz"):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        steps = [int(e["args"]["step_num"]) for e in events if e.get("name") == "train"]
        names = {e.get("name", "") for e in events}
        assert any("train_step" in name for name in names)
        assert path.with_name(path.name.replace(".trace.json.gz", ".xplane.pb")).exists()
        found[path.parent.name] = steps
    return found


def test_the_steps_that_were_asked_for(tmp_path):
    fit(tmp_path, steps=5, profile=(2, 3))
    assert traced(tmp_path) == {"steps2-3": [2, 3]}


def test_the_step_that_is_compiled_is_left_out(tmp_path, caplog):
    fit(tmp_path, steps=2, profile=(1, 2))
    assert traced(tmp_path) == {"steps1-2": [2]}
    fit(tmp_path, steps=3, profile=(3, 3))
    assert "no trace: step 3 is the first of this run" in caplog.text
    fit(tmp_path, steps=4, profile=(1, 2))  # which were before this run
    assert list(traced(tmp_path)) == ["steps1-2"]


def test_a_run_that_ends_early_keeps_what_it_has(tmp_path):
    def fail(state):
        raise RuntimeError("no")

    for name in ("a", "b"):  # the second can start only if the first has stopped
        with pytest.raises(RuntimeError, match="no"):
            fit(tmp_path / name, evaluations=[loop.Evaluation(3, fail)], profile=(2, 9))
        assert traced(tmp_path / name) == {"steps2-9": [2, 3]}


def test_a_trace_in_an_object_store(bucket):
    profiler = Profiler(bucket, (2, 2), done=0)
    profiler.start_before(2)
    profiler.stop_after(2, jnp.ones(3) + 1)
    names = {
        path.name for path in (bucket / "profile" / "plugins" / "profile" / "steps2-2").iterdir()
    }
    assert {name.split(".", 2)[0] for name in names} == {"process0"}
    assert {name.rpartition(".")[2] for name in names} == {"pb", "gz"}
