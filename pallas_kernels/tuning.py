"""Tile sizes. They change speed, never the result beyond rounding."""

from dataclasses import dataclass


@dataclass(frozen=True)
class XlaTuning:
    """Tiles of the portable XLA path; the defaults were chosen on two AVX2 cores (benchmarks/cpu.py)."""

    dense_q: int = 512
    """Rows of a dense or block-mass tile."""
    dense_k: int = 1024
    """Keys of a dense or block-mass tile."""
    sparse_keys: int = 4096
    """Most keys gathered for one softmax step of a query block."""
    streams: int = 2
    """Independent loops the work is split into; the CPU runtime runs them on different cores."""


XLA = XlaTuning()
