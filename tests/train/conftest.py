"""What tests of trainings share: compiled programs, and an object store."""

import jax
import object_store
import pytest


@pytest.fixture(scope="package", autouse=True)
def compiled_programs(tmp_path_factory):
    """Compiles fast, and what several tests compile once."""
    settings = {
        "jax_compilation_cache_dir": (None, str(tmp_path_factory.mktemp("compiled"))),
        "jax_persistent_cache_min_compile_time_secs": (1.0, 0.0),
        "jax_disable_most_optimizations": (False, True),
    }
    for name, (_, here) in settings.items():
        jax.config.update(name, here)
    yield
    for name, (before, _) in settings.items():
        jax.config.update(name, before)


@pytest.fixture
def bucket():
    """An empty gs:// bucket in memory, which counts what is written to it."""
    yield object_store.use()
    object_store.stop()
