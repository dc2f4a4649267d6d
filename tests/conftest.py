"""Fixtures that more than one test file uses, and no GPU: the tests compare fp32 numbers to 1e-5."""

import os
import signal

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is there
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes of tests share the cores
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's shell ignores Ctrl-C

import pytest  # noqa: E402
import torch  # noqa: E402
from helpers import lively, make_world  # noqa: E402

from lib.rows import read_rows  # noqa: E402


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of the small world: data/ and base/, a tied random network. Tests do not change it."""
    torch.set_num_threads(1)
    return make_world(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def rows(tiny):
    """The rows of the small world."""
    return read_rows(tiny / "data" / "train_imagery.jsonl")


@pytest.fixture(scope="module")
def model(tiny):
    """The lively network; tests that change it make their own."""
    return lively(tiny)
