"""AdaSpa in JAX: training-free adaptive sparse attention for video diffusion transformers."""

from adaspa_jax.attention import Parts, adaspa_attention, attend
from adaspa_jax.config import PRESETS, Budget, SparseConfig
from adaspa_jax.layout import TokenLayout
from adaspa_jax.report import Report, draw_blocks, json_values, summarize
from adaspa_jax.sampling import History, Scheduler, denoise, scan_steps
from adaspa_jax.schedule import StepKind, default_search_steps, paper_search_steps, step_kinds
from adaspa_jax.search import Selection, head_tiers, select_blocks
from adaspa_jax.sharding import AttentionSharding
from adaspa_jax.state import SparseState

__all__ = [
    "PRESETS",
    "AttentionSharding",
    "Budget",
    "History",
    "Parts",
    "Report",
    "Scheduler",
    "Selection",
    "SparseConfig",
    "SparseState",
    "StepKind",
    "TokenLayout",
    "adaspa_attention",
    "attend",
    "default_search_steps",
    "denoise",
    "draw_blocks",
    "head_tiers",
    "json_values",
    "paper_search_steps",
    "scan_steps",
    "select_blocks",
    "step_kinds",
    "summarize",
]
