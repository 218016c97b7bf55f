"""report.json: what a run did, and how far AdaSpa's videos are from the dense ones.

JSON has no number for some figures: the PSNR of equal videos is the string "Infinity", and null is a figure that does
not exist, such as the SSIM of pictures below 7 x 7 pixels (`adaspa_jax.json_values`).
"""

import dataclasses
import json
import math
import resource
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from adaspa_jax import SparseConfig, json_values
from models.commands.media import psnr, ssim
from models.pipeline.video import LatentSample


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.inf if a else math.nan


def fields_of(prompts: list[str], seed: int, config: SparseConfig, runs: dict[str, LatentSample]) -> dict[str, Any]:
    """What can be said of the runs without their videos."""
    fields: dict[str, Any] = {"prompts": prompts, "seed": seed, "steps": config.steps}
    for name, run in runs.items():
        key = name.lower()
        fields |= {f"{key}_seconds": run.seconds, f"{key}_compile_seconds": run.compile_seconds}
        fields["implementation"] = run.implementation
    sparse = runs.get("AdaSpa")
    if sparse is None:
        return fields
    if "dense" in runs:
        fields["speedup"] = _ratio(runs["dense"].seconds, sparse.seconds)
    if sparse.reports:
        fields |= {
            "search_steps": list(config.search),
            "sparsity": config.sparsity,
            "density": float(np.mean([d.density for d in sparse.reports])),
            "recall": float(np.mean([d.recall for d in sparse.reports])),
            "compensation": config.compensation,
            "score_precision": sparse.score_precision,
            "stand_ins": float(np.mean([d.stand_ins for d in sparse.reports])),
            "tokens": {"video": sparse.layout.video_tokens, "text": sparse.layout.text, "block": sparse.layout.block},
            "details": dataclasses.asdict(sparse.reports[0]),
        }
        if len(sparse.reports) > 1:
            fields["details_of_the_second_expert"] = dataclasses.asdict(sparse.reports[1])
    return fields


def memory() -> dict[str, int]:
    """Peak bytes so far: of this process on the host, and of its fullest device, where JAX says."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"host_peak_bytes": host} | ({"device_peak_bytes": max(peaks)} if any(peaks) else {})


def distance(videos: dict[str, np.ndarray]) -> dict[str, float]:
    """PSNR in dB, inf for equal videos, and SSIM, of AdaSpa's against the dense ones; empty unless there are both."""
    if set(videos) != {"dense", "AdaSpa"}:
        return {}
    return {
        "psnr_db": psnr(videos["AdaSpa"], videos["dense"]),
        "ssim": ssim(videos["AdaSpa"], videos["dense"]),
    }


def write_json(path: Path, fields: Any) -> None:
    """Writes JSON that every reader takes: no NaN, no Infinity but as null and as text."""
    path.write_text(json.dumps(json_values(fields), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def summary(fields: dict[str, Any]) -> str:
    """The line a person reads at the end."""
    found = []
    if "speedup" in fields:
        found.append(f"speed-up {fields['speedup']:.2f}x")
    if "psnr_db" in fields:
        same = math.isinf(fields["psnr_db"])
        found.append("the same video" if same else f"PSNR {fields['psnr_db']:.1f} dB")
        if not same and math.isfinite(fields["ssim"]):
            found.append(f"SSIM {fields['ssim']:.3f}")
    if math.isfinite(fields.get("density", math.nan)):
        what = f"sparse steps compute {fields['density']:.1%} of the block pairs"
        if math.isfinite(fields["recall"]):
            what += f", with {fields['recall']:.0%} of the mass"
            if fields["compensation"] != "none":
                what += f", and stand-ins for {fields['stand_ins']:.0%}"
    elif "adaspa_seconds" in fields:
        what = "all steps or layers were dense, nothing skipped"
    else:
        what = "dense run, nothing skipped"
    return "; ".join([", ".join(found), what] if found else [what])
