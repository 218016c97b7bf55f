"""What does sparsity cost, and which way of it is worth its work? Two models, AdaSpa against dense from one noise.

    python -m benchmarks.quality [--model embedded] [--json FILE] [--picture FILE] [--variant NAME] [--work 0.38]

Every variant is run at the same attention work, in units of a dense run: a dense step 1, a search's block mass 0.5
more, a sparse step its density, stand-ins (1 - density) / block. The levels of work are those of "AdaSpa", the paper's
way in cube order, at sparsity 0.9, 0.8 and 0.5. Lists hold whole blocks, so others run at the two sparsities next to a
level and their figures are interpolated. The presets follow, at their own work. PSNR, SSIM and flicker are means over
prompts and seeds; `gain_db` is the paired difference to AdaSpa at the same work, `gain_error` its standard error.

"embedded" is the demo's model. "yardstick", in benchmarks/yardstick, was made by `models.demo.train --preset hard`: its
attention is as concentrated as that of large models. `benchmarks.probe` says how hard a model is.
"""

import dataclasses
import functools
import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.progress import track

from adaspa_jax import PRESETS, SparseConfig, StepKind
from adaspa_jax.compensation import SAMPLE
from adaspa_jax.layout import TokenLayout
from adaspa_jax.schedule import search_steps_at
from benchmarks.table import show, write_json
from models.commands.cli import run_cli
from models.commands.media import psnr, ssim
from models.pipeline.plan import initial_noise
from models.pipeline.video import LatentSample
from models.pipeline.words import HunyuanVideoPipeline
from pallas_kernels import Implementation
from pallas_kernels.dispatch import gpu_capability


@dataclass(frozen=True)
class Model:
    """A checkpoint with a word encoder, and prompts that it knows."""

    checkpoint: Path
    prompts: tuple[str, ...]


_ROOT = Path(__file__).parent.parent
_CLIPS = (
    "red circle moving left",
    "blue square moving down",
    "yellow triangle moving up",
    "green ring moving right",
    "white circle moving right",
    "blue ring moving up",
    "red triangle moving down",
    "green square moving left",
)
MODELS = {
    "embedded": Model(_ROOT / "models/demo/checkpoint", _CLIPS),
    "yardstick": Model(
        _ROOT / "benchmarks/yardstick",
        tuple(f"{front} {behind}" for front, behind in zip(_CLIPS, _CLIPS[3:] + _CLIPS[:3], strict=True)),
    ),
}


def model_of(name: str, checkpoint: Path | None = None) -> Model:
    """The model `name`, at another place if given. ValueError for another name, or a model that is not there."""
    if name not in MODELS:
        raise ValueError(f"--model {name!r} is unknown; choose of: {', '.join(MODELS)}")
    model = MODELS[name] if checkpoint is None else dataclasses.replace(MODELS[name], checkpoint=checkpoint)
    if not model.checkpoint.is_dir():
        raise ValueError(
            f"{name}: {model.checkpoint} is no folder; python -m models.demo.train --preset hard makes one"
        )
    return model


BASE, PRESET = "AdaSpa", "preset "
"""The variant that the others are compared with, and what the names of presets begin with."""
_SAME = 1e-9
"""Works that differ by less are equal."""
MASS_WORK = 0.5
"""Of a dense step's attention: one of its two products."""
LEVELS = (0.9, 0.8, 0.5)


def variants(steps: int) -> dict[str, SparseConfig]:
    """The ways to be compared, whatever their sparsity."""
    change = dataclasses.replace
    adaspa, default = SparseConfig.paper(steps, token_order="cube"), SparseConfig(steps=steps)
    at = lambda *shares: change(default, search_steps=search_steps_at(steps, *shares))
    # What a GPU refuses would end a run over all ways.
    on_gpu = ("int8", "fp8") if gpu_capability() == "9.0" else ()
    eight = on_gpu if jax.default_backend() == "gpu" else ("int8", "fp8")
    return {
        BASE: adaspa,
        "AdaSpa, raster (paper)": change(adaspa, token_order="raster"),
        "AdaSpa, block 128": change(adaspa, block_size=128),
        "default": default,
        "default, no stand-ins": change(default, compensation="none"),
        "default, tiers": change(default, head_adaptive=True),
        "default, block 128": change(default, block_size=128),
        "default, blocks 128 x 64": change(default, query_block_size=128),
        "default, search at 8%": at(0.08),
        "default, search at 20%": at(0.2),
        "default, searches at 12, 80%": at(0.12, 0.8),
        **{f"default, {precision} scores": change(default, score_precision=precision) for precision in eight},
    }


