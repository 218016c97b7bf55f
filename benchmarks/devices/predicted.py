"""What several devices should take for HunyuanVideo-13B at 720p x 129 frames, on paper, and what was measured.

    python -m benchmarks.devices.predicted

Attention, its search and everything else in a layer divide over the devices; what they send each other comes on top,
with nothing hidden behind compute. One device's milliseconds a layer are measured (H200) or static cycles of the TPU
compiler (`benchmarks.tpu.static`), which leave out what DMA makes a kernel wait; the products outside attention are
taken at 70% of a TPU's peak. 50 steps, two searches, sparsity 0.8, block 128.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.full_size import ALL_LAYERS, HIDDEN_MB
from benchmarks.table import show
from benchmarks.tpu.schedule import CHIPS
from models.commands.cli import run_cli

LAYERS, STEPS, DENSE_STEPS, SEARCHES = sum(ALL_LAYERS), 50, 10, 2
RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Layer:
    """Milliseconds of a layer on one device."""

    dense: float
    sparse: float
    mass: float
    rest: float


@dataclass(frozen=True)
class Prediction:
    """A machine on paper."""

    name: str
    layer: Layer
    heads: int
    rows: int
    gb_per_s: float
    """That a device sends in an all-to-all over heads."""
    rows_gb_per_s: float = 1.0
    """That it receives when K and V are gathered over rows."""
    measured: str | None = None
    """File of benchmarks/results."""

    @property
    def devices(self) -> int:
        """All of them."""
        return self.heads * self.rows

    @property
    def exchange(self) -> float:
        """Milliseconds a layer: q, k, v and out by all-to-all, K and V gathered."""
        swapped = 4 * HIDDEN_MB / self.devices * (self.heads - 1) / self.heads
        gathered = 2 * HIDDEN_MB / self.heads * (self.rows - 1) / self.rows
        return swapped / self.gb_per_s + gathered / self.rows_gb_per_s

    def seconds(self, sparse: bool, devices: int) -> float:
        """Of a whole run; on one device nothing is sent."""
        layer, sent = self.layer, self.exchange if devices > 1 else 0.0
        dense = (layer.dense + layer.rest) / devices + sent
        if not sparse:
            return LAYERS * STEPS * dense / 1e3
        skipping = (layer.sparse + layer.rest) / devices + sent
        steps = DENSE_STEPS * dense + (STEPS - DENSE_STEPS) * skipping + SEARCHES * layer.mass / devices
        return LAYERS * steps / 1e3

    def row(self) -> dict[str, Any]:
        """Of the table."""
        row: dict[str, Any] = {"machine": self.name, "mesh": f"heads={self.heads},rows={self.rows}"}
        row["sent_ms_a_layer"] = self.exchange
        found = efficiencies(self.measured)
        for sparse, name in ((False, "dense"), (True, "AdaSpa")):
            one, many = self.seconds(sparse, 1), self.seconds(sparse, self.devices)
            row |= {f"{name}_one_s": one, f"{name}_s": many, f"{name}_predicted": f"{one / many / self.devices:.1%}"}
            row[f"{name}_measured"] = found.get(name, "")
        return row


def efficiencies(file: str | None) -> dict[str, str]:
    """What `benchmarks.devices` measured of the whole sampler."""
    if file is None:
        return {}
    rows = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    named = {row["what"]: row["efficiency"] for row in rows if "what" in row}
    return {name: f"{named[f'sampler, {name}']:.1%}" for name in ("dense", "AdaSpa")}


def tpu_layer(name: str) -> Layer:
    """From recorded static cycles: dense attention, whole lists at density 0.2, block mass, of 128 x 128 x 128."""
    chip, rows = CHIPS[name], json.loads((RESULTS / "tpu-static.json").read_text(encoding="utf-8"))
    case = {"chip": name, "block": 128, "head_dim": 128, "dtype": "bfloat16", "tokens": 119056, "ragged": False}
    found = {row["kernel"]: row["all_in_cycles_per_block"] for row in rows if case.items() <= row.items()}
    ms = 24 * (119056 / 128) ** 2 / (chip.ghz * 1e6) / chip.cores
    teraflops = chip.flops_per_cycle * chip.ghz * chip.cores / 1e3
    products = 27 / (0.7 * teraflops) * 1e3
    return Layer(found["dense"] * ms, 0.2 * found["block_sparse"] * ms, found["block_mass"] * ms, products)


H200 = Layer(330.2, 68.0, 180.0, 43.8)
"""Measured on one (benchmarks/results/devices-h200x4.json, gpu-h200.json), with the kernels that ran on several."""
H200_NOW = Layer(239.2, 51.4, 151.0, 43.8)
"""With those of 2026-11-29, alone (benchmarks/results/gpu-h200-int8.json), scores in bfloat16."""
V6E, V5P, V7X = map(tpu_layer, ("v6e", "v5p", "v7x"))
NVLINK = 193.0
"""GB/s that a device sent in the all-to-all measured on four H200; its links have 450 each way."""
# A slice's all-to-all is bounded by the links across its middle, half of what each chip sends crossing them.
MACHINES = [
    Prediction("2 x H200", H200, 2, 1, NVLINK, measured="devices-h200x2.json"),
    Prediction("4 x H200", H200, 4, 1, NVLINK, measured="devices-h200x4.json"),
    Prediction("8 x H100 or H200, NVLink", H200, 8, 1, NVLINK),
    Prediction("4 x H200, kernels of 2026-11-29", H200_NOW, 4, 1, NVLINK),
    Prediction("8 x H200, kernels of 2026-11-29", H200_NOW, 8, 1, NVLINK),
    Prediction("16, two hosts, 50 GB/s each GPU", H200, 8, 2, NVLINK, 50),
    Prediction("v6e-8 (2x4, 90 GB/s a link)", V6E, 8, 1, 2 * 2 * 90 / 4),
    Prediction("v5p-8 (2x2x2, 90 GB/s a link)", V5P, 8, 1, 2 * 4 * 90 / 4),
    Prediction("v7x-8 (2x2x2, 100 GB/s a link)", V7X, 8, 1, 2 * 4 * 100 / 4),
]


def main() -> None:
    """Prints the table."""
    show(
        "HunyuanVideo-13B, 720p x 129 frames, 50 steps; PREDICTED but for the measured columns",
        [m.row() for m in MACHINES],
    )


if __name__ == "__main__":
    run_cli(main)
