"""What is checked before a run: guidance as in diffusers, embeddings, noise, sizes. No weights, nothing compiled."""

import functools
from typing import Any

import flax.nnx as nnx
import numpy as np
import pytest

from adaspa_jax import SparseConfig
from models.pipeline.families import VideoSize, family_of
from models.pipeline.guidance import Guidance
from models.pipeline.plan import Plan
from models.pipeline.video import VideoPipeline
from models.schedulers import CogVideoXDDIM, FlowMatchEuler
from models.transformers.cogvideox import CogVideoXConfig, CogVideoXTransformer
from models.transformers.hunyuan_video import HunyuanVideoConfig, HunyuanVideoTransformer
from models.transformers.wan import WanConfig, WanTransformer
from tests.models.transformers import test_cogvideox, test_hunyuan_video, test_wan

SIZE, STEPS = VideoSize(9, 48, 80), 4
FLF = {"in_channels": 12, "image_dim": 6, "added_kv_proj_dim": 128, "pos_embed_seq_len": 10}
MODELS: dict[str, Any] = {
    "Wan": (WanTransformer, WanConfig, test_wan.SMALL),
    "Wan, two frames": (WanTransformer, WanConfig, test_wan.SMALL | FLF),
    "CogVideoX": (CogVideoXTransformer, CogVideoXConfig, test_cogvideox.VARIANTS["1.5 T2V"]),
    "HunyuanVideo": (HunyuanVideoTransformer, HunyuanVideoConfig, test_hunyuan_video.SMALL),
    "HunyuanVideo I2V": (HunyuanVideoTransformer, HunyuanVideoConfig, test_hunyuan_video.VARIANTS["I2V, latents"]),
}


@functools.cache
def abstract(name: str) -> Any:
    create, config, sizes = MODELS[name]
    return nnx.eval_shape(lambda: create(config.from_dict(sizes), rngs=nnx.Rngs(0)))


def pipeline(name: str, index: dict[str, Any] | None = None) -> VideoPipeline:
    model = abstract(name)
    family = family_of(model, index)
    scheduler = CogVideoXDDIM() if name == "CogVideoX" else FlowMatchEuler(3.0)
    boundary = None if index is None else 1000 * index["boundary_ratio"]
    return VideoPipeline((model, model)[: 1 if index is None else 2], scheduler, family, boundary)


def embeddings(name: str, prompts: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal((prompts, *shape)).astype(np.float32)
    found = {}
    for prefix in ("", "negative_"):
        found[prefix + "prompt_embeds"] = draw(11, 24)
        if "Hunyuan" in name:
            found[prefix + "prompt_attention_mask"] = np.ones((prompts, 11), np.int32)
            found[prefix + "pooled_prompt_embeds"] = draw(16)
    if name == "Wan, two frames":
        found |= {"condition": draw(8, 3, 6, 10), "image_embeds": draw(2, 5, 6)}
    if name == "HunyuanVideo I2V":
        found["condition"] = draw(5, 3, 6, 10)
    return found


def plan(name: str, given: Any = None, guidance: Guidance | None = None, index: Any = None, **options: Any) -> Plan:
    options = {"size": SIZE} | options
    config = SparseConfig(steps=STEPS, block_size=16)
    return pipeline(name, index).plan(given or embeddings(name), config, guidance=guidance, **options)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["Wan", "CogVideoX", "HunyuanVideo"])
def test_guidance_is_off_at_1_and_below(name: str, scale: float) -> None:
    guidance = Guidance(true_cfg=scale) if name == "HunyuanVideo" else Guidance(scale)
    given = {n: x for n, x in embeddings(name).items() if not n.startswith("negative_")}
    found = plan(name, given, guidance)
    assert not found.guided
    assert len(found.given["prompt_embeds"]) == 1


def test_guidance_of_two_experts_is_that_of_diffusers() -> None:
    index = {"boundary_ratio": 0.9}
    table = lambda *scales: plan("Wan", guidance=Guidance(*scales), index=index).tables["guidance"].tolist()
    high = int((FlowMatchEuler(3.0).tables(STEPS)["timestep"] >= 900).sum())
    assert 0 < high < STEPS
    assert table(4.0, 3.0) == [4.0] * high + [3.0] * (STEPS - high)
    assert table(4.0) == [4.0] * STEPS  # guidance_scale_2=None
    assert table(3.5, 1.0) == [3.5] * high + [1.0] * (STEPS - high)
    assert table(3.5, 0.5) == [3.5] * high + [0.5] * (STEPS - high)
    assert not plan("Wan", guidance=Guidance(1.0), index=index).guided
    assert not plan("Wan", guidance=Guidance(1.0, 1.0), index=index).guided


IDLE = {
    "a second scale that the first turns off": (
        "Wan",
        Guidance(1.0, 3.0),
        {"boundary_ratio": 0.9},
        "turns guidance off",
    ),
    "a dynamic scale that is off": ("CogVideoX", Guidance(1.0, dynamic=True), None, "turns guidance off"),
    "a second scale, one expert": ("Wan", Guidance(4.0, 3.0), None, "has one expert"),
    "true CFG": ("CogVideoX", Guidance(true_cfg=2.0), None, "embeds no guidance"),
}


@pytest.mark.parametrize("case", IDLE)
def test_guidance_without_effect_is_refused(case: str) -> None:
    name, guidance, index, message = IDLE[case]
    with pytest.raises(ValueError, match=message):
        plan(name, guidance=guidance, index=index)


