"""What tests of trainings share: compiled programs, and an object store."""

import jax
import object_store
import pytest


@pytest.fixture(scope="package", autouse=True)
def compiled_programs(tmp_path_factory):
    """Keeps them, for the tests that compile the same ones."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def bucket():
    """An empty gs:// bucket in memory, which counts what is written to it."""
    yield object_store.use()
    object_store.stop()
