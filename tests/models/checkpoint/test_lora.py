"""LoRA adapters merged while weights are read: every style of keys against diffusers' own merge, and bad input."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel, HunyuanVideoTransformer3DModel, WanTransformer3DModel
from flax import nnx
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file

import models
from convert.writer import convert
from models.checkpoint.key_table import Leaf
from models.checkpoint.loading import Source, open_checkpoint
from models.checkpoint.lora_file import read_lora
from models.checkpoint.safetensors_folder import CheckpointError
from tests.models.checkpoint.originals import HUNYUAN, WAN, Weights, _renamed
from tests.models.checkpoint.test_formats import HUNYUAN as SMALL_HUNYUAN
from tests.models.checkpoint.test_formats import V15
from tests.models.checkpoint.test_formats import WAN_IMAGE as SMALL_WAN

RANK, ALPHA, SCALE = 4, 6.0, 0.7
PORTS: dict[str, tuple[type, dict[str, Any]]] = {
    "Hunyuan": (HunyuanVideoTransformer3DModel, SMALL_HUNYUAN),
    "CogVideoX": (CogVideoXTransformer3DModel, V15),
    "Wan": (WanTransformer3DModel, SMALL_WAN),
}


def linear(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


def flat(model: nnx.Module) -> dict[str, np.ndarray]:
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(leaf, np.float32) for path, leaf in state}


def check_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], limit: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        error = np.abs(value - expected[name]).max() / max(1.0, np.abs(expected[name]).max())
        assert error <= limit, f"{name}: {error}"


class Made:
    """A small model on disk, a random LoRA of all its matrices, and the model that diffusers fused it into."""

    def __init__(self, name: str, folder: Path):
        cls, options = PORTS[name]
        self.cls, self.folder = cls, folder
        torch.manual_seed(0)
        self.model = cls(**options)
        self.model.save_pretrained(folder / "base")
        self.base = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.modules = linear(self.model)
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=self.modules, init_lora_weights=False)
        inject_adapter_in_model(config, self.model)
        self.lora = {k: v.clone() for k, v in get_peft_model_state_dict(self.model).items()}
        self.merged = flat(models.from_pretrained(self.fused(cls(**options)), dtype="float32"))

    def fused(self, model: Any) -> Path:
        """By diffusers."""
        model.load_state_dict(self.base)
        alphas = {f"{name}.alpha": ALPHA for name in self.modules}
        keys = {f"transformer.{key}": value.clone() for key, value in self.lora.items()}
        named = {f"transformer.{key}": value for key, value in alphas.items()}
        model.load_lora_adapter(keys, prefix="transformer", network_alphas=named)
        model.fuse_lora(lora_scale=SCALE)
        model.unload_lora()
        model.save_pretrained(self.folder / "fused")
        return self.folder / "fused"

    def pairs(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Module -> (A, B)."""
        return {n: (self.lora[f"{n}.lora_A.weight"], self.lora[f"{n}.lora_B.weight"]) for n in self.modules}


@pytest.fixture(scope="module", params=PORTS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(request.param, tmp_path_factory.mktemp(request.param))


def write(file: Path, tensors: Weights, metadata: dict[str, str] | None = None) -> Path:
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, file, metadata)
    return file


Style = Callable[[Made], tuple[Weights, dict[str, str] | None]]
ALPHA_KEY = torch.tensor(ALPHA)


def in_style(prefix: str, down: str, up: str, dots: bool = True) -> Style:
    """Prefix, ends of the keys, alphas as tensors."""

    def make(made: Made) -> tuple[Weights, None]:
        out = {}
        for name, (a, b) in made.pairs().items():
            stem = prefix + (name if dots else name.replace(".", "_"))
            out |= {stem + down: a, stem + up: b, f"{stem}.alpha": ALPHA_KEY}
        return out, None

    return make


def with_metadata(made: Made) -> tuple[Weights, dict[str, str]]:
    """As diffusers' save_lora_weights writes them."""
    config = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA, "transformer.alpha_pattern": {}}
    return {f"transformer.{k}": v for k, v in made.lora.items()}, {"lora_adapter_metadata": json.dumps(config)}