ALL_ENTRIES = [(name, entry) for name in MODELS for entry in embeddings(name)]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(("name", "entry"), ALL_ENTRIES)
def test_numbers_that_are_not_finite_are_refused_wherever_they_are(name: str, entry: str, value: float) -> None:
    given = embeddings(name)
    given[entry] = given[entry].astype(np.float32)
    given[entry].flat[-1] = value
    with pytest.raises(ValueError, match=f"^{entry} has NaN or infinite values"):
        plan(name, given, Guidance(true_cfg=2.0) if "Hunyuan" in name else None)


def test_what_overflows_float32_is_not_finite() -> None:
    with pytest.raises(ValueError, match="prompt_embeds has NaN or infinite"):
        plan("Wan", embeddings("Wan") | {"prompt_embeds": np.full((1, 11, 24), 1e300)})


@pytest.mark.parametrize("entry", ["prompt_attention_mask", "negative_prompt_attention_mask"])
def test_masks_need_a_token_for_every_prompt(entry: str) -> None:
    given = embeddings("HunyuanVideo", 2)
    given[entry][1] = 0
    with pytest.raises(ValueError, match=f"^{entry} has no token for prompt 2"):
        plan("HunyuanVideo", given, Guidance(true_cfg=2.0))
    given[entry][1, 0] = 7
    with pytest.raises(ValueError, match="1 for real tokens and 0 for padding"):
        plan("HunyuanVideo", given, Guidance(true_cfg=2.0))


MISFITS = {
    "no prompts": (
        "Wan",
        {n: x[:0] for n, x in embeddings("Wan").items()},
        r"prompt_embeds must be \[prompts, T, 24\]",
    ),
    "no tokens": ("Wan", {n: x[:, :0] for n, x in embeddings("Wan").items()}, r"got \[1, 0, 24\]"),
    "a number": ("Wan", {"prompt_embeds": np.float32(1)}, r"got \[\]"),
    "another model's": (
        "Wan",
        {"pooled_prompt_embeds": np.ones((1, 16))},
        "takes no pooled_prompt_embeds, but prompt_em",
    ),
    "an image": ("Wan", {"condition": np.ones((1, 4, 1, 6, 10))}, "this model takes no condition"),
    "one frame": ("Wan, two frames", {"image_embeds": np.ones((1, 5, 6))}, r"image_embeds must be \[1, 2, 5, 6\]"),
    "two pairs": ("Wan, two frames", {"image_embeds": np.ones((4, 5, 6))}, r"image_embeds must be \[1, 2, 5, 6\]"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_embeddings_that_do_not_fit_are_refused(case: str) -> None:
    name, changes, message = MISFITS[case]
    with pytest.raises(ValueError, match=message):
        plan(name, embeddings(name) | changes)


@pytest.mark.parametrize("prompts", [1, 2])
def test_first_and_last_frame_come_in_three_forms(prompts: int) -> None:
    given = embeddings("Wan, two frames", prompts)
    image = given["image_embeds"]
    for form in (image, image.reshape(-1, 5, 6), image.reshape(prompts, 10, 6)):
        found = plan("Wan, two frames", given | {"image_embeds": form}).given["image_embeds"]
        np.testing.assert_array_equal(found, np.concatenate([image, image]))  # both branches of guidance


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_a_video_that_would_show_no_frame_is_refused(frames: int) -> None:
    with pytest.raises(ValueError, match=r"first 4, of the image, are not shown.*nearest is \(5, 48, 80\)"):
        plan("HunyuanVideo I2V", size=VideoSize(frames, 48, 80))


def test_float64_embeddings_are_float32_and_masks_int32() -> None:
    given = {n: x.astype(np.float64) for n, x in embeddings("HunyuanVideo").items()}
    found = plan("HunyuanVideo", given).given
    assert {n: str(x.dtype) for n, x in found.items()} == {
        "prompt_embeds": "float32",
        "prompt_attention_mask": "int32",
        "pooled_prompt_embeds": "float32",
    }


BAD: dict[str, Any] = {
    "frames": lambda: VideoSize(0, 16, 16),
    "height": lambda: VideoSize(1, -16, 16),
    "width": lambda: VideoSize(1, 16, 16.0),  # type: ignore[arg-type]
    "frames=True": lambda: VideoSize(True, 16, 16),
    "seed": lambda: plan("Wan", seed=-1),
    "dense_layers": lambda: pipeline("Wan").plan(embeddings("Wan"), SparseConfig(dense_layers=(2,)), size=SIZE),
    "steps": lambda: pipeline("CogVideoX").plan(embeddings("CogVideoX"), SparseConfig(steps=1001), size=SIZE),
}


@pytest.mark.parametrize("message", BAD)
def test_numbers_are_checked(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BAD[message]()


def test_noise_is_checked_before_anything_compiles() -> None:
    run = lambda noise: pipeline("Wan").sample(
        embeddings("Wan"), SparseConfig(steps=1, block_size=16), size=SIZE, noise=noise
    )
    noise = np.zeros((1, 4, 3, 6, 10), np.float32)
    with pytest.raises(ValueError, match=r"noise must be \[1, 4, 3, 6, 10\]"):
        run(noise[:, :3])
    noise[0, 0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="noise has NaN or infinite values"):
        run(noise)
