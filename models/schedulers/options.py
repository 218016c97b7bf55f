"""Reading a diffusers scheduler_config.json: what would sample differently is refused, never ignored."""

import math
from typing import Any

import numpy as np


def check_class(config: dict[str, Any], name: str) -> None:
    """ValueError unless the config is of diffusers' class `name`."""
    found = config.get("_class_name")
    if found != name:
        raise ValueError(f"scheduler {found!r} is not supported here; this one is {name}")


def check_off(config: dict[str, Any], *options: str) -> None:
    """ValueError for an option that is set."""
    for option in options:
        if config.get(option):
            raise ValueError(f"scheduler option {option}={config[option]!r} is not supported; it must be off")


def check_only(config: dict[str, Any], option: str, default: Any, supported: Any) -> None:
    """ValueError unless an option, which diffusers gives the value `default`, has the supported one."""
    value = config.get(option, default)
    if value != supported:
        raise ValueError(f"scheduler option {option}={value!r} is not supported; it must be {supported!r}")


def number(config: dict[str, Any], option: str, default: float) -> float:
    """A number, or ValueError."""
    value = config.get(option, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"scheduler option {option}={value!r} must be a number")
    return value


def whole(config: dict[str, Any], option: str, default: int) -> int:
    """A whole number, or ValueError."""
    value = number(config, option, default)
    if not math.isfinite(value) or value != int(value):
        raise ValueError(f"scheduler option {option}={value!r} must be a whole number")
    return int(value)


def flag(config: dict[str, Any], option: str, default: bool) -> bool:
    """True or false, or ValueError."""
    value = config.get(option, default)
    if not isinstance(value, bool):
        raise ValueError(f"scheduler option {option}={value!r} must be true or false")
    return value


def check_positive(**values: float) -> None:
    """ValueError unless every number is above zero and finite."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value} must be positive and finite")


def check_train_timesteps(train_timesteps: int) -> None:
    """ValueError unless it is a whole number of at least 1."""
    _check_count(train_timesteps=train_timesteps)


def check_steps(steps: int) -> None:
    """ValueError unless it is a whole number of at least 1."""
    _check_count(steps=steps)


def _check_count(**values: Any) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise ValueError(f"{name}={value!r} must be a whole number")
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
