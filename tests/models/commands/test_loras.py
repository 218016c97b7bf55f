"""LoRAs from the command line to the experts they are for."""

from pathlib import Path

import pytest

from models.checkpoint.lora_file import Lora
from models.checkpoint.safetensors_folder import CheckpointError
from models.commands.loras import OPTIONS, parse_loras
from models.pipeline.experts import share_loras

NONE = dict.fromkeys(OPTIONS)


def test_files_with_and_without_a_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b:2", "c"):
        Path(name).touch()
    given = NONE | {"lora": ["a", "a:0.5", "b:2", "b:2:-1"], "lora_low_noise": ["c:.25"]}
    assert parse_loras(given) == (
        Lora(Path("a")),
        Lora(Path("a"), 0.5),
        Lora(Path("b:2")),
        Lora(Path("b:2"), -1.0),
        Lora(Path("c"), 0.25, "low_noise"),
    )
    for text, message in (
        ("", "--lora is empty; give FILE or FILE:SCALE"),
        ("no/such", "--lora no/such does not exist"),
        ("no/such:0.5", "--lora no/such does not exist"),
        ("a:x", "--lora a:x: 'x' is no scale; give FILE or FILE:SCALE"),
        ("a:0", "the scale of a LoRA must be a number other than 0"),
        ("a:inf", "the scale of a LoRA must be a number other than 0"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_loras(NONE | {"lora": [text]})


def test_experts_get_their_own_and_those_of_all() -> None:
    every, high = Lora(Path("style.safetensors"), 0.5), Lora(Path("x_HIGH_fp16.safetensors"), 1.0, "high_noise")
    low = Lora(Path("low_noise_model.safetensors"), 1.0, "low_noise")
    assert share_loras([every, high, low], 2) == [(every, high), (every, low)]
    assert share_loras([("style.safetensors", 0.5), "highway.safetensors", "slow.pt"], 2)[0][0] == every
    assert share_loras(["x_high_noise.safetensors"], 1) == [(Lora(Path("x_high_noise.safetensors")),)]
    for lora in (high, low):
        with pytest.raises(CheckpointError, match=f"given for {lora.expert}, and this model has one expert"):
            share_loras([lora], 1)
        option = f"--lora-{str(lora.expert).replace('_', '-')}"
        with pytest.raises(CheckpointError, match=f"is by its name for {lora.expert} alone: give it with {option}"):
            share_loras([lora.path], 2)
