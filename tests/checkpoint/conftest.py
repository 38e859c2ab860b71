"""A folder with two checkpoints."""

import shutil

import pytest
from items import save


@pytest.fixture(scope="session")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    save(folder, 1, 2)
    return folder


@pytest.fixture
def folder(two, tmp_path):
    """With checkpoints of steps 1 and 2."""
    return shutil.copytree(two, tmp_path / "dit")
