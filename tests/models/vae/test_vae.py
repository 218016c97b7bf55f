"""VAE decoders against diffusers: tiny random weights, float32, odd sizes; full sizes by key and shape."""

import copy
import json
import sys
from unittest.mock import Mock, call

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLHunyuanVideo, AutoencoderKLWan
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from models.checkpoint.safetensors_folder import SINGLE, CheckpointError
from models.vae import base
from models.vae.cogvideox_torch import decode_with_diffusers
from models.vae.load import WHOLE, Tiling, abstract_vae, load_vae, plan_vae
from models.vae.tiling import space_windows, time_windows
from tests.matrix import in_matrix
from tests.relative_error import relative_error

WAN_SCALE = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.7, 2.0, 1.0]}
WAN22 = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
TINY = {
    "hunyuan": (
        AutoencoderKLHunyuanVideo,
        {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "latent_channels": 4, "layers_per_block": 1},
    ),
    "wan2.1": (AutoencoderKLWan, {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1, **WAN_SCALE}),
    "wan2.2": (AutoencoderKLWan, {"base_dim": 4, "decoder_base_dim": 8, "z_dim": 4, **WAN_SCALE, **WAN22}),
}
FULL = {
    "hunyuan": (AutoencoderKLHunyuanVideo, {}),
    "wan2.1": (AutoencoderKLWan, {}),
    "wan2.2": (
        AutoencoderKLWan,
        {
            "base_dim": 160,
            "decoder_base_dim": 256,
            "z_dim": 48,
            "latents_mean": [0.0] * 48,
            "latents_std": [1.0] * 48,
            **WAN22,
        },
    ),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """name -> (diffusers' VAE, its folder, ours)."""
    made = {}
    for name, (create, config) in TINY.items():
        torch.manual_seed(4)  # of the kernels; in some random models the middle attention weighs more
        theirs = create(**config).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in theirs.parameters():
                if weight.ndim == 1 or weight.shape[1:].numel() == 1:  # norms and biases are ones and zeros at first
                    weight.add_(torch.randn(weight.shape, generator=generator) / 10)
        folder = tmp_path_factory.mktemp(name)
        theirs.save_pretrained(folder / "vae")
        made[name] = (theirs, folder, load_vae(folder))
    return made


def latents_of(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def decode_theirs(theirs, name, latents):
    """With the scaling that the pipelines undo, as they write it."""
    z = torch.from_numpy(latents)
    if name == "hunyuan":
        z = z / theirs.config.scaling_factor
    else:
        mean = torch.tensor(theirs.config.latents_mean).view(1, -1, 1, 1, 1)
        std = 1.0 / torch.tensor(theirs.config.latents_std).view(1, -1, 1, 1, 1)
        z = z / std + mean
    with torch.no_grad():
        return theirs.decode(z).sample.clamp(-1, 1).numpy()


@pytest.mark.parametrize("name", TINY)
def test_decoding_equals_diffusers(tiny, name):
    theirs, _, ours = tiny[name]
    latents = latents_of(2, 4, 3, 3, 5)
    video = ours.decode(latents)
    assert video.dtype == np.float32
    assert video.shape == (2, 3, 9, 3 * ours.space_ratio, 5 * ours.space_ratio)
    assert relative_error(video, decode_theirs(theirs, name, latents)) < 1e-5


@pytest.mark.parametrize("name", TINY)
def test_one_frame(tiny, name):
    theirs, _, ours = tiny[name]
    latents = latents_of(1, 4, 1, 3, 2)
    assert relative_error(ours.decode(latents), decode_theirs(theirs, name, latents)) < 1e-5


@pytest.mark.parametrize(("name", "all_frames"), [("wan2.1", (4, 12)), *in_matrix(("wan2.2", (8,)))])
def test_wan_in_pieces_of_time_equals_the_whole(tiny, name, all_frames):
    """The first frame, then pieces of one, two or three latent frames, the last one padded; two programs each."""
    _, _, ours = tiny[name]
    latents = latents_of(1, 4, 6, 3, 3)
    # In one call, which takes no cache at all.
    graph, weights = nnx.split(ours)
    whole = np.clip(base.decode_wave(graph, None, weights, ours.unscale(jnp.asarray(latents)), None)[0][0], -1, 1)
    for frames in all_frames:
        before = base.decode_wave._cache_size()
        progress = Mock()
        video = ours.decode(latents, Tiling(frames=frames, frame_stride=4), progress)
        pieces = 1 + -(-5 // (frames // 4))
        assert progress.call_args_list == [call(i + 1, pieces) for i in range(pieces)]
        assert relative_error(video[0], whole) < 1e-5
        assert base.decode_wave._cache_size() - before <= 2


def test_hunyuan_in_pieces_equals_diffusers_where_its_pieces_are_the_same(tiny):
    """Blended in time and width: all but the last pieces, which diffusers cuts short."""
    theirs, _, ours = tiny["hunyuan"]
    latents = latents_of(1, 4, 5, 4, 8)
    before = base.decode_wave._cache_size()
    video = ours.decode(latents, Tiling(size=32, stride=16, frames=8, frame_stride=4))
    assert base.decode_wave._cache_size() - before == 1
    theirs.enable_tiling(32, 32, 8, 16, 16, 4)
    try:
        expected = decode_theirs(theirs, "hunyuan", latents)
    finally:
        theirs.disable_tiling()
        theirs.tile_sample_min_num_frames, theirs.tile_sample_stride_num_frames = 16, 12
    same = np.s_[:, :, :13, :16, :48]
    assert relative_error(video[same], expected[same]) < 1e-5
    assert relative_error(video, ours.decode(latents, WHOLE)) > 1e-2  # the group norms see another piece


@pytest.mark.parametrize("name", [*in_matrix("wan2.1"), "wan2.2"])
def test_wan_in_tiles_equals_diffusers_where_its_tiles_are_the_same(tiny, name):
    theirs, _, ours = tiny[name]
    ratio = ours.space_ratio
    latents = latents_of(1, 4, 2, 4, 8)
    video = ours.decode(latents, Tiling(size=4 * ratio, stride=2 * ratio))
    theirs.enable_tiling(4 * ratio, 4 * ratio, 2 * ratio, 2 * ratio)
    try:
        expected = decode_theirs(theirs, name, latents)
    finally:
        theirs.disable_tiling()
    # Wan 2.2 is blended there before its patches are taken apart: two pixels share one weight. Pure parts are the same.
    columns = np.r_[: 6 * ratio] if name == "wan2.1" else np.r_[: 2 * ratio]
    assert relative_error(video[..., : 2 * ratio, columns], expected[..., : 2 * ratio, columns]) < 1e-5


def test_wan_in_tiles_equals_the_whole_away_from_seams(tiny):
    """Exactly, but for the middle attention, which sees its tile alone: taken out here. Its own part is small."""
    _, folder, _ = tiny["wan2.1"]
    ours = load_vae(folder)
    latents = latents_of(1, 4, 1, 2, 48)
    tiling = Tiling(size=32 * 8, stride=24 * 8)
    whole, tiles = ours.decode(latents, WHOLE), ours.decode(latents, tiling)
    with_attention = relative_error(tiles[..., : 16 * 8], whole[..., : 16 * 8])
    attention = ours.decoder.mid_block.attentions[0]
    attention.proj.kernel[...] = jnp.zeros_like(attention.proj.kernel[...])
    whole, tiles = ours.decode(latents, WHOLE), ours.decode(latents, tiling)
    for columns in (np.r_[: 16 * 8], np.r_[32 * 8 : 48 * 8]):  # 12 latents and more from where the other tile ends
        assert relative_error(tiles[..., columns], whole[..., columns]) < 1e-5
    assert with_attention < 0.05
    assert 1e-6 < relative_error(tiles, whole) < 1e-3


@given(size=st.integers(1, 70), tile=st.integers(1, 16), stride=st.integers(1, 16), ratio=st.sampled_from([1, 4, 8]))
def test_windows_cover_an_axis_with_weights_that_add_up_to_one(size, tile, stride, ratio):
    stride = min(stride, tile)
    space = space_windows(size, ratio, Tiling(size=tile * ratio, stride=stride * ratio))
    time = time_windows(size, ratio, Tiling(frames=tile * ratio, frame_stride=stride * ratio))
    for windows, samples, length in ((space, size * ratio, tile), (time, (size - 1) * ratio + 1, tile + 1)):
        total = np.zeros(samples)
        for window in windows:
            assert window.samples.stop - window.samples.start == len(window.weight)
            assert window.latents.stop - window.latents.start == min(size, length)
            total[window.samples] += window.weight
        np.testing.assert_allclose(total, 1, atol=1e-6)
        assert windows[-1].latents.stop == size


@pytest.mark.parametrize("name", FULL)
def test_every_key_of_the_full_size_is_accounted_for(name):
    create, config = FULL[name]
    with torch.device("meta"):
        theirs = create(**config)
    ours = abstract_vae(json.loads(theirs.to_json_string()), jnp.bfloat16)
    tensors = theirs.state_dict()
    used = plan_vae(tensors, ours)
    decoder = {key for key in tensors if key.startswith(("decoder.", "post_quant_conv."))}
    assert set(used.values()) == decoder
    assert len(used) == len(decoder)
    leaves = dict(nnx.to_flat_state(nnx.state(ours, nnx.Param)))
    assert sum(leaf.size for leaf in leaves.values()) == sum(tensors[key].numel() for key in decoder)
    assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("name", TINY)
def test_bfloat16_is_as_close_to_float32_as_diffusers_is(tiny, name):
    theirs, folder, ours = tiny[name]
    latents = latents_of(1, 4, 1, 3, 2)
    low = load_vae(folder / "vae", jnp.bfloat16)
    assert low.dtype == jnp.bfloat16
    exact, unscaled = ours.decode(latents), torch.from_numpy(np.array(ours.unscale(jnp.asarray(latents))))
    with torch.no_grad():
        their_low = copy.deepcopy(theirs).bfloat16().decode(unscaled.bfloat16()).sample.clamp(-1, 1).float()
    assert relative_error(low.decode(latents), exact) < 1.5 * relative_error(their_low, exact)


def copy_of(tiny, tmp_path, name, change_weights=None, **changes):
    _, folder, _ = tiny[name]
    config = json.loads((folder / "vae" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    tensors = load_file(folder / "vae" / SINGLE)
    if change_weights is not None:
        change_weights(tensors)
    save_file(tensors, tmp_path / SINGLE)
    return tmp_path


def test_a_checkpoint_without_its_encoder_loads(tiny, tmp_path):
    def drop(tensors):
        for key in [key for key in tensors if key.startswith(("encoder.", "quant_conv."))]:
            del tensors[key]

    load_vae(copy_of(tiny, tmp_path, "wan2.1", drop))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("decoder.conv_in.weight"), "1 missing keys: decoder.conv_in.weight"),
        (lambda t: t.update({"decoder.extra.weight": torch.zeros(1)}), "1 unexpected keys: decoder.extra.weight"),
        (lambda t: t.update({"quantconv.weight": torch.zeros(1)}), "1 unexpected keys: quantconv.weight"),
        (lambda t: t.update({"decoder.conv_in.bias": torch.zeros(3)}), r"1 misshapen keys: decoder.conv_in.bias \[3\]"),
        (lambda t: t["decoder.conv_in.bias"].fill_(float("nan")), "decoder.conv_in.bias.* NaN"),
    ],
)
def test_weights_that_do_not_fit(tiny, tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        load_vae(copy_of(tiny, tmp_path, "wan2.1", change))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("wan2.1", {"_class_name": "AutoencoderKL"}, "'AutoencoderKL' is not supported; supported: .*KLWan"),
        ("wan2.1", {"_class_name": None}, "None is not supported; supported: .*KLHunyuanVideo"),
        ("wan2.1", {"_class_name": "AutoencoderKLCogVideoX"}, "supported: .*KLWan.*models.decode.*`torch` extra"),
        ("wan2.1", {"new_option": 1}, "new_option"),
        ("wan2.1", {"attn_scales": [1.0]}, "attn_scales"),
        ("wan2.1", {"latents_mean": [0.0]}, "latents_mean must be 4 numbers"),
        ("wan2.1", {"latents_std": ["a"] * 4}, "latents_std must be 4 numbers"),
        ("wan2.1", {"dim_mult": [1, 2, 4]}, "temperal_downsample"),
        ("wan2.1", {"dim_mult": 3}, "AutoencoderKLWan"),
        ("wan2.1", {"scale_factor_spatial": 16}, "scale_factor_spatial=16 does not fit the blocks, which make 8"),
        ("wan2.1", {"z_dim": 0}, "z_dim=0"),
        ("wan2.2", {"patch_size": 3}, "out_channels=12"),
        ("hunyuan", {"act_fn": "gelu"}, "act_fn='gelu' is not ported"),
        ("hunyuan", {"temporal_compression_ratio": 8}, "temporal_compression_ratio=8"),
        ("hunyuan", {"up_block_types": ["UpBlock"] * 4}, "up_block_types"),
        ("hunyuan", {"block_out_channels": [6, 8, 16, 16]}, "multiples of 4 groups"),
        ("hunyuan", {"spatial_compression_ratio": 6}, "spatial_compression_ratio=6"),
        ("hunyuan", {"scaling_factor": 0}, "scaling_factor=0"),
    ],
)
def test_configs_that_are_not_supported(tiny, tmp_path, name, change, message):
    with pytest.raises(CheckpointError, match=message):
        load_vae(copy_of(tiny, tmp_path, name, **change))


def test_a_folder_without_a_vae(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither config\.json nor vae/config\.json"):
        load_vae(tmp_path)


def test_latents_and_tilings_that_do_not_fit(tiny):
    _, _, ours = tiny["wan2.1"]
    for shape in ((4, 2, 3, 3), (1, 5, 2, 3, 3), (1, 4, 0, 3, 3)):
        with pytest.raises(ValueError, match=r"latents must be \[B, 4, F, H, W\]; got \["):
            ours.decode(np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match="multiples of 8"):
        ours.decode(latents_of(1, 4, 1, 3, 30), Tiling(size=100, stride=80))
    with pytest.raises(ValueError, match="stride=300 must be positive and at most the tile's 256"):
        Tiling(stride=300)
    with pytest.raises(ValueError, match="stride=0"):
        Tiling(frame_stride=0)
    with pytest.raises(ValueError, match="multiples of 4"):
        tiny["hunyuan"][2].decode(latents_of(1, 4, 9, 2, 2), Tiling(frames=10, frame_stride=5))


def test_cogvideox_decodes_through_diffusers(tmp_path):
    theirs = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        layers_per_block=1,
        scaling_factor=0.7,
        invert_scale_latents=True,
    ).eval()
    theirs.save_pretrained(tmp_path / "vae")
    latents = latents_of(1, 4, 3, 3, 5)
    with torch.no_grad():
        expected = theirs.decode(torch.from_numpy(latents) / 0.7).sample.clamp(-1, 1)
    video = decode_with_diffusers(tmp_path, jnp.asarray(latents))
    assert video.dtype == np.float32
    assert relative_error(video, expected) < 1e-5
    with pytest.raises(ValueError, match=r"latents must be \[B, 4, F, H, W\]; got \[1, 3, 4"):
        decode_with_diffusers(tmp_path, latents.swapaxes(1, 2))


def test_only_cogvideox_decodes_through_diffusers(tiny):
    with pytest.raises(CheckpointError, match="'AutoencoderKLWan' is no AutoencoderKLCogVideoX; use load_vae"):
        decode_with_diffusers(tiny["wan2.1"][1], latents_of(1, 4, 1, 2, 2))


def test_without_pytorch_the_error_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLCogVideoX"}))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install 'adaspa_jax\[torch\]'"):
        decode_with_diffusers(tmp_path, latents_of(1, 16, 1, 2, 2))


@pytest.mark.parametrize("name", TINY)
def test_need_is_that_of_the_largest_piece(name: str) -> None:
    create, options = TINY[name]
    vae = abstract_vae({"_class_name": create.__name__} | options, jnp.float32)
    shape = (1, vae.channels, 5, 16, 24)
    weights = sum(x.size * 4 for x in jax.tree.leaves(nnx.state(vae)))
    small, large = (vae.need(shape, Tiling(size, size * 3 // 4)) for size in (64, 128))
    assert weights < small < large < vae.need(shape, WHOLE)
    if name != "hunyuan":  # a piece behind the first holds what came before it, whatever its length
        frames = [vae.need((1, vae.channels, n, 16, 24)) for n in (1, 2)]
        assert frames[1] > 1.2 * frames[0]
    with pytest.raises(ValueError, match=r"latents must be \[B, "):
        vae.need((1, vae.channels + 1, 5, 16, 24))
