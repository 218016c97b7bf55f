"""Weights in whatever wraps them: prefixes, all-in-one files, training checkpoints; relatives that are not ported."""

import argparse
import collections
import enum
import json
import os
import pathlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from flax import nnx
from safetensors.torch import load_file, save_file

import models
from convert.writer import convert
from models.checkpoint.safetensors_folder import SINGLE, CheckpointError
from models.vae.load import load_vae
from tests.models.checkpoint.originals import to_wan
from tests.models.checkpoint.small_wan import check_equal, small_wan, values, weights

PREFIXES = ("_orig_mod.", "transformer.", "dit.", "net.", "module._orig_mod.", "model.diffusion_model.", "a.b.c.")
PARTS = {
    "vae.decoder.conv1.weight": torch.zeros(2, 2),
    "text_encoders.t5.shared.weight": torch.zeros(2, 2),
    "text_encoders.t5.scale": torch.zeros(2, 2, dtype=torch.float8_e4m3fn),
    "first_stage_model.encoder.conv_in.weight": torch.zeros(2, 2),
}
BUFFERS = {
    "rope.freqs": torch.zeros(2, dtype=torch.float64),
    "rope.table": torch.zeros(2, dtype=torch.complex64),
    "step": torch.zeros((), dtype=torch.int64),
    "initted": torch.zeros(1, dtype=torch.bool),
    "blocks.0.position_ids": torch.zeros(1, 4, dtype=torch.int32),
}


@pytest.fixture(scope="module")
def expected(wan: Path) -> dict[str, np.ndarray]:
    return values(wan)


