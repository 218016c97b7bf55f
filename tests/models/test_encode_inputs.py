"""What goes into `encode_prompt`: pictures as diffusers loads them, sizes, folders of all kinds, any locale's text."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.utils import load_image
from flax import nnx
from PIL import Image
from safetensors.torch import load_file

from models import encode_prompt
from models.checkpoint.safetensors_folder import CheckpointError
from models.commands import encoders
from models.pipeline.embeddings import read_embeddings, read_prompts
from models.pipeline.families import family_of
from models.transformers.hunyuan_video import HunyuanVideoConfig, HunyuanVideoTransformer
from models.transformers.wan import WanConfig, WanTransformer
from tests.models.test_encode_prompt import SIZE, picture, t5, text_pipeline, tokenizer, unipc, wan_i2v
from tests.models.transformers import test_hunyuan_video, test_wan

ROOT = Path(encode_prompt.__file__).parents[1]
ORIENTATION = 0x0112


def pixels(mode: str) -> Image.Image:
    numbers = np.random.default_rng(0).integers(0, 256, (6, 9, 4), np.uint8)
    image = Image.fromarray(numbers, "RGBA")
    if mode == "I;16":
        return Image.fromarray(numbers[..., 0].astype(np.uint16) * 200)
    if mode == "P, transparent":
        image = image.convert("RGB").quantize(16)
        image.info["transparency"] = 3
        return image
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


@pytest.mark.parametrize("orientation", range(9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "webp"])
def test_photos_are_turned_as_diffusers_turns_them(orientation: int, suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    pixels("RGB").save(tmp_path / f"x.{suffix}", exif=exif)
    found = encoders.read_picture(tmp_path / f"x.{suffix}")
    assert found.mode == "RGB"
    np.testing.assert_array_equal(found, load_image(str(tmp_path / f"x.{suffix}")))
    assert found.size == ((6, 9) if orientation >= 5 else (9, 6))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "P, transparent", "RGBA", "I;16"])
def test_pictures_of_any_mode_become_rgb_as_in_diffusers(mode: str, tmp_path: Path) -> None:
    pixels(mode).save(tmp_path / "x.png")
    found = encoders.read_picture(tmp_path / "x.png")
    assert found.mode == "RGB"
    np.testing.assert_array_equal(found, load_image(str(tmp_path / "x.png")))


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", "torn", "huge"])
def test_what_is_no_picture_is_refused_before_encoders_load(
    content: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.png"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        pixels("RGB").resize((200, 200)).save(file)
    if content == "torn":
        file.write_bytes(file.read_bytes()[:200])
    if content == "huge":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr(encode_prompt, "load_encoders", None)
    with pytest.raises(ValueError, match=r"--image .*x\.png cannot be read as a picture"):
        encode_prompt.encode(tmp_path, ["a cat"], None, file, (None, None, None), "float32")


@pytest.fixture(scope="module")
def image_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(Wan 2.1's image to video with all its parts, its folder, in which is cat.png)."""
    parts, *_ = wan_i2v(two=False, tokens=False)
    encoder = t5(transformers.UMT5EncoderModel, transformers.UMT5Config)
    named = {"image_encoder": parts.image_encoder, "image_processor": parts.image_processor}
    pipe = diffusers.WanImageToVideoPipeline(
        tokenizer(), encoder, parts.vae, unipc(), transformer=parts.transformer, **named
    )
    folder = tmp_path_factory.mktemp("i2v")
    pipe.save_pretrained(folder)
    picture().save(folder / "cat.png")
    return pipe, folder


def encode(folder: Path, image: Path, dtype: str = "float32") -> Any:
    return encode_prompt.encode(folder, ["a cat"], None, image, (SIZE.frames, SIZE.height, SIZE.width), dtype)


