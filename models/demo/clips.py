"""Procedural training clips for the demo model: one coloured shape moving in one direction over black."""

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


def render(count: int, frames: int, generator: torch.Generator, device: str) -> tuple[Tensor, list[str]]:
    """Draws `count` clips as float32 [count, 3, frames, SIZE, SIZE] in [-1, 1], with their prompts.

    A shape stays inside the picture through all FRAMES frames; fewer `frames` are a random window of them.
    """

    def uniform(low: float | Tensor, high: float | Tensor) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    color, shape, way = (torch.randint(len(n), (count,), generator=generator) for n in (COLORS, SHAPES, DIRECTIONS))
    prompts = [f"{COLORS[c]} {SHAPES[s]} moving {DIRECTIONS[w]}" for c, s, w in zip(color, shape, way, strict=True)]
    radius, travel = uniform(5.0, 6.5), uniform(10.0, 15.0)
    margin = radius + 0.5
    low, high = margin + travel / 2, SIZE - margin - travel / 2
    along, across = uniform(low, high), uniform(margin, SIZE - margin)
    step = torch.tensor([STEP[name] for name in DIRECTIONS])[way]
    center = torch.where(step != 0, along[:, None], across[:, None])
    start = torch.randint(FRAMES - frames + 1, (count, 1), generator=generator)
    phase = (start + torch.arange(frames)) / (FRAMES - 1) - 0.5
    path = center[:, None] + step[:, None] * (travel[:, None] * phase)[..., None]  # [count, frames, 2]

    path, radius, shape, color = (x.to(device) for x in (path, radius, shape, color))
    grid = torch.arange(SIZE, device=device) + 0.5
    dy, dx = grid[:, None] - path[:, :, 0, None, None], grid - path[:, :, 1, None, None]
    distance = signed_distance(dy, dx, radius[:, None, None, None])
    inside = (0.5 - distance[shape, torch.arange(count, device=device)]).clamp(0, 1)
    rgb = torch.tensor([RGB[name] for name in COLORS], device=device)[color]
    return inside[:, None] * rgb[:, :, None, None, None] * 2 - 1, prompts