def under(prefix: str, tensors: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    return {prefix + key: value.clone() for key, value in (weights() if tensors is None else tensors).items()}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_prefix_of_all_keys_is_taken_off(
    prefix: str, wan: Path, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    save_file(under(prefix), tmp_path / "x.safetensors")
    check_equal(values(tmp_path / "x.safetensors"), expected)
    save_file(under(prefix, to_wan(weights())), tmp_path / "x.safetensors")
    check_equal(values(tmp_path / "x.safetensors"), expected)
    (tmp_path / "x.safetensors").unlink()
    (tmp_path / "config.json").write_bytes((wan / "config.json").read_bytes())
    save_file(under(prefix), tmp_path / SINGLE)
    check_equal(values(tmp_path), expected)


@pytest.mark.parametrize(
    "beside",
    [BUFFERS, PARTS, BUFFERS | PARTS, {"rope.freqs_cos": torch.zeros(2, 3, dtype=torch.float64)}],
    ids=["buffers", "parts", "both", "RoPE"],
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_what_lies_beside_the_weights_is_left_out(
    prefix: str, beside: dict[str, torch.Tensor], expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    save_file(under(prefix) | beside, tmp_path / "x.safetensors")
    torch.save(under(prefix) | beside, tmp_path / "x.pt")
    for name in ("x.safetensors", "x.pt"):
        check_equal(values(tmp_path / name), expected)


def test_an_averaged_model(expected: dict[str, np.ndarray], tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(small_wan())
    torch.save(averaged.state_dict(), tmp_path / "x.pt")
    check_equal(values(tmp_path / "x.pt"), expected)


def test_weights_of_float64_become_float32(expected: dict[str, np.ndarray], tmp_path: Path) -> None:
    wide = {key: value.double() for key, value in weights().items()}
    save_file(wide, tmp_path / "x.safetensors")
    torch.save(wide, tmp_path / "x.pt")
    for name in ("x.safetensors", "x.pt"):
        check_equal(values(tmp_path / name), expected)
    converted = convert(tmp_path / "x.pt", tmp_path / "out")
    assert json.loads((converted / "config.json").read_text(encoding="utf-8"))["adaspa_jax"]["dtype"] == "float32"


def test_weights_of_integers_are_refused(tmp_path: Path) -> None:
    tensors = weights() | {"proj_out.bias": torch.zeros(16, dtype=torch.int8)}
    save_file(tensors, tmp_path / "x.safetensors")
    torch.save(tensors, tmp_path / "x.pt")
    for name, dtype in (("x.safetensors", "I8"), ("x.pt", "int8")):
        with pytest.raises(CheckpointError, match=f"tensor 'proj_out.bias' is {dtype}; supported are"):
            models.from_pretrained(tmp_path / name)


@dataclass
class Settings:
    """Arguments of some trainer."""

    lr: float = 1e-4
    ema: bool = True


class Mode(enum.Enum):
    TRAIN = 1


class AttributeDict(dict):  # type: ignore[type-arg]
    """As Lightning's, EasyDict, Box."""


def optimizer_state() -> dict[str, Any]:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    return optimizer.state_dict()


TRAINING: dict[str, Any] = {
    "args": argparse.Namespace(lr=1e-4, out=pathlib.PurePosixPath("x")),
    "config": Settings(),
    "mode": Mode.TRAIN,
    "hyper_parameters": AttributeDict(lr=1e-4, nested=AttributeDict(x=1)),
    "history": collections.defaultdict(list, loss=[1.0]),
    "best": np.float64(0.5),
    "numbers": np.arange(3),
    "optimizer": optimizer_state(),
    "optimizer_states": [optimizer_state()],
    "lr_schedulers": [{"last_epoch": 3}],
    "epoch": 3,
    "rng_state": torch.get_rng_state(),
    "dtype": torch.bfloat16,
    "set": {1, 2},
}


@pytest.mark.parametrize("wrapper", ["module", "model", "state_dict", "generator", "generator_ema", "ema", "a b"])
def test_training_checkpoints(wrapper: str, expected: dict[str, np.ndarray], tmp_path: Path) -> None:
    torch.save({wrapper: under("model."), **TRAINING}, tmp_path / "x.pt")
    check_equal(values(tmp_path / "x.pt"), expected)


def test_training_arguments_among_the_weights(expected: dict[str, np.ndarray], tmp_path: Path) -> None:
    torch.save({**weights(), **TRAINING}, tmp_path / "x.pt")
    check_equal(values(tmp_path / "x.pt"), expected)
    torch.save(AttributeDict(state=AttributeDict(weights())), tmp_path / "x.pt")
    check_equal(values(tmp_path / "x.pt"), expected)


@pytest.mark.parametrize("names", [("generator", "generator_ema"), ("model", "ema"), ("generator", "critic")])
def test_several_models_in_one_file_are_named(names: tuple[str, str], tmp_path: Path) -> None:
    torch.save({name: under("model.") for name in names}, tmp_path / "x.pt")
    save_file(under(f"{names[0]}.") | under(f"{names[1]}."), tmp_path / "x.safetensors")
    for file in ("x.pt", "x.safetensors"):
        with pytest.raises(CheckpointError, match="holds several models, under the keys ") as raised:
            models.from_pretrained(tmp_path / file)
        assert all(f"'{name}" in str(raised.value) for name in names)


class Hostile:
    """Calls a function when it is unpickled as pickle would."""

    def __init__(self, *call: Any):
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


def test_nothing_of_a_file_is_run(expected: dict[str, np.ndarray], tmp_path: Path) -> None:
    torch.save(
        {"model": weights(), "args": Hostile(shutil.copyfile, __file__, str(tmp_path / "run"))}, tmp_path / "x.pt"
    )
    check_equal(values(tmp_path / "x.pt"), expected)
    for call, message in (((os.system, "true"), "is blocked"), ((Path.write_text, tmp_path / "run", "x"), "reduce")):
        torch.save({"model": weights(), "args": Hostile(*call)}, tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match=f"cannot be read: .*{message}") as raised:
            models.from_pretrained(tmp_path / "x.pt")
        assert "weights_only" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_pickled_module_is_named(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"x\.pt .*Linear.*"):
        models.from_pretrained(tmp_path / "x.pt")


def test_dicts_without_end(tmp_path: Path) -> None:
    content: dict[str, Any] = {"x": torch.ones(1)}
    content["self"] = content
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="without end"):
        models.from_pretrained(tmp_path / "x.pt")


def test_weights_that_are_no_plain_tensors(tmp_path: Path) -> None:
    tensors = weights()
    tensors["proj_out.weight"] = torch.zeros(128, 16).t()
    torch.save(tensors, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="does not lie in one piece; save the file again"):
        models.from_pretrained(tmp_path / "x.pt")


RELATIVES = {
    "VSA": ({"blocks.0.to_gate_compress.weight": torch.ones(2, 2)}, "of VSA .*'blocks.0.to_gate_compress.weight'"),
    "VACE": ({"vace_blocks.0.proj_in.weight": torch.ones(2, 2)}, "of VACE.*'vace_blocks.0.proj_in.weight'"),
    "VACE's input": ({"vace_patch_embedding.weight": torch.ones(2, 2)}, "of VACE"),
    "GPTQ": ({"blocks.0.attn1.to_q.qweight": torch.ones(2, dtype=torch.int32)}, "is quantised"),
    "bitsandbytes": ({"proj_out.weight.quant_state.bitsandbytes__nf4": torch.ones(2)}, "is quantised"),
}


@pytest.mark.parametrize("name", RELATIVES)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_relatives_are_named_as_what_they_are(name: str, prefix: str, wan: Path, tmp_path: Path) -> None:
    keys, message = RELATIVES[name]
    save_file(under(prefix, weights() | keys), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=message):
        models.from_pretrained(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "x.safetensors", tmp_path / "out")
    (tmp_path / "config.json").write_bytes((wan / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=message):
        models.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["WanVACETransformer3DModel", "VaceWanModel"])
def test_the_classes_of_vace_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"class '{name}', Wan with VACE, is not supported"):
        models.from_pretrained(tmp_path)


def test_a_vae_with_a_prefix_and_what_lies_beside_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    scale = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    AutoencoderKLWan(base_dim=4, z_dim=4, num_res_blocks=1, **scale).save_pretrained(tmp_path)
    plain = nnx.to_flat_state(nnx.state(load_vae(tmp_path)))
    tensors = load_file(tmp_path / SINGLE)
    wrapped = (
        {f"_orig_mod.{key}": value for key, value in tensors.items()},
        {f"first_stage_model.{key}": value for key, value in tensors.items()} | under("model.diffusion_model."),
        tensors | {"steps": torch.zeros((), dtype=torch.int64)},
    )
    for keys in wrapped:
        save_file(keys, tmp_path / SINGLE)
        for (path, value), (_, wanted) in zip(nnx.to_flat_state(nnx.state(load_vae(tmp_path))), plain, strict=True):
            np.testing.assert_array_equal(value, wanted, err_msg=str(path))
    twice = {f"{name}.{key}": value.clone() for name in ("vae", "ema") for key, value in tensors.items()}
    save_file(twice, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match="holds several models, under the keys 'ema', 'vae'"):
        load_vae(tmp_path)
