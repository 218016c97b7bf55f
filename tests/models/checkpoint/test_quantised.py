"""fp8 and GGUF: values bit for bit those of the format's own code, whole and in slices, with a LoRA on top."""

import logging
import sys
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
from safetensors.torch import save_file

import models
from models.checkpoint.gguf_file import read_gguf
from models.checkpoint.loading import Source, open_checkpoint
from models.checkpoint.quantised import dequantised
from models.checkpoint.safetensors_folder import CheckpointError
from models.checkpoint.weight_files import read_weights
from tests.models.checkpoint.originals import to_hunyuan, to_wan
from tests.models.checkpoint.small_wan import weights
from tests.models.checkpoint.test_formats import HUNYUAN
from tests.models.checkpoint.test_wrapped import PARTS

SMALL = HUNYUAN | {"num_layers": 1, "num_single_layers": 1}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def read(path: Path, **options: Any) -> dict[str, np.ndarray]:
    """NNX path -> float32 values of a checkpoint."""
    source = open_checkpoint(path, **options)
    assert isinstance(source, Source)
    assert source.dtype == ml_dtypes.bfloat16
    return {".".join(leaf.path): leaf.read(source.tensors, np.dtype(np.float32)) for leaf in source.leaves}


def expected_of(tensors: dict[str, torch.Tensor], path: Path) -> dict[str, np.ndarray]:
    """The same of plain float32 weights."""
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path)
    source = open_checkpoint(path)
    assert isinstance(source, Source)
    return {".".join(leaf.path): leaf.read(source.tensors) for leaf in source.leaves}


def check_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def is_matrix(key: str, value: torch.Tensor) -> bool:
    return key.endswith(".weight") and value.ndim == 2


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_plain_fp8(dtype: torch.dtype, tmp_path: Path) -> None:
    plain = to_wan(weights())
    small = {key: value.to(dtype) if value.ndim > 1 else value.bfloat16() for key, value in plain.items()}
    save_file({f"model.diffusion_model.{key}": value for key, value in small.items()}, tmp_path / "x.safetensors")
    torch.save({"model": small}, tmp_path / "x.pt")
    expected = expected_of({key: value.float() for key, value in small.items()}, tmp_path / "plain.safetensors")
    for name in ("x.safetensors", "x.pt"):
        check_equal(read(tmp_path / name), expected)
    model = models.from_pretrained(tmp_path / "x.safetensors")
    kernel = model.blocks.attn1.to_q.kernel[...]
    assert kernel.dtype == "bfloat16"
    np.testing.assert_array_equal(kernel, expected["blocks.attn1.to_q.kernel"].astype(ml_dtypes.bfloat16))


SCALES = {
    "earlier ComfyUI": ("scale_weight", "scale_input", lambda value: torch.rand(()) + 0.5),
    "ComfyUI": ("weight_scale", "input_scale", lambda value: torch.rand(1) + 0.5),
    "one a row": ("weight_scale", "input_scale", lambda value: torch.rand(value.shape[0]) + 0.5),
    "one a row, as a column": ("weight_scale", "input_scale", lambda value: torch.rand(value.shape[0], 1) + 0.5),
}


