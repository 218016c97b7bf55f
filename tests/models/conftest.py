"""Pipeline folders of both kinds with random weights and a few hundred tokens: like the embedded one, and a Wan."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel

from models.demo.presets import DEMO
from models.demo.train import SCHEDULER
from models.demo.words import WordEncoder
from models.pipeline.embeddings import write_tensors

TINY = DEMO.config | {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "rope_axes_dim": (4, 6, 6),
    "num_single_layers": 2,
}


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


@pytest.fixture(scope="session")
def wan_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan pipeline of latents with its VAE, and prompts.safetensors, embeddings of "a cat", in it."""
    from tests.models.pipeline.test_video import embeddings_of, save, unipc
    from tests.models.test_encode_prompt import vae
    from tests.models.transformers import test_wan
    from tests.models.transformers.ports import reference

    folder = tmp_path_factory.mktemp("wan")
    transformer = reference(diffusers.WanTransformer3DModel, test_wan.SMALL)
    save(folder, diffusers.WanPipeline(None, None, None, unipc(), transformer))
    vae("wan2.1").save_pretrained(folder / "vae")
    write_tensors(folder / "prompts.safetensors", embeddings_of(11, 24), {"prompts": json.dumps(["a cat"])})
    return folder
