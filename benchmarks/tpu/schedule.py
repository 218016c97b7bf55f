"""Reads the TPU compiler's final schedule of a kernel: static cycles and memory, on a machine with no TPU.

A line of the dumped `*-packed-bundles-post-ra.txt` is one issue cycle of a core. What DMA and semaphores make a kernel
wait is not in it: the cycles are a lower bound on time, the same in every run, good for comparing kernels and for
noticing a regression.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_BUNDLE = re.compile(r"\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2}\s*)*:")
_BRANCH = re.compile(r"sbr\.rel \(.*?\) target bundleno = (\d+)")
_ALLOCATION = re.compile(r"#allocation\d*(_spill)?\S* \[.*?space=(\w+), size = (0x[0-9a-f]+), scoped")
_TURNS = re.compile(r"scmp\.ge\.s32\.totalorder \S+, (\d+) /\* loop exit test \*/")
_WORK = re.compile(r"vmatmul|= dma\.")
# A taken branch has this many delay slots, which belong to the loop that it closes.
_DELAY_SLOTS = 4


@dataclass(frozen=True)
class Chip:
    """Of a TPU: what static figures are divided by, per core. Google's published figures."""

    topology: str
    cores: int
    flops_per_cycle: int
    """bfloat16, dense."""
    ghz: float
    hbm_gb_per_s: float


CHIPS = {
    "v5e": Chip("v5e:2x2", 1, 131072, 1.503, 819),
    "v5p": Chip("v5p:2x2x1", 2, 131072, 1.75, 2765 / 2),
    "v6e": Chip("v6e:2x2", 1, 524288, 1.75, 1640),
    "v7x": Chip("tpu7x:2x2x1", 2, 524288, 2.2, 7380 / 2),
}


@dataclass(frozen=True)
class Loop:
    """A loop of the schedule."""

    cycles: int
    """Of one turn, less the branches that a turn in the middle does not take."""
    matmuls: int
    innermost: bool


def _regions(bundles: list[str], first: int, last: int) -> list[tuple[int, int]]:
    """Innermost predicated regions within a loop: (bundle after the branch, bundle it jumps to)."""
    found = []
    for i in range(first, last + 1):
        match = _BRANCH.search(bundles[i])
        if match and i < int(match[1]) <= last + 1:
            found.append((i + 1, int(match[1])))
    return [r for r in found if not any(r != o and r[0] <= o[0] and o[1] <= r[1] for o in found)]


def _loop(bundles: list[str], first: int, last: int, innermost: bool) -> Loop:
    """A turn in the middle skips regions that neither multiply nor copy, which begin or end something.

    Of several regions that multiply, which are variants of one step, it takes the cheapest: the step without a mask.
    """
    text = lambda a, b: "\n".join(bundles[a:b])
    regions = _regions(bundles, first, last)
    variants = sorted((r for r in regions if "vmatmul" in text(*r)), key=lambda r: r[1] - r[0])
    skipped = [r for r in regions if not _WORK.search(text(*r))] + variants[1:]
    cycles = last + 1 - first - sum(b - a for a, b in skipped)
    matmuls = text(first, last + 1).count("vmatmul") - sum(text(*r).count("vmatmul") for r in skipped)
    return Loop(cycles, matmuls, innermost)


def loops(schedule: Path) -> list[Loop]:
    """The loops of a `*-packed-bundles-post-ra.txt`, in the order of their ends."""
    bundles = [
        line for line in schedule.read_text(encoding="utf-8", errors="replace").splitlines() if _BUNDLE.match(line)
    ]
    spans = []
    for i, line in enumerate(bundles):
        match = _BRANCH.search(line)
        if match and int(match[1]) <= i:
            spans.append((int(match[1]), min(i + _DELAY_SLOTS, len(bundles) - 1)))
    inside = lambda a, b: a != b and b[0] <= a[0] and a[1] <= b[1]
    return [_loop(bundles, *span, not any(inside(other, span) for other in spans)) for span in spans]


def total_cycles(schedule: Path) -> int:
    """Cycles of one of XLA's own operations that is one loop of a fixed number of turns, such as a sort."""
    (turns,) = _TURNS.findall(schedule.read_text(encoding="utf-8", errors="replace"))
    return int(turns) * max(loop.cycles for loop in loops(schedule))


def schedules(folder: Path, kernel: str) -> Iterator[Path]:
    """Schedules of the custom calls in a dump folder whose name contains `kernel`."""
    for path in sorted(folder.glob("*-packed-bundles-post-ra.txt")):
        if kernel in path.name and not re.search("schedule-analysis|post-bundle-packing", path.name):
            yield path


def scoped_bytes(schedule: Path) -> dict[str, int]:
    """Bytes that a kernel allocates by memory ("vmem", "smem", "sflag"), and as "spill" its spilled registers in VMEM.

    Spills of different parts of a kernel share their place, so that their sum is more than they take.
    """
    name = re.sub(r"-\d+-packed-bundles-post-ra.txt$", "", schedule.name)
    (path,) = (p for p in schedule.parent.iterdir() if re.fullmatch(re.escape(name) + r"-\d+-post-ra\.txt", p.name))
    totals = {"vmem": 0, "smem": 0, "spill": 0}
    for spill, memory, size in _ALLOCATION.findall(path.read_text(encoding="utf-8", errors="replace")):
        name = "spill" if spill and memory == "vmem" else memory
        totals[name] = totals.get(name, 0) + int(size, 16)
    return totals
