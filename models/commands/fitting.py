"""Whether a run fits the memory of a device, said before it samples, with the nearest that does."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from models.commands.hosts import stderr
from models.commands.jobs import Job
from models.commands.runs import Runs
from models.pipeline.families import VideoSize
from models.pipeline.mesh import Weights, placed
from models.pipeline.offload import Offload, default_offload
from models.pipeline.program import Need, bytes_of
from models.pipeline.video import VideoPipeline

_TRIES = 4
"""Lengths that are compiled to find one that fits."""
_SHARE = "XLA_PYTHON_CLIENT_MEM_FRACTION"
"""The variable that says how much of a GPU JAX takes, three quarters if it is not set."""


def device_limit() -> int | None:
    """Bytes of each device that programs may use; None: the backend does not say, as on a CPU."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    known = [limit for limit in limits if limit]
    return min(known) if len(known) == len(limits) else None


def with_offload(pipeline: VideoPipeline, given: Offload | None, limit: int | None) -> VideoPipeline:
    """As is given, or on one device as its `limit` suggests. Raises ValueError as `VideoPipeline.with_offload`."""
    if given is None and pipeline.sharding is None:
        weights = bytes_of([nnx.state(expert) for expert in pipeline.experts])
        given = default_offload(len(pipeline.experts), weights, limit)
    return pipeline.with_offload(given or "none")


def check_weights(pipeline: VideoPipeline, weights: Weights, limit: int | None) -> None:
    """ValueError if the weights alone, which need not be there yet, do not fit."""
    if limit is None:
        return
    turns = pipeline.offload == "experts"
    place = None if turns else pipeline.place(weights)
    sizes = [bytes_of(placed(nnx.state(expert), place)) for expert in pipeline.experts]
    size = max(sizes) if turns else sum(sizes)
    if size > limit:
        raise ValueError(f"the weights take {_gib(size)} of a device that has {_gib(limit)}{_advice(pipeline)}")


def overflow(runs: Runs, limit: int) -> Need | None:
    """Waits for the programs: what they need, or the decoder, if that is more than `limit`."""
    with stderr().status("compiling"):
        need = runs.need()
    return need if need.total > limit else None


def cannot_fit(runs: Runs, kinds: list[bool], weights: Weights, need: Need, limit: int) -> ValueError:
    """The error for runs that need more than `limit`, with the longest video that was found to fit.

    Programs of other lengths are compiled for it. `kinds` and `weights` as for `Runs.compile`.
    """
    family, size = runs.pipeline.family, runs.size
    least = 1 + family.time_ratio * -(-family.skip_frames // family.time_ratio)
    with stderr().status("this does not fit; looking for what does"):
        measure = lambda frames: _need(runs, dataclasses.replace(size, frames=frames), kinds, weights).total
        frames = nearest_frames(measure, size.frames, need.total, least, family.time_ratio, limit)
    work = "work" if need.step == "sample" else "the decoder"
    parts = f"weights {_gib(need.weights)}, latents and lists {_gib(need.operands)}, {work} {_gib(need.temporary)}"
    fits = (
        "no length fits at this height and width" if frames is None else f"the nearest that fits is --frames {frames}"
    )
    needs = f"to {need.step}, this run needs {_gib(need.total)} of a device ({parts}) that has {_gib(limit)}"
    return ValueError(f"{needs}; {fits}{_advice(runs.pipeline)}")


def nearest_frames(
    need: Callable[[int], int], frames: int, needed: int, least: int, step: int, limit: int
) -> int | None:
    """The longest video below `frames` that was found to need at most `limit`; None if the shortest does not.

    `need`, bytes of a number of frames, is asked a few times; it grows about evenly. Frames are `least` and, from
    there, in steps.
    """
    if frames <= least or (low := need(least)) > limit:
        return None
    for _ in range(_TRIES):
        guess = least + int((frames - least) * (limit - low) / max(1, needed - low)) // step * step
        guess = min(guess, frames - step)
        if guess <= least:
            break
        if (needed := need(guess)) <= limit:
            return guess
        frames = guess
    return least


def _need(runs: Runs, size: VideoSize, kinds: list[bool], weights: Weights) -> Need:
    """What the same runs need at another size."""
    other = dataclasses.replace(runs, size=size, jobs=[_resized(runs, size)], programs={}, phases={})
    other.compile(kinds, weights)
    return (other if runs.decoder is None else other.with_decoder()).need()


def _resized(runs: Runs, size: VideoSize) -> Job:
    """The first job with latents of an image, if it has some, of another size."""
    job, grid = runs.jobs[0], runs.pipeline.family.latent_shape(size, runs.pipeline.experts[0])
    if (condition := job.embeddings.get("condition")) is None:
        return job
    frames = 1 if condition.shape[2] == 1 else grid[0]
    shape = (*condition.shape[:2], frames, *grid[1:])
    return dataclasses.replace(job, embeddings=job.embeddings | {"condition": np.zeros(shape, np.float32)})


def _advice(pipeline: VideoPipeline) -> str:
    """What else helps."""
    if pipeline.sharding is not None:
        return "; or take more devices, or --weights sharded"
    found = [] if pipeline.offload == "layers" else ["--offload layers"]
    if jax.default_backend() == "gpu":
        found.append(f"{_SHARE}=0.95 in the environment")
    return f"; or take {', '.join([*found, 'fewer prompts at once, several devices (--mesh)'])}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB" if size >= 2**28 else f"{size / 2**20:.3g} MiB"