def test_pictures_are_encoded_in_float32_whatever_the_text_encoders_are(image_pipeline: Any) -> None:
    _, folder = image_pipeline
    pipe = encode_prompt.load_encoders(folder, image=True, dtype="bfloat16")
    dtypes = {name: getattr(pipe, name).dtype for name in ("text_encoder", "vae", "image_encoder")}
    assert dtypes == {"text_encoder": torch.bfloat16, "vae": torch.float32, "image_encoder": torch.float32}
    low, exact = (encode(folder, folder / "cat.png", dtype) for dtype in ("bfloat16", "float32"))
    for name in ("condition", "image_embeds"):
        np.testing.assert_array_equal(low[name], exact[name])
    assert not np.array_equal(low["prompt_embeds"], exact["prompt_embeds"])


def as_bin(folder: Path) -> None:
    for file in folder.glob("*/*model.safetensors"):
        name = "diffusion_pytorch_model" if file.name.startswith("diffusion") else "pytorch_model"
        torch.save(load_file(file), file.with_name(f"{name}.bin"))
        file.unlink()


@pytest.mark.parametrize("kind", ["variant", "shards of a variant", "bin"])
def test_folders_that_save_pretrained_writes(kind: str, image_pipeline: Any, tmp_path: Path) -> None:
    pipe, folder = image_pipeline
    options = {"variant": {"variant": "fp16"}, "shards of a variant": {"variant": "fp16", "max_shard_size": "20KB"}}
    pipe.save_pretrained(tmp_path, **options.get(kind, {}))
    if kind == "bin":
        as_bin(tmp_path)
    expected, found = (encode(path, folder / "cat.png") for path in (folder, tmp_path))
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected[name])


def test_lost_weights_of_an_encoder_are_named(tmp_path: Path) -> None:
    text_pipeline("wan").save_pretrained(tmp_path, max_shard_size="2KB")
    (tmp_path / "text_encoder" / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"index that lists them is missing; download model\.safetensors\.index"):
        encode_prompt.load_encoders(tmp_path, image=False)
    for file in (tmp_path / "text_encoder").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match="text_encoder holds no weights; download it again"):
        encode_prompt.load_encoders(tmp_path, image=False)


