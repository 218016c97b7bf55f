"""The checkpoint in the repository, the data it was trained on, and its training script."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.utils import logging as diffusers_logging

import models
from models.demo import train
from models.demo.clips import FRAMES, RGB, SIZE, STEP, render
from models.demo.presets import PRESETS, Stage
from models.demo.words import VOCABULARY, WordEncoder
from tests.models.conftest import TINY

FOLDER = Path(train.__file__).parent / "checkpoint"
diffusers_logging.set_verbosity_error()


def test_diffusers_loads_it_and_our_port_agrees() -> None:
    reference = HunyuanVideoTransformer3DModel.from_pretrained(FOLDER / "transformer", torch_dtype=torch.float32)
    text = WordEncoder.load(FOLDER / "text_encoder").encode(["green ring moving down", "red circle"])
    rng = np.random.default_rng(0)
    inputs = {
        "hidden_states": rng.standard_normal((2, 3, 3, 10, 14), np.float32),
        "timestep": np.array([937.0, 12.5], np.float32),
        "encoder_hidden_states": text.tokens,
        "encoder_attention_mask": text.mask,
        "pooled_projections": text.pooled,
    }
    with torch.no_grad():
        expected = reference.eval()(**{k: torch.from_numpy(v) for k, v in inputs.items()}, return_dict=False)[0].numpy()
    sample = np.asarray(models.from_pretrained(FOLDER, dtype="float32")(**inputs))
    assert np.linalg.norm(sample - expected) <= 5e-6 * np.linalg.norm(expected)


def test_it_is_small_bfloat16_and_has_at_least_2048_video_tokens() -> None:
    assert sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file()) <= 16e6
    assert str(models.from_pretrained(FOLDER).dtype) == "bfloat16"
    assert FRAMES * (SIZE // 2) ** 2 >= 2048


def test_its_text_encoder_is_the_one_of_the_training_script() -> None:
    stored, made = WordEncoder.load(FOLDER / "text_encoder"), WordEncoder.create()
    assert stored.words == made.words == VOCABULARY
    np.testing.assert_array_equal(stored.table, made.table)


@pytest.mark.parametrize("prompt", ["red dinosaur moving left", "purple circle"])
def test_unknown_words_are_named_with_the_known_ones(prompt: str) -> None:
    unknown = next(word for word in prompt.split() if word not in VOCABULARY)
    with pytest.raises(ValueError, match=unknown) as error:
        WordEncoder.create().encode([prompt])
    assert all(word in str(error.value) for word in VOCABULARY)


@pytest.mark.parametrize("prompt", ["", " ".join(["red"] * 9)])
def test_empty_and_long_prompts_are_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="words; it must have 1 to 8"):
        WordEncoder.create().encode([prompt])


def test_clips_show_what_their_prompts_say() -> None:
    clips, prompts = render(64, FRAMES, torch.Generator().manual_seed(0), "cpu")
    light = (clips + 1) / 2
    weight = light.amax(1)  # [clip, frame, y, x]
    grid = torch.arange(SIZE) + 0.5
    center = (
        torch.stack([(weight.sum(3) * grid).sum(2), (weight.sum(2) * grid).sum(2)], -1) / weight.sum((2, 3))[..., None]
    )
    moved = center[:, -1] - center[:, 0]
    for i, prompt in enumerate(prompts):
        color, _, _, way = prompt.split()
        along = float((moved[i] * torch.tensor(STEP[way])).sum())
        assert 9.5 <= along <= 15.5, prompt
        assert abs(float(moved[i].norm()) - along) < 0.1
        np.testing.assert_allclose(light[i].amax((1, 2, 3)), RGB[color], atol=1e-5)


def _train(name: str, steps: int, folder: Path) -> train.Trainer:
    preset = dataclasses.replace(PRESETS[name], config=TINY)
    trainer = train.Trainer(preset, (Stage(2, 1, 0.5), Stage(4, 1, 0.5)), 4, 1e-3, "cpu")
    state = folder / "state.pt"
    if state.exists():
        trainer.restore(state)
    while trainer.step < steps:
        trainer.train_step()
    trainer.save(state)
    return trainer


@pytest.mark.parametrize("name", PRESETS)
def test_a_resumed_training_equals_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = _train(name, 4, tmp_path / "a")
    _train(name, 2, tmp_path / "b")
    resumed = _train(name, 4, tmp_path / "b")
    for name, value in whole.ema.items():
        torch.testing.assert_close(resumed.ema[name], value, rtol=0, atol=0)


def test_stages_cover_the_training() -> None:
    trainer = train.Trainer.__new__(train.Trainer)
    trainer.stages, trainer.steps = (Stage(4, 8, 0.6), Stage(16, 2, 0.4)), 10
    frames = []
    for step in range(11):
        trainer.step = step
        frames.append(dataclasses.asdict(trainer.stage())["frames"])
    assert frames == [4] * 6 + [16] * 5
