"""Parameters of the whole matrices, which `make test-all` alone runs."""

from collections.abc import Iterable
from typing import Any

import pytest


def in_matrix(*values: Any) -> list[Any]:
    """The values, or tuples of several, as parameters that are marked."""
    return [pytest.param(*(x if isinstance(x, tuple) else (x,)), marks=pytest.mark.matrix) for x in values]


def only(kept: set[Any], values: Iterable[Any]) -> list[Any]:
    """All values as parameters, marked but for those in `kept`."""
    return [x if x in kept else in_matrix(x)[0] for x in values]
