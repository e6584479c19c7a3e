"""Fixtures of the data tests."""

import pytest

from crossdock.data import DataConfig, Tokens, prepare_tokens


@pytest.fixture(scope="session")
def sotu_tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    """The speeches with a tokenizer trained on them, which takes some seconds."""
    return prepare_tokens(DataConfig(cache_folder=str(tmp_path_factory.mktemp("sotu"))), None)
