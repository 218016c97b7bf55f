"""Tile sizes. They change speed, never the result beyond rounding."""

from dataclasses import dataclass


@dataclass(frozen=True)
class XlaTuning:
    """Tiles of the portable XLA path; the defaults were chosen on two AVX2 cores (benchmarks/cpu.py)."""

    dense_q: int = 512
    """Rows of a dense or block-mass tile."""
    dense_k: int = 1024
    """Keys of a dense or block-mass tile."""
    group_keys: int = 1664
    """Most keys that a query block gathers for one softmax step."""
    short_group_keys: int = 448
    """About as many for rows that fit in three such steps."""
    step_keys: int = 4096
    """Keys that the query blocks of one step gather together."""


XLA = XlaTuning()
