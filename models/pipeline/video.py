"""Prompt embeddings to latents, for every port: scheduler, guidance, experts and AdaSpa in compiled programs."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from adaspa_jax import AttentionSharding, Report, SparseConfig, StepKind, TokenLayout, summarize
from models import schedulers
from models.checkpoint.loading import describe, expert_folders, from_pretrained
from models.checkpoint.lora_file import LoraLike
from models.checkpoint.safetensors_folder import read_json
from models.pipeline.embeddings import Embeddings, check_embeddings
from models.pipeline.experts import boundary_ratio, share_loras
from models.pipeline.families import Family, VideoSize, family_of
from models.pipeline.guidance import Guidance, constant_scale, dynamic_scale
from models.pipeline.mesh import Weights, for_report, placement
from models.pipeline.offload import Offload, check_offload, resting_place
from models.pipeline.plan import Plan, branches, initial_noise, split_steps
from models.pipeline.program import Functions, Program, Progress, compile_program
from models.schedulers import AnyScheduler, FlowMatchEuler, UniPC
from models.schedulers.few_step import of_flow
from models.schedulers.seeds import check_seed
from models.transformers.base import VideoTransformer
from models.transformers.cogvideox import CogVideoXTransformer
from models.transformers.wan import WanTransformer
from pallas_kernels import Implementation, ScorePrecision, resolve_implementation, resolve_score_precision


@dataclass(frozen=True)
class LatentSample:
    """One finished run."""

    latents: np.ndarray
    """float32 [B, C, F, H, W], the frames that a model only pads with left out."""
    states: tuple[Any, ...]
    """The final sparse state of each expert, () for a dense run."""
    layout: TokenLayout
    config: SparseConfig
    reports: tuple[Report, ...]
    """Of each expert that searched."""
    seconds: float
    """The sampling scans, compile time apart."""
    compile_seconds: float
    implementation: Implementation
    """The kernels that attention ran on."""
    score_precision: ScorePrecision
    """What the scores of kept blocks were multiplied in; "input" in a dense run."""


@dataclass(frozen=True)
class VideoPipeline:
    """The experts of a model, one or two, with what belongs to them; make it with `load`."""

    experts: tuple[VideoTransformer, ...]
    scheduler: AnyScheduler
    family: Family
    boundary: float | None = None
    """Timestep below which the second expert takes over."""
    sharding: AttentionSharding | None = None
    """The mesh that it samples on; None: one device."""
    offload: Offload = "none"
    """What of the weights waits in the memory of the host."""

    @classmethod
    def describe(
        cls, path: str | Path, dtype: Any = None, *, follow_links: bool = False, loras: Sequence[LoraLike] = ()
    ) -> "VideoPipeline":
        """What `load` loads, with shapes in place of weights: enough for `plan`. Raises ValueError as `load` does."""
        path = Path(path)
        index = read_json(path / "model_index.json") if (path / "model_index.json").is_file() else {}
        folders = expert_folders(path)
        shared = zip(folders, share_loras(loras, len(folders)), strict=True)
        experts = tuple(describe(folder, dtype, follow_links=follow_links, loras=own) for folder, own in shared)
        ratio = boundary_ratio(index, experts)
        family = family_of(experts[0], index | {"boundary_ratio": ratio})
        scheduler = family.scheduler
        if (path / "scheduler/scheduler_config.json").is_file():
            scheduler = schedulers.from_config(read_json(path / "scheduler/scheduler_config.json"))
        if isinstance(scheduler, FlowMatchEuler) and isinstance(experts[0], WanTransformer):
            scheduler = dataclasses.replace(scheduler, default_sigmas=True)
        return cls(experts, scheduler, family, None if ratio is None else ratio * scheduler.train_timesteps)

    @classmethod
    def load(
        cls,
        path: str | Path,
        dtype: Any = None,
        progress: Callable[[int, int], None] | None = None,
        *,
        mesh: Mesh | None = None,
        weights: Weights = "replicated",
        offload: Offload = "none",
        follow_links: bool = False,
        loras: Sequence[LoraLike] = (),
    ) -> "VideoPipeline":
        """Reads a transformer, or a pipeline folder: its experts, its scheduler. `dtype` None: the checkpoint's.

        `progress` gets the parameters of an expert loaded so far and in all. `mesh` has axes data, heads or rows, see
        `AttentionSharding`; `weights` lie whole on each of its devices, or sharded over all. `offload`, on one device:
        two experts take turns on it ("experts"), or each layer comes to it when it runs ("layers"); the rest waits in
        the memory of the host. `follow_links`: the files
        of the transformers may be links out of their folders. `loras` are merged, each a file, (file, scale) or `Lora`;
        into both experts of two, if `Lora` does not say which. Raises ValueError for what cannot be read.
        """
        described = cls.describe(path, dtype, follow_links=follow_links, loras=loras).with_offload(offload)
        if mesh is not None:
            described = dataclasses.replace(described, sharding=AttentionSharding(mesh))
        return described.with_weights(path, dtype, progress, weights=weights, follow_links=follow_links, loras=loras)

    def with_weights(
        self,
        path: str | Path,
        dtype: Any = None,
        progress: Callable[[int, int], None] | None = None,
        *,
        weights: Weights = "replicated",
        follow_links: bool = False,
        loras: Sequence[LoraLike] = (),
    ) -> "VideoPipeline":
        """With the experts of `path`, which this was described from; arguments as for `load`."""
        place = self.place(weights)
        options: dict[str, Any] = {"progress": progress, "sharding": place, "follow_links": follow_links}
        folders = expert_folders(Path(path))
        shared = zip(folders, share_loras(loras, len(folders)), strict=True)
        experts = tuple(from_pretrained(folder, dtype, **options, loras=own) for folder, own in shared)
        return dataclasses.replace(self, experts=experts)

    def place(self, weights: Weights) -> Any:
        """Where each parameter lies, on the mesh as `weights` says; None: on the default device."""
        if self.sharding is None:
            return resting_place(self.offload)
        if self.offload != "none":
            raise ValueError(f"offload={self.offload!r} is for one device; on a mesh take weights='sharded'")
        return placement(self.sharding.mesh, weights)

    def with_offload(self, offload: Offload) -> "VideoPipeline":
        """With weights that wait elsewhere, once they are loaded. ValueError if there is nothing to take turns."""
        check_offload(offload, len(self.experts))
        return dataclasses.replace(self, offload=offload)

    def with_shift(self, shift: float | None) -> "VideoPipeline":
        """With another time shift; ValueError if the scheduler has none. None changes nothing."""
        if shift is None:
            return self
        if not isinstance(self.scheduler, FlowMatchEuler | UniPC):
            raise ValueError(f"{shift=}: {type(self.scheduler).__name__} has no shift; leave it out")
        return dataclasses.replace(self, scheduler=dataclasses.replace(self.scheduler, shift=shift))

    def with_timesteps(self, timesteps: tuple[float, ...] | None, renoise: bool = False) -> "VideoPipeline":
        """Sampled at these, as distilled models are, see `FewStep`; ValueError if that cannot be. None changes nothing.

        They are shifted like the scheduler's own; a shift of 1 leaves them as they are.
        """
        if timesteps is None:
            return self
        return dataclasses.replace(self, scheduler=of_flow(self.scheduler, timesteps, renoise))

    def _check_guidance(self, guidance: Guidance, scale: float) -> None:
        """ValueError for a part of it that has no effect on this model."""
        if guidance.dynamic and not isinstance(self.experts[0], CogVideoXTransformer):
            raise ValueError("dynamic guidance is CogVideoX's; leave it out")
        if guidance.true_cfg is not None and not self.family.embedded_guidance:
            raise ValueError(
                f"true_cfg={guidance.true_cfg}: {self.family.name} embeds no guidance; give its scale instead"
            )
        if guidance.low_noise is not None and self.boundary is None:
            raise ValueError(f"low_noise={guidance.low_noise}: {self.family.name} has one expert; give its scale alone")
        if scale <= 1 and (guidance.dynamic or (guidance.low_noise or 0) > 1):
            raise ValueError(
                f"guidance {scale} turns guidance off, as in diffusers, whatever low_noise={guidance.low_noise} and "
                f"dynamic={guidance.dynamic} are; give a scale above 1, or that alone"
            )

    def _scales(self, guidance: Guidance, tables: dict[str, np.ndarray]) -> tuple[float, bool, np.ndarray]:
        """(embedded scale, whether there are two branches, scale of classifier-free guidance in each step)."""
        family, steps = self.family, len(tables["timestep"])
        scale = family.guidance[0] if guidance.scale is None else guidance.scale
        self._check_guidance(guidance, scale)
        if family.embedded_guidance:
            true_cfg = guidance.true_cfg or 1.0
            return scale, true_cfg > 1, constant_scale(true_cfg, steps)
        if scale <= 1:
            return scale, False, constant_scale(1.0, steps)
        table = dynamic_scale(scale, tables["timestep"]) if guidance.dynamic else constant_scale(scale, steps)
        if self.boundary is not None:
            low = guidance.low_noise
            if low is None:
                low = family.guidance[-1] if guidance.scale is None else scale
            table = np.where(tables["timestep"] >= self.boundary, table, np.float32(low))
        return scale, True, table

    def sample(
        self,
        embeddings: Embeddings,
        config: SparseConfig,
        *,
        size: VideoSize | None = None,
        guidance: Guidance | None = None,
        seed: int = 0,
        noise: Any = None,
        dense: bool = False,
        keep_mass: bool = False,
        progress: Progress | None = None,
        implementation: Implementation | None = None,
        program: Program | None = None,
    ) -> LatentSample:
        """Samples one video a prompt, as one batch. The same seed gives the same noise, dense or sparse.

        Args:
          embeddings: of the prompts, see `models.embeddings`.
          config: how AdaSpa runs; its `steps` are those of a dense run too.
          size: in pixels; None: the family's.
          guidance: scales.
          seed: of the initial noise, and of what a scheduler adds; each in 0 .. 2^64 - 1 is its own.
          noise: float32 [B, C, F, H, W], to start from instead.
          dense: skip nothing.
          keep_mass: keep the block mass for pictures.
          progress: called with the number of each finished step.
          implementation: which kernels run.
          program: of `compile`, for the same options and shapes; None: it is compiled.

        Raises:
          ValueError: before anything runs; see `plan`. Noise of another shape, or with NaN or infinity.
        """
        model, family, size = self.experts[0], self.family, size or self.family.size
        plan = self.plan(embeddings, config, size=size, guidance=guidance, seed=seed)
        start, compile_seconds = initial_noise(plan.shape, seed, noise), 0.0
        how: dict[str, Any] = {
            "implementation": implementation,
            "dtype": model.dtype,
            "head_dim": model.config.attention_head_dim,
            "block_size": config.block_size,
            "query_block_size": config.query_block,
        }
        precision = "input" if dense else resolve_score_precision(config.score_precision, **how)
        if program is None:
            program = self.compile(plan, config, dense=dense, keep_mass=keep_mass, implementation=implementation)
            compile_seconds = program.seconds
        begun = time.perf_counter()
        latents, states, histories = program.run(self.experts, plan, start, seed, progress)
        seconds = time.perf_counter() - begun
        grid, text = plan.shape[2:], plan.given["prompt_embeds"].shape[1]
        layout = model.layout(grid, text, config)
        reports = tuple(
            summarize(state, history, layout, config, kinds=part.kinds, first=part.first + 1)
            for part, state, history in zip(plan.parts, for_report(states, self.sharding), histories, strict=True)
            if not dense and (part.kinds == StepKind.FUSED_SEARCH).any()
        )
        return LatentSample(
            np.asarray(latents, np.float32)[:, :, family.padding_frames(size, model) :],
            states,
            layout,
            config,
            reports,
            seconds,
            compile_seconds,
            resolve_implementation(**how),
            precision,
        )

    def compile(
        self,
        plan: Plan,
        config: SparseConfig,
        *,
        dense: bool = False,
        keep_mass: bool = False,
        implementation: Implementation | None = None,
        weights: Weights = "replicated",
    ) -> Program:
        """Compiles what `sample` runs, for every seed and prompts of the shapes of `plan`; weights need not be there.

        Options as for `sample`; `weights`: how they will lie on the mesh.
        """
        how = (self.family, plan.scheduler, plan.scale, plan.guided, config, dense, implementation, self.sharding)
        place, turns = self.place(weights), self.offload == "experts"
        return compile_program(Functions(*how), self.experts, plan, keep_mass, place, turns)

    def plan(
        self,
        embeddings: Embeddings,
        config: SparseConfig,
        *,
        size: VideoSize | None = None,
        guidance: Guidance | None = None,
        seed: int = 0,
    ) -> Plan:
        """All of a run but its noise and weights, which need not be there. Arguments as for `sample`.

        Raises ValueError for a size or a number of steps that the model cannot make, guidance that has no effect on it,
        layers that it does not have, a seed outside 0 .. 2^64 - 1, and embeddings that do not fit it, are not finite or
        have a mask without a token.
        """
        model, family, scheduler = self.experts[0], self.family, self.scheduler
        grid = family.latent_shape(size or family.size, model)
        check_seed(seed)
        tables = scheduler.tables(config.steps)
        scale, guided, tables["guidance"] = self._scales(guidance or Guidance(), tables)
        if config.share_cfg_indices and not guided:
            raise ValueError("share_cfg_indices needs classifier-free guidance; this run has one branch")
        # Of shapes alone: no device is asked for yet.
        jax.eval_shape(lambda: config.layer_kinds(StepKind.DENSE, sum(model.stack_sizes())))
        fixed = family.fixed_first_frame
        found = check_embeddings(embeddings, model, grid, guided=guided, first_frame=fixed)
        shape = (len(found["prompt_embeds"]), model.config.out_channels, *grid)
        if self.sharding is not None:
            self.sharding.check(config, shape[0] * (1 + guided), model.config.num_attention_heads)
        parts = split_steps(tables["timestep"], self.boundary, config.step_kinds())
        return Plan(scheduler, tables, scale, guided, parts, branches(found, guided), shape)
