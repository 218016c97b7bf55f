"""The sampler over a mesh equals the one on one device: eight virtual devices, in a process of their own."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

from adaspa_jax import AttentionSharding, SparseConfig, SparseState, StepKind, adaspa_attention, attend
from models.pipeline.families import VideoSize, family_of
from models.pipeline.guidance import Guidance
from models.pipeline.mesh import best_mesh, make_mesh, parse_mesh, placement
from models.pipeline.video import VideoPipeline
from models.transformers.cogvideox import CogVideoXConfig, CogVideoXTransformer
from models.transformers.hunyuan_video import HunyuanVideoConfig, HunyuanVideoTransformer
from models.transformers.wan import WanConfig, WanTransformer
from models.vae.hunyuan import HunyuanVAEConfig, HunyuanVideoVAE
from models.vae.tiling import Tiling
from models.vae.wan import WanVAE, WanVAEConfig
from tests import foreign_dit
from tests.foreign_dit import ForeignDit

DEVICES = 8
eight = pytest.mark.skipif(jax.device_count() < DEVICES, reason="test_on_eight_devices starts a process that has them")


@pytest.mark.skipif(jax.device_count() >= DEVICES, reason="this is that process")
@pytest.mark.parametrize("which", ["not matrix", pytest.param("matrix", marks=pytest.mark.matrix)])
def test_on_eight_devices(which: str) -> None:
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-x", "-m", which, str(Path(__file__))]
    flags = f"--xla_force_host_platform_device_count={DEVICES}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stdout[-4000:]
    assert " passed" in ended.stdout


CONFIG = SparseConfig.paper(5, block_size=16, sparsity=0.6, token_order="cube", recall_threshold=0.7)
POOLED = dataclasses.replace(CONFIG, compensation="pooled")
WIDE = dataclasses.replace(POOLED, query_block_size=32)
MESHES = [
    # data, heads, rows, heads of the model, frames
    (CONFIG, 1, 8, 1, 8, 3),
    (CONFIG, 2, 2, 2, 8, 5),
    (CONFIG, 2, 4, 1, 8, 3),
    (CONFIG, 1, 4, 2, 12, 3),
    (CONFIG, 1, 2, 4, 6, 3),
    (WIDE, 1, 4, 2, 8, 3),
    pytest.param(POOLED, 2, 2, 2, 8, 5, marks=pytest.mark.matrix),
]


@eight
@pytest.mark.parametrize(("config", "data", "heads", "rows", "of_model", "frames"), MESHES)
def test_attention_and_its_state(
    config: SparseConfig, data: int, heads: int, rows: int, of_model: int, frames: int
) -> None:
    """Every step kind, ragged text, batch 2, on a mesh with Explicit axes."""
    layout = config.layout((frames, 9, 11), text=21)
    mesh = Mesh(
        np.array(jax.devices()).reshape(data, heads, rows),
        ("data", "heads", "rows"),
        axis_types=(AxisType.Explicit,) * 3,
    )
    sharding, rng = AttentionSharding(mesh), np.random.default_rng(0)
    q, k, v = (jnp.asarray(2 * rng.standard_normal((2, layout.length, of_model, 16)), jnp.float32) for _ in range(3))
    valid = layout.block_valid(jnp.array([21, 13]), 2)
    real = (np.arange(layout.block) < layout.video_valid[:, None]).reshape(-1)
    real = np.concatenate([real, np.arange(layout.text_length) < 13])

    def step(sharding: Any, kind: StepKind, q: Any, state: Any) -> Any:
        return adaspa_attention(
            q, k, v, state, kind, layout=layout, config=config, block_valid=valid, sharding=sharding
        )

    alone = SparseState.create(layout, config, 2, of_model)
    create = lambda: SparseState.create(layout, config, 2, of_model, sharding=sharding)
    spread = jax.jit(create, out_shardings=SparseState.shardings(sharding, layers=False))()
    for i, kind in enumerate((StepKind.FUSED_SEARCH, StepKind.SPARSE, StepKind.CACHED_SEARCH, StepKind.SPARSE)):
        moved = q * (1 + 0.1 * i)
        expected, alone = jax.jit(functools.partial(step, None, kind))(moved, alone)
        got, spread = jax.jit(functools.partial(step, sharding, kind))(moved, spread)
        np.testing.assert_allclose(np.asarray(got)[:, real], np.asarray(expected)[:, real], atol=1e-5)
    places, blocks = np.asarray(spread.places), layout.query_blocks
    for name in ("recall", "drift", "stand_ins"):
        np.testing.assert_allclose(getattr(spread, name), getattr(alone, name), atol=2e-6)
    counts = np.take_along_axis(np.asarray(alone.counts), places[:, :, None], 1)
    indices = np.take_along_axis(np.asarray(alone.indices), places[:, :, None, None], 1)
    np.testing.assert_array_equal(spread.counts[:, :, :blocks], counts)
    used = np.arange(indices.shape[-1]) < counts[..., None]
    np.testing.assert_array_equal(np.where(used, spread.indices[:, :, :blocks], 0), np.where(used, indices, 0))
    assert bool(alone.row_bias.any()) == (config.compensation == "pooled")
    for name, ours in {"row_bias": spread.row_bias[:, :, :blocks], "col_bias": spread.col_bias}.items():
        np.testing.assert_allclose(ours, np.take_along_axis(getattr(alone, name), places[:, :, None], 1), atol=2e-5)
    np.testing.assert_allclose(spread.strength, np.take_along_axis(alone.strength, places, 1), atol=2e-5)
    loads = counts[:, :, 0].reshape(2, heads, -1).sum(-1)
    assert len(set(counts[0, :, 0])) > 1  # the tiers differ
    # Exact for an even number of heads a device; three of one device cannot be made of easy and hard alone.
    assert loads.max() <= {0: 1.0, 1: 1.17}[of_model // heads % 2] * loads.mean() or of_model == heads


HUNYUAN = HunyuanVideoConfig(
    in_channels=4,
    out_channels=4,
    num_attention_heads=4,
    attention_head_dim=16,
    num_layers=1,
    num_single_layers=1,
    num_refiner_layers=1,
    text_embed_dim=8,
    pooled_projection_dim=8,
    rope_axes_dim=(4, 6, 6),
    guidance_embeds=False,
)
WAN = WanConfig(
    num_attention_heads=4,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    text_dim=8,
    freq_dim=8,
    ffn_dim=32,
    num_layers=2,
)
COGVIDEOX = CogVideoXConfig(
    num_attention_heads=4,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    time_embed_dim=8,
    text_embed_dim=8,
    num_layers=2,
    max_text_seq_length=6,
    sample_width=8,
    sample_height=8,
    use_rotary_positional_embeddings=True,
)
SAMPLERS = [
    pytest.param(
        lambda: HunyuanVideoTransformer(HUNYUAN, rngs=nnx.Rngs(0)),
        "data=2,heads=2,rows=2",
        id="HunyuanVideo",
    ),
    pytest.param(lambda: WanTransformer(WAN, rngs=nnx.Rngs(0)), "heads=4,rows=2", id="Wan"),
    pytest.param(lambda: CogVideoXTransformer(COGVIDEOX, rngs=nnx.Rngs(0)), "auto", id="CogVideoX"),
]


@eight
@pytest.mark.parametrize(("create", "mesh"), SAMPLERS)
@pytest.mark.parametrize("weights", ["replicated", pytest.param("sharded", marks=pytest.mark.matrix)])
def test_the_whole_sampler(create: Any, mesh: str, weights: Any) -> None:
    """Both branches of guidance, four steps of all kinds; latents equal, and what the report says."""
    rng, model = np.random.default_rng(0), create()
    family = family_of(model)
    embeddings = {
        name: rng.standard_normal((1, 6, 8)).astype(np.float32) for name in ("prompt_embeds", "negative_prompt_embeds")
    }
    guidance = Guidance(3.0)
    if isinstance(model, HunyuanVideoTransformer):
        guidance = Guidance(true_cfg=3.0)
        for name in ("", "negative_"):
            embeddings[name + "prompt_attention_mask"] = np.array([[1, 1, 1, 1, 0, 0]])
            embeddings[name + "pooled_prompt_embeds"] = rng.standard_normal((1, 8)).astype(np.float32)
    alone = VideoPipeline((model,), family.scheduler, family)
    config = dataclasses.replace(POOLED, search_steps=(2, 3), steps=4)
    sample = lambda pipeline: pipeline.sample(embeddings, config, size=VideoSize(5, 64, 80), guidance=guidance, seed=3)
    expected = sample(alone)
    spread = dataclasses.replace(alone, sharding=AttentionSharding(parse_mesh(mesh, 4, 2, config)))
    place = placement(spread.sharding.mesh, weights)
    graph, state = nnx.split(model)
    placed = [(path, x.replace(jax.device_put(x[...], place(path, x.shape)))) for path, x in nnx.to_flat_state(state)]
    spread = dataclasses.replace(spread, experts=(nnx.merge(graph, nnx.from_flat_state(placed)),))
    got = sample(spread)
    error = np.linalg.norm(got.latents - expected.latents) / np.linalg.norm(expected.latents)
    assert error < 2e-6
    assert got.reports[0].density == pytest.approx(expected.reports[0].density)
    np.testing.assert_allclose(got.reports[0].recall, expected.reports[0].recall, atol=1e-5)


@eight
def test_a_foreign_dit_on_a_mesh() -> None:
    """As the README shows it: the state made where it belongs, one more argument of the attention call."""
    config = dataclasses.replace(POOLED, steps=6)
    layout = config.layout((4, 6, 5))
    sharding = AttentionSharding(jax.make_mesh((1, 4, 2), ("data", "rows", "heads")))
    make = lambda sharding=None: SparseState.create(layout, config, 1, foreign_dit.HEADS, 2, sharding=sharding)
    found = []
    for spread in (None, sharding):
        out = None if spread is None else SparseState.shardings(spread)
        dit, state = ForeignDit(config, layout, spread), jax.jit(lambda s=spread: make(s), out_shardings=out)()
        found.append(jax.jit(dit.sample)(dit.noise, state)[0])
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)


@eight
def test_what_is_compiled() -> None:
    """Four all-to-alls a layer, q, k, v and out, and nothing gathered but text and heads' recalls."""
    layout = POOLED.layout((4, 32, 32), text=0)
    sharding = AttentionSharding(make_mesh(heads=8))
    length = sharding.video_length(layout)
    shape = jax.ShapeDtypeStruct((1, length, 8, 16), jnp.float32, sharding=sharding.named("data", "tokens"))
    state = jax.eval_shape(lambda: SparseState.create(layout, POOLED, 1, 8, sharding=sharding))

    def step(q: Any, k: Any, v: Any, state: Any) -> Any:
        parts = [(x, x[:, :0]) for x in (q, k, v)]
        return attend(*parts, state, StepKind.SPARSE, layout=layout, config=POOLED, sharding=sharding)

    text = jax.jit(step).lower(shape, shape, shape, state).compile().as_text()
    assert text.count(" all-to-all(") + text.count(" all-to-all-start(") == 4
    assert "all-gather" not in text


