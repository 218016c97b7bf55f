"""Options that are given and would have no effect are refused, with the reason."""

from typing import Any

_TRAINED = "this checkpoint makes videos of the size it was trained on"
WORDS = {
    "frames": _TRAINED,
    "height": _TRAINED,
    "width": _TRAINED,
    "shift": "this checkpoint has the time shift it was trained with",
    "embeddings": "this checkpoint encodes words itself: give --prompt",
    "vae": "this checkpoint samples pixels, which need no VAE",
    "guidance": "this checkpoint was trained without guidance",
    "guidance_low_noise": "this checkpoint was trained without guidance",
    "true_cfg": "this checkpoint was trained without guidance",
    "dynamic_guidance": "this checkpoint was trained without guidance",
    "mesh": "this checkpoint is small and samples on one device",
    "distributed": "this checkpoint is small and samples on one device",
    "weights": "this checkpoint is small and samples on one device",
    "offload": "this checkpoint is small and samples on one device",
    "share_cfg_indices": "this checkpoint was trained without guidance, so there are no two branches",
    "negative_prompt": "this checkpoint was trained without guidance",
    "image": "this checkpoint makes videos of words alone",
    "last_image": "this checkpoint makes videos of words alone",
    "lora_high_noise": "this checkpoint has one expert, whose LoRA is --lora",
    "lora_low_noise": "this checkpoint has one expert, whose LoRA is --lora",
}
"""Of `models.sample`, with a checkpoint of pixels that has a word encoder."""
EMBEDDED = dict.fromkeys(
    ("prompt", "prompts", "negative_prompt", "image", "last_image"),
    "prompts and pictures are those that --embeddings FILE was made from",
)
"""Of `models.sample`, with --embeddings."""
HOSTS = dict.fromkeys(
    ("prompt", "prompts"), "several hosts read one file of models.encode_prompt: give --embeddings, which all can read"
)
"""Of `models.sample`, with --distributed."""
FEW = {"steps": "--timesteps say how many there are"}
"""Of `models.sample`, with --timesteps."""
DENSE = dict.fromkeys(
    (
        "preset",
        "sparsity",
        "search_step",
        "dense_layer",
        "dense_last_steps",
        "share_cfg_indices",
        "compensation",
        "score_precision",
    ),
    "it is AdaSpa's, and a --dense run skips nothing",
)
"""Of `models.sample`, with --dense. Block size and token order stay: dense attention runs in that layout too."""
CACHE_HELP = "FOLDER of compiled programs, which later runs reuse, or off; default: the user's cache"
"""Of --compile-cache."""
PIXELS = dict.fromkeys(
    ("dtype", "follow_links", "compile_cache"), "what this checkpoint samples are pixels, which no decoder has to make"
)
"""Of `models.decode`, with a checkpoint of pixels."""


def refuse(given: dict[str, Any], reasons: dict[str, str]) -> None:
    """ValueError for the first option of `given`, parameter -> value, that is in `reasons`; see `is_given`."""
    for name, value in given.items():
        if name in reasons and is_given(value):
            shown = "" if value is True else f" {' '.join(map(str, value)) if isinstance(value, list) else value}"
            raise ValueError(f"--{name.replace('_', '-')}{shown}: {reasons[name]}; leave it out")


def is_given(value: Any) -> bool:
    """Whether an option was on the command line; 0 was."""
    return value is not None and value is not False and value != []
