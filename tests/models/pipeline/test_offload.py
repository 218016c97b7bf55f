"""Weights that wait in the memory of the host, bit for bit the same latents. On a CPU that memory is the device's."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from models.pipeline import offload
from models.pipeline.mesh import is_stacked, make_mesh
from models.pipeline.offload import default_offload, waits
from models.pipeline.video import VideoPipeline
from tests.models.pipeline.test_video import CASES, CONFIG, SIZE

NAMES = ("Wan 2.2 A14B", "HunyuanVideo", "CogVideoX1.5, DDIM")


@pytest.fixture(scope="module", params=NAMES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(a pipeline folder, embeddings, guidance)."""
    create, guidance = CASES[request.param]
    folder, embeddings, *_ = create(tmp_path_factory.mktemp("made"))
    return folder, embeddings, guidance


@pytest.mark.parametrize("how", ["layers", "experts"])
def test_the_latents_are_the_same(how: Any, made: Any) -> None:
    folder, embeddings, guidance = made
    load = lambda **options: VideoPipeline.load(folder, "float32", **options)
    if how == "experts" and not (folder / "transformer_2").exists():
        with pytest.raises(ValueError, match="offload='experts' is for models of two experts"):
            load(offload=how)
        return
    described = VideoPipeline.describe(folder, "float32").with_offload(how)
    run = lambda pipeline, program=None, **options: pipeline.sample(
        embeddings, CONFIG, size=SIZE, guidance=guidance, program=program, **options
    )
    pipeline, plain = load(offload=how), load()
    for expert in pipeline.experts:
        for path, leaf in nnx.to_flat_state(nnx.state(expert)):
            assert waits(leaf[...]) == (how == "experts" or is_stacked(path))
    for dense in (True, False):
        plan = described.plan(embeddings, CONFIG, size=SIZE, guidance=guidance)
        program, alone = described.compile(plan, CONFIG, dense=dense), plain.compile(plan, CONFIG, dense=dense)
        expected = run(plain, alone, dense=dense).latents
        for _ in range(2):  # what was fetched is not lost
            np.testing.assert_array_equal(run(pipeline, program, dense=dense).latents, expected)
        assert program.need.weights < alone.need.weights * (0.6 if how == "experts" else 0.9)
        assert program.need.operands == alone.need.operands


def test_a_layer_is_fetched_where_it_runs(made: Any) -> None:
    folder, embeddings, guidance = made
    described = VideoPipeline.describe(folder, "float32").with_offload("layers")
    seen = []
    put = jax.device_put
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_put", lambda x, *rest: (seen.append((x.shape, *rest)), put(x, *rest))[1])
        plan = described.plan(embeddings, CONFIG, size=SIZE, guidance=guidance)
        described.compile(plan, CONFIG, dense=True)
    to_device = [shape for shape, *where in seen if where == [jax.memory.Space.Device]]
    stacked = [leaf for path, leaf in nnx.to_flat_state(nnx.state(described.experts[0])) if is_stacked(path)]
    assert sorted(to_device) == sorted(leaf.shape[1:] for leaf in stacked)


def test_when_experts_take_turns_by_themselves() -> None:
    assert default_offload(2, 57 << 30, 79 << 30) == "experts"
    assert default_offload(2, 57 << 30, 139 << 30) == "none"
    assert default_offload(1, 57 << 30, 79 << 30) == "none"
    assert default_offload(2, 57 << 30, None) == "none"


def test_what_cannot_wait_is_named(made: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder, *_ = made
    with pytest.raises(ValueError, match="offload='disk' must be one of none, experts, layers"):
        VideoPipeline.load(folder, offload="disk")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is for one device; on a mesh take weights='sharded'"):
        VideoPipeline.load(folder, offload="layers", mesh=make_mesh())
    monkeypatch.setattr(offload, "_HOST", "elsewhere")
    with pytest.raises(NotImplementedError, match="has no elsewhere memory"):
        VideoPipeline.load(folder, offload="layers")
