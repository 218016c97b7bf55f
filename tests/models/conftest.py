"""A pipeline folder like the embedded one, with random weights and a few hundred tokens."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel

from models.demo.train import CONFIG, SCHEDULER
from models.demo.words import WordEncoder

TINY = CONFIG | {"num_attention_heads": 2, "attention_head_dim": 16, "rope_axes_dim": (4, 6, 6), "num_single_layers": 2}


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 frames of 16 x 16 pixels: 256 video tokens, 16 blocks of 16."""
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    torch.manual_seed(0)
    HunyuanVideoTransformer3DModel(**TINY).save_pretrained(folder / "transformer")
    WordEncoder.create().save(folder / "text_encoder")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    size = {"frames": 4, "height": 16, "width": 16, "fps": 8}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "HunyuanVideoPipeline", "sample_size": size}))
    return folder
