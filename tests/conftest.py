"""For every test: one thread, nothing fetched, quiet libraries, and one start of the random numbers."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers

transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _alike():
    torch.manual_seed(0)
    # tiny products: a second thread costs more than it brings
    torch.set_num_threads(1)


@pytest.fixture
def nan_filled_empty():
    """torch.empty comes filled with NaN, so that a result nobody wrote cannot look right."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
