"""The files that the models' authors publish, value by value against diffusers' folders, and at full size by shapes."""

import copy
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel, HunyuanVideoTransformer3DModel, WanTransformer3DModel
from diffusers.loaders.single_file_utils import (
    convert_hunyuan_video_transformer_to_diffusers,
    convert_wan_transformer_to_diffusers,
)
from flax import nnx
from safetensors.torch import save_file

import models
from convert.writer import convert
from models.checkpoint.formats import to_diffusers
from models.checkpoint.inferred_config import infer_config
from models.checkpoint.key_table import plan
from models.checkpoint.loading import abstract_model, open_source, parameter_shapes
from models.checkpoint.registry import PORTS
from models.checkpoint.safetensors_folder import INDEX, SINGLE, CheckpointError
from models.checkpoint.weight_files import expert_folders, read_weights
from tests.models.checkpoint.originals import Weights, to_cogvideox, to_hunyuan, to_wan

HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 1,
    "attention_head_dim": 128,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": 24,
    "pooled_projection_dim": 16,
}
COGVIDEOX = {
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 32,
    "text_embed_dim": 24,
    "num_layers": 2,
}
V15 = COGVIDEOX | {"patch_size_t": 2, "patch_bias": False, "use_rotary_positional_embeddings": True}
V15 |= {"sample_height": 300, "sample_width": 300, "sample_frames": 81}
WAN = {
    "num_attention_heads": 2,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "freq_dim": 32,
    "ffn_dim": 96,
    "num_layers": 2,
}
WAN_IMAGE = WAN | {"image_dim": 20, "added_kv_proj_dim": 256, "in_channels": 9}
sinusoidal: Callable[[Weights], Weights] = lambda weights: to_cogvideox(weights, rotary=False)

SMALL: dict[str, tuple[type, dict[str, Any], Callable[[Weights], Weights]]] = {
    "Hunyuan": (HunyuanVideoTransformer3DModel, HUNYUAN, to_hunyuan),
    "Hunyuan I2V": (
        HunyuanVideoTransformer3DModel,
        HUNYUAN | {"in_channels": 9, "image_condition_type": "latent_concat", "guidance_embeds": False},
        to_hunyuan,
    ),
    "CogVideoX1.5": (CogVideoXTransformer3DModel, V15, to_cogvideox),
    "CogVideoX1.5 I2V": (CogVideoXTransformer3DModel, V15 | {"in_channels": 8, "ofs_embed_dim": 32}, to_cogvideox),
    "CogVideoX 2B": (CogVideoXTransformer3DModel, COGVIDEOX, sinusoidal),
    "CogVideoX 5B": (CogVideoXTransformer3DModel, COGVIDEOX | {"use_rotary_positional_embeddings": True}, to_cogvideox),
    "Wan": (WanTransformer3DModel, WAN, to_wan),
    "Wan I2V": (WanTransformer3DModel, WAN_IMAGE, to_wan),
    "Wan first and last frame": (WanTransformer3DModel, WAN_IMAGE | {"pos_embed_seq_len": 14}, to_wan),
}


def saved(cls: type, options: dict[str, Any], folder: Path) -> Weights:
    """A diffusers folder of random bfloat16 weights, no two alike, and these weights."""
    torch.manual_seed(0)
    model = cls(**options)
    for parameter in (*model.parameters(), *model.buffers()):  # learned positions are a buffer
        parameter.data = torch.randn(parameter.shape).bfloat16()
    model.save_pretrained(folder)
    return {key: value.clone() for key, value in model.state_dict().items()}


def check_equal(found: nnx.Module, expected: nnx.Module) -> None:
    """The same config, and the same parameters bit for bit."""
    assert found.config == expected.config  # type: ignore[attr-defined]
    ours, theirs = (dict(nnx.to_flat_state(nnx.state(model, nnx.Param))) for model in (found, expected))
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        assert leaf.dtype == theirs[path].dtype
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(theirs[path]), err_msg=str(path))


@pytest.mark.parametrize("name", SMALL)
def test_originals_equal_the_diffusers_folder(name: str, tmp_path: Path) -> None:
    cls, options, original = SMALL[name]
    weights = saved(cls, options, tmp_path / "diffusers")
    expected = models.from_pretrained(tmp_path / "diffusers")
    published = original(weights)
    torch.save({"module": published}, tmp_path / "weights.pt")
    check_equal(models.from_pretrained(tmp_path / "weights.pt"), expected)
    prefix = "" if next(iter(published)).startswith("model.") else "model.model."
    (tmp_path / "alone").mkdir()
    save_file({prefix + k: v.contiguous() for k, v in published.items()}, tmp_path / "alone" / "repack.safetensors")
    check_equal(models.from_pretrained(tmp_path / "alone"), expected)
    if name != "CogVideoX 5B":  # told from 2B by its number of layers
        save_file(weights, tmp_path / "single.safetensors")
        check_equal(models.from_pretrained(tmp_path / "single.safetensors"), expected)