STYLES: dict[str, Style] = {
    "diffusers with metadata": with_metadata,
    "diffusers": in_style("transformer.", ".lora_A.weight", ".lora_B.weight"),
    "older diffusers": in_style("transformer.", ".lora.down.weight", ".lora.up.weight"),
    "PEFT": in_style("base_model.model.", ".lora_A.weight", ".lora_B.weight"),
    "DiffSynth": in_style("", ".lora_A.default.weight", ".lora_B.default.weight"),
    "Kohya": in_style("lora_unet_", ".lora_down.weight", ".lora_up.weight", dots=False),
}


@pytest.mark.parametrize("style", STYLES)
def test_equal_to_what_diffusers_fuses(made: Made, style: str, tmp_path: Path) -> None:
    tensors, metadata = STYLES[style](made)
    file = write(tmp_path / "x.safetensors", tensors, metadata)
    found = flat(models.from_pretrained(made.folder / "base", loras=[(file, SCALE)]))
    base = flat(models.from_pretrained(made.folder / "base"))
    check_close(found, made.merged)
    changed = sum(bool((value != base[name]).any()) for name, value in found.items())
    assert changed == sum(name.endswith("kernel") for name in found) - (made.cls is not CogVideoXTransformer3DModel)


def test_a_folder_of_peft(made: Made, tmp_path: Path) -> None:
    write(tmp_path / "adapter_model.safetensors", {f"base_model.model.{k}": v for k, v in made.lora.items()})
    config = {"r": RANK, "lora_alpha": 1, "alpha_pattern": dict.fromkeys(made.modules, ALPHA)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    check_close(flat(models.from_pretrained(made.folder / "base", loras=[(tmp_path, SCALE)])), made.merged)
    config = {"r": RANK, "lora_alpha": ALPHA / RANK**0.5, "use_rslora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    check_close(flat(models.from_pretrained(made.folder / "base", loras=[(tmp_path, SCALE)])), made.merged)


def test_alphas_by_pattern_are_those_of_peft(made: Made, tmp_path: Path) -> None:
    first, *_, second = made.modules
    pattern = {re.escape(first): 3.0, second[:-2] + "[a-z0-9_]+": 5.0}
    model = made.cls(**PORTS[next(name for name, port in PORTS.items() if port[0] is made.cls)][1])
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, alpha_pattern=pattern, target_modules=made.modules)
    inject_adapter_in_model(config, model)
    write(tmp_path / "adapter_model.safetensors", {f"base_model.model.{k}": v for k, v in made.lora.items()})
    stored = {"r": RANK, "lora_alpha": ALPHA, "alpha_pattern": pattern}
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored), encoding="utf-8")
    file = read_lora(tmp_path)
    found = {}
    for module, adapter in file.adapters.items():
        name = module.removeprefix("base_model.model.")
        found[name] = file.factor(adapter, name, RANK)
    scaling = {name: model.get_submodule(name).scaling["default"] for name in made.modules}
    assert found == pytest.approx(scaling)
    assert len(set(scaling.values())) == 3
    stored["alpha_pattern"] = {"(": 1.0}
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"alpha_pattern '\(' is no regular expression"):
        models.from_pretrained(made.folder / "base", loras=[tmp_path])


