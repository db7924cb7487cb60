"""The toy data and model, which lie beside the tests and are also read by processes that tests start."""

import pytest

from . import toy as toys


@pytest.fixture(scope="session")
def toy():
    """The module of the toy data."""
    return toys


@pytest.fixture(scope="session")
def toy_data(tokenizer_model):
    """Eight action samples of two datasets, two of text."""
    return toys.ToyData(tokenizer_model)