@pytest.mark.parametrize("name", SCALES)
def test_scaled_fp8(name: str, tmp_path: Path) -> None:
    """Of Hunyuan, where the rows of one tensor go to several parameters."""
    own, unused, make = SCALES[name]
    torch.manual_seed(0)
    plain = to_hunyuan(HunyuanVideoTransformer3DModel(**SMALL).state_dict())
    files, expected = {"scaled_fp8": torch.zeros(2, dtype=FP8[0])}, {}
    for key, value in plain.items():
        files[key] = expected[key] = value.contiguous()
        if not is_matrix(key, value):
            continue
        module = key.removesuffix("weight")
        small, scale = value.to(FP8[0]), make(value).float()
        files |= {key: small, module + own: scale, module + unused: torch.ones(())}
        files[module + "comfy_quant"] = torch.zeros(4, dtype=torch.uint8)
        expected[key] = small.float() * scale.reshape(-1, 1)
    save_file({key: value.contiguous().clone() for key, value in files.items()}, tmp_path / "x.safetensors")
    wanted = expected_of(expected, tmp_path / "plain.safetensors")
    check_equal(read(tmp_path / "x.safetensors"), wanted)
    source = open_checkpoint(tmp_path / "x.safetensors")
    assert isinstance(source, Source)
    for leaf in source.leaves:
        index = tuple(slice(n // 3, n - n // 4) for n in leaf.shape)
        found = leaf.read(source.tensors, np.dtype(np.float32), index)
        np.testing.assert_array_equal(found, wanted[".".join(leaf.path)][index], err_msg=str(leaf.path))


def test_tencents_scales_lie_beside_the_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = to_hunyuan(HunyuanVideoTransformer3DModel(**SMALL).state_dict())
    linear = [key for key, value in plain.items() if "_blocks." in key and is_matrix(key, value)]
    small = {key: value.to(FP8[0]) if key in linear else value for key, value in plain.items()}
    scales = {key.removesuffix(".weight"): torch.rand(()) + 0.5 for key in linear}
    torch.save({"module": small}, tmp_path / "x_fp8.pt")
    with pytest.raises(CheckpointError, match=r"x_fp8_map\.pt, which holds its scales, is missing"):
        models.from_pretrained(tmp_path / "x_fp8.pt")
    torch.save(scales, tmp_path / "x_fp8_map.pt")
    values = {k: v.float() * scales.get(k.removesuffix(".weight"), torch.ones(())) for k, v in small.items()}
    source = open_checkpoint(tmp_path / "x_fp8.pt")
    assert isinstance(source, Source)
    found = {".".join(leaf.path): leaf.read(source.tensors, np.dtype(np.float32)) for leaf in source.leaves}
    check_equal(found, expected_of(values, tmp_path / "plain.safetensors"))
    torch.save({"no.such": torch.ones(())}, tmp_path / "x_fp8_map.pt")
    with pytest.raises(CheckpointError, match=r"has a scale of 'no.such', and its weights have 0"):
        models.from_pretrained(tmp_path / "x_fp8.pt")


def test_every_value_of_a_byte(tmp_path: Path) -> None:
    every = np.arange(256, dtype=np.uint8)
    for name, dtype in (("a", ml_dtypes.float8_e4m3fn), ("b", ml_dtypes.float8_e5m2)):
        tensor = torch.from_numpy(every.copy()).view(FP8[name == "b"])
        save_file({f"{name}.weight": tensor}, tmp_path / "x.safetensors")
        found = dequantised(read_weights(tmp_path / "x.safetensors"))[f"{name}.weight"].read()
        np.testing.assert_array_equal(found, every.view(dtype).astype(np.float32))
        np.testing.assert_array_equal(found, tensor.float().numpy())


def write_gguf(path: Path, tensors: dict[str, Any], architecture: str = "wan", shapes: Any = None) -> None:
    """As ComfyUI-GGUF does: name -> (array or bytes of blocks, GGML's type)."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, shape in (shapes or {}).items():
        writer.add_array(f"comfy.gguf.orig_shape.{name}", list(map(int, shape)))
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_blocks(kind: gguf.GGMLQuantizationType, rows: int, width: int) -> np.ndarray:
    """Bytes of which no half is infinite or NaN."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return np.random.default_rng(0).integers(0, 0x7C, (rows, width // block * size), np.uint8)


@pytest.mark.parametrize("name", [*BLOCKS, "F16", "BF16", "F32"])
def test_gguf_is_bit_equal_to_its_own_code(name: str, tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType[name]
    write_gguf(tmp_path / "x.gguf", {"a": (random_blocks(kind, 20, 768), kind)})
    tensor = read_gguf(tmp_path / "x.gguf")["a"]
    (stored,) = gguf.GGUFReader(tmp_path / "x.gguf").tensors
    expected = gguf.dequantize(stored.data, kind)
    assert tensor.shape == expected.shape == (20, 768)
    np.testing.assert_array_equal(tensor.read(), expected)
    for index in ((slice(3, 9),), (slice(3, 9), slice(100, 700)), (slice(None), slice(256, 512)), (slice(19, 20),)):
        np.testing.assert_array_equal(tensor.read(index), expected[index])


WAN = {"num_attention_heads": 2, "in_channels": 4, "out_channels": 4, "text_dim": 256, "freq_dim": 256, "num_layers": 2}


def gguf_of_wan(file: Path) -> dict[str, torch.Tensor]:
    """Writes a Wan whose matrices are of all kinds in turn, and gives its values under Wan's names."""
    torch.manual_seed(0)
    plain = to_wan(WanTransformer3DModel(**WAN, ffn_dim=512).state_dict())
    tensors, expected, shapes = {}, {}, {}
    for i, (key, value) in enumerate(plain.items()):
        array = value.float().numpy()
        kind = gguf.GGMLQuantizationType[("Q4_0", "Q5_1", "Q8_0", "BF16", "F16")[i % 5] if array.ndim == 2 else "F32"]
        if array.ndim > 4:
            shapes[key] = array.shape
            array, kind = array.reshape(-1), gguf.GGMLQuantizationType.F16
        data = gguf.quantize(array, kind)
        tensors[key] = (data, kind)
        expected[key] = torch.from_numpy(gguf.dequantize(data, kind).reshape(value.shape).copy())
    write_gguf(file, tensors, shapes=shapes)
    return expected


def test_a_model_of_gguf_with_a_lora_on_top(tmp_path: Path) -> None:
    values = gguf_of_wan(tmp_path / "x.gguf")
    check_equal(read(tmp_path / "x.gguf"), expected_of(values, tmp_path / "plain.safetensors"))
    torch.manual_seed(1)
    a, b, name = torch.randn(3, 256), torch.randn(512, 3), "blocks.1.ffn.0"
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, tmp_path / "lora.safetensors")
    values[f"{name}.weight"] = values[f"{name}.weight"] + 0.5 * (b @ a)
    expected = expected_of(values, tmp_path / "plain.safetensors")
    for key, value in read(tmp_path / "x.gguf", loras=[(tmp_path / "lora.safetensors", 0.5)]).items():
        np.testing.assert_allclose(value, expected[key], rtol=1e-6, atol=1e-6, err_msg=key)
    assert str(models.from_pretrained(tmp_path / "x.gguf").dtype) == "bfloat16"


def test_files_of_gguf_that_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, f32 = tmp_path / "x.gguf", gguf.GGMLQuantizationType.F32
    values = {key: (value.float().numpy(), f32) for key, value in to_wan(weights()).items() if value.ndim < 5}
    shape = to_wan(weights())["patch_embedding.weight"].shape
    values["patch_embedding.weight"] = (np.zeros(int(np.prod(shape)), np.float32), f32)
    kind = gguf.GGMLQuantizationType.IQ4_NL
    small = values | {"blocks.0.self_attn.q.weight": (random_blocks(kind, 128, 128), kind)}
    write_gguf(file, small, shapes={"patch_embedding.weight": shape})
    with pytest.raises(CheckpointError, match=r"'blocks.0.self_attn.q.weight' is IQ4_NL of GGUF; read are .*Q4_K"):
        models.from_pretrained(file)
    write_gguf(file, {"blk.0.attn_q.weight": (np.zeros((2, 2), np.float32), f32)}, "llama")
    with pytest.raises(CheckpointError, match="is a GGUF of 'llama', no transformer that is supported"):
        models.from_pretrained(file)
    write_gguf(file, {"a": (np.zeros((2, 2), np.float32), f32)}, shapes={"a": (3, 3)})
    with pytest.raises(CheckpointError, match=r"damaged or cut GGUF file \(tensor 'a' \[2, 2\] cannot be \[3, 3\]\)"):
        models.from_pretrained(file)
    write_gguf(file, values)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="damaged or cut GGUF file"):
        models.from_pretrained(file)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match="pip install gguf, or the extra `demo`"):
        models.from_pretrained(file)


