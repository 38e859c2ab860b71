"""Eight fake devices for the whole suite, set before JAX starts; and an object store in memory."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    # Without these emitters, compiling takes half the time.
    + " --xla_force_host_platform_device_count=8 --xla_cpu_use_fusion_emitters=false"
)

import object_store
import pytest


def pytest_configure(config):
    """Default tests compile far more than they compute; slow ones do not."""
    if config.option.markexpr == "not slow":
        os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """An empty bucket in memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield object_store.use()
    object_store.stop()
