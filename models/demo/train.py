"""Trains the embedded demo checkpoint: a small HunyuanVideo DiT, in PyTorch, with diffusers' own class.

    python -m models.demo.train --out out/train            # CPU or CUDA; stop it and run it again to resume
    python -m models.demo.train --preset hard --compile    # the yardstick of benchmarks.quality, on a GPU

Flow matching on procedural clips: the demo's first on short windows, where a step is cheap, then on whole clips.
Every step draws from a generator seeded by its number, so a resumed run continues the same sequence.
"""

import itertools
import json
import math
import os
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from diffusers import HunyuanVideoTransformer3DModel
from PIL import Image
from torch import Tensor

from models.demo.clips import FRAMES
from models.demo.presets import PRESETS, Preset, Stage
from models.demo.words import WordEncoder

SCHEDULER: dict[str, Any] = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}


class Trainer:
    """Model, its exponential moving average and optimiser, saved and restored together."""

    def __init__(self, preset: Preset, stages: tuple[Stage, ...], steps: int, lr: float, device: str):
        torch.manual_seed(0)
        self.preset = preset
        self.model = HunyuanVideoTransformer3DModel(**preset.config)
        sharpen(self.model, preset.qk_gain)
        self.model.to(device)
        self.ema = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.01)
        self.encoder = WordEncoder.create()
        self.stages, self.steps, self.lr, self.device = stages, steps, lr, device
        self.step, self.loss = 0, float("nan")

    def stage(self) -> Stage:
        """The stage that the current step belongs to."""
        done = self.step / self.steps
        for stage in self.stages:
            if done < stage.share:
                return stage
            done -= stage.share
        return self.stages[-1]

    def learning_rate(self) -> float:
        """Linear warm-up over 200 steps, then a cosine to 2%."""
        cosine = 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        return self.lr * min(1.0, (self.step + 1) / 200) * (0.02 + 0.98 * cosine)

    def predict(self, x: Tensor, sigma: Tensor, prompts: list[str]) -> Tensor:
        """Velocity noise - clip for noisy clips x [B, 3, F, S, S] at noise levels sigma [B]."""
        text = self.encoder.encode(prompts)
        count = int(text.mask.sum(1).max())
        return self.model(
            hidden_states=x,
            timestep=sigma * 1000,
            encoder_hidden_states=torch.from_numpy(text.tokens[:, :count]).to(self.device),
            encoder_attention_mask=torch.from_numpy(text.mask[:, :count]).to(self.device),
            pooled_projections=torch.from_numpy(text.pooled).to(self.device),
            return_dict=False,
        )[0]

    def train_step(self) -> None:
        """One optimiser step."""
        stage = self.stage()
        generator = torch.Generator().manual_seed(self.step)
        clips, prompts = self.preset.render(stage.batch, stage.frames, generator, self.device)
        mean, deviation = self.preset.noise
        sigma = torch.sigmoid(deviation * torch.randn(stage.batch, generator=generator) + mean).to(self.device)
        torch.manual_seed(self.step)
        noise = torch.randn_like(clips)
        mix = sigma[:, None, None, None, None]
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        with torch.autocast(self.device, torch.bfloat16):
            velocity = self.predict((1 - mix) * clips + mix * noise, sigma, prompts)
        loss = ((velocity.float() - (noise - clips)) ** 2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        decay = min(0.999, self.step / (self.step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.values()), list(self.model.state_dict().values()), 1 - decay)
        if self.step % 25 == 0 or self.step == 1:  # reading the loss waits for the device
            value = loss.item()
            self.loss = value if math.isnan(self.loss) else 0.8 * self.loss + 0.2 * value

    def save(self, path: Path) -> None:
        """Writes everything needed to resume, atomically."""
        parts = {"model": self.model.state_dict(), "ema": self.ema, "optimizer": self.optimizer.state_dict()}
        torch.save({**parts, "step": self.step}, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def restore(self, path: Path) -> None:
        """Continues from what `save` wrote."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema, self.step = state["ema"], state["step"]

    def export(self, folder: Path) -> HunyuanVideoTransformer3DModel:
        """Writes the averaged weights as a bfloat16 diffusers pipeline folder and returns that model."""
        with torch.device(self.device):
            averaged = HunyuanVideoTransformer3DModel(**self.preset.config)
        averaged.load_state_dict(self.ema)
        averaged.to(torch.bfloat16).save_pretrained(folder / "transformer", max_shard_size="15MB")
        self.encoder.save(folder / "text_encoder")
        (folder / "scheduler").mkdir(exist_ok=True)
        scheduler = folder / "scheduler" / "scheduler_config.json"
        scheduler.write_text(json.dumps(SCHEDULER | {"shift": self.preset.shift}, indent=2) + "\n", encoding="utf-8")
        size = self.preset.size
        index = {
            "_class_name": "HunyuanVideoPipeline",
            "transformer": ["diffusers", "HunyuanVideoTransformer3DModel"],
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["models.demo.words", "WordEncoder"],
            "sample_size": {"frames": FRAMES, "height": size, "width": size, "fps": 8},
        }
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return averaged

    @torch.no_grad()
    def contact_sheet(self, model: HunyuanVideoTransformer3DModel, steps: int = 50) -> Image.Image:
        """Samples the preset's prompts with `model`: a row a prompt, a column a frame."""
        prompts, size, shift = list(self.preset.sheet_prompts), self.preset.size, self.preset.shift
        self.model, kept = model.float(), self.model
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(len(prompts), 3, FRAMES, size, size, generator=generator).to(self.device)
        u = np.linspace(1, 0, steps + 1)
        sigmas = shift * u / (1 + (shift - 1) * u)
        for a, b in itertools.pairwise(sigmas):
            velocity = self.predict(x, torch.full((len(x),), a, device=self.device, dtype=x.dtype), prompts)
            x = x + (b - a) * velocity
        self.model = kept
        pixels = ((x.clamp(-1, 1) + 1) * 127.5).byte().permute(0, 3, 2, 4, 1)  # [prompt, y, frame, x, rgb]
        sheet = Image.fromarray(pixels.reshape(len(x) * size, FRAMES * size, 3).cpu().numpy())
        return sheet.resize((sheet.width * 3, sheet.height * 3), Image.Resampling.NEAREST)


def sharpen(model: HunyuanVideoTransformer3DModel, gain: float) -> None:
    """Starts every norm of queries and keys at `gain`."""
    for name, weight in model.named_parameters():
        if name.rsplit(".", 2)[-2] in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            torch.nn.init.constant_(weight, gain)


def use_flash_kernels() -> None:
    """Drops the attention mask in diffusers: a preset's prompts are equally long, unpadded, so it hides nothing.

    Without a mask `scaled_dot_product_attention` may choose its flash kernel.
    """
    from diffusers.models.transformers import transformer_hunyuan_video as module

    dispatch = module.dispatch_attention_fn
    module.dispatch_attention_fn = lambda q, k, v, attn_mask=None, **kwargs: dispatch(q, k, v, **kwargs)


def main(
    out: Annotated[Path, typer.Option(help="folder for the state, the checkpoint and the sheet")] = Path("out/train"),
    preset: Annotated[Literal["demo", "hard"], typer.Option(help="hard: the yardstick")] = "demo",
    steps: Annotated[int | None, typer.Option(help="optimiser steps in all; default: the preset's", min=1)] = None,
    lr: Annotated[float, typer.Option(help="peak learning rate")] = 1e-3,
    batch: Annotated[int | None, typer.Option(help="whole clips a step; default: the preset's", min=1)] = None,
    minutes: Annotated[float, typer.Option(help="stop after this long, saved; run again to resume")] = math.inf,
    compile_model: Annotated[bool, typer.Option("--compile", help="torch.compile the model")] = False,
) -> None:
    """Trains, or resumes, and writes OUT/checkpoint and OUT/sheet.png."""
    begun = saved = time.time()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True
    use_flash_kernels()
    chosen = PRESETS[preset]
    steps = steps or chosen.steps
    trainer = Trainer(chosen, chosen.stages(batch or chosen.batch), steps, lr, device)
    state = out / "state.pt"
    out.mkdir(parents=True, exist_ok=True)
    if state.exists():
        trainer.restore(state)
        print(f"resumed at step {trainer.step}", flush=True)
    if compile_model:
        trainer.model.compile(dynamic=False)  # symbolic shapes fail in torch 2.11's generated backward pass
    while trainer.step < steps and time.time() - begun < minutes * 60:
        trainer.train_step()
        if trainer.step % 100 == 0:
            print(f"step {trainer.step}/{steps}  loss {trainer.loss:.4f}  {time.time() - begun:.0f} s", flush=True)
        if time.time() - saved > 120:
            trainer.save(state)
            saved = time.time()
    trainer.save(state)
    trainer.contact_sheet(trainer.export(out / "checkpoint")).save(out / "sheet.png")
    print(f"wrote {out / 'checkpoint'} at step {trainer.step}", flush=True)


if __name__ == "__main__":
    typer.run(main)
