"""Fixtures that more than one test file uses."""

import pytest
import torch
from helpers import make_world


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of the small world: data/ and base/, a tied random network. Tests do not change it."""
    torch.set_num_threads(1)
    return make_world(tmp_path_factory.mktemp("tiny"))