def original(made: Made, down: str, up: str, prefix: str, dots: bool = True) -> Weights:
    """The same differences under the original names of Hunyuan or Wan; q, k, v as one fused pair with block-diagonal B.

    The matrices that a fused pair holds share its A: their own stand one below the other in it.
    """
    fused: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    order = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "proj_mlp")  # PyTorch's is another
    place = lambda name: next((i for i, part in enumerate(order) if name.endswith(part)), 0)
    for name in sorted(made.modules, key=place):
        target, pair = name, made.pairs()[name]
        if made.cls is HunyuanVideoTransformer3DModel:
            single = name.startswith("single_transformer_blocks.")
            qkv = "LINEAR1" if single else "QKV"
            for part in ("attn.to_q", "attn.to_k", "attn.to_v", *(["proj_mlp"] if single else [])):
                target = target.removesuffix(part) + qkv if target.endswith(f".{part}") else target
            for part in ("q", "k", "v"):
                target = target.removesuffix(f"attn.add_{part}_proj") + "ADDED" if f"add_{part}_" in target else target
        stem = _renamed(target, HUNYUAN if made.cls is HunyuanVideoTransformer3DModel else WAN)
        fused.setdefault(stem, []).append(pair)
    out = {}
    for name, pairs in fused.items():
        a, b = torch.cat([a for a, _ in pairs]), torch.block_diag(*(b for _, b in pairs))
        if name == "final_layer.adaLN_modulation.1":  # shift, scale there
            b = torch.cat(b.chunk(2)[::-1])
        stem = prefix + (name if dots else name.replace(".", "_"))
        out |= {stem + down: a, stem + up: b, f"{stem}.alpha": ALPHA_KEY * len(pairs)}
    return out


@pytest.mark.parametrize(
    ("down", "up", "prefix", "dots"),
    [
        (".lora_down.weight", ".lora_up.weight", "diffusion_model.", True),
        (".lora_A.weight", ".lora_B.weight", "transformer.", True),
        (".lora_A.default.weight", ".lora_B.default.weight", "", True),
        (".lora_down.weight", ".lora_up.weight", "lora_unet_", False),
    ],
    ids=["ComfyUI", "transformer", "DiffSynth", "musubi"],
)
@pytest.mark.parametrize("made", ["Hunyuan", "Wan"], indirect=True)
def test_original_names_equal_diffusers(
    made: Made, down: str, up: str, prefix: str, dots: bool, tmp_path: Path
) -> None:
    file = write(tmp_path / "x.safetensors", original(made, down, up, prefix, dots))
    check_close(flat(models.from_pretrained(made.folder / "base", loras=[(file, SCALE)])), made.merged)


@pytest.mark.parametrize("made", ["Wan"], indirect=True)
def test_differences_of_weights_biases_norms_and_modulation(made: Made, tmp_path: Path) -> None:
    """As LightX2V writes them."""
    names = {
        "blocks.0.self_attn.q.diff": "blocks.0.attn1.to_q.weight",
        "blocks.0.self_attn.q.diff_b": "blocks.0.attn1.to_q.bias",
        "blocks.1.self_attn.norm_q.diff": "blocks.1.attn1.norm_q.weight",
        "blocks.1.norm3.diff": "blocks.1.norm2.weight",
        "blocks.1.norm3.diff_b": "blocks.1.norm2.bias",
        "blocks.0.diff_m": "blocks.0.scale_shift_table",
        "head.diff_m": "scale_shift_table",
        "head.head.diff": "proj_out.weight",
        "patch_embedding.diff": "patch_embedding.weight",
        "img_emb.proj.0.diff_b": "condition_embedder.image_embedder.norm1.bias",
    }
    torch.manual_seed(1)
    tensors = {f"diffusion_model.{key}": torch.randn_like(made.base[name]) for key, name in names.items()}
    file = write(tmp_path / "x.safetensors", tensors)
    model = made.cls(**PORTS["Wan"][1])
    weights = dict(made.base)
    for key, name in names.items():
        weights[name] = weights[name] + SCALE * tensors[f"diffusion_model.{key}"]
    model.load_state_dict(weights)
    model.save_pretrained(tmp_path / "expected")
    expected = flat(models.from_pretrained(tmp_path / "expected"))
    check_close(flat(models.from_pretrained(made.folder / "base", loras=[(file, SCALE)])), expected)


