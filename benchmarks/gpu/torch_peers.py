"""Other people's attention in PyTorch, dense and block-sparse, those that are installed: checked first, then timed.

    python -m benchmarks.gpu.torch_peers FILE TOKENS...

In a process of its own, for torch and JAX would share the memory. Inputs as in `benchmarks.measure`; block lists are
random, ascending, density 0.2. Each contender is compared with float32 on some rows of that very shape and list; who
is off by more than 2%, or raises, gets a row that says so and no time. The others are timed in turns.
"""

import importlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

HEADS, HEAD_DIM, BLOCKS, DENSITY = 24, 128, (64, 128), 0.2
SCALE, LIMIT, ROUNDS = HEAD_DIM**-0.5, 2e-2, 5
ROWS = 16
"""That are compared with float32; of lists as many blocks of rows."""

Inputs = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""q, k, v [1, H, N, D] each, taken in turn."""
Run = Callable[[int], torch.Tensor]
"""Of the number of a call, the output [1, H, N, D]."""


@dataclass(frozen=True)
class Lists:
    """The same number of key blocks for every query block, of blocks that divide the sequence."""

    block: int
    indices: torch.Tensor
    """int32 [1, H, blocks, kept], ascending."""

    @classmethod
    def draw(cls, tokens: int, block: int, device: str) -> "Lists":
        """A random set for each query block."""
        blocks = tokens // block
        kept = math.ceil(round(DENSITY * blocks, 6))
        scores = torch.rand(1, HEADS, blocks, blocks, device=device)
        return cls(block, scores.topk(kept, -1).indices.sort(-1).values.int().contiguous())

    @property
    def blocks(self) -> int:
        """In the sequence."""
        return self.indices.shape[2]

    @property
    def counts(self) -> torch.Tensor:
        """int32 [1, H, blocks]."""
        return torch.full(self.indices.shape[:3], self.indices.shape[3], dtype=torch.int32, device=self.indices.device)


def _tokens_first(inputs: Inputs) -> Inputs:
    return [tuple(x.transpose(1, 2).contiguous() for x in each) for each in inputs]  # type: ignore[misc]


def torch_sdpa(inputs: Inputs) -> Run:
    """FlashAttention-2, in torch."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(i: int) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(*inputs[i % len(inputs)])

    return run


def flash_attention_3(inputs: Inputs) -> Run:
    """With LSE, of the wheel `fa3-fwd`."""
    forward, turned = importlib.import_module("fa3_fwd_interface")._flash_attn_forward, _tokens_first(inputs)
    return lambda i: forward(*turned[i % len(turned)], softmax_scale=SCALE, causal=False)[0].transpose(1, 2)


def flash_attention_4(inputs: Inputs, lists: Lists | None = None) -> Run:
    """With LSE, of the wheel `flash-attn-4`: CuTe kernels."""
    cute, turned, given = importlib.import_module("flash_attn.cute"), _tokens_first(inputs), {}
    if lists is not None:
        kind = importlib.import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch
        none = torch.zeros_like(lists.counts), torch.zeros_like(lists.indices)
        size = (lists.block, lists.block)
        given["block_sparse_tensors"] = kind(*none, lists.counts, lists.indices, block_size=size)
    run = lambda each: cute.flash_attn_func(*each, softmax_scale=SCALE, return_lse=True, **given)[0]
    return lambda i: run(turned[i % len(turned)]).transpose(1, 2)


def flash_infer(inputs: Inputs, lists: Lists | None = None) -> Run:
    """Its FlashAttention-3 kernels: a ragged batch of one; or blocks, all heads as one sequence of H * N rows."""
    wrappers, (_, _, tokens, _) = importlib.import_module("flashinfer"), inputs[0][0].shape
    device, types = inputs[0][0].device, dict.fromkeys(("q_data_type", "kv_data_type", "o_data_type"), torch.bfloat16)
    workspace = torch.empty(384 << 20, dtype=torch.uint8, device=device)
    if lists is None:
        wrapper = wrappers.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD", backend="fa3")
        ends = torch.tensor([0, tokens], dtype=torch.int32, device=device)
        wrapper.plan(ends, ends, HEADS, HEADS, HEAD_DIM, causal=False, **types)
        turned = [tuple(x[0] for x in each) for each in _tokens_first(inputs)]
        return lambda i: wrapper.run(*turned[i % len(turned)])[None].transpose(1, 2)
    wrapper = wrappers.BlockSparseAttentionWrapper(workspace, backend="fa3")
    first = lists.blocks * torch.arange(HEADS, dtype=torch.int32, device=device)[:, None, None]
    indices, kept = (lists.indices[0] + first).reshape(-1), lists.indices.shape[3]
    ends = torch.arange(0, indices.numel() + 1, kept, dtype=torch.int32, device=device)
    size = HEADS * tokens, HEADS * tokens, lists.block, lists.block
    wrapper.plan(ends, indices, *size, 1, 1, HEAD_DIM, **types)
    flat = [tuple(x.reshape(HEADS * tokens, 1, HEAD_DIM) for x in each) for each in inputs]
    return lambda i: wrapper.run(*flat[i % len(flat)]).view(1, HEADS, tokens, HEAD_DIM)


