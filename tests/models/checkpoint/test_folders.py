"""Folders of weights: all that `save_pretrained` can write, transformers and VAEs; what is lost or elsewhere."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan
from flax import nnx
from safetensors.torch import load_file, save_file

import models
from convert.writer import convert
from models.checkpoint.loading import open_source
from models.checkpoint.safetensors_folder import INDEX, SINGLE, CheckpointError, read_json
from models.checkpoint.weight_files import read_weights, variant_of, weights_file
from models.pipeline.video import VideoPipeline
from models.vae.cogvideox_torch import decode_with_diffusers
from models.vae.decoding import decode_latents
from models.vae.load import load_vae
from tests.models.checkpoint.small_wan import check_equal, small_wan, values

SAVED: dict[str, dict[str, Any]] = {
    f"{variant or 'plain'}, {'shards' if shards else 'one file'}, {'safetensors' if safe else 'bin'}": {
        "safe_serialization": safe,
        **({"variant": variant} if variant else {}),
        **({"max_shard_size": "8KB"} if shards else {}),
    }
    for variant in (None, "fp16", "non_ema")
    for shards in (False, True)
    for safe in (False, True)
}


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    scale = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    return AutoencoderKLWan(base_dim=4, z_dim=4, num_res_blocks=1, **scale)


@pytest.mark.parametrize("name", SAVED)
def test_what_save_pretrained_writes_loads(name: str, wan: Path, tmp_path: Path) -> None:
    small_wan().save_pretrained(tmp_path, **SAVED[name])
    check_equal(values(tmp_path), values(wan))
    file = weights_file(tmp_path)
    assert file is not None
    assert variant_of(file) == SAVED[name].get("variant")
    assert open_source(file).format == "diffusers"


@pytest.mark.parametrize("name", SAVED)
def test_a_vae_that_save_pretrained_writes_loads(name: str, vae: AutoencoderKLWan, tmp_path: Path) -> None:
    options = SAVED[name] | ({"max_shard_size": "40KB"} if "max_shard_size" in SAVED[name] else {})
    vae.save_pretrained(tmp_path / "vae", **options)
    weights = vae.state_dict()
    found = nnx.to_flat_state(nnx.state(load_vae(tmp_path)))
    kernel = dict(found)["decoder", "conv_in", "kernel"]
    expected = weights["decoder.conv_in.weight"].numpy().transpose(2, 3, 4, 1, 0)
    np.testing.assert_array_equal(kernel, expected)


@pytest.mark.parametrize("options", [{"variant": "fp16"}, {"safe_serialization": False, "max_shard_size": "40KB"}])
def test_cogvideox_vaes_are_read_by_the_same_reader(options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "latent_channels": 4, "layers_per_block": 1}
    theirs = AutoencoderKLCogVideoX(**sizes)
    theirs.save_pretrained(tmp_path / "plain")
    theirs.save_pretrained(tmp_path / "other", **options)
    latents = np.random.default_rng(0).normal(size=(1, 4, 1, 2, 2)).astype(np.float32)
    expected = decode_with_diffusers(tmp_path / "plain", latents)
    np.testing.assert_array_equal(decode_with_diffusers(tmp_path / "other", latents), expected)


def test_the_plain_file_is_chosen_as_diffusers_does(wan: Path, tmp_path: Path) -> None:
    other = small_wan()
    with torch.no_grad():
        other.proj_out.bias.add_(1)
    other.save_pretrained(tmp_path, variant="fp16")
    other.save_pretrained(tmp_path, variant="bf16", max_shard_size="8KB")
    with pytest.raises(
        CheckpointError, match=r"several files of weights; give one of them: .*\.fp16\.safetensors, .*bf16"
    ):
        models.from_pretrained(tmp_path)
    assert open_source(tmp_path / "diffusion_pytorch_model.fp16.safetensors").format == "diffusers"
    small_wan().save_pretrained(tmp_path, safe_serialization=False)
    check_equal(values(tmp_path), values(wan))  # .bin without a variant before safetensors with one
    small_wan().save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"broken")
    (tmp_path / "._diffusion_pytorch_model.safetensors").write_bytes(b"of macOS")
    check_equal(values(tmp_path), values(wan))


@pytest.mark.parametrize(
    ("options", "index"),
    [
        ({}, INDEX),
        ({"variant": "fp16"}, "diffusion_pytorch_model.safetensors.index.fp16.json"),
        ({"safe_serialization": False}, "diffusion_pytorch_model.bin.index.json"),
    ],
)
def test_a_lost_index_and_a_lone_shard_are_named(options: dict[str, Any], index: str, tmp_path: Path) -> None:
    small_wan().save_pretrained(tmp_path, max_shard_size="20KB", **options)
    shard = next(tmp_path.glob("*00001*"))
    with pytest.raises(CheckpointError, match=rf"is one of several shards; give their index, .*/{index}"):
        models.from_pretrained(shard)
    (tmp_path / index).unlink()
    for config in (True, False):
        for path in (tmp_path, shard):
            with pytest.raises(CheckpointError, match=rf"the index that lists them is missing; download {index}"):
                models.from_pretrained(path)
        if config:
            (tmp_path / "config.json").unlink()


def test_a_vae_without_its_index(vae: AutoencoderKLWan, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path, max_shard_size="40KB")
    (tmp_path / INDEX).unlink()
    with pytest.raises(CheckpointError, match="the index that lists them is missing"):
        load_vae(tmp_path)


def test_the_only_shard_is_whole(wan: Path, tmp_path: Path) -> None:
    shutil.copytree(wan, tmp_path, dirs_exist_ok=True)
    (tmp_path / SINGLE).rename(tmp_path / "diffusion_pytorch_model-00001-of-00001.safetensors")
    check_equal(values(tmp_path), values(wan))


def test_a_missing_shard_and_names_that_leave_the_folder(tmp_path: Path) -> None:
    small_wan().save_pretrained(tmp_path, max_shard_size="20KB", variant="fp16")
    index = next(tmp_path.glob("*.index.fp16.json"))
    next(tmp_path.glob("*00002*")).unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-.* is missing; the checkpoint is incomplete"):
        models.from_pretrained(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}), encoding="utf-8")
    for follow in (False, True):
        with pytest.raises(CheckpointError, match="leaves the checkpoint's folder"):
            models.from_pretrained(tmp_path, follow_links=follow)


def test_files_of_transformers_and_of_trainers(wan: Path, tmp_path: Path) -> None:
    shutil.copyfile(wan / SINGLE, tmp_path / "model.safetensors")
    for name in ("optimizer.bin", "scheduler.bin", "training_args.bin", "rng_state_0.pth"):
        torch.save({"x": torch.ones(1)}, tmp_path / name)
    check_equal(values(tmp_path), values(wan))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (SINGLE, b"version https://git-lfs.github.com/spec/v1\noid", "pointer of Git LFS.* git lfs pull"),
        (SINGLE, b"", "truncated or no safetensors"),
        ("diffusion_pytorch_model.bin", b"", "cannot be read"),
        (INDEX, b"{}", "no valid weight_map"),
        (INDEX, b'{"weight_map": 3}', "no valid weight_map"),
        (INDEX, b"\xff\xfe", "is not valid JSON"),
    ],
)
def test_broken_files_are_named(name: str, content: bytes, message: str, wan: Path, tmp_path: Path) -> None:
    shutil.copyfile(wan / "config.json", tmp_path / "config.json")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        models.from_pretrained(tmp_path)


def test_safetensors_by_another_name_and_a_config_for_weights(wan: Path, tmp_path: Path) -> None:
    shutil.copyfile(wan / SINGLE, tmp_path / "wan.bin")
    check_equal(values(tmp_path / "wan.bin"), values(wan))
    with pytest.raises(CheckpointError, match=r"config\.json holds no weights; give the folder"):
        models.from_pretrained(wan / "config.json")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="is no file"):
        models.from_pretrained(tmp_path / "pipe")


def test_a_byte_order_mark_is_no_part_of_a_config(wan: Path, tmp_path: Path) -> None:
    shutil.copytree(wan, tmp_path, dirs_exist_ok=True)
    config = (tmp_path / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + config)
    assert read_json(tmp_path / "config.json") == json.loads(config)
    check_equal(values(tmp_path), values(wan))


def linked(source: Path, folder: Path) -> Path:
    """A folder whose weights are links to those of another."""
    folder.mkdir()
    for path in source.iterdir():
        if path.name == "config.json":
            shutil.copyfile(path, folder / path.name)
        else:
            (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.parametrize("save", [{}, {"max_shard_size": "20KB"}, {"safe_serialization": False}])
def test_links_out_of_the_folder_are_followed_when_that_is_asked_for(save: dict[str, Any], tmp_path: Path) -> None:
    small_wan().save_pretrained(tmp_path / "store", **save)
    folder = linked(tmp_path / "store", tmp_path / "links")
    asked: tuple[Callable[[], object], ...] = (
        lambda: models.from_pretrained(folder),
        lambda: convert(folder, tmp_path / "out"),
        lambda: read_weights(folder),
    )
    for load in asked:
        with pytest.raises(CheckpointError, match=r"is a link to .*store.* --follow-links, or follow_links=True"):
            load()
    expected = values(tmp_path / "store")
    check_equal(values(folder, follow_links=True), expected)
    check_equal(values(convert(folder, tmp_path / "out", follow_links=True)), expected)
    with pytest.raises(CheckpointError, match="--follow-links"):
        VideoPipeline.load(folder)
    assert VideoPipeline.load(folder, follow_links=True).family.name.startswith("Wan 2.1")
    (folder / "config.json").unlink()  # files of whoever they are
    with pytest.raises(CheckpointError, match="--follow-links"):
        models.from_pretrained(folder)
    check_equal(values(folder, follow_links=True), expected)


def test_a_vae_of_links(vae: AutoencoderKLWan, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path / "store")
    folder = linked(tmp_path / "store", tmp_path / "vae")
    with pytest.raises(CheckpointError, match="--follow-links"):
        load_vae(folder)
    load_vae(folder, follow_links=True)
    latents = np.zeros((1, 4, 1, 2, 2), np.float32)
    with pytest.raises(CheckpointError, match="--follow-links"):
        decode_latents(folder, latents)
    assert decode_latents(folder, latents, follow_links=True).shape == (1, 3, 1, 16, 16)


def test_a_hub_cache_links_to_its_own_blobs_and_no_further(wan: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--wan--small"
    snapshot = cache / "snapshots" / "abc" / "transformer"
    snapshot.mkdir(parents=True)
    shutil.copyfile(wan / "config.json", snapshot / "config.json")
    (snapshot / SINGLE).symlink_to(Path("../../../blobs/123"))
    with pytest.raises(CheckpointError, match=r"is a link to .*blobs/123, which does not exist; download it again"):
        models.from_pretrained(snapshot)
    (tmp_path / "disk").mkdir()
    (cache / "blobs").symlink_to(tmp_path / "disk")  # blobs on another disk
    shutil.copyfile(wan / SINGLE, tmp_path / "disk" / "123")
    check_equal(values(snapshot.parent), values(wan))
    (snapshot / SINGLE).unlink()
    shutil.copyfile(wan / SINGLE, cache / "other")
    (snapshot / SINGLE).symlink_to(cache / "other")
    with pytest.raises(CheckpointError, match="--follow-links"):
        models.from_pretrained(snapshot)


def test_a_file_that_changes_while_it_is_read(wan: Path, tmp_path: Path) -> None:
    shutil.copyfile(wan / SINGLE, tmp_path / "x.safetensors")
    tensors = read_weights(tmp_path / "x.safetensors")
    save_file({"x": load_file(wan / SINGLE)["proj_out.bias"]}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read any more"):
        tensors["blocks.0.ffn.net.0.proj.weight"].read()