@eight
@pytest.mark.parametrize("name", ["HunyuanVideo", "Wan"])
def test_all_devices_decode(name: str) -> None:
    """A wave of tiles a time, the last one not full: the video of one device."""
    scale = {"latents_mean": (0.0,) * 4, "latents_std": (1.0,) * 4}
    if name == "Wan":
        vae: Any = WanVAE(
            WanVAEConfig(base_dim=4, z_dim=4, num_res_blocks=1, **scale), dtype="float32", rngs=nnx.Rngs(0)
        )
    else:
        sizes = {"block_out_channels": (4, 4, 8, 8), "norm_num_groups": 2, "latent_channels": 4, "layers_per_block": 1}
        vae = HunyuanVideoVAE(HunyuanVAEConfig(**sizes), dtype="float32", rngs=nnx.Rngs(0))
    latents = np.random.default_rng(0).standard_normal((1, 4, 4, 4, 14), np.float32)
    tiling, done = Tiling(32, 24, 8, 4), []
    expected = vae.decode(latents, tiling)
    got = vae.decode(latents, tiling, lambda *counts: done.append(counts), make_mesh(heads=4, rows=2))
    np.testing.assert_allclose(got, expected, atol=2e-6)
    assert [count for count, _ in done] == sorted({count for count, _ in done})
    assert done[-1][0] == done[-1][1]