@pytest.mark.parametrize("made", ["Wan"], indirect=True)
def test_convolutions_bias_of_b_and_several_at_once(made: Made, tmp_path: Path) -> None:
    torch.manual_seed(2)
    shape = made.base["patch_embedding.weight"].shape
    a, b = torch.randn(3, *shape[1:]), torch.randn(shape[0], 3, 1, 1, 1)
    bias = torch.randn(shape[0])
    names = ("lora_A.weight", "lora_B.weight", "lora_B.bias")
    tensors = {f"transformer.patch_embedding.{n}": t for n, t in zip(names, (a, b, bias), strict=True)}
    first = write(tmp_path / "a.safetensors", tensors)
    torch.save({f"diffusion_model.{k}": v for k, v in STYLES["DiffSynth"](made)[0].items()}, tmp_path / "b.pt")
    weights = {key: value.clone() for key, value in made.base.items()}
    weights["patch_embedding.weight"] += -2 * (b.flatten(1) @ a.flatten(1)).reshape(shape)
    weights["patch_embedding.bias"] += -2 * bias
    for name, (down, up) in made.pairs().items():
        weights[f"{name}.weight"] += SCALE * ALPHA / RANK * up @ down
    model = made.cls(**PORTS["Wan"][1])
    model.load_state_dict(weights)
    model.save_pretrained(tmp_path / "expected")
    found = models.from_pretrained(made.folder / "base", loras=[(first, -2), (tmp_path / "b.pt", SCALE)])
    check_close(flat(found), flat(models.from_pretrained(tmp_path / "expected")))


