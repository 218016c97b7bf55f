"""torch's dense attention and FlexAttention with the block mask of benchmarks.gpu, in a process of their own.

python -m benchmarks.gpu.torch_baselines FILE TOKENS...
"""

import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

HEADS, HEAD_DIM, BLOCK, DENSITY = 24, 128, 128, 0.2


def milliseconds(run: Callable[[], Any]) -> float:
    """Median of five rounds, between CUDA events, each long enough that launches do not count."""
    run(), run()
    times, calls = [], 1
    for round_ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        took = begin.elapsed_time(end) / calls
        if round_:
            times.append(took)
        calls = max(1, math.ceil(30 / took))
    return statistics.median(times)


def random_mask(tokens: int) -> tuple[BlockMask, float]:
    """A random set of key blocks for each query block, and the density it has."""
    blocks = math.ceil(tokens / BLOCK)
    kept = math.ceil(round(DENSITY * blocks, 6))
    order = torch.rand(1, HEADS, blocks, blocks, device="cuda").argsort(-1).int()
    counts = torch.full((1, HEADS, blocks), kept, dtype=torch.int32, device="cuda")
    none = torch.zeros_like(counts)
    mask = BlockMask.from_kv_blocks(none, order, counts, order, BLOCK_SIZE=BLOCK, seq_lengths=(tokens, tokens))
    return mask, kept / blocks


def rows(tokens: int) -> list[dict[str, Any]]:
    """SDPA with FlashAttention, and FlexAttention at density 0.2."""
    q, k, v = (torch.randn(1, HEADS, tokens, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    work = 4e-12 * HEADS * tokens**2 * HEAD_DIM
    found = []
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        ms = milliseconds(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
    found.append({"implementation": "torch FlashAttention", "kernel": "dense", "ms": ms, "tflops": 1e3 * work / ms})
    if tokens % BLOCK == 0:
        mask, density = random_mask(tokens)
        flex = torch.compile(flex_attention)
        ms = milliseconds(lambda: flex(q, k, v, block_mask=mask))
        named = {"implementation": "torch FlexAttention", "kernel": "block_sparse", "block": BLOCK, "density": DENSITY}
        found.append(named | {"ms": ms, "tflops": 1e3 * work * density / ms})
    return [{"tokens": tokens, "note": f"torch {torch.__version__}"} | row for row in found]


if __name__ == "__main__":
    with torch.no_grad():
        found = [row for n in sys.argv[2:] for row in rows(int(n))]
        Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")