def test_what_else_a_file_holds_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wrapped = {f"model.diffusion_model.{key}": value for key, value in weights().items()}
    save_file(wrapped | PARTS, tmp_path / "x.safetensors")
    with caplog.at_level(logging.WARNING):
        models.from_pretrained(tmp_path / "x.safetensors")
    (line,) = caplog.messages
    assert line.endswith(
        "x.safetensors: its transformer is read; not read, by name and number of tensors: "
        "first_stage_model (1), text_encoders (2), vae (1)"
    )


def test_what_is_broken_is_named_as_in_the_file(tmp_path: Path) -> None:
    key, values = "model.diffusion_model.blocks.0.self_attn.q.weight", {}
    for name, value in to_wan(weights()).items():
        values[f"model.diffusion_model.{name}"] = value.float().clone()
    broken = values | {key: torch.full_like(values[key], float("nan"))}
    save_file(broken, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=f"tensor '{key}' has NaN or infinite values; the weights are broken"):
        models.from_pretrained(tmp_path / "x.safetensors")
    scale = key.removesuffix("weight") + "scale_weight"
    save_file(values | {scale: torch.tensor(float("inf"))}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=f"'{scale}', the scale of '{key}', is NaN or infinite"):
        models.from_pretrained(tmp_path / "x.safetensors")