@pytest.mark.parametrize("made", ["Wan"], indirect=True)
def test_every_slice_equals_that_of_the_whole(made: Made, tmp_path: Path) -> None:
    file = write(tmp_path / "x.safetensors", STYLES["DiffSynth"](made)[0])
    source = open_checkpoint(made.folder / "base", loras=[(file, SCALE)])
    assert isinstance(source, Source)
    for leaf in source.leaves:
        whole = leaf.read(source.tensors)
        index = tuple(slice(n // 3, n - n // 4) for n in leaf.shape)
        np.testing.assert_allclose(leaf.read(source.tensors, None, index), whole[index], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("made", ["Wan"], indirect=True)
def test_the_sum_is_rounded_once(made: Made, tmp_path: Path) -> None:
    file = write(tmp_path / "x.safetensors", STYLES["diffusers"](made)[0])
    wide = models.from_pretrained(made.folder / "base", "float32", loras=[(file, SCALE)])
    narrow = models.from_pretrained(made.folder / "base", "bfloat16", loras=[(file, SCALE)])
    kernels = (model.blocks.attn1.to_q.kernel[...] for model in (wide, narrow))
    expected, found = kernels
    assert found.dtype == "bfloat16"
    np.testing.assert_array_equal(found, expected.astype("bfloat16"))


ONE = torch.ones(2, 2)
QUERY = "blocks.0.attn1.to_q"
PAIR = {f"{QUERY}.lora_A.weight": torch.ones(2, 256), f"{QUERY}.lora_B.weight": torch.ones(256, 2)}
ENCODER = {key.replace(QUERY, "text_encoder.layers.0.q"): value for key, value in PAIR.items()}
BAD: dict[str, tuple[Weights, str]] = {
    "no LoRA": ({"a.weight": ONE, "b": ONE}, r"is no LoRA, by its keys \('a.weight', 'b'\)"),
    "keys of something else": (PAIR | {"a.weight": ONE}, "1 keys are none of a LoRA's: 'a.weight'"),
    "LoKr": ({"blocks.0.attn1.to_q.lokr_w1": ONE}, "is a LoKr .*, which is not read"),
    "LoHa": ({"blocks.0.attn1.to_q.hada_w1_a": ONE}, "is a LoHa"),
    "DoRA": (PAIR | {"blocks.0.attn1.to_q.dora_scale": ONE}, "is a DoRA"),
    "half": (dict([*PAIR.items()][:1]), "'blocks.0.attn1.to_q.lora_A.weight' without its other half"),
    "another width": (
        {key: value[: value.shape[0] // 2 + 1] if "lora_B" in key else value for key, value in PAIR.items()},
        r"of other sizes: .* \[2, 256\], and its other half \[129, 2\], for blocks.0.attn1.to_q.weight \[256, 256\]",
    ),
    "another rank": (
        {key: value.repeat(2, 1) if "lora_A" in key else value for key, value in PAIR.items()},
        "of other sizes",
    ),
    "a layer too many": (
        {key.replace("0", "7"): value for key, value in PAIR.items()} | PAIR,
        "1 keys are of no parameter of this WanTransformer3DModel: 'blocks.7.attn1.to_q.lora_A.weight'; check",
    ),
    "HunyuanVideo's": (
        {key.replace(QUERY, "diffusion_model.double_blocks.0.img_attn_qkv"): value for key, value in PAIR.items()},
        "is a LoRA of a HunyuanVideoTransformer3DModel, and the checkpoint is a WanTransformer3DModel",
    ),
    "an alpha of nothing": (PAIR | {"blocks.0.ffn.net.2.alpha": torch.ones(())}, "1 keys are of no parameter"),
    "an alpha that is none": (PAIR | {"blocks.0.attn1.to_q.alpha": torch.tensor(float("nan"))}, "is nan, no number"),
    "twice": (PAIR | {"blocks.0.attn1.to_q.lora_down.weight": ONE}, "which are the same"),
    "integers": ({key: value.int() for key, value in PAIR.items()}, "is I32"),
    "text encoder": (PAIR | ENCODER, "1 keys are of no parameter .*'text_encoder"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("made", ["Wan"], indirect=True)
def test_bad_loras_are_named_before_weights_are_read(
    made: Made, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, message = BAD[name]
    file = write(tmp_path / "x.safetensors", tensors)
    monkeypatch.setattr(Leaf, "read", None)
    with pytest.raises(CheckpointError, match=message) as raised:
        models.from_pretrained(made.folder / "base", loras=[file])
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("made", ["Wan"], indirect=True)
def test_what_cannot_be_merged(made: Made, tmp_path: Path) -> None:
    base = made.folder / "base"
    with pytest.raises(CheckpointError, match="no/such does not exist"):
        models.from_pretrained(base, loras=["no/such"])
    for scale in (0, float("nan"), float("inf"), -1e39):
        with pytest.raises(CheckpointError, match="must be a number other than 0"):
            models.from_pretrained(base, loras=[("x", scale)])
    with pytest.raises(CheckpointError, match="holds no single file of a LoRA"):
        models.from_pretrained(base, loras=[tmp_path])
    for key, value in PAIR.items():
        broken = PAIR | {key: torch.full_like(value, float("inf"))}
        with pytest.raises(CheckpointError, match=rf"'{key}' has NaN or infinite.*the LoRA"):
            models.from_pretrained(base, loras=[write(tmp_path / "x.safetensors", broken)])
    (down, a), (up, b) = PAIR.items()
    for odd in ({down: a[:0], up: b[:, :0]}, {down: a[0, 0], up: b[0, 0]}, {down: a[0], up: b}):
        with pytest.raises(CheckpointError, match="is a LoRA of a model of other sizes"):
            models.from_pretrained(base, loras=[write(tmp_path / "x.safetensors", odd)])
    with pytest.raises(CheckpointError, match="x: 'y' is no scale of a LoRA"):
        models.from_pretrained(base, loras=[("x", "y")])
    (tmp_path / "real").mkdir()
    write(tmp_path / "real" / "y.safetensors", PAIR)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "y.safetensors").symlink_to(tmp_path / "real" / "y.safetensors")
    with pytest.raises(CheckpointError, match="leaves the checkpoint's folder"):
        models.from_pretrained(base, loras=[tmp_path / "linked"])
    models.from_pretrained(base, loras=[tmp_path / "linked"], follow_links=True)
    with pytest.raises(CheckpointError, match="is converted, and a LoRA needs the checkpoint"):
        models.from_pretrained(convert(base, tmp_path / "converted"), loras=[tmp_path / "real"])