def test_the_pipeline_of_a_distilled_model_is_wans(tmp_path: Path) -> None:
    text_pipeline("wan").save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text(encoding="utf-8"))
    size = (None, None, None)
    expected = encode_prompt.encode(tmp_path, ["a cat"], None, None, size, "float32")
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": "WanDMDPipeline"}), encoding="utf-8")
    found = encode_prompt.encode(tmp_path, ["a cat"], None, None, size, "float32")
    np.testing.assert_array_equal(found["prompt_embeds"], expected["prompt_embeds"])


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((0, None, None), "0"),
        ((-3, None, None), "-3"),
        ((None, 0, None), "0"),
        ((None, None, -16), "-16"),
        ((10, None, None), r"1 \+ 4n frames"),
        ((None, 41, None), "steps of 16"),
        ((None, None, 1 << 40), None),
        ((9.0, None, None), "9.0"),
        ((float("nan"), None, None), "nan"),
    ],
)
def test_sizes_are_checked_before_anything_is_loaded(
    size: Any, message: str | None, image_pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = image_pipeline
    monkeypatch.setattr(encode_prompt, "load_encoders", lambda *a, **k: SimpleNamespace(fail=1 / 0))
    with pytest.raises(ValueError if message else ZeroDivisionError, match=message):
        encode_prompt.encode(folder, ["a cat"], None, folder / "cat.png", size, "float32")


NO_PLACE = "no place for a --last-image; leave it out"
NEEDED = "made for a first and a last frame; give --last-image too"
WAN = test_wan.SMALL | {"in_channels": 12}
CLIP = {"image_dim": 20, "added_kv_proj_dim": 128}
TWO = CLIP | {"pos_embed_seq_len": 10}
HUNYUAN = test_hunyuan_video.VARIANTS["I2V, latents"]
MODELS = {WanConfig: WanTransformer, HunyuanVideoConfig: HunyuanVideoTransformer}


@pytest.mark.parametrize(
    ("config", "options", "index", "given", "message"),
    [
        (WanConfig, WAN | CLIP, {}, True, "this Wan 2.1 I2V has " + NO_PLACE),
        (WanConfig, WAN | CLIP, {}, False, None),
        (WanConfig, WAN | TWO, {}, False, NEEDED),
        (WanConfig, WAN | TWO, {}, True, None),
        (WanConfig, WAN, {"boundary_ratio": 0.9}, True, None),
        (WanConfig, WAN, {"boundary_ratio": 0.9}, False, None),
        (WanConfig, test_wan.SMALL, {}, True, "this Wan 2.1 has " + NO_PLACE),
        (WanConfig, test_wan.SMALL, {"expand_timesteps": True}, True, "this Wan 2.2 TI2V has " + NO_PLACE),
        (HunyuanVideoConfig, HUNYUAN, {}, True, "this HunyuanVideo I2V has " + NO_PLACE),
    ],
)
def test_a_last_picture_is_for_models_that_have_a_place_for_it(
    config: Any, options: Any, index: Any, given: bool, message: str | None
) -> None:
    model = nnx.eval_shape(lambda: MODELS[config](config.from_dict(options), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=re.escape(message)) if message else contextlib.nullcontext():
        encoders.check_last_image(family_of(model, index), model, given)


def test_a_last_picture_is_checked_before_anything_is_loaded(
    image_pipeline: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, folder = image_pipeline
    monkeypatch.setattr(diffusers.WanImageToVideoPipeline, "from_pretrained", None)
    cat, out = folder / "cat.png", tmp_path / "x.safetensors"
    size = {"frames": SIZE.frames, "height": SIZE.height, "width": SIZE.width}
    run = lambda last, image=cat: encode_prompt.main(folder, ["a cat"], image=image, last_image=last, out=out, **size)
    with pytest.raises(ValueError, match=NO_PLACE):
        run(cat)
    with pytest.raises(ValueError, match="--frames 1 is too few for a first and a last image"):
        encode_prompt.encode(folder, ["a cat"], None, cat, (1, None, None), "float32", cat)
    with pytest.raises(ValueError, match=r"--last-image .*no\.png does not exist"):
        run(folder / "no.png")
    with pytest.raises(ValueError, match=r"--last-image .*index\.json cannot be read as a picture"):
        run(folder / "model_index.json")
    with pytest.raises(ValueError, match="goes with --image"):
        run(cat, None)


def test_a_place_that_cannot_be_written_is_named_first(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be written; name a file"):
        encode_prompt.main(tmp_path, ["a cat"], out=tmp_path)


PROMPT = "une étoile 🌟 星"
COMMAND = """
import numpy as np
from models import encode_prompt
from models.commands.cli import run_cli

encode_prompt.encode = lambda checkpoint, prompts, negative, *rest: {
    "prompt_embeds": np.array([[ord(c) for c in prompts[0] + negative]], np.float32)
}
run_cli(encode_prompt.main)
"""


def test_prompts_in_any_locale(tmp_path: Path) -> None:
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "JAX_PLATFORMS": "cpu"}
    out = tmp_path / "é.safetensors"
    options = ["--checkpoint", "x", "--prompt", PROMPT, "--negative", PROMPT, "--out", str(out)]
    command = [sys.executable, "-c", COMMAND, *options]
    ended = subprocess.run(command, capture_output=True, cwd=ROOT, env=os.environ | locale)
    assert ended.returncode == 0, ended.stderr
    assert read_prompts(out, 1) == [PROMPT]
    assert "".join(map(chr, read_embeddings(out)["prompt_embeds"][0].astype(int))) == PROMPT + PROMPT


def test_prompts_that_are_no_text() -> None:
    assert encoders.decoded(PROMPT) == PROMPT
    with pytest.raises(ValueError, match=r"'\\udcff' is no text in UTF-8"):
        encoders.decoded("\udcff")