def test_learned_positions_take_their_size_from_a_config_beside_the_file(tmp_path: Path) -> None:
    options = COGVIDEOX | {"use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True}
    options |= {"sample_height": 12, "sample_width": 18, "sample_frames": 9, "max_text_seq_length": 11}
    weights = saved(CogVideoXTransformer3DModel, options, tmp_path / "diffusers")
    (tmp_path / "sat").mkdir()
    torch.save({"module": to_cogvideox(weights)}, tmp_path / "sat" / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match="config inferred from their shapes: 1 misshapen keys: 'patch_embed"):
        models.from_pretrained(tmp_path / "sat")
    shutil.copyfile(tmp_path / "diffusers" / "config.json", tmp_path / "sat" / "config.json")
    file = tmp_path / "sat" / "mp_rank_00_model_states.pt"
    check_equal(models.from_pretrained(file), models.from_pretrained(tmp_path / "diffusers"))


def test_a_folder_of_wan_with_its_own_config_in_shards_and_converted(tmp_path: Path) -> None:
    weights = saved(WanTransformer3DModel, WAN | {"attention_head_dim": 64, "eps": 1e-5}, tmp_path / "diffusers")
    folder = tmp_path / "Wan2.1"
    folder.mkdir()
    keys = sorted(published := to_wan(weights))
    for name, part in (("a", keys[::2]), ("b", keys[1::2])):
        save_file({k: published[k] for k in part}, folder / f"{name}.safetensors")
    shards = {k: "ab"[i % 2] + ".safetensors" for i, k in enumerate(keys)}
    (folder / INDEX).write_text(json.dumps({"weight_map": shards}))
    config = {"_class_name": "WanModel", "dim": 128, "num_heads": 2, "num_layers": 2, "ffn_dim": 96, "in_dim": 4}
    config |= {"out_dim": 4, "freq_dim": 32, "eps": 1e-5, "model_type": "t2v", "text_len": 512}
    (folder / "config.json").write_text(json.dumps(config))
    expected = models.from_pretrained(tmp_path / "diffusers")
    check_equal(models.from_pretrained(folder), expected)
    check_equal(models.from_pretrained(folder / INDEX), expected)
    check_equal(models.from_pretrained(convert(folder, tmp_path / "converted")), expected)


def test_a_lone_file_converts_beside_itself(tmp_path: Path) -> None:
    weights = saved(HunyuanVideoTransformer3DModel, HUNYUAN, tmp_path / "diffusers")
    torch.save({"module": to_hunyuan(weights)}, tmp_path / "weights.pt")
    converted = convert(tmp_path / "weights.pt", tmp_path / "converted")
    assert json.loads((converted / "config.json").read_text())["adaspa_jax"]["source"] == "Tencent"
    check_equal(models.from_pretrained(converted), models.from_pretrained(tmp_path / "diffusers"))


@pytest.mark.parametrize("name", ["Hunyuan", "Wan I2V"])
def test_the_tables_agree_with_diffusers_own_converters(name: str, tmp_path: Path) -> None:
    cls, options, original = SMALL[name]
    if name == "Hunyuan":  # its converter knows the published width only; two columns are enough
        options = options | {"num_attention_heads": 24}
        converter = convert_hunyuan_video_transformer_to_diffusers
    else:
        converter = convert_wan_transformer_to_diffusers
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in cls(**options).state_dict().items()}
    torch.manual_seed(0)
    narrow = {key: torch.randn(shape[0], *(min(2, n) for n in shape[1:])) for key, shape in shapes.items()}
    published = {key: value.contiguous() for key, value in original(narrow).items()}
    save_file(published, tmp_path / "w.safetensors")
    known, ours = to_diffusers(tmp_path, read_weights(tmp_path / "w.safetensors"))
    assert known is not None
    assert known.class_name == cls.__name__
    theirs = converter(dict(published))
    assert ours.keys() == theirs.keys() == narrow.keys()
    for key, tensor in ours.items():
        np.testing.assert_array_equal(tensor.read(), theirs[key].numpy(), err_msg=key)
        assert tensor.shape == tuple(theirs[key].shape)


@dataclass(frozen=True)
class Meta:
    """A tensor without values."""

    shape: tuple[int, ...]
    file: Path = Path("meta")
    problem: str | None = None

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(ml_dtypes.bfloat16)

    def read(self) -> np.ndarray:
        raise AssertionError("not to be read")