REFUSED = {
    "heads": (lambda s: s.check(CONFIG, 2, 12), {"heads": 8}, "12 heads do not divide .* use heads=4 and rows=2"),
    "batch": (lambda s: s.check(CONFIG, 3, 8), {"data": 2, "heads": 4}, "batch of 3.* use data=1 and rows=2"),
    "row_wise": (
        lambda s: s.check(dataclasses.replace(CONFIG, row_wise=False), 2, 8),
        {"heads": 4, "rows": 2},
        "row_wise=False .* rows=1",
    ),
    "share_cfg_indices": (
        lambda s: s.check(dataclasses.replace(CONFIG, share_cfg_indices=True), 2, 8),
        {"data": 2},
        "share_cfg_indices needs .* data=1",
    ),
    "keep_mass": (
        lambda s: SparseState.create(CONFIG.layout((1, 4, 4)), CONFIG, 2, 8, keep_mass=True, sharding=s),
        {"heads": 8},
        "keep_mass=True is for one device",
    ),
}


@eight
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exact_is_refused(case: str) -> None:
    call, sizes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call(AttentionSharding(make_mesh(**sizes)))


@eight
def test_meshes_by_name() -> None:
    assert dict(parse_mesh("data=2,heads=4", 8, 2, CONFIG).shape) == {"data": 2, "rows": 1, "heads": 4}
    assert dict(parse_mesh("auto", 12, 2, CONFIG).shape) == {"data": 2, "heads": 4, "rows": 1}
    assert best_mesh(8, 40, 1, CONFIG) == (1, 8, 1)
    assert best_mesh(8, 6, 1, CONFIG) == (1, 2, 4)
    for text in ("heads", "heads=0", "columns=2", "heads=x", ""):
        with pytest.raises(ValueError, match="is no axis"):
            parse_mesh(text, 8, 2, CONFIG)
    with pytest.raises(ValueError, match="needs 16 devices; there are 8"):
        parse_mesh("heads=16", 16, 2, CONFIG)
    with pytest.raises(ValueError, match="name at least one of them data, heads or rows"):
        AttentionSharding(Mesh(np.array(jax.devices()), ("x",)))
