"""What tests of trainings share: compiled programs."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A folder for them."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module", autouse=True)
def fast_compilation(compiled):
    """Compiles fast, and once what several tests compile; in this folder's tests only."""
    settings = {
        "jax_compilation_cache_dir": (None, str(compiled)),
        "jax_persistent_cache_min_compile_time_secs": (1.0, 0.0),
        "jax_disable_most_optimizations": (False, True),
    }
    for name, (_, here) in settings.items():
        jax.config.update(name, here)
    compilation_cache.reset_cache()  # it would stay where it is
    yield
    for name, (before, _) in settings.items():
        jax.config.update(name, before)
    compilation_cache.reset_cache()
