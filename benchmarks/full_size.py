"""HunyuanVideo-13B's sampler at 720p x 129 frames, of as many layers as wanted: what several benchmarks run or compile.

118,800 video tokens and 256 of text, 24 heads, D = 128, bfloat16, random weights. Layers of a kind are scanned, so few
of them compile to the same code as all 60.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from adaspa_jax import AttentionSharding, SparseConfig, StepKind, denoise
from models.pipeline.mesh import gather_small
from models.schedulers import FlowMatchEuler
from models.transformers.hunyuan_video import HunyuanVideoConfig, HunyuanVideoTransformer
from pallas_kernels import Implementation

LATENTS, TEXT = (33, 90, 160), 256
HIDDEN_MB = 126720 * 3072 * 2 / 1e6
"""Of the video tokens, padded for a mesh, in bfloat16: q, k, v or out of a layer."""
ALL_LAYERS = (20, 40)
"""Dual-stream and single-stream."""


def operands(config: HunyuanVideoConfig) -> dict[str, Any]:
    """Keyword arguments of one forward pass, less the timestep."""
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "hidden_states": jax.random.normal(keys[0], (1, config.in_channels, *LATENTS), jnp.bfloat16),
        "encoder_hidden_states": jax.random.normal(keys[1], (1, TEXT, config.text_embed_dim), jnp.bfloat16),
        "encoder_attention_mask": jnp.ones((1, TEXT), jnp.int32),
        "pooled_projections": jax.random.normal(keys[2], (1, config.pooled_projection_dim), jnp.bfloat16),
        "guidance": jnp.full((1,), 6000.0),
    }


def create(layers: tuple[int, int]) -> HunyuanVideoTransformer:
    """A model with random weights; inside `nnx.jit` or `nnx.eval_shape`."""
    sizes = HunyuanVideoConfig(num_layers=layers[0], num_single_layers=layers[1])
    return HunyuanVideoTransformer(sizes, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))


def program(
    graph: Any,
    config: SparseConfig,
    *,
    dense: bool = False,
    sharding: AttentionSharding | None = None,
    implementation: Implementation | None = None,
) -> Callable[..., tuple[Array, Any]]:
    """(weights, noise, other operands, states) -> (latents, states), for `jax.jit`; states are () for a dense run."""
    scheduler = FlowMatchEuler()

    def run(weights: Any, noise: Array, given: dict[str, Array], states: Any) -> tuple[Array, Any]:
        model = nnx.merge(graph, weights if sharding is None else gather_small(weights, sharding))

        def predict(latents: Array, row: dict[str, Array], states: Any, kind: Any) -> Any:
            how = {"state": None, "step_kind": StepKind.DENSE} if dense else {"state": states, "step_kind": kind}
            how |= {"config": config, "sharding": sharding, "implementation": implementation}
            out = model(hidden_states=latents.astype(model.dtype), timestep=row["timestep"][None], **given, **how)
            out, states = (out, states) if dense else out
            return (out if sharding is None else sharding.replicated(out)), states

        return denoise(predict, scheduler, scheduler.tables(config.steps), noise, states, config)[:2]

    return run
