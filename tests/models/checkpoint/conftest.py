"""A small Wan on disk."""

from pathlib import Path

import pytest

from tests.models.checkpoint.small_wan import small_wan


@pytest.fixture(scope="session")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that save_pretrained wrote."""
    folder = tmp_path_factory.mktemp("wan")
    small_wan().save_pretrained(folder)
    return folder