def presets(steps: int) -> dict[str, SparseConfig]:
    """The presets, each at its own work."""
    return {PRESET + name: SparseConfig.preset(name, steps=steps) for name in PRESETS}


def work(config: SparseConfig, layout: TokenLayout) -> float:
    """Attention of a whole run in units of a dense one."""
    density, pooled = config.budget(layout).base / layout.num_blocks, config.compensation == "pooled"
    sparse = density + (1 - density) / config.block_size * pooled
    search = MASS_WORK * (1 if config.lse_cache else 2)
    cost = {
        StepKind.DENSE: 1.0,
        StepKind.FUSED_SEARCH: 1 + MASS_WORK + sparse * pooled,  # what strengths are fitted to
        StepKind.CACHED_SEARCH: sparse + search + pooled / SAMPLE,
        StepKind.SPARSE: sparse,
    }
    return sum(cost[StepKind(kind)] for kind in config.step_kinds()) / config.steps


def at_work(config: SparseConfig, layout: TokenLayout, most: float) -> list[SparseConfig]:
    """`config` at the two sparsities whose work is next to `most`, the lesser first; one if that is it; or none.

    None for more than all blocks are worth, and for less than the fewest.
    """
    total = layout.num_blocks
    above: list[SparseConfig] = []
    for kept in range(total, layout.text_blocks, -1):
        found = dataclasses.replace(config, sparsity=1 - kept / total)
        if (own := work(found, layout)) <= most + _SAME:
            return [found] if own >= most - _SAME else [found, *above] if above else []
        above = [found]
    return []


def flicker(video: np.ndarray, reference: np.ndarray) -> float:
    """Mean difference of the changes from frame to frame, of videos [..., F, H, W] in [-1, 1]."""
    change = lambda x: np.diff(x.astype(np.float64), axis=-3)
    return float(np.abs(change(video) - change(reference)).mean())


def figures(videos: np.ndarray, dense: np.ndarray) -> dict[str, list[float]]:
    """Of each video of a batch."""
    pairs = [(np.clip(a, -1, 1), np.clip(b, -1, 1)) for a, b in zip(videos, dense, strict=True)]
    return {
        "psnr_db": [psnr(a[None], b[None]) for a, b in pairs],
        "ssim": [ssim(a[None], b[None]) for a, b in pairs],
        "flicker": [flicker(a, b) for a, b in pairs],
    }


@dataclass(frozen=True)
class Bench:
    """A loaded model, and what its variants are run on: every prompt with every noise, one batch."""

    pipeline: HunyuanVideoPipeline
    prompts: tuple[str, ...]
    seeds: int
    implementation: Implementation | None

    def layout(self, config: SparseConfig) -> TokenLayout:
        """Of the model's own size."""
        video = self.pipeline.video_pipeline()
        shape = video.plan(self.pipeline.embed(list(self.prompts)), config).shape
        return video.experts[0].layout(shape[2:], self.pipeline.encoder.max_words, config)

    def run(self, config: SparseConfig, dense: bool = False) -> LatentSample:
        """Videos [seeds * prompts, 3, F, H, W], those of a seed side by side."""
        video, embeddings = self.pipeline.video_pipeline(), self.pipeline.embed(list(self.prompts) * self.seeds)
        shape = (len(self.prompts), *video.plan(embeddings, config).shape[1:])
        noise = jnp.concatenate([jnp.asarray(initial_noise(shape, seed, None)) for seed in range(self.seeds)])
        return video.sample(embeddings, config, noise=noise, dense=dense, implementation=self.implementation)

    def row(self, name: str, config: SparseConfig, dense: np.ndarray) -> dict[str, Any]:
        """What a variant reaches against the videos `dense`; lists by video under "of_video"."""
        run = self.run(config)
        videos, (report,) = figures(run.latents, dense), run.reports
        return {
            "variant": name,
            "work": work(config, run.layout),
            "density": config.budget(run.layout).base / run.layout.num_blocks,
            **{key: float(np.mean(values)) for key, values in videos.items()},
            "recall": report.recall,
            "stand_ins": report.stand_ins,
            "of_video": videos,
        }


