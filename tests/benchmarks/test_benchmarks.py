"""The benchmarks run, on small sizes, and write the rows they promise."""

import json
from pathlib import Path

import pytest

from adaspa_jax import SparseConfig
from benchmarks import cpu, few_steps, quality
from tests.matrix import in_matrix


@pytest.mark.parametrize(("sparsities", "count"), [((0.5,), 2), *in_matrix(((0.5, 0.8), 8))])
def test_quality_writes_its_rows(
    sparsities: tuple[float, ...], count: int, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "CHECKPOINT", tiny_pipeline)
    monkeypatch.setattr(quality, "SPARSITIES", sparsities)
    monkeypatch.setattr(quality, "PROMPTS", quality.PROMPTS[:2])
    quality.main(json=tmp_path / "deep" / "rows.json", steps=3)
    rows = json.loads((tmp_path / "deep" / "rows.json").read_text())
    keys = ["sparsity", "token_order", "head_adaptive", "lse_cache", "psnr_db", "ssim", "recall", "density"]
    assert all(list(row) == keys for row in rows)
    switches = [tuple(row.values())[:4] for row in rows]
    assert len(switches) == len(set(switches)) == count
    assert {(s, o) for s, o, *_ in switches} == {(s, o) for s in sparsities for o in ("cube", "raster")}
    for switched_off in (any(not tiers for *_, tiers, _ in switches), any(not cache for *_, cache in switches)):
        assert switched_off == (0.8 in sparsities)  # at the default sparsity alone


def test_full_quality_takes_every_combination() -> None:
    configs = list(quality.configs(50, full=True))
    assert len(set(configs)) == len(configs) == 32


def test_cpu_measures_what_it_prints() -> None:
    row = cpu.measure(512, repeats=1)
    assert row["density"] == pytest.approx(2 / 8)
    assert row["sparse_over_torch"] == pytest.approx(row["torch_seconds"] / row["sparse_seconds"])
    assert row["sparse_over_dense"] == pytest.approx(row["dense_seconds"] / row["sparse_seconds"])
    assert row["sparse_gflops"] == pytest.approx(row["density"] * 4e-9 * 4 * 512**2 * 64 / row["sparse_seconds"])


def test_few_steps_writes_its_rows(tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_steps, "CHECKPOINT", tiny_pipeline)
    monkeypatch.setattr(few_steps, "PROMPTS", few_steps.PROMPTS[:1])
    monkeypatch.setattr(few_steps, "SCHEDULES", {4: ((2,), (1, 2))})
    few_steps.main(json=tmp_path / "rows.json", sparsity=0.5)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["search_steps"] for row in rows] == [[2], [1, 2]]
    assert all(row["psnr_db"] > 10 for row in rows)
    work = few_steps.attention(SparseConfig(steps=4, search_steps=(2, 3)), 0.25)
    assert work == pytest.approx((1 + 1.5 + 0.75 + 0.25) / 4)
