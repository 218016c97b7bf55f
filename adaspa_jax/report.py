"""What a run really did: realised density, recall, stand-ins, staleness of the LSE cache; pictures of block masks."""

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from adaspa_jax.config import SparseConfig
from adaspa_jax.layout import TokenLayout
from adaspa_jax.sampling import History
from adaspa_jax.schedule import StepKind
from adaspa_jax.state import SparseState

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _layers(tree: Any, axis: int = 0) -> np.ndarray:
    """Joins per-stack arrays along their layer axis."""
    return np.concatenate([np.asarray(x) for x in jax.tree.leaves(tree)], axis=axis)


def json_values(tree: Any) -> Any:
    """A report as JSON can hold it: dataclasses become objects, NumPy's values Python's, tuples lists.

    Figures that JSON has no number for: infinite ones are the strings "Infinity" and "-Infinity" (the PSNR of equal
    videos), and NaN, which stands for a figure that does not exist (the recall of a run without a search), is null.
    """
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        tree = dataclasses.asdict(tree)
    if isinstance(tree, dict):
        return {key.item() if isinstance(key, np.generic) else key: json_values(x) for key, x in tree.items()}
    if isinstance(tree, list | tuple):
        return [json_values(x) for x in tree]
    if isinstance(tree, np.ndarray | np.generic | jax.Array):
        return json_values(np.asarray(tree).tolist())
    if isinstance(tree, float) and not math.isfinite(tree):
        return None if math.isnan(tree) else "Infinity" if tree > 0 else "-Infinity"
    return tree


def _mean(values: np.ndarray) -> float:
    """NaN of nothing, without a warning."""
    return float(values.mean()) if values.size else math.nan


@dataclass(frozen=True)
class Report:
    """Figures of one run, over its sparse layers; NL layers. NaN: nothing to measure. `json_values` spells it."""

    density: float
    """Share of the block pairs of video rows that a sparse step computes; exact. NaN if all layers are dense."""
    density_by_layer: list[float]
    """[NL] the same by layer; 1 for a dense one."""
    recall: float
    """Share of the attention mass in the kept blocks at the base budget, mean over searches, layers, samples, heads.
    NaN without a search or a sparse layer."""
    recall_by_search: dict[int, list[list[float]]]
    """Search step -> [NL][H], mean over the batch."""
    drift_by_search: dict[int, list[list[float]]]
    """Search step -> [NL][H] mean |change of the LSE| since the last search: staleness of the cache, 0 at the first."""
    stand_ins: float
    """Share of the attention mass that the stand-ins of dropped blocks held, as calibrated at the searches, the same
    mean as recall; with the recall about 1. 0 without compensation, NaN where recall is."""
    stand_ins_by_search: dict[int, list[list[float]]]
    """Search step -> [NL][H], mean over the batch."""
    step_kinds: dict[str, list[int]]
    """Name of each step kind -> its steps."""


def summarize(
    state: Any,
    history: History,
    layout: TokenLayout,
    config: SparseConfig,
    *,
    kinds: np.ndarray | None = None,
    first: int = 1,
) -> Report:
    """Collects a Report from what `denoise` returned; `state` is its pytree of layer-stacked SparseStates.

    `kinds` and `first` of a run of `scan_steps`: its StepKinds and its first step.
    """
    counts = _layers(
        jax.tree.map(
            lambda s: s.counts[..., : layout.query_blocks], state, is_leaf=lambda x: isinstance(x, SparseState)
        )
    )
    sparse = np.setdiff1d(np.arange(len(counts)), config.dense_layers)
    density = counts.mean((1, 2, 3)) / layout.num_blocks
    density[list(config.dense_layers)] = 1.0
    recall, drift = _layers(history.recall, axis=1), _layers(history.drift, axis=1)
    stand_ins = _layers(history.stand_ins, axis=1)
    kinds = config.step_kinds() if kinds is None else kinds
    searches = [i for i, kind in enumerate(kinds) if kind in (StepKind.FUSED_SEARCH, StepKind.CACHED_SEARCH)]
    by_search = lambda x: {first + i: x[i].mean(1).round(6).tolist() for i in searches}
    return Report(
        density=_mean(density[sparse]),
        density_by_layer=density.tolist(),
        recall=_mean(recall[searches][:, sparse]),
        recall_by_search=by_search(recall),
        drift_by_search=by_search(drift),
        stand_ins=_mean(stand_ins[searches][:, sparse]),
        stand_ins_by_search=by_search(stand_ins),
        step_kinds={kind.name.lower(): (np.flatnonzero(kinds == kind) + first).tolist() for kind in StepKind},
    )


def draw_blocks(state: Any, layout: TokenLayout, sample: int = 0, heads: int = 6) -> "Figure":
    """Draws the block mass of some heads of a run, and under each the blocks it kept.

    Takes heads spread over all layers of `state`, which must hold the mass (`SparseState.create(keep_mass=True)`);
    raises ValueError otherwise. Returns a matplotlib figure.
    """
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.figure import Figure

    stacks = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, SparseState))
    if any(s.mass.size == 0 for s in stacks):
        raise ValueError("this state holds no block mass; create it with keep_mass=True")
    joined = SparseState(*(np.concatenate([np.asarray(x) for x in xs]) for xs in zip(*stacks, strict=True)))  # type: ignore[arg-type]
    searched, per_layer = np.flatnonzero(joined.mass.any((1, 2, 3, 4))), joined.counts.shape[2]
    if not len(searched):
        raise ValueError("no layer of this state was searched")
    count = len(searched) * per_layer
    chosen = np.linspace(0, count - 1, min(heads, count)).round().astype(int)
    figure = Figure(figsize=(2.4 * len(chosen), 5.6), layout="constrained")
    for column, (place, head) in enumerate(zip(*divmod(chosen, per_layer), strict=True)):
        layer = searched[place]
        mass, counts = joined.mass[layer, sample, head], joined.counts[layer, sample, head]
        kept = np.zeros(mass.shape, bool)
        for row, (index, count) in enumerate(zip(joined.indices[layer, sample, head], counts, strict=True)):
            kept[row, index[:count]] = True
        top, bottom = (figure.add_subplot(2, len(chosen), column + 1 + i * len(chosen)) for i in (0, 1))
        top.imshow(
            np.maximum(mass, 1e-4), norm=LogNorm(1e-2, layout.query_block), cmap="magma", interpolation="nearest"
        )
        bottom.imshow(kept, cmap=ListedColormap(["#f2f2f2", "#1f4e79"]), interpolation="nearest")
        recall = mass[kept].sum() / (mass.sum() or 1)
        top.set_title(f"layer {layer}, head {head}\nblock mass", fontsize=9)
        bottom.set_title(f"kept {kept.mean():.0%}, recall {recall:.0%}", fontsize=9)
        for axes in (top, bottom):
            axes.set_xticks([])
            axes.set_yticks([])
    figure.supxlabel("key blocks (text last)", fontsize=9)
    figure.supylabel("query blocks", fontsize=9)
    return figure
