"""Procedural training clips: coloured shapes that move; for the demo model one of them, over black."""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.demo.words import COLORS, DIRECTIONS, SHAPES

FRAMES, SIZE = 16, 32
RGB = {
    "red": (1.0, 0.15, 0.1),
    "green": (0.1, 0.9, 0.2),
    "blue": (0.15, 0.3, 1.0),
    "yellow": (1.0, 0.9, 0.1),
    "white": (1.0, 1.0, 1.0),
}
# Unit steps (y, x), y pointing down as in pictures.
STEP = {"left": (0.0, -1.0), "right": (0.0, 1.0), "up": (-1.0, 0.0), "down": (1.0, 0.0)}


def signed_distance(dy: Tensor, dx: Tensor, radius: Tensor) -> Tensor:
    """Approximate distance in pixels to each shape's edge, negative inside; [len(SHAPES), ...]."""
    r = torch.hypot(dy, dx)
    circle = r - radius
    square = torch.maximum(dy.abs(), dx.abs()) - 0.88 * radius
    triangle = torch.maximum(dy - 0.8 * radius, (2 * dx.abs() - (dy + radius)) / 5**0.5)
    ring = (r - 0.8 * radius).abs() - 0.3 * radius
    return torch.stack([circle, square, triangle, ring])


def uniform(low: float | Tensor, high: float | Tensor, count: int, generator: torch.Generator) -> Tensor:
    """float32 [count], each between its bounds."""
    return low + (high - low) * torch.rand(count, generator=generator)


def windows(count: int, frames: int, generator: torch.Generator) -> Tensor:
    """Times float32 [count, frames]: a random window of the FRAMES frames of each clip, which last from 0 to 1."""
    start = torch.randint(FRAMES - frames + 1, (count, 1), generator=generator)
    return (start + torch.arange(frames)) / (FRAMES - 1)


@dataclass(frozen=True)
class Shapes:
    """A moving shape in each of a number of clips."""

    color: Tensor
    shape: Tensor
    way: Tensor
    radius: Tensor
    """Pixels."""
    travel: Tensor
    """Pixels from the first frame to the last."""
    center: Tensor
    """float32 [count, 2], (y, x) at half time."""

    @classmethod
    def draw(
        cls,
        count: int,
        size: int,
        radius: tuple[float, float],
        travel: tuple[float, float],
        generator: torch.Generator,
    ) -> "Shapes":
        """Shapes that stay inside pictures of size x size pixels; `radius` and `travel` are ranges."""
        color, shape, way = (torch.randint(len(n), (count,), generator=generator) for n in (COLORS, SHAPES, DIRECTIONS))
        radii, travels = uniform(*radius, count, generator), uniform(*travel, count, generator)
        margin = radii + 0.5
        low, high = margin + travels / 2, size - margin - travels / 2
        along, across = uniform(low, high, count, generator), uniform(margin, size - margin, count, generator)
        step = torch.tensor([STEP[name] for name in DIRECTIONS])[way]
        return cls(color, shape, way, radii, travels, torch.where(step != 0, along[:, None], across[:, None]))

    def prompts(self) -> list[str]:
        """Of each clip, such as "red circle moving left"."""
        parts = zip(self.color, self.shape, self.way, strict=True)
        return [f"{COLORS[c]} {SHAPES[s]} moving {DIRECTIONS[w]}" for c, s, w in parts]

    def cover(self, times: Tensor, size: int, device: str) -> tuple[Tensor, Tensor]:
        """(share of each pixel that is covered [count, 1, frames, size, size], colours [count, 3, 1, 1, 1])."""
        step = torch.tensor([STEP[name] for name in DIRECTIONS])[self.way]
        path = self.center[:, None] + step[:, None] * (self.travel[:, None] * (times - 0.5))[..., None]
        path, radius, shape, color = (x.to(device) for x in (path, self.radius, self.shape, self.color))
        grid = torch.arange(size, device=device) + 0.5
        dy, dx = grid[:, None] - path[:, :, 0, None, None], grid - path[:, :, 1, None, None]
        distance = signed_distance(dy, dx, radius[:, None, None, None])
        inside = (0.5 - distance[shape, torch.arange(len(shape), device=device)]).clamp(0, 1)
        rgb = torch.tensor([RGB[name] for name in COLORS], device=device)[color]
        return inside[:, None], rgb[:, :, None, None, None]


def render(count: int, frames: int, generator: torch.Generator, device: str) -> tuple[Tensor, list[str]]:
    """Draws `count` clips as float32 [count, 3, frames, SIZE, SIZE] in [-1, 1], with their prompts.

    A shape stays inside the picture through all FRAMES frames; fewer `frames` are a random window of them.
    """
    shapes = Shapes.draw(count, SIZE, (5.0, 6.5), (10.0, 15.0), generator)
    inside, rgb = shapes.cover(windows(count, frames, generator), SIZE, device)
    return inside * rgb * 2 - 1, shapes.prompts()
