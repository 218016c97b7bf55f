"""Parameters of the whole matrices, which `make test-all` alone runs."""

from typing import Any

import pytest


def in_matrix(*values: Any) -> list[Any]:
    """The values, or tuples of several, as parameters that are marked."""
    return [pytest.param(*(x if isinstance(x, tuple) else (x,)), marks=pytest.mark.matrix) for x in values]