FIVE_B = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
BIG_15 = (
    FIVE_B | {"patch_size_t": 2, "patch_bias": False, "sample_height": 300, "sample_width": 300} | {"sample_frames": 81}
)
WAN_I2V = {"image_dim": 1280, "added_kv_proj_dim": 5120, "in_channels": 36}
PUBLISHED: dict[str, tuple[type, dict[str, Any], Callable[[Weights], Weights], int, int]] = {
    "HunyuanVideo 13B": (HunyuanVideoTransformer3DModel, {}, to_hunyuan, 856, 1264),
    "Wan2.1-T2V-1.3B": (
        WanTransformer3DModel,
        {"ffn_dim": 8960, "num_attention_heads": 12, "num_layers": 30},
        to_wan,
        825,
        825,
    ),
    "HunyuanVideo-I2V 13B, latents": (
        HunyuanVideoTransformer3DModel,
        {"in_channels": 33, "image_condition_type": "latent_concat", "guidance_embeds": False},
        to_hunyuan,
        852,
        1260,
    ),
    "Wan2.2-TI2V-5B": (
        WanTransformer3DModel,
        {"ffn_dim": 14336, "in_channels": 48, "out_channels": 48, "num_attention_heads": 24, "num_layers": 30},
        to_wan,
        825,
        825,
    ),
    "Wan2.1-T2V-14B": (WanTransformer3DModel, {}, to_wan, 1095, 1095),
    "Wan2.1-I2V-14B": (WanTransformer3DModel, WAN_I2V, to_wan, 1303, 1303),
    "CogVideoX1.5-5B": (CogVideoXTransformer3DModel, BIG_15, to_cogvideox, 774, 1024),
    "CogVideoX1.5-5B-I2V": (
        CogVideoXTransformer3DModel,
        BIG_15 | {"in_channels": 32, "ofs_embed_dim": 512},
        to_cogvideox,
        778,
        1028,
    ),
    "CogVideoX-5B-I2V": (
        CogVideoXTransformer3DModel,
        FIVE_B | {"in_channels": 32, "use_learned_positional_embeddings": True},
        to_cogvideox,
        775,
        1025,
    ),
    "CogVideoX-2B": (CogVideoXTransformer3DModel, {}, sinusoidal, 557, 736),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_key_and_shape_of_the_published_file_is_mapped(name: str) -> None:
    cls, options, original, keys, mapped = PUBLISHED[name]
    with torch.device("meta"):
        weights = cls(**options).state_dict()
    published = original(weights)
    assert len(published) == keys
    known, tensors = to_diffusers(Path(name), {key: Meta(tuple(value.shape)) for key, value in published.items()})
    assert known is not None
    assert known.moves is not None
    assert len(tensors) == mapped
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    assert shapes == {key: tuple(value.shape) for key, value in weights.items()}
    port, inferred = PORTS[cls.__name__], infer_config(cls.__name__, shapes) | dict(known.config)
    config = port.config.from_dict(inferred)
    assert config == port.config.from_dict(options)
    plan(tensors, port.rules, parameter_shapes(abstract_model(port, config, "bfloat16")), port.stacks)


ONE = torch.ones(2, 2)
FP8 = torch.zeros(2, 2, dtype=torch.float8_e4m3fn)
BAD: dict[str, tuple[str, Any, str]] = {
    "LoRA of diffusers": (
        "x.safetensors",
        {"blocks.0.attn1.to_q.lora_A.weight": ONE},
        "is a LoRA .* with --lora",
    ),
    "LoRA of kohya": ("x.safetensors", {"lora_unet_blocks_0_q.lora_down.weight": ONE, "a.alpha": ONE}, "is a LoRA"),
    "LoKr": ("x.safetensors", {"diffusion_model.blocks.0.q.lokr_w1": ONE}, "is a LoRA"),
    "LoRA in .pt": ("x.pt", {"module": {"blocks.0.q.lora_up.weight": ONE}}, "is a LoRA"),
    "fp8 of something": ("x.safetensors", {"a.weight": FP8, "scaled_fp8": FP8}, "is no transformer that is supported"),
    "fp8 in .pt without its scales": (
        "x.pt",
        {"module": {"double_blocks.0.a.weight": FP8}},
        "is in fp8, and x_map.pt, which holds its scales, is missing",
    ),
    "a scale of nothing": ("x.safetensors", {"blocks.0.ffn.0.scale_weight": ONE}, "quantised in a way that is not"),
    "a scale of blocks": (
        "x.safetensors",
        {"a.weight": FP8, "a.weight_scale": torch.ones(3, 3)},
        r"'a.weight' \[2, 2\] has a scale of shape \[3, 3\]",
    ),
    "a scale in fp8": ("x.safetensors", {"a.weight": FP8, "a.weight_scale": FP8}, "'a.weight_scale' is F8_E4M3"),
    "int8 in .pt": ("x.pt", {"a": ONE.to(torch.int8)}, "is int8; supported are bfloat16"),
    "GGUF": ("x.gguf", b"GGUF" + bytes(60), "is a damaged or cut GGUF file"),
    "GGUF by another name": ("x.safetensors", b"GGUF" + bytes(60), "is a damaged or cut GGUF file"),
    "VAE": ("x.safetensors", {"encoder.conv1.weight": ONE, "decoder.conv1.weight": ONE, "conv1.bias": ONE}, "is a VAE"),
    "VAE in .pt": ("x.pth", {"encoder.conv1.weight": ONE, "decoder.head.0.gamma": ONE}, "is a VAE"),
    "VAE with its losses": ("x.pt", {"state_dict": {"decoder.up.0.block.0.x": ONE, "loss.x": ONE}}, "is a VAE"),
    "text encoder": ("x.safetensors", {"encoder.block.0.x": ONE, "decoder.block.0.x": ONE}, "no transformer that is"),
    "unknown": ("x.safetensors", {"some.weight": ONE}, r"'some.weight', .*supported: .*\(Tencent\).*\(SAT\).*\(Wan\)"),
    "no tensors": ("x.pt", {"epoch": 3}, "no transformer"),
    "a list": ("x.pt", [ONE], "holds a list"),
    "code": ("x.pt", {"model": Path("x"), "f": copy.deepcopy}, "cannot be read: .* holds more than tensors"),
    "no file of PyTorch": ("x.pt", b"hello" * 20, "cannot be read"),
    "torn": ("x.safetensors", b"\xff" * 60, "truncated or no safetensors"),
    "incomplete": (
        "x.safetensors",
        {"blocks.0.self_attn.q.weight": ONE, "time_projection.1.weight": ONE},
        "no whole WanTransformer3DModel: 'patch_embedding.weight' is missing",
    ),
    "unequal parts": (
        "x.pt",
        {"double_blocks.0.img_attn_qkv.weight": ONE, "txt_in.input_embedder.weight": ONE},
        "does not split into 3 equal parts",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_transformer_is_named(name: str, tmp_path: Path) -> None:
    file, content, message = BAD[name]
    if isinstance(content, bytes):
        (tmp_path / file).write_bytes(content)
    elif file.endswith(".safetensors"):
        save_file({key: value.clone() for key, value in content.items()}, tmp_path / file)
    else:
        torch.save(content, tmp_path / file)
    for path in (tmp_path / file, tmp_path):
        with pytest.raises(CheckpointError, match=message) as raised:
            models.from_pretrained(path)
        assert "\n" not in str(raised.value)
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_of_pytorch_need_it_and_its_present_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"x": ONE}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"of PyTorch before 1\.6"):
        models.from_pretrained(tmp_path / "old.pt")
    torch.save({"x": ONE}, tmp_path / "x.pt")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckpointError, match="install the extra `torch`"):
        models.from_pretrained(tmp_path / "x.pt")