@dataclass(frozen=True)
class Job:
    """A variant at a sparsity, to be run for a level of work; NaN: for none, as presets are."""

    variant: str
    config: SparseConfig
    level: float = math.nan


def jobs(bench: Bench, chosen: dict[str, SparseConfig], levels: list[float]) -> Iterator[list[Job]]:
    """Those of every level that a variant can work at, the least work first, then the presets."""
    layouts = {name: bench.layout(config) for name, config in chosen.items()}
    for most in levels:
        for name, config in chosen.items():
            if not name.startswith(PRESET) and (found := at_work(config, layouts[name], most)):
                yield [Job(name, own, most) for own in found]
    yield from ([Job(name, config)] for name, config in chosen.items() if name.startswith(PRESET))


def interpolated(rows: list[dict[str, Any]], level: float) -> dict[str, Any]:
    """The row of one variant at a level of work, from its rows on both sides of it or the only one."""
    if len(rows) == 1:
        return rows[0] | {"level": level}
    below, above = rows
    share = (level - below["work"]) / (above["work"] - below["work"])

    def mix(a: Any, b: Any) -> Any:
        if isinstance(a, dict):
            return {key: mix(a[key], b[key]) for key in a}
        if isinstance(a, list):
            return [mix(x, y) for x, y in zip(a, b, strict=True)]
        return a + share * (b - a) if isinstance(a, float) and a != b else a  # equal ones may be infinite

    return mix(below, above) | {"level": level}


def default_levels(bench: Bench, steps: int) -> list[float]:
    """The work of AdaSpa at each of LEVELS."""
    adaspa = variants(steps)[BASE]
    layout = bench.layout(adaspa)
    return list(dict.fromkeys(work(dataclasses.replace(adaspa, sparsity=s), layout) for s in LEVELS))


