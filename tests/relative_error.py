"""The measure of parity."""

from typing import Any

import numpy as np


def relative_error(x: Any, reference: Any) -> float:
    """L2 norm of the difference over that of the reference, in float64."""
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(x - reference) / np.linalg.norm(reference))
