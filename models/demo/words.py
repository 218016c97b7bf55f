"""The text encoder of the demo model: a fixed table of random word embeddings.

A prompt such as "red circle moving left" is split at spaces; every word is one text token. Rows past the last word
are zero and masked out. The table is stored beside the checkpoint, as a real text encoder would be.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

COLORS = ("red", "green", "blue", "yellow", "white")
SHAPES = ("circle", "square", "triangle", "ring")
DIRECTIONS = ("left", "right", "up", "down")
VOCABULARY = (*COLORS, *SHAPES, "moving", *DIRECTIONS)
EMBED_DIM = 64
MAX_WORDS = 8


@dataclass(frozen=True)
class PromptEmbeddings:
    """What a DiT reads of a batch of prompts: B prompts, T text tokens, E channels."""

    tokens: np.ndarray
    """float32 [B, T, E], zero past the last word."""
    mask: np.ndarray
    """int32 [B, T], 1 for a word and 0 for padding."""
    pooled: np.ndarray
    """float32 [B, E], mean over the words."""


@dataclass(frozen=True)
class WordEncoder:
    """Maps prompts to embeddings by table look-up. `table` is float32 [len(words), E]."""

    words: tuple[str, ...]
    table: np.ndarray
    max_words: int = MAX_WORDS

    @classmethod
    def create(cls, seed: int = 0) -> "WordEncoder":
        """The encoder the demo model is trained with."""
        table = np.random.default_rng(seed).standard_normal((len(VOCABULARY), EMBED_DIM), np.float32)
        return cls(VOCABULARY, table)

    def encode(self, prompts: list[str]) -> PromptEmbeddings:
        """Embeds prompts. Raises ValueError for an empty or too long prompt and for words outside the table."""
        index = {word: i for i, word in enumerate(self.words)}
        tokens = np.zeros((len(prompts), self.max_words, self.table.shape[1]), np.float32)
        mask = np.zeros((len(prompts), self.max_words), np.int32)
        for row, prompt in enumerate(prompts):
            words = prompt.lower().split()
            unknown = [word for word in words if word not in index]
            if unknown:
                raise ValueError(
                    f"prompt {prompt!r} has unknown words {', '.join(map(repr, unknown))}; "
                    f"this checkpoint knows: {', '.join(self.words)}"
                )
            if not 0 < len(words) <= self.max_words:
                raise ValueError(f"prompt {prompt!r} has {len(words)} words; it must have 1 to {self.max_words}")
            tokens[row, : len(words)] = self.table[[index[word] for word in words]]
            mask[row, : len(words)] = 1
        pooled = tokens.sum(1) / mask.sum(1, keepdims=True, dtype=np.float32)
        return PromptEmbeddings(tokens, mask, pooled)

    def save(self, folder: Path) -> None:
        """Writes `config.json` and `model.safetensors` into `folder`, made if absent."""
        from safetensors.numpy import save

        folder.mkdir(parents=True, exist_ok=True)
        config = {"_class_name": "WordEncoder", "words": list(self.words), "max_words": self.max_words}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / "model.safetensors").write_bytes(save({"embedding.weight": self.table}))

    @classmethod
    def load(cls, folder: Path) -> "WordEncoder":
        """Reads what `save` wrote. Raises ValueError if the folder holds another kind of text encoder."""
        from safetensors.numpy import load_file

        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config.get("_class_name") != "WordEncoder":
            raise ValueError(f"{folder} is no WordEncoder: _class_name={config.get('_class_name')!r}")
        table = load_file(folder / "model.safetensors")["embedding.weight"]
        if table.ndim != 2 or len(table) != len(config["words"]):
            raise ValueError(f"{folder}: the table has shape {table.shape} for {len(config['words'])} words")
        return cls(tuple(config["words"]), table, int(config["max_words"]))
