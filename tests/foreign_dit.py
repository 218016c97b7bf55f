"""A DiT of two scanned layers and a scheduler that are none of ours, with AdaSpa plugged in as the README says."""

from typing import Any

import jax
import numpy as np
from jax import Array

from adaspa_jax import AttentionSharding, SparseConfig, StepKind, TokenLayout, adaspa_attention, denoise

HEADS, WIDTH = 2, 32


class Euler:
    """dx = velocity * dt."""

    def init(self, latents):
        return latents

    latents = init

    def step(self, carry, prediction, row):
        return carry + row["dt"] * prediction


class ForeignDit:
    """Its tokens are the latents [B, video tokens, WIDTH]; `traces` counts how often it was traced."""

    def __init__(self, config: SparseConfig, layout: TokenLayout, sharding: AttentionSharding | None = None) -> None:
        self.config, self.layout, self.sharding, self.traces = config, layout, sharding, 0
        self.weights = jax.random.normal(jax.random.key(0), (2, 4, WIDTH, WIDTH)) * 0.12
        self.noise = jax.random.normal(jax.random.key(1), (1, layout.video_tokens, WIDTH))
        self.tables = {"dt": np.full(config.steps, -0.1, np.float32)}

    def predict(self, latents: Array, row: Any, state: Any, kind: Any) -> tuple[Array, Any]:
        self.traces += 1
        layout, config = self.layout, self.config

        def layer(x, xs):
            (wq, wk, wv, wo), state, kind = xs
            q, k, v = ((x @ w).reshape(*x.shape[:2], HEADS, -1) for w in (wq, wk, wv))
            kind = StepKind.DENSE if state is None else kind
            how = {"layout": layout, "config": config, "sharding": self.sharding}
            out, state = adaspa_attention(q, k, v, state, kind, **how)
            return x + out.reshape(x.shape) @ wo, state

        x, state = jax.lax.scan(layer, layout.pack_video(latents), (self.weights, state, config.layer_kinds(kind, 2)))
        return layout.unpack_video(x), state

    def sample(self, noise: Array, state: Any, **options: Any) -> Any:
        """For `jax.jit`: (latents, state, history)."""
        return denoise(self.predict, Euler(), self.tables, noise, state, self.config, **options)
