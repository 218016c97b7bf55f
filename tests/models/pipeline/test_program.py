"""One compiled program serves every prompt, seed and number of steps, and is there before the weights are."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaspa_jax import SparseConfig
from models.pipeline.guidance import Guidance
from models.pipeline.video import VideoPipeline
from models.schedulers import CogVideoXDPM
from tests.models.pipeline.test_video import CASES, CONFIG, SIZE

DPM = "CogVideoX1.5, DDIM"
OPTIONS = {"size": SIZE, "guidance": Guidance(4.0)}


@pytest.fixture(scope="module", params=["Wan 2.2 A14B", DPM])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    folder, embeddings, *_ = CASES[request.param][0](tmp_path_factory.mktemp("made"))
    return request.param, folder, embeddings


def test_a_program_compiled_from_shapes_serves_all(made: tuple[str, Path, Any]) -> None:
    name, folder, embeddings = made
    described, loaded = VideoPipeline.describe(folder, "float32"), VideoPipeline.load(folder, "float32")
    if name == DPM:  # draws noise in every step, of the seed
        described, loaded = (dataclasses.replace(x, scheduler=CogVideoXDPM()) for x in (described, loaded))
    plan = described.plan(embeddings, CONFIG, **OPTIONS)
    program = described.compile(plan, CONFIG)
    if name != DPM:
        assert program.steps[0] is program.steps[1]
    other = {key: x + 1 for key, x in embeddings.items()}
    few = dataclasses.replace(CONFIG, steps=4)
    seen: list[int] = []
    for given, config, seed in ((embeddings, CONFIG, 0), (other, CONFIG, 2**40), (embeddings, few, 1)):
        run = loaded.sample(given, config, seed=seed, program=program, progress=seen.append, **OPTIONS)
        alone = loaded.sample(given, config, seed=seed, **OPTIONS)
        np.testing.assert_array_equal(run.latents, alone.latents)
        assert (run.compile_seconds, alone.compile_seconds > 0) == (0, True)
        assert [dataclasses.asdict(x) for x in run.reports] == [dataclasses.asdict(x) for x in alone.reports]
    assert seen == [*range(1, 9), *range(1, 9), *range(1, 5)]


def test_experts_that_differ_have_programs_of_their_own(tmp_path: Path) -> None:
    folder, embeddings, *_ = CASES["Wan 2.2 A14B"][0](tmp_path)
    high, low = (VideoPipeline.describe(folder, dtype) for dtype in ("float32", "bfloat16"))
    mixed = dataclasses.replace(high, experts=(high.experts[0], low.experts[1]))
    config = SparseConfig(steps=4, block_size=16)
    program = mixed.compile(mixed.plan(embeddings, config, **OPTIONS), config, dense=True)
    assert program.steps[0] is not program.steps[1]
