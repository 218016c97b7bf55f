"""SparseConfig: everything the result of AdaSpa depends on, validated once."""

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from jax import Array

from adaspa_jax.layout import TokenLayout, TokenOrder
from adaspa_jax.schedule import StepKind, default_search_steps, paper_search_steps, step_kinds
from pallas_kernels import ScorePrecision

Compensation = Literal["none", "pooled"]
_LEAST_POOLED_BLOCK = 16
"""Tokens: below, the stand-ins would cost what they save."""

PRESETS: dict[str, dict[str, Any]] = {
    "quality": {"sparsity": 0.7},
    "balanced": {"sparsity": 0.875, "score_precision": "auto"},
    "fast": {"sparsity": 0.922, "score_precision": "auto"},
}
"""Points of the front of `benchmarks.quality`, by what `benchmarks.gpu.sampler` says of their speed."""


def _whole(name: str, value: Any) -> int:
    """`value` as an int; ValueError for a fraction, a float that happens to be whole, a truth value."""
    try:
        if not isinstance(value, bool | np.bool_):
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f"{name}: {value!r} must be a whole number")


def _number(name: str, value: Any) -> float:
    """`value` as a float; ValueError for what is none, and for NaN and infinity."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be a finite number")
    return float(value)


@dataclass(frozen=True)
class Budget:
    """Key blocks a block of rows keeps: `low`, `base` or `high`, by the tier of its head. low + high = 2 * base."""

    low: int
    base: int
    high: int


@dataclass(frozen=True)
class SparseConfig:
    """How AdaSpa samples. Raises ValueError at construction for values that cannot work."""

    sparsity: float = 0.8
    """Share of block pairs skipped, in [0, 1)."""
    block_size: int = 64
    """Tokens of a block, a power of two."""
    steps: int = 50
    """Denoising steps."""
    search_steps: tuple[int, ...] | None = None
    """Steps, from 1, that search for blocks; None: at 12% of `steps`, not the first. Empty: always dense."""
    token_order: TokenOrder = "cube"
    """Order of video tokens before blocking; the paper's is "raster"."""
    head_adaptive: bool = False
    """Give heads with low recall more blocks, taken from heads with high recall. Those are served well by stand-ins."""
    recall_threshold: float = 0.8
    """A head counts as easy above this recall."""
    row_wise: bool = True
    """Every row block keeps the same number; False: one budget per head, spent where the mass is."""
    lse_cache: bool = True
    """Later searches reuse the LSE of the last one; False: recompute it, with a second pass."""
    dense_layers: tuple[int, ...] = ()
    """Layers that stay dense in every step."""
    dense_last_steps: int = 0
    """Steps at the end that are dense again."""
    share_cfg_indices: bool = False
    """The halves of the batch are those of classifier-free guidance, and the second, conditional, searches for both."""
    compensation: Compensation = "pooled"
    """What stands for a dropped block: nothing, or a pooled key and value, calibrated to the mass that was measured."""
    score_precision: ScorePrecision = "input"
    """What the scores of kept blocks are multiplied in: the dtype of q and k, "int8" or "fp8" on a TPU or a Hopper GPU,
    or "auto", which is the 8 bits that the device multiplies faster, if it does."""
    query_block_size: int | None = None
    """Video tokens whose rows share a list of blocks, a power of two of `block_size` or more; None: `block_size`."""

    def __post_init__(self) -> None:
        self._normalise()
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity} must be in [0, 1)")
        if self.block_size < 1 or self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size={self.block_size} must be a power of two, such as 64 or 128")
        rows = self.query_block
        if rows < self.block_size or rows & (rows - 1):
            raise ValueError(
                f"query_block_size={rows} must be a power of two and at least block_size={self.block_size}"
            )
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")
        self._check_steps(self.search)
        named = {"token_order": TokenOrder, "score_precision": ScorePrecision, "compensation": Compensation}
        for name, known in named.items():
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(get_args(known))}")
        self._check_compensation()
        if any(layer < 0 for layer in self.dense_layers):
            raise ValueError(f"dense_layers={self.dense_layers} must not be negative")

    def _normalise(self) -> None:
        """Plain Python values, which hash and compare: a config is a static argument of jitted functions."""
        for name in ("block_size", "steps", "dense_last_steps"):
            object.__setattr__(self, name, _whole(name, getattr(self, name)))
        if self.query_block_size is not None:
            object.__setattr__(self, "query_block_size", _whole("query_block_size", self.query_block_size))
        for name in ("search_steps", "dense_layers"):
            value = getattr(self, name)
            if value is not None:
                if not isinstance(value, Iterable):
                    raise ValueError(f"{name}={value!r} must be a tuple of whole numbers")
                object.__setattr__(self, name, tuple(_whole(name, x) for x in value))
        for name in ("sparsity", "recall_threshold"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        for name in ("head_adaptive", "row_wise", "lse_cache", "share_cfg_indices"):
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
            object.__setattr__(self, name, bool(getattr(self, name)))

    def _check_steps(self, search: tuple[int, ...]) -> None:
        if list(search) != sorted(set(search)):
            raise ValueError(f"search_steps={search} must be increasing")
        if search and not 1 <= search[0] <= search[-1] <= self.steps:
            raise ValueError(f"search_steps={search} must be in 1 .. steps={self.steps}")
        if not 0 <= self.dense_last_steps <= self.steps:
            raise ValueError(f"dense_last_steps={self.dense_last_steps} must be in 0 .. steps={self.steps}")
        if self.search_steps and search[-1] > self.steps - self.dense_last_steps:
            raise ValueError(f"search_steps={search}: the last {self.dense_last_steps} of {self.steps} steps are dense")

    def _check_compensation(self) -> None:
        if self.compensation == "none":
            return
        if not self.row_wise:
            raise ValueError(
                "compensation='pooled' goes with lists of equal length: set row_wise=True, or compensation='none'"
            )
        if self.block_size < _LEAST_POOLED_BLOCK:
            raise ValueError(
                f"compensation='pooled' needs block_size={self.block_size} to be at least {_LEAST_POOLED_BLOCK}; "
                "raise it, or set compensation='none'"
            )

    @classmethod
    def paper(cls, steps: int = 50, **changes: object) -> "SparseConfig":
        """AdaSpa to the letter (arXiv 2502.21079), with `changes` on top: raster order, blocks of 64, searches at steps
        10 and 30 of 50 (scaled to `steps`), head tiers, nothing in place of what is dropped.
        """
        letter = {"block_size": 64, "search_steps": paper_search_steps(steps), "token_order": "raster"}
        letter |= {"sparsity": 0.8, "head_adaptive": True, "compensation": "none"}
        return cls(**({"steps": steps} | letter | changes))  # type: ignore[arg-type]

    @classmethod
    def preset(cls, name: str, **changes: object) -> "SparseConfig":
        """The preset `name` ("quality", "balanced", "fast") with `changes` on top."""
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is unknown; choose one of {', '.join(PRESETS)}")
        return cls(**(PRESETS[name] | changes))

    @property
    def search(self) -> tuple[int, ...]:
        """`search_steps` with the default filled in."""
        return default_search_steps(self.steps) if self.search_steps is None else self.search_steps

    @property
    def query_block(self) -> int:
        """`query_block_size` with the default filled in."""
        return self.block_size if self.query_block_size is None else self.query_block_size

    def layout(self, grid: tuple[int, int, int], text: int = 0) -> TokenLayout:
        """The token layout of a video of `grid` tokens (frames, rows, columns) and `text` text tokens."""
        return TokenLayout.create(grid, text, self.block_size, self.token_order, self.query_block_size)

    def budget(self, layout: TokenLayout) -> Budget:
        """Key blocks kept per video row block (AdaSpa, selection, points 2 and 3)."""
        total, least = layout.num_blocks, min(layout.text_blocks + 1, layout.num_blocks)
        # Rounded first: 1 - 0.9 is slightly more than 0.1 in binary.
        kept = round((1 - self.sparsity) * total, 6)
        base = max(math.ceil(kept), least)
        spread = round(kept / 2) if self.head_adaptive else 0
        spread = min(spread, base - least, total - base)
        return Budget(base - spread, base, base + spread)

    def step_kinds(self) -> np.ndarray:
        """int32 [steps]: the StepKind of every step."""
        return step_kinds(self.steps, self.search, self.dense_last_steps)

    def layer_kinds(self, step_kind: int | Array, num_layers: int) -> Array:
        """int32 [num_layers]: the step kind of each layer; `dense_layers` are dense whatever the step."""
        if any(layer >= num_layers for layer in self.dense_layers):
            raise ValueError(f"dense_layers={self.dense_layers} must be below the model's {num_layers} layers")
        dense = np.isin(np.arange(num_layers), self.dense_layers)
        return jnp.where(dense, jnp.int32(StepKind.DENSE), jnp.asarray(step_kind, jnp.int32))