def add_gains(rows: list[dict[str, Any]]) -> None:
    """Adds the paired difference to AdaSpa at the same level with its standard error, NaN where there is none."""
    base = {row["level"]: row for row in rows if row["variant"] == BASE}
    for row in rows:
        row["gain_db"] = row["gain_error"] = math.nan
        if row["level"] in base:
            ours, theirs = (np.asarray(r["of_video"]["psnr_db"]) for r in (row, base[row["level"]]))
            row["gain_db"] = float((ours - theirs).mean())
            row["gain_error"] = float((ours - theirs).std(ddof=1) / math.sqrt(len(ours))) if len(ours) > 1 else math.nan


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """A picture of the front: PSNR against attention work, a panel a model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(6.4 * len(models), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        own = [row for row in rows if row["model"] == model]
        for name in dict.fromkeys(row["variant"] for row in own):
            points = sorted((row["work"], row["psnr_db"]) for row in own if row["variant"] == name)
            line, marker = "--" if name.startswith(BASE) else "-", "*" if name.startswith(PRESET) else "o"
            size = 14 if marker == "*" else 5
            axes.plot(*zip(*points, strict=True), marker=marker, markersize=size, linestyle=line, label=name)
        axes.set(title=model, xlabel="attention work, dense = 1", ylabel="PSNR against dense [dB]")
        axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


_WORKER: dict[str, Any] = {}
"""Of a process of the pool: its Bench and the dense videos."""


def _start(bench: Callable[[], Bench], dense: np.ndarray) -> None:
    _WORKER.update(bench=bench(), dense=dense)


def _row(job: Job) -> dict[str, Any]:
    return _WORKER["bench"].row(job.variant, job.config, _WORKER["dense"])


def measure(
    name: str,
    bench: Bench,
    make: Callable[[], Bench],
    chosen: dict[str, SparseConfig],
    levels: list[float],
    processes: int,
) -> Iterator[dict[str, Any]]:
    """The rows of one model, as they are done; `make` is for the processes, which make a `bench` each."""
    todo = list(jobs(bench, chosen, levels))
    if not todo:
        raise ValueError(f"no variant of {', '.join(chosen)} works at {', '.join(f'{x:g}' for x in levels)} of dense")
    dense = bench.run(next(iter(chosen.values())), dense=True).latents
    single = [job for group in todo for job in group]
    with ExitStack() as stack:
        if processes == 1:
            done: Iterable[dict[str, Any]] = (bench.row(job.variant, job.config, dense) for job in single)
        else:
            # Each traces and compiles on its own: threads would wait for one another.
            context = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(processes, context, _start, (make, dense))
            done = stack.enter_context(pool).map(_row, single)
        shown = iter(track(done, f"sampling {name}", len(single)))
        for group in todo:
            yield {"model": name} | interpolated([next(shown) for _ in group], group[0].level)


def load(model: Model, dtype: str, prompts: int, seeds: int, implementation: Implementation | None) -> Bench:
    """The Bench of a model."""
    pipeline = HunyuanVideoPipeline.load(model.checkpoint, jnp.dtype(dtype))
    return Bench(pipeline, model.prompts[:prompts], seeds, implementation)


def main(
    model: Annotated[
        list[str] | None, typer.Option(help=f"of {', '.join(MODELS)}; repeatable, default: all there are")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="write the rows to this file")] = None,
    picture: Annotated[Path | None, typer.Option(help="draw the front to this PNG")] = None,
    variant: Annotated[list[str] | None, typer.Option(help="to run; repeatable, default: all")] = None,
    work_: Annotated[list[float] | None, typer.Option("--work", help="levels of work; repeatable")] = None,
    steps: Annotated[int, typer.Option(help="denoising steps", min=1)] = 50,
    prompts: Annotated[int, typer.Option(help="how many", min=1, max=len(_CLIPS))] = len(_CLIPS),
    seeds: Annotated[int, typer.Option(help="how many noises a prompt", min=1)] = 2,
    processes: Annotated[int, typer.Option(help="variants at a time, which share the device's memory", min=1)] = 1,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="of the models")] = "float32",
    implementation: Annotated[str | None, typer.Option(help="kernels to run, see pallas_kernels")] = None,
) -> None:
    """Prints PSNR, SSIM, flicker, recall and what the stand-ins hold, by model, work and variant."""
    kernels: Implementation | None = implementation  # type: ignore[assignment]
    names, all_variants = (
        model or [name for name in MODELS if MODELS[name].checkpoint.is_dir()],
        variants(steps) | presets(steps),
    )
    models = {name: model_of(name) for name in names}
    for name in variant or []:
        if name not in all_variants:
            raise ValueError(f"--variant {name!r} is unknown; choose of: {'; '.join(all_variants)}")
    chosen = {name: all_variants[name] for name in variant or all_variants}
    rows: list[dict[str, Any]] = []
    for name, found in models.items():
        make = functools.partial(load, found, dtype, prompts, seeds, kernels)
        bench, own = make(), []
        levels = work_ or default_levels(bench, steps)
        for row in measure(name, bench, make, chosen, levels, processes):
            own.append(row)
            add_gains(own)
            write_json(json, rows + own)
        rows += own
    show(
        f"{prompts} prompts, {seeds} seeds, {steps} steps, against dense",
        [{key: x for key, x in row.items() if key != "of_video"} for row in rows],
    )
    if picture is not None:
        draw(picture, rows)


if __name__ == "__main__":
    run_cli(main)