def flex_attention(inputs: Inputs, lists: Lists) -> Run:
    """torch's own, compiled, with these lists as its block mask; its tiles are of 128."""
    from torch.nn.attention import flex_attention as flex

    if lists.block != 128:
        raise ValueError("its tiles do not divide this block")
    every = torch.zeros(*lists.counts.shape, lists.blocks, dtype=torch.int32, device=lists.indices.device)
    every[..., : lists.indices.shape[3]] = lists.indices
    none, tokens = torch.zeros_like(lists.counts), inputs[0][0].shape[2]
    options: dict[str, Any] = {"BLOCK_SIZE": lists.block, "seq_lengths": (tokens, tokens)}
    mask = flex.BlockMask.from_kv_blocks(none, torch.zeros_like(every), lists.counts, every, **options)
    run = torch.compile(flex.flex_attention)
    return lambda i: run(*inputs[i % len(inputs)], block_mask=mask)


DENSE: dict[str, Callable[[Inputs], Run]] = {
    "torch FlashAttention": torch_sdpa,
    "FlashAttention-3": flash_attention_3,
    "flash-attn 4": flash_attention_4,
    "FlashInfer": flash_infer,
}
SPARSE: dict[str, Callable[[Inputs, Lists], Run]] = {
    "torch FlexAttention": flex_attention,
    "flash-attn 4": flash_attention_4,
    "FlashInfer": flash_infer,
}


def distance(run: Run, inputs: Inputs, lists: Lists | None) -> float:
    """Relative L2 of the first call's output on some rows, against float32."""
    (q, k, v), tokens = (x[0] for x in inputs[0]), inputs[0][0].shape[2]
    out, block = run(0)[0], 1 if lists is None else lists.block
    apart = total = 0.0
    for number in range(0, tokens // block, max(1, tokens // block // ROWS)):
        rows = slice(number * block, (number + 1) * block)
        scores = SCALE * q[:, rows].float() @ k.float().transpose(1, 2)
        if lists is not None:
            kept = torch.zeros(HEADS, lists.blocks, dtype=torch.bool, device=q.device)
            kept.scatter_(1, lists.indices[0, :, number].long(), True)
            scores.masked_fill_(~kept.repeat_interleave(block, 1)[:, None], -math.inf)
        exact = scores.softmax(-1) @ v.float()
        apart += float((out[:, rows].float() - exact).square().sum())
        total += float(exact.square().sum())
    return math.sqrt(apart / total)


def checked(make: Callable[[], Run], inputs: Inputs, lists: Lists | None) -> tuple[Run | None, str]:
    """(what may be timed, note): None with the reason for what is not installed, raises, or is wrong."""
    try:
        run = make()
        off = distance(run, inputs, lists)
    except ModuleNotFoundError as missing:
        return None, f"{missing.name} is not installed: pip install 'adaspa_jax[peers]'"
    except Exception as error:  # one that refuses must not end the benchmark
        return None, f"{type(error).__name__}: {str(error)[:80]}"
    return (run, "") if off <= LIMIT else (None, f"WRONG by {off:.3g}: not timed")


def in_turns(runs: dict[str, Run]) -> dict[str, float]:
    """Median milliseconds of a call, over rounds that take every one in another order."""

    def timed(run: Run, calls: int) -> float:
        begun = time.perf_counter()
        for i in range(calls):
            run(i)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - begun) / calls

    calls = {name: max(2, math.ceil(40 / min(timed(run, 2) for _ in range(2)))) for name, run in runs.items()}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(ROUNDS):
        names = list(runs)
        for name in names[round_ % max(1, len(names)) :] + names[: round_ % max(1, len(names))]:
            found[name].append(timed(runs[name], calls[name]))
    return {name: statistics.median(times) for name, times in found.items()}


def race(
    contenders: dict[str, Callable[..., Run]], inputs: Inputs, lists: Lists | None, work: float
) -> list[dict[str, Any]]:
    """A row for every contender; `work` in TFLOPs."""
    given = (inputs,) if lists is None else (inputs, lists)
    found = {name: checked(partial(make, *given), inputs, lists) for name, make in contenders.items()}
    times = in_turns({name: run for name, (run, _) in found.items() if run is not None})
    case: dict[str, Any] = {"kernel": "dense"}
    if lists is not None:
        case = {"kernel": "block_sparse", "block": lists.block, "density": DENSITY}
    rows = []
    for name, (_, note) in found.items():
        ms = times.get(name, math.nan)
        rows.append({"implementation": name} | case | {"ms": ms, "tflops": 1e3 * work / ms, "note": note})
    return rows


def rows(tokens: int, device: str = "cuda", blocks: tuple[int, ...] = BLOCKS) -> list[dict[str, Any]]:
    """Dense, and over lists of the blocks that divide the sequence."""
    draw = lambda: torch.randn(1, HEADS, tokens, HEAD_DIM, device=device, dtype=torch.bfloat16)
    inputs = [(draw(), draw(), draw()) for _ in range(2)]
    work = 4e-12 * HEADS * tokens**2 * HEAD_DIM
    found = race(DENSE, inputs, None, work)
    for block in blocks:
        if tokens % block == 0:
            lists = Lists.draw(tokens, block, device)
            found += race(SPARSE, inputs, lists, work * lists.indices.shape[3] / lists.blocks)
    return [{"tokens": tokens} | row for row in found]


if __name__ == "__main__":
    with torch.no_grad():
        every = [row for n in sys.argv[2:] for row in rows(int(n))]
        Path(sys.argv[1]).write_text(json.dumps(every), encoding="utf-8")
