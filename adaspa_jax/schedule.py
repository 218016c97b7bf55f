"""Step number -> step kind (AdaSpa, the four step kinds). Steps are numbered from 1, as in the paper."""

import enum

import numpy as np


class StepKind(enum.IntEnum):
    """What attention does in a denoising step. The numbers are the codes of traced step kinds."""

    DENSE = 0
    """Dense attention; the state is left alone."""
    FUSED_SEARCH = 1
    """Dense attention with LSE, then block mass and selection: the first search."""
    CACHED_SEARCH = 2
    """Block mass with the cached LSE, selection, then sparse attention: every later search."""
    SPARSE = 3
    """Attention over the selected blocks."""


def search_steps_at(steps: int, *shares: float) -> tuple[int, ...]:
    """The steps at these shares of all, but the first only of a single step: what noise attends to says little."""
    return tuple(sorted({max(min(2, steps), round(share * steps)) for share in shares}))


def default_search_steps(steps: int) -> tuple[int, ...]:
    """(6,) of 50, scaled: at equal work one early search is nearer to dense than the paper's two."""
    return search_steps_at(steps, 0.12)


def paper_search_steps(steps: int) -> tuple[int, ...]:
    """(10, 30) of 50, scaled."""
    return search_steps_at(steps, 0.2, 0.6)


def step_kinds(steps: int, search_steps: tuple[int, ...], dense_last_steps: int = 0) -> np.ndarray:
    """int32 [steps]: the StepKind of every step."""
    kinds = np.full(steps, StepKind.SPARSE, np.int32)
    first = search_steps[0] if search_steps else steps + 1
    kinds[: first - 1] = StepKind.DENSE
    for step in search_steps:
        kinds[step - 1] = StepKind.FUSED_SEARCH if step == first else StepKind.CACHED_SEARCH
    kinds[steps - dense_last_steps :] = StepKind.DENSE
    return kinds