def test_folders_that_do_not_say_what_to_load(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        models.from_pretrained(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x": ONE}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"several files .* a\.safetensors, b\.safetensors"):
        models.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan"}))
    with pytest.raises(
        CheckpointError, match=r"'AutoencoderKLWan', a VAE, is not supported; supported: .*WanTransformer3DModel"
    ):
        models.from_pretrained(tmp_path)


def test_weights_of_another_model_than_the_config_says(tmp_path: Path) -> None:
    weights = saved(WanTransformer3DModel, WAN, tmp_path)
    save_file({key: value.contiguous() for key, value in to_wan(weights).items()}, tmp_path / SINGLE)
    open_source(tmp_path)  # a diffusers folder may have Wan's keys
    config = {"_class_name": "HunyuanVideoTransformer3DModel"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"says HunyuanVideo.*, but the weights are of a WanTransformer3DModel"):
        open_source(tmp_path)


@pytest.mark.parametrize("names", [("transformer", "transformer_2"), ("high_noise_model", "low_noise_model")])
def test_two_experts(names: tuple[str, str], tmp_path: Path) -> None:
    if names[0] == "transformer":
        (tmp_path / "model_index.json").write_text(json.dumps({"boundary_ratio": 0.875}))
    (tmp_path / names[0]).mkdir()
    with pytest.raises(CheckpointError, match=re.escape(f"two experts, but {names[1]}/ is missing")):
        expert_folders(tmp_path)
    (tmp_path / names[1]).mkdir()
    assert [folder.name for folder in expert_folders(tmp_path)] == list(names)
    with pytest.raises(CheckpointError, match=f"two experts; give {names[0]}/ and {names[1]}/ one at a time"):
        models.from_pretrained(tmp_path)
    assert expert_folders(tmp_path / names[0]) == [tmp_path / names[0]]
