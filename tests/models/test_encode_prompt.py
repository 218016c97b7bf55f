"""Encoders through diffusers, tiny and random: prompts and images into files, and image to video from them."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from models import encode_prompt
from models.checkpoint.safetensors_folder import CheckpointError
from models.pipeline.embeddings import read_embeddings, read_prompts
from models.pipeline.video import Guidance, VideoPipeline
from tests.matrix import only
from tests.models.pipeline.test_video import (
    COGVIDEOX,
    CONFIG,
    SIZE,
    embeddings_of,
    noise_of,
    run,
    save,
    tensors,
    unipc,
)
from tests.models.transformers import test_cogvideox, test_hunyuan_video, test_wan
from tests.models.transformers.ports import reference
from tests.models.vae.test_vae import TINY
from tests.relative_error import relative_error

COG_VAE = {
    "down_block_types": ("CogVideoXDownBlock3D",) * 4,
    "up_block_types": ("CogVideoXUpBlock3D",) * 4,
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "latent_channels": 4,
}
WORDS = ["<pad>", "</s>", "<unk>", "a", "cat", "on", "roof", "dog"]


def vae(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    if name == "cogvideox":
        return diffusers.AutoencoderKLCogVideoX(**COG_VAE, **changes).eval()
    create, options = TINY[name]
    return create(**(options | changes)).eval()


def picture() -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 256, (SIZE.height, SIZE.width, 3), np.uint8)
    return Image.fromarray(pixels)


def clip_vision() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 20, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3}
    config = transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=16)
    return transformers.CLIPVisionModel(config).eval()


def wan_i2v(two: bool, tokens: bool) -> tuple[Any, dict[str, Any], int, int]:
    options = test_wan.SMALL | ({} if tokens else {"in_channels": 12})
    image: dict[str, Any] = {}
    if not two and not tokens:  # 2.1
        options |= {"image_dim": 20, "added_kv_proj_dim": 128}
        processor = transformers.CLIPImageProcessorPil(
            size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32}
        )
        image = {"image_encoder": clip_vision(), "image_processor": processor}
    transformer = reference(diffusers.WanTransformer3DModel, options)
    index = {"expand_timesteps": True} if tokens else {"boundary_ratio": 0.9} if two else {}
    second = transformer if two else None
    pipe = diffusers.WanImageToVideoPipeline(
        None, None, vae("wan2.1"), unipc(), transformer=transformer, transformer_2=second, **image, **index
    )
    return pipe, index, 512, 4


def hunyuan_i2v(kind: str) -> tuple[Any, dict[str, Any], int, int]:
    names = {"latent_concat": "I2V, latents", "token_replace": "I2V, tokens"}
    transformer = reference(diffusers.HunyuanVideoTransformer3DModel, test_hunyuan_video.VARIANTS[names[kind]])
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    parts = (None, None, transformer, vae("hunyuan"), scheduler, None, None, None)
    return diffusers.HunyuanVideoImageToVideoPipeline(*parts), {}, 11, 4


def cogvideox_i2v() -> tuple[Any, dict[str, Any], int, int]:
    transformer = reference(diffusers.CogVideoXTransformer3DModel, test_cogvideox.VARIANTS["1.5 I2V"])
    scheduler = diffusers.CogVideoXDDIMScheduler(**COGVIDEOX)
    pipe = diffusers.CogVideoXImageToVideoPipeline(
        None, None, vae("cogvideox", invert_scale_latents=True), transformer, scheduler
    )
    return pipe, {}, 11, 4


CASES: dict[str, Any] = {
    "Wan 2.1 I2V": lambda: wan_i2v(two=False, tokens=False),
    "Wan 2.2 I2V A14B": lambda: wan_i2v(two=True, tokens=False),
    "Wan 2.2 TI2V": lambda: wan_i2v(two=False, tokens=True),
    "HunyuanVideo I2V, latents": lambda: hunyuan_i2v("latent_concat"),
    "HunyuanVideo I2V, first frame": lambda: hunyuan_i2v("token_replace"),
    "CogVideoX1.5 I2V": cogvideox_i2v,
}


@pytest.mark.parametrize("name", only({"HunyuanVideo I2V, latents", "Wan 2.1 I2V", "CogVideoX1.5 I2V"}, CASES))
def test_an_image_becomes_the_video_that_diffusers_makes(name: str, tmp_path: Path) -> None:
    pipe, index, text, channels = CASES[name]()
    save(tmp_path, pipe, **index)
    config = pipe.transformer.config
    embeddings = embeddings_of(text, 24)
    guidance = Guidance(4.0)
    if "Hunyuan" in name:
        mask = {"prompt_attention_mask": np.ones((1, text), np.int32)}
        pooled = {"pooled_prompt_embeds": np.ones((1, 16), np.float32)}
        embeddings = {"prompt_embeds": embeddings["prompt_embeds"]} | mask | pooled
    frames = 4 if "CogVideoX" in name else 3
    noise = noise_of(channels, frames)
    theirs = noise.swapaxes(1, 2).copy() if "CogVideoX" in name else noise
    # The seed of `encode_image`: CogVideoX samples the image's latents.
    options: dict[str, Any] = {"guidance_scale": 4.0, "generator": torch.Generator().manual_seed(0)}
    expected = run(pipe, theirs, image=picture(), **tensors(embeddings), **options)
    expected = expected.swapaxes(1, 2)[:, :, 1:] if "CogVideoX" in name else expected

    pipe.register_modules(transformer=None)
    pipe.transformer = SimpleNamespace(config=SimpleNamespace(**config))
    with torch.no_grad():
        embeddings |= encode_prompt.encode_image(pipe, picture(), 1, SIZE)
    ours = VideoPipeline.load(tmp_path, dtype="float32")
    got = ours.sample(embeddings, CONFIG, size=SIZE, guidance=guidance, noise=noise, dense=True).latents
    shown = slice(ours.family.skip_frames // 4, None)
    assert relative_error(got[:, :, shown], expected) <= 1e-4
    sparse = ours.sample(
        embeddings, dataclasses.replace(CONFIG, sparsity=0.0), size=SIZE, guidance=guidance, noise=noise
    )
    assert relative_error(sparse.latents[:, :, shown], expected) <= 1e-4


def tokenizer() -> Any:
    raw = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def t5(cls: Any, config: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": len(WORDS)}
    return cls(config(**sizes)).eval()


def text_pipeline(name: str) -> Any:
    if name == "wan":
        transformer = reference(diffusers.WanTransformer3DModel, test_wan.SMALL)
        encoder = t5(transformers.UMT5EncoderModel, transformers.UMT5Config)
        return diffusers.WanPipeline(tokenizer(), encoder, None, unipc(), transformer)
    if name == "cogvideox":
        transformer = reference(diffusers.CogVideoXTransformer3DModel, test_cogvideox.V15)
        encoder = t5(transformers.T5EncoderModel, transformers.T5Config)
        scheduler = diffusers.CogVideoXDDIMScheduler(**COGVIDEOX)
        return diffusers.CogVideoXPipeline(tokenizer(), encoder, None, transformer, scheduler)
    transformer = reference(diffusers.HunyuanVideoTransformer3DModel, test_hunyuan_video.SMALL)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": len(WORDS)}
    torch.manual_seed(0)
    llama = transformers.LlamaModel(transformers.LlamaConfig(**sizes, num_hidden_layers=3, pad_token_id=0)).eval()
    clip_sizes = sizes | {"hidden_size": 16, "num_hidden_layers": 1, "eos_token_id": 1, "pad_token_id": 0}
    clip = transformers.CLIPTextModel(transformers.CLIPTextConfig(**clip_sizes)).eval()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    return diffusers.HunyuanVideoPipeline(llama, tokenizer(), transformer, None, scheduler, clip, tokenizer())


PROMPTS = ["a cat on a roof", "a dog"]


@pytest.mark.parametrize("name", only({"hunyuan", "wan"}, ("wan", "cogvideox", "hunyuan")))
def test_a_file_of_prompts_holds_what_the_pipeline_encodes(name: str, tmp_path: Path) -> None:
    pipe = text_pipeline(name)
    pipe.save_pretrained(tmp_path / "pipe")
    negative = None if name == "hunyuan" else "a dog on a dog"
    found = encode_prompt.encode(tmp_path / "pipe", PROMPTS, negative, None, (None, None, None), "float32")
    with torch.no_grad():
        if name == "hunyuan":
            embeds, pooled, mask = pipe.encode_prompt(PROMPTS, max_sequence_length=256)
            right = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "prompt_attention_mask": mask}
        else:
            tokens = 512 if name == "wan" else 11
            pair = pipe.encode_prompt(PROMPTS, ["a dog on a dog"] * 2, max_sequence_length=tokens)
            right = dict(zip(("prompt_embeds", "negative_prompt_embeds"), pair, strict=True))
    assert set(found) == set(right)
    for key, value in right.items():
        np.testing.assert_allclose(found[key], value.float().numpy(), rtol=1e-6, atol=1e-6)
    assert found["prompt_embeds"].std() > 1e-3
    VideoPipeline.load(tmp_path / "pipe").sample(found, CONFIG, size=SIZE)


def test_the_command_writes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text_pipeline("wan").save_pretrained(tmp_path / "pipe")
    out = tmp_path / "prompts.safetensors"
    encode_prompt.main(tmp_path / "pipe", PROMPTS, dtype="float32", out=out)
    assert read_prompts(out, 2) == PROMPTS
    assert {name: x.shape for name, x in read_embeddings(out).items()} == {
        "prompt_embeds": (2, 512, 24),
        "negative_prompt_embeds": (2, 512, 24),
    }
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_bad_input_is_named(tmp_path: Path) -> None:
    load = encode_prompt.load_encoders
    with pytest.raises(CheckpointError, match=r"no model_index\.json"):
        load(tmp_path, image=False)
    for name, image, message in (
        ("FluxPipeline", False, "'FluxPipeline' is not supported; supported: HunyuanVideoPipeline"),
        ("WanPipeline", True, "takes no --image"),
        ("HunyuanVideoImageToVideoPipeline", False, "sees the image; give --image"),
    ):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path, image=image)
    for options, message in (
        ({"dtype": "int8"}, "--dtype int8"),
        ({"out": tmp_path / "no" / "file"}, "its folder does not exist"),
        ({"image": tmp_path / "no.png"}, "no.png does not exist"),
        ({"height": 480}, "go with --image"),
    ):
        with pytest.raises(ValueError, match=message):
            encode_prompt.main(tmp_path, PROMPTS, **options)
