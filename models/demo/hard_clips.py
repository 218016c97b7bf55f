"""Procedural clips that are hard to denoise: shapes that cross over a textured, panning background, light that changes.

The texture and its pan are not in the prompt: a model finds them in the noise, and has to look along the pan to see a
spot of the background in other frames.
"""

import math

import torch
from torch import Tensor

from models.demo.clips import FRAMES, Shapes, uniform, windows

SIZE = 48
_TORUS = 96
"""Pixels of a side of the texture, which repeats: a pan of 3 pixels a frame sees no spot twice."""
_GRAIN = 0.8
"""Pixels: standard deviation of the blur that ends the texture's spectrum."""
_FASTEST_PAN = 3
"""Pixels a frame."""


def texture(count: int, generator: torch.Generator, device: str) -> Tensor:
    """float32 [count, _TORUS, _TORUS] in (-1, 1): noise whose amplitude falls with frequency**1.5: smooth."""
    noise = torch.randn(count, _TORUS, _TORUS, generator=generator).to(device)
    frequency = torch.fft.fftfreq(_TORUS, device=device)
    square = frequency[:, None] ** 2 + frequency**2
    amplitude = torch.exp(-2 * (math.pi * _GRAIN) ** 2 * square) / square.clamp(min=_TORUS**-2).pow(0.75)
    amplitude[0, 0] = 0
    smooth = torch.fft.ifft2(torch.fft.fft2(noise) * amplitude).real
    # Steeper edges, or all in one fine octave, make every spot a coin that the smallest error of attention turns.
    return torch.tanh(smooth / smooth.std(dim=(1, 2), keepdim=True))


def background(count: int, frames: Tensor, generator: torch.Generator, device: str) -> Tensor:
    """float32 [count, 3, frames, SIZE, SIZE] in [0, 1] at the frame numbers `frames` int [count, frames]."""
    pan = torch.randint(-_FASTEST_PAN, _FASTEST_PAN + 1, (count, 2), generator=generator)
    origin = torch.randint(_TORUS, (count, 2), generator=generator)
    place = (origin[:, None] + pan[:, None] * frames[..., None]).to(device)  # [count, frames, 2]
    y, x = (
        (place[:, :, axis, None] + torch.arange(SIZE, device=device)) % _TORUS for axis in (0, 1)
    )  # [count, frames, SIZE]
    of_clip = torch.arange(count, device=device)[:, None, None, None]
    seen = texture(count, generator, device)[of_clip, y[..., None], x[..., None, :]]
    middle = 0.4 + 0.2 * torch.rand(count, 3, generator=generator)
    contrast = 0.55 * (2 * torch.randint(2, (count, 3), generator=generator) - 1)
    middle, contrast = (c.to(device)[:, :, None, None, None] for c in (middle, contrast))
    return (middle + contrast * seen[:, None]).clamp(0, 1)


def light(count: int, times: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness float32 [count, frames] in [0.5, 1], one slow wave a clip."""
    depth, phase = uniform(0.1, 0.5, count, generator), uniform(0.0, 1.0, count, generator)
    return 1 - depth[:, None] * (0.5 + 0.5 * torch.sin(2 * math.pi * (times + phase[:, None])))


def render(count: int, frames: int, generator: torch.Generator, device: str) -> tuple[Tensor, list[str]]:
    """Draws `count` clips as float32 [count, 3, frames, SIZE, SIZE] in [-1, 1], with their prompts.

    A prompt names two shapes, "red circle moving left blue ring moving up", the first in front. Half of the clips have
    a third between the others and the background, without a word. Fewer `frames` than FRAMES are a random window.
    """
    times = windows(count, frames, generator)
    picture = background(count, (times * (FRAMES - 1)).round().long(), generator, device)
    front, behind, third = (Shapes.draw(count, SIZE, (6.0, 9.0), (16.0, 26.0), generator) for _ in range(3))
    there = torch.randint(2, (count, 1, 1, 1, 1), generator=generator).to(device)
    for shapes, share in ((third, there), (behind, 1), (front, 1)):
        inside, rgb = shapes.cover(times, SIZE, device)
        picture = torch.lerp(picture, rgb, inside * share)
    bright = light(count, times, generator).to(device)[:, None, :, None, None]
    prompts = [f"{a} {b}" for a, b in zip(front.prompts(), behind.prompts(), strict=True)]
    return picture * bright * 2 - 1, prompts
