"""The small world that tests of preprocessing share."""

import pytest
from made_world import make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder
