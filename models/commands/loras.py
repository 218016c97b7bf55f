"""LoRAs on the command line: FILE or FILE:SCALE, for all experts or for one."""

from pathlib import Path
from typing import Any, Literal

from models.checkpoint.lora_file import Lora

OPTIONS: dict[str, Literal["high_noise", "low_noise"] | None] = {
    "lora": None,
    "lora_high_noise": "high_noise",
    "lora_low_noise": "low_noise",
}
"""Of `models.sample` -> the expert whose LoRA it is."""


def _parse(option: str, text: str, expert: Literal["high_noise", "low_noise"] | None) -> Lora:
    if not text:
        raise ValueError(f"{option} is empty; give FILE or FILE:SCALE, such as x:0.8")
    path, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        path, scale = text, "1"
    try:
        number = float(scale)
    except ValueError as error:
        raise ValueError(f"{option} {text}: {scale!r} is no scale; give FILE or FILE:SCALE, such as x:0.8") from error
    if not Path(path).exists():
        raise ValueError(f"{option} {path} does not exist; give the file of a LoRA")
    return Lora(Path(path), number, expert)


def parse_loras(given: dict[str, Any]) -> tuple[Lora, ...]:
    """Those of all options, parameter -> values. Raises ValueError for missing files, and scales that are none."""
    return tuple(
        _parse(f"--{name.replace('_', '-')}", text, expert)
        for name, expert in OPTIONS.items()
        for text in given[name] or ()
    )
