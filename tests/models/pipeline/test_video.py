"""Whole tiny pipelines against diffusers': scheduler, guidance, model, 8 steps from the same noise."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from adaspa_jax import SparseConfig, StepKind
from models.pipeline import video
from models.pipeline.embeddings import Embeddings
from models.pipeline.families import VideoSize
from models.pipeline.guidance import Guidance
from models.pipeline.plan import split_steps
from models.pipeline.video import LatentSample, VideoPipeline
from tests.matrix import in_matrix
from tests.models.transformers import test_cogvideox, test_hunyuan_video, test_wan
from tests.models.transformers.ports import reference
from tests.relative_error import relative_error

STEPS, SIZE = 8, VideoSize(9, 48, 80)
CONFIG = SparseConfig(steps=STEPS, block_size=16)
Reference = tuple[Path, Embeddings, np.ndarray, np.ndarray]
"""A pipeline folder, embeddings, noise and diffusers' latents, both [B, C, F, H, W]."""


def embeddings_of(text: int, width: int, **more: tuple[int, ...]) -> Embeddings:
    rng = np.random.default_rng(0)
    shapes = {"prompt_embeds": (1, text, width), "negative_prompt_embeds": (1, text, width), **more}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def tensors(embeddings: Embeddings) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(x) for name, x in embeddings.items() if name != "condition"}


def save(folder: Path, pipe: Any, **index: Any) -> None:
    """What a downloaded pipeline has, without text encoders and VAE."""
    for name in ("transformer", "transformer_2", "scheduler"):
        if getattr(pipe, name, None) is not None:
            getattr(pipe, name).save_pretrained(folder / name)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": type(pipe).__name__, **index}))


