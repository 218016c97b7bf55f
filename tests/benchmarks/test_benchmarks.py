"""The benchmarks run, on small sizes, and write the rows they promise."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from adaspa_jax import SparseConfig
from benchmarks import cpu, end_to_end, few_steps, probe, quality
from tests.models.transformers import test_hunyuan_video, test_wan
from tests.models.vae import test_vae


@pytest.fixture
def tiny_model(tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        quality.MODELS, "embedded", dataclasses.replace(quality.MODELS["embedded"], checkpoint=tiny_pipeline)
    )


def test_quality_compares_variants_at_equal_work(tiny_model: None, tmp_path: Path) -> None:
    names, levels = ["AdaSpa", "default", "preset fast"], [0.9]
    file, picture = tmp_path / "deep/rows.json", tmp_path / "docs/front.png"
    how = {"variant": names, "work_": levels, "steps": 5, "prompts": 2, "seeds": 2}
    quality.main(model=["embedded"], json=file, picture=picture, **how)
    rows = json.loads(file.read_text())
    assert [(row["variant"], row["level"]) for row in rows] == [
        ("AdaSpa", 0.9),
        ("default", 0.9),
        ("preset fast", None),
    ]
    for row in rows:
        assert row["level"] is None or row["level"] == pytest.approx(row["work"])
        assert len(row["of_video"]["psnr_db"]) == 4
        assert row["psnr_db"] == pytest.approx(np.mean(row["of_video"]["psnr_db"]))
        assert (row["stand_ins"] > 0) == (row["variant"] != "AdaSpa")
        if row["variant"] == "AdaSpa":
            assert row["gain_db"] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_quality_counts_work() -> None:
    config = SparseConfig.paper(token_order="cube")
    layout = config.layout((10, 16, 16), 0)  # 40 blocks: 8 kept
    assert quality.work(config, layout) == pytest.approx((10 + 0.5 + 0.5 + 40 * 0.2) / 50)
    pooled = dataclasses.replace(config, compensation="pooled")
    # The first search pays a sparse step, the second a sixteenth of a dense one, to fit strengths.
    assert quality.work(pooled, layout) == pytest.approx((11 + 41 * (0.2 + 0.8 / 64) + 1 / 16) / 50)
    exact = dataclasses.replace(config, lse_cache=False)
    assert quality.work(exact, layout) == pytest.approx(quality.work(config, layout) + 0.5 / 50)
    below, above = quality.at_work(pooled, layout, quality.work(config, layout))
    assert (below.budget(layout).base, above.budget(layout).base) == (7, 8)
    (same,) = quality.at_work(config, layout, quality.work(config, layout))
    assert same.budget(layout).base == 8
    assert quality.at_work(config, layout, 0.2) == []
    assert quality.at_work(config, layout, 2.0) == []
    assert quality.at_work(config, layout, float("nan")) == []


def test_quality_says_where_nothing_works(tiny_model: None) -> None:
    with pytest.raises(ValueError, match=r"no variant of default works at 0.0001, 9 of dense"):
        quality.main(model=["embedded"], variant=["default"], work_=[1e-4, 9.0], steps=2, prompts=1, seeds=1)


def test_quality_has_each_level_once(tiny_model: None) -> None:
    bench = quality.load(quality.MODELS["embedded"], "float32", 1, 1, None)
    assert len(quality.default_levels(bench, 1)) == 1
    levels = quality.default_levels(bench, 50)
    assert levels == sorted(set(levels))
    assert len(levels) > 1


def test_quality_interpolates_between_neighbours() -> None:
    row = lambda work, psnr: {
        "variant": "default",
        "work": work,
        "psnr_db": float(np.mean(psnr)),
        "of_video": {"psnr_db": psnr},
    }
    infinite = float("inf")
    found = quality.interpolated([row(0.3, [20.0, 30.0, infinite]), row(0.4, [24.0, 38.0, infinite])], 0.325)
    assert found["of_video"]["psnr_db"] == pytest.approx([21.0, 32.0, infinite])
    assert found["work"] == pytest.approx(0.325)
    assert (found["variant"], found["level"]) == ("default", 0.325)
    ours = quality.interpolated([row(0.3, [20.0, 30.0]), row(0.4, [24.0, 38.0])], 0.325)
    rows = [ours, ours | {"variant": "AdaSpa", "of_video": {"psnr_db": [20.0, 30.0]}}]
    quality.add_gains(rows)
    assert [row["gain_db"] for row in rows] == pytest.approx([1.5, 0])
    assert rows[0]["gain_error"] == pytest.approx(0.5)


@pytest.mark.parametrize("option", ["model", "variant"])
def test_quality_names_what_it_does_not_know(option: str) -> None:
    with pytest.raises(ValueError, match=f"--{option} 'best' is unknown; choose of: "):
        quality.main(**{option: ["best"]})


def test_probe_says_how_hard_a_model_is(tiny_model: None, tmp_path: Path) -> None:
    probe.main(model="embedded", json=tmp_path / "probe.json", steps=4, prompts=2)
    found, *rows = json.loads((tmp_path / "probe.json").read_text())
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(0.2 < row["recall"] <= 1 for row in rows)
    assert rows[0]["velocity_change"] is None
    assert all(row["velocity_change"] > 0 for row in rows[1:])
    assert found["mean recall"] == pytest.approx(np.mean([row["recall"] for row in rows]))


def test_cpu_measures_what_it_prints() -> None:
    row = cpu.measure(512, repeats=1)
    assert row["density"] == pytest.approx(2 / 8)
    assert row["sparse_over_torch"] == pytest.approx(row["torch_seconds"] / row["sparse_seconds"])
    assert row["sparse_over_dense"] == pytest.approx(row["dense_seconds"] / row["sparse_seconds"])
    assert row["sparse_gflops"] == pytest.approx(row["density"] * 4e-9 * 4 * 512**2 * 64 / row["sparse_seconds"])


def test_few_steps_writes_its_rows(tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = quality.Model(tiny_pipeline, quality.MODELS["embedded"].prompts[:1])
    monkeypatch.setitem(quality.MODELS, "embedded", tiny)
    monkeypatch.setattr(few_steps, "SCHEDULES", {4: ((2,), (1, 2))})
    few_steps.main(json=tmp_path / "rows.json", sparsity=0.5)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["search_steps"] for row in rows] == [[2], [1, 2]]
    assert all(row["psnr_db"] > 10 for row in rows)


SMALL = {
    "HunyuanVideo 13B": {
        "options": test_hunyuan_video.SMALL,
        "vae_options": test_vae.TINY["hunyuan"][1],
        "embeddings": {"prompt_embeds": (8, 24), "prompt_attention_mask": (8,), "pooled_prompt_embeds": (16,)},
    },
    "Wan 2.2 A14B": {
        "options": test_wan.SMALL,
        "vae_options": test_vae.TINY["wan2.1"][1],
        "embeddings": dict.fromkeys(("prompt_embeds", "negative_prompt_embeds"), (8, 24)),
    },
}


@pytest.mark.parametrize("name", SMALL)
def test_end_to_end_goes_from_a_folder_to_an_mp4(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(end_to_end.PIPELINES[name], **SMALL[name])
    monkeypatch.setitem(end_to_end.PIPELINES, name, small)
    end_to_end.main(name, folder=tmp_path, write_only=True)
    pipeline = end_to_end.written(name, tmp_path)  # is there, and not written again
    assert (pipeline / "transformer_2").exists() == (small.experts == 2)
    size = ["--frames", 5, "--height", 32, "--width", 32, "--steps", 4, "--block-size", 16, "--compile-cache", "off"]
    row = end_to_end.sampled(pipeline, tmp_path / "out", *size)
    assert (row["frames"], row["steps"]) == (5, 4)
    assert min(row["mp4_bytes"], row["host_peak_bytes"]) > 0
    assert row["total_seconds"] > row["load_seconds"] + row["adaspa_seconds"] + row["decode_seconds"]


def test_end_to_end_says_early_what_cannot_be(tmp_path: Path) -> None:
    for options, message in (
        ({"model": "x"}, "--model 'x' must be one of HunyuanVideo 13B, Wan 2.2 A14B"),
        ({"write_only": True}, "--write-only needs --folder"),
        ({"mesh": "x=2"}, "'x=2' is no axis"),
        ({"weights": "sharded"}, "is for several devices; give --mesh"),
        ({"offload": "foo"}, "offload='foo' must be one of"),
        ({"offload": "experts"}, "is for models of two experts"),
    ):
        with pytest.raises(ValueError, match=message):
            end_to_end.main(**options)
    foreign = tmp_path / "hunyuanvideo-13b"
    foreign.mkdir()
    for written in ({}, {"model_index.json": '{"_class_name": "WanPipeline"}', end_to_end.EMBEDDINGS: ""}):
        for name, text in written.items():
            (foreign / name).write_text(text)
        with pytest.raises(ValueError, match=r"is no whole HunyuanVideo 13B of this benchmark; delete it"):
            end_to_end.main(folder=tmp_path, write_only=True)
    with pytest.raises(ValueError, match=r"models.sample ended with 2: what it said is above"):
        end_to_end.sampled(foreign, tmp_path / "out")
