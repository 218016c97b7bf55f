"""Runs that must be bit for bit alike, and the two that diffusers is compared with besides those of test_video.py."""

from pathlib import Path
from typing import Any

import diffusers
import flax.nnx as nnx
import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from adaspa_jax import SparseConfig
from models import encode_prompt
from models.pipeline.families import VideoSize, family_of
from models.pipeline.guidance import Guidance
from models.pipeline.video import VideoPipeline
from models.schedulers import AnyScheduler, CogVideoXDPM, UniPC
from models.transformers.wan import WanConfig, WanTransformer
from tests.models.pipeline.test_video import embeddings_of, save, unipc
from tests.models.test_encode_prompt import clip_vision, vae
from tests.models.transformers import test_wan
from tests.models.transformers.ports import reference
from tests.relative_error import relative_error

SIZE, STEPS = VideoSize(5, 32, 32), 2
SIDES = {"height": 32, "width": 32}
TINY = test_wan.SMALL | {"num_layers": 1}


@pytest.fixture(scope="module")
def model() -> WanTransformer:
    return WanTransformer(WanConfig.from_dict(TINY), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("scheduler", "dense"), [(UniPC(3.0), False), (CogVideoXDPM(), True)])
def test_x64_changes_no_bit(scheduler: AnyScheduler, dense: bool, model: WanTransformer) -> None:
    pipeline = VideoPipeline((model,), scheduler, family_of(model))
    embeddings = {name: x.astype(np.float64) for name, x in embeddings_of(4, 24).items()}
    config = SparseConfig(steps=3, block_size=16)
    run = lambda: pipeline.sample(embeddings, config, size=SIZE, seed=2**40 + 7, dense=dense).latents
    plain = run()
    with jax.enable_x64(True):
        wide = run()
    assert wide.dtype == np.float32
    np.testing.assert_array_equal(plain, wide)


def test_guidance_0_is_that_of_diffusers(tmp_path: Path) -> None:
    pipe = diffusers.WanPipeline(None, None, None, unipc(), reference(diffusers.WanTransformer3DModel, TINY))
    pipe.set_progress_bar_config(disable=True)
    save(tmp_path, pipe)
    embeddings, noise = embeddings_of(4, 24), np.random.default_rng(1).standard_normal((1, 4, 2, 4, 4), np.float32)
    given = {name: torch.from_numpy(x) for name, x in embeddings.items()}
    sizes = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": STEPS, "output_type": "latent"}
    expected = pipe(**given, **sizes, latents=torch.from_numpy(noise), guidance_scale=0.0, return_dict=False)[0].numpy()
    options = {"size": SIZE, "guidance": Guidance(0.0), "noise": noise, "dense": True}
    config = SparseConfig(steps=STEPS, block_size=16)
    found = VideoPipeline.load(tmp_path, "float32").sample(embeddings, config, **options)
    assert relative_error(found.latents, expected) <= 1e-5


def first_and_last(version: str) -> Any:
    """Wan 2.1 sees the two frames through CLIP too, 2.2, with two experts, in the latents alone."""
    options: dict[str, Any] = TINY | {"in_channels": 12}
    if version == "2.2":
        transformer = reference(diffusers.WanTransformer3DModel, options)
        parts = {"transformer": transformer, "transformer_2": transformer, "boundary_ratio": 0.9}
    else:
        options |= {"image_dim": 20, "added_kv_proj_dim": 128, "pos_embed_seq_len": 10}
        processor = transformers.CLIPImageProcessorPil(size=SIDES, crop_size=SIDES)
        transformer = reference(diffusers.WanTransformer3DModel, options)
        parts = {"transformer": transformer, "image_encoder": clip_vision(), "image_processor": processor}
    pipe = diffusers.WanImageToVideoPipeline(None, None, vae("wan2.1"), unipc(), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("version", ["2.1", "2.2"])
def test_first_and_last_frame_make_the_video_of_diffusers(version: str, tmp_path: Path) -> None:
    pipe = first_and_last(version)
    save(tmp_path, pipe, **({"boundary_ratio": 0.9} if version == "2.2" else {}))
    rng = np.random.default_rng(3)
    first, last = (Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(2))
    # 512 text tokens: diffusers counts on them to find the image's.
    embeddings, noise = embeddings_of(512, 24), rng.standard_normal((1, 4, 2, 4, 4), np.float32)
    given = {name: torch.from_numpy(x) for name, x in embeddings.items()}
    sizes = {"num_frames": 5, **SIDES}
    run = {"num_inference_steps": STEPS, "output_type": "latent", "return_dict": False, "guidance_scale": 4.0}
    expected = pipe(first, last_image=last, **given, **sizes, **run, latents=torch.from_numpy(noise))[0].numpy()

    with torch.no_grad():
        embeddings |= encode_prompt.encode_image(pipe, first, 1, SIZE, last)
        two = encode_prompt.encode_image(pipe, first, 2, SIZE, last)
    for name, value in two.items():
        np.testing.assert_array_equal(value, np.concatenate([embeddings[name]] * 2))
    how = {"size": SIZE, "guidance": Guidance(4.0), "noise": noise, "dense": True}
    found = VideoPipeline.load(tmp_path, "float32").sample(embeddings, SparseConfig(steps=STEPS, block_size=16), **how)
    assert relative_error(found.latents, expected) <= 1e-4