def run(pipe: Any, noise: np.ndarray, **options: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    options |= {"num_frames": SIZE.frames, "height": SIZE.height, "width": SIZE.width, "num_inference_steps": STEPS}
    return pipe(**options, latents=torch.from_numpy(noise), output_type="latent", return_dict=False)[0].numpy()


def noise_of(channels: int, frames: int = 3, ratio: int = 8) -> np.ndarray:
    shape = (1, channels, frames, SIZE.height // ratio, SIZE.width // ratio)
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def hunyuan(folder: Path, true_cfg: float) -> Reference:
    transformer = reference(diffusers.HunyuanVideoTransformer3DModel, test_hunyuan_video.SMALL)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = diffusers.HunyuanVideoPipeline(None, None, transformer, None, scheduler, None, None)
    mask = np.array([[1] * 7 + [0] * 4])
    names = {"pooled_prompt_embeds": (1, 16), "negative_pooled_prompt_embeds": (1, 16)}
    embeddings = embeddings_of(11, 24, **names)
    embeddings |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    noise = noise_of(4)
    expected = run(pipe, noise, **tensors(embeddings), guidance_scale=6.0, true_cfg_scale=true_cfg)
    save(folder, pipe)
    return folder, embeddings, noise, expected


def wan(folder: Path, scheduler: Any, **options: Any) -> Reference:
    transformer = reference(diffusers.WanTransformer3DModel, test_wan.SMALL)
    pipe = diffusers.WanPipeline(None, None, None, scheduler, transformer, **options)
    embeddings, noise = embeddings_of(11, 24), noise_of(4)
    if "boundary_ratio" in options:
        torch.manual_seed(1)
        second = diffusers.WanTransformer3DModel(**test_wan.SMALL).eval()
        pipe = diffusers.WanPipeline(None, None, None, scheduler, transformer, second, **options)
    scales = {"guidance_scale": 4.0} | ({"guidance_scale_2": 3.0} if "boundary_ratio" in options else {})
    expected = run(pipe, noise, **tensors(embeddings), **scales)
    save(folder, pipe, **options)
    return folder, embeddings, noise, expected


def cogvideox(folder: Path, scheduler: Any, variant: str = "1.5 T2V", **options: Any) -> Reference:
    transformer = reference(diffusers.CogVideoXTransformer3DModel, test_cogvideox.VARIANTS[variant])
    pipe = diffusers.CogVideoXPipeline(None, None, None, transformer, scheduler)
    padding = 1 if "1.5" in variant else 0  # to even
    embeddings, noise = embeddings_of(11, 24), noise_of(4, frames=3 + padding)
    swapped = noise.swapaxes(1, 2).copy()
    expected = run(pipe, swapped, **tensors(embeddings), **options).swapaxes(1, 2)[:, :, padding:]
    save(folder, pipe)
    return folder, embeddings, noise, expected


UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
COGVIDEOX = {
    "snr_shift_scale": 1.0,
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "prediction_type": "v_prediction",
}

OLDER = COGVIDEOX | {"snr_shift_scale": 3.0}


def unipc() -> Any:
    return diffusers.UniPCMultistepScheduler(**UNIPC)


CASES: dict[str, tuple[Any, Guidance]] = {
    "HunyuanVideo": (lambda f: hunyuan(f, 1.0), Guidance(6.0)),
    "HunyuanVideo, true CFG": (lambda f: hunyuan(f, 3.0), Guidance(6.0, true_cfg=3.0)),
    "Wan 2.1": (lambda f: wan(f, unipc()), Guidance(4.0)),
    "Wan 2.1, Euler": (lambda f: wan(f, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)), Guidance(4.0)),
    "Wan 2.2 A14B": (lambda f: wan(f, unipc(), boundary_ratio=0.875), Guidance(4.0, low_noise=3.0)),
    "CogVideoX1.5, DDIM": (
        lambda f: cogvideox(f, diffusers.CogVideoXDDIMScheduler(**COGVIDEOX), guidance_scale=6.0),
        Guidance(6.0),
    ),
    "CogVideoX 2B": (
        lambda f: cogvideox(f, diffusers.CogVideoXDDIMScheduler(**OLDER), "1.0 2B T2V", guidance_scale=6.0),
        Guidance(6.0),
    ),
    "CogVideoX 5B": (
        lambda f: cogvideox(f, diffusers.CogVideoXDDIMScheduler(**COGVIDEOX), "1.0 5B T2V", guidance_scale=6.0),
        Guidance(6.0),
    ),
    "CogVideoX1.5, dynamic": (
        lambda f: cogvideox(f, diffusers.CogVideoXDDIMScheduler(**COGVIDEOX), guidance_scale=6.0, use_dynamic_cfg=True),
        Guidance(6.0, dynamic=True),
    ),
}


def sample(made: Reference, guidance: Guidance, config: SparseConfig = CONFIG, **options: Any) -> LatentSample:
    folder, embeddings, noise, _ = made
    pipeline = VideoPipeline.load(folder, dtype="float32")
    return pipeline.sample(embeddings, config, size=SIZE, guidance=guidance, noise=noise, **options)


LIKE_OTHERS = ("Wan 2.1, Euler", "CogVideoX 5B")


@pytest.mark.parametrize("name", [*(c for c in CASES if c not in LIKE_OTHERS), *in_matrix(*LIKE_OTHERS)])
def test_dense_latents_equal_those_of_diffusers(name: str, tmp_path: Path) -> None:
    create, guidance = CASES[name]
    made = create(tmp_path)
    error = relative_error(sample(made, guidance, dense=True).latents, made[3])
    print(f"{name}: {error:.1e}")
    assert error <= 1e-4


@pytest.mark.parametrize("name", ["Wan 2.2 A14B", *in_matrix("CogVideoX1.5, DDIM", "HunyuanVideo, true CFG")])
def test_adaspa_at_sparsity_0_samples_the_same_and_at_more_less(name: str, tmp_path: Path) -> None:
    create, guidance = CASES[name]
    made = create(tmp_path)
    everything = sample(made, guidance, SparseConfig(steps=STEPS, block_size=16, sparsity=0))
    assert relative_error(everything.latents, made[3]) <= 1e-4
    sparse = sample(made, guidance, SparseConfig(steps=STEPS, block_size=16, sparsity=0.5))
    assert len(sparse.reports) == (2 if "A14B" in name else 1)
    blocks, budget = sparse.layout.num_blocks, sparse.config.budget(sparse.layout)
    for report in sparse.reports:
        assert report.density == pytest.approx(budget.base / blocks)
    assert 1e-4 < relative_error(sparse.latents, made[3]) < 0.5


def test_one_search_serves_both_branches(tmp_path: Path) -> None:
    create, guidance = CASES["Wan 2.1"]
    made = create(tmp_path)
    config = SparseConfig(steps=STEPS, block_size=16, sparsity=0.5, share_cfg_indices=True)
    shared = sample(made, guidance, config)
    assert {state.indices.shape[1] for state in shared.states[0]} == {1}
    own = sample(made, guidance, SparseConfig(steps=STEPS, block_size=16, sparsity=0.5))
    np.testing.assert_array_equal(own.states[0][0].indices.shape[1], 2)
    assert 0 < relative_error(shared.latents, own.latents) < 0.3
    zero = sample(made, guidance, SparseConfig(steps=STEPS, block_size=16, sparsity=0, share_cfg_indices=True))
    assert relative_error(zero.latents, made[3]) <= 1e-4


def test_an_expert_searches_in_its_first_sparse_step() -> None:
    times = np.array([999.0, 950, 900, 870, 500, 100])
    config = SparseConfig(steps=6, search_steps=(2, 5))
    one, two = split_steps(times, 875, config.step_kinds())
    assert (one.first, two.first, one.expert, two.expert) == (0, 3, 0, 1)
    assert one.kinds.tolist() == [StepKind.DENSE, StepKind.FUSED_SEARCH, StepKind.SPARSE]
    assert two.kinds.tolist() == [StepKind.FUSED_SEARCH, StepKind.CACHED_SEARCH, StepKind.SPARSE]
    (alone,) = split_steps(times, None, config.step_kinds())
    np.testing.assert_array_equal(alone.kinds, config.step_kinds())


BAD = {
    "size": ({"size": VideoSize(10, 48, 80)}, {}, r"\(10, 48, 80\) is not one, the nearest is \(9, 48, 80\)"),
    "width": ({"size": VideoSize(9, 48, 90)}, {}, r"nearest is \(9, 48, 96\)"),
    "no negative": ({}, {"negative_prompt_embeds": None}, "lack negative_prompt_embeds.*guidance of 1"),
    "wrong width": ({}, {"prompt_embeds": np.zeros((1, 11, 23), np.float32)}, r"prompt_embeds must be \[1, T, 24\]"),
    "wrong length": (
        {},
        {"negative_prompt_embeds": np.zeros((1, 9, 24), np.float32)},
        "must have the shape of the positive",
    ),
    "dynamic": ({"guidance": Guidance(4.0, dynamic=True)}, {}, "dynamic guidance is CogVideoX's"),
    "true CFG": ({"guidance": Guidance(4.0, true_cfg=2.0)}, {}, "embeds no guidance"),
}


@pytest.fixture(scope="module")
def tiny_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan")
    transformer = reference(diffusers.WanTransformer3DModel, test_wan.SMALL)
    save(folder, diffusers.WanPipeline(None, None, None, unipc(), transformer))
    return folder


def test_what_cannot_be_served_is_found_before_the_run(tiny_wan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any, **options: Any) -> None:
        raise NotImplementedError("int8 is not served here")

    monkeypatch.setattr(video, "resolve_score_precision", refuse)
    pipeline, config = VideoPipeline.load(tiny_wan), dataclasses.replace(CONFIG, score_precision="int8")
    dense = pipeline.sample(embeddings_of(11, 24), config, size=SIZE, dense=True)
    assert dense.score_precision == "input"
    monkeypatch.setattr(VideoPipeline, "compile", lambda *given, **options: pytest.fail("it is compiled first"))
    with pytest.raises(NotImplementedError, match="int8 is not served here"):
        pipeline.sample(embeddings_of(11, 24), config, size=SIZE)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str, tiny_wan: Path) -> None:
    options, changes, message = BAD[case]
    embeddings = embeddings_of(11, 24) | changes
    embeddings = {name: x for name, x in embeddings.items() if x is not None}
    with pytest.raises(ValueError, match=message):
        VideoPipeline.load(tiny_wan).sample(embeddings, CONFIG, **({"size": SIZE} | options))


def test_two_experts_need_both_folders(tiny_wan: Path, tmp_path: Path) -> None:
    (tmp_path / "transformer").symlink_to(tiny_wan / "transformer")
    (tmp_path / "model_index.json").write_text(json.dumps({"boundary_ratio": 0.875}))
    with pytest.raises(ValueError, match="transformer_2/ is missing"):
        VideoPipeline.load(tmp_path)
