"""Every option of every command is used or refused, with both kinds of checkpoint. A new option needs an entry here."""

import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from convert import __main__ as convert
from convert import writer
from models import decode, encode_prompt, sample
from models.commands.encoding import Encoder
from models.commands.options import DENSE
from models.pipeline.latents import SavedLatents, write_latents
from tests.models.commands.fakes import WORDS, Fakes, call, latent_arguments

COMMANDS = {"sample": sample, "decode": decode, "encode_prompt": encode_prompt, "convert": convert}
KINDS = ("words", "latents")

Entry = list[Any] | str
"""Arguments that change what the command does (or make it refuse a missing file), or the reason it is refused for."""
BOTH: dict[str, dict[str, Entry]] = {
    "sample": {
        "checkpoint": ["--checkpoint", "no/such"],
        "preset": ["--preset", "fast"],
        "steps": ["--steps", 8],
        "seed": ["--seed", "3-4"],
        "sparsity": ["--sparsity", 0.25],
        "block_size": ["--block-size", 32],
        "query_block_size": ["--query-block-size", 128],
        "search_step": ["--search-step", 2],
        "token_order": ["--token-order", "raster"],
        "dense_layer": ["--dense-layer", 0],
        "dense_last_steps": ["--dense-last-steps", 1],
        "compensation": ["--compensation", "none"],
        "score_precision": ["--score-precision", "int8"],
        "dtype": ["--dtype", "bfloat16"],
        "dense": ["--dense"],
        "timesteps": ["--timesteps", "1000,500"],
        "renoise": "goes with --timesteps",
        "lora": ["--lora", "x.lora:0.5"],
        "compare": ["--compare"],
        "compile_cache": ["--compile-cache", "no/such"],
        "follow_links": ["--follow-links"],
        "out": ["--out", "another"],
        "debug": ["--debug"],
    },
    "decode": {
        "checkpoint": ["--checkpoint", "no/such"],
        "latents": ["--latents", "no/such"],
        "fps": ["--fps", 3],
        "out": ["--out", "another"],
        "debug": ["--debug"],
    },
    "encode_prompt": {
        "checkpoint": ["--checkpoint", "another"],
        "prompt": ["--prompt", "a dog"],
        "prompts": ["--prompts", "lines.txt"],
        "negative": ["--negative", "blurred"],
        "image": ["--image", "no/such"],
        "last_image": "goes with --image",
        "frames": "--frames, --height and --width go with --image",
        "height": "--frames, --height and --width go with --image",
        "width": "--frames, --height and --width go with --image",
        "dtype": ["--dtype", "float32"],
        "out": ["--out", "another.safetensors"],
        "debug": ["--debug"],
    },
    "convert": {
        "src": ["no/such"],
        "dst": ["another"],
        "dtype": ["--dtype", "bfloat16"],
        "overwrite": ["--overwrite"],
        "follow_links": ["--follow-links"],
        "debug": ["--debug"],
    },
}
ONLY: dict[tuple[str, str], dict[str, Entry]] = {
    ("sample", "words"): {
        "prompt": ["--prompt", "green ring moving down"],
        "prompts": ["--prompts", "words.txt"],
        "negative_prompt": "trained without guidance",
        **dict.fromkeys(("image", "last_image"), "makes videos of words alone"),
        "embeddings": "this checkpoint encodes words itself",
        "vae": "pixels, which need no VAE",
        **dict.fromkeys(("frames", "height", "width"), "the size it was trained on"),
        "shift": "the time shift it was trained with",
        **dict.fromkeys(("guidance", "guidance_low_noise", "true_cfg", "dynamic_guidance"), "trained without guidance"),
        "share_cfg_indices": "trained without guidance",
        "mesh": "samples on one device",
        "offload": "samples on one device",
        "weights": "is for several devices",
        "distributed": "is for several hosts",
        **dict.fromkeys(("lora_high_noise", "lora_low_noise"), "has one expert"),
    },
    ("sample", "latents"): {
        **dict.fromkeys(
            ("prompt", "prompts", "negative_prompt", "image", "last_image"),
            "those that --embeddings FILE was made from",
        ),
        "embeddings": ["--embeddings", "no/such"],
        "vae": ["--vae", "no/such"],
        "frames": ["--frames", 13],
        "height": ["--height", 64],
        "width": ["--width", 64],
        "shift": ["--shift", 9],
        "guidance": ["--guidance", 2],
        "guidance_low_noise": "has one expert",
        "true_cfg": "embeds no guidance",
        "dynamic_guidance": "is CogVideoX's",
        "share_cfg_indices": ["--share-cfg-indices"],
        "mesh": ["--mesh", "heads=1"],
        "offload": ["--offload", "layers"],
        "weights": "is for several devices",
        "distributed": "is for several hosts",
        **dict.fromkeys(("lora_high_noise", "lora_low_noise"), "has one expert"),
    },
    ("decode", "words"): dict.fromkeys(
        ("dtype", "follow_links", "compile_cache"), "pixels, which no decoder has to make"
    ),
    ("decode", "latents"): {
        "dtype": ["--dtype", "bfloat16"],
        "follow_links": ["--follow-links"],
        "compile_cache": ["--compile-cache", "no/such"],
    },
}
ONLY["sample", "text"] = ONLY["sample", "latents"] | {
    "prompt": ["--prompt", "a dog"],
    "prompts": ["--prompts", "lines.txt"],
    "negative_prompt": ["--negative-prompt", "blurred"],
    "image": "takes no --image",
    "last_image": "goes with --image",
    "embeddings": "those that --embeddings FILE was made from",
    "distributed": "is for several hosts",
}
"""A pipeline with text encoders."""
REFUSED = {"vae": "x", "embeddings": "x", "dtype": "float32", "prompt": "a dog", "mesh": "auto", "weights": "sharded"}
REFUSED |= {
    "prompts": "lines.txt",
    "negative_prompt": "blurred",
    "image": "cat.png",
    "last_image": "cat.png",
    "offload": "layers",
}
REFUSED |= dict.fromkeys(("lora_high_noise", "lora_low_noise"), "x.lora")
"""Values of options that are refused; numbers get 2."""
INSTEAD = {"prompts": "prompt", "timesteps": "steps"}
"""Options that take the place of another."""
FLAGS = ("renoise", "dynamic_guidance", "share_cfg_indices", "follow_links", "distributed")
BROKEN = {"sample": ["--seed", -1], "decode": ["--fps", 0]}
"""What --debug shows a traceback of."""


def entries(command: str, kind: str) -> dict[str, Entry]:
    return BOTH[command] | ONLY.get((command, kind), {})


def base(command: str, kind: str, checkpoint: Path) -> dict[str, list[Any]]:
    """Parameter -> arguments of a call that works."""
    if command == "convert":
        return {"src": [checkpoint], "dst": ["out"]}
    given: dict[str, list[Any]] = {"checkpoint": ["--checkpoint", checkpoint]}
    Path("lines.txt").write_text("a dog\n")
    if command == "encode_prompt":
        return given | {"prompt": ["--prompt", "a cat"], "out": ["--out", "out"]}
    given["out"] = ["--out", "out"]
    Path("x.lora").touch()
    Path("no").touch()  # so that no/such cannot be made
    Path("words.txt").write_text("green ring moving down\n")
    Image.new("RGB", (8, 8)).save("cat.png")
    if command == "decode":
        latents = np.zeros((1, 3 if kind == "words" else 4, 3, 16, 16), np.float32)
        write_latents(Path("x"), SavedLatents({"dense": latents}, ["a cat"], 8))
        return given | {"latents": ["--latents", "x"]}
    if kind == "text":
        given |= {"prompt": ["--prompt", "a cat"], "checkpoint": ["--checkpoint", with_text_encoder(checkpoint)]}
    arguments = list(WORDS if kind == "words" else latent_arguments(checkpoint))
    pairs = zip(arguments[::2], arguments[1::2], strict=True)
    parameters = {name.removeprefix("--").replace("-", "_"): [name, value] for name, value in pairs}
    if kind == "text":
        del parameters["embeddings"]
    return given | parameters


def with_text_encoder(checkpoint: Path) -> Path:
    """A copy of a Wan pipeline that looks as if it could encode."""
    folder = Path("whole")
    if not folder.exists():
        (folder / "text_encoder").mkdir(parents=True)
        for name in ("transformer", "scheduler", "vae"):
            (folder / name).symlink_to(checkpoint / name)
        index = {"_class_name": "WanPipeline", "text_encoder": ["transformers", "UMT5EncoderModel"]}
        (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def content(path: Path) -> Any:
    """What a file holds; of safetensors not the bytes, whose metadata are in any order."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(path, "np") as file:
        return file.metadata(), {key: file.get_tensor(key).tobytes() for key in file.keys()}  # noqa: SIM118


def observe(command: str, arguments: dict[str, list[Any]], fakes: Fakes, monkeypatch: Any, capsys: Any) -> Any:
    """(exit code or exception, error or None, what was asked for, the files there are)."""
    for folder in ("out", "another"):
        shutil.rmtree(folder, ignore_errors=True)
    fakes.calls.clear()
    capsys.readouterr()
    try:
        code: Any = call(monkeypatch, COMMANDS[command].main, *(x for group in arguments.values() for x in group))
    except ValueError as error:
        code = type(error)
    lines = capsys.readouterr().err.strip().splitlines()
    shown = {str(p): content(p) for p in Path().rglob("*") if p.suffix in (".mp4", ".png", ".safetensors")}
    return code, lines[-1] if code and lines else None, [repr(x) for x in fakes.calls], shown


def record(module: Any, name: str, result: Any, fakes: Fakes, monkeypatch: Any) -> None:
    """Replaces a function by one that notes what it was asked for."""

    def fake(checkpoint: Path, *given: Any, progress: Any = None, **options: Any) -> Any:
        if checkpoint == Path("no/such"):
            raise ValueError("no/such does not exist")
        fakes.calls.append((str(checkpoint), given, options))
        if progress is not None:
            progress(1, 1)
        return result

    monkeypatch.setattr(module, name, fake)


BASES: dict[Any, Any] = {}
"""What the calls without the option do, the same for all of a command and a kind."""
CASES = [
    (command, kind, option)
    for command, module in COMMANDS.items()
    for kind in (*KINDS, *["text"] * (command == "sample"))
    for option in inspect.signature(module.main).parameters
]


@pytest.mark.parametrize(("command", "kind", "option"), CASES)
def test_an_option_is_used_or_refused(
    command: str,
    kind: str,
    option: str,
    tiny_pipeline: Path,
    wan_pipeline: Path,
    tmp_path: Path,
    fakes: Fakes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert option in entries(command, kind), f"--{option}: say in this file what it does, or that it is refused"
    monkeypatch.chdir(tmp_path)
    record(encode_prompt, "encode", {"prompt_embeds": np.zeros((1, 1, 1), np.float32)}, fakes, monkeypatch)
    record(writer, "convert", None, fakes, monkeypatch)
    monkeypatch.setattr(Encoder, "encode", lambda self, wanted: fakes.encode(wanted))
    given = base(command, kind, tiny_pipeline if kind == "words" else wan_pipeline)
    if option == "debug":
        given["broken"] = BROKEN.get(command, ["--dtype", "x"])
    look = lambda given: observe(command, given, fakes, monkeypatch, capsys)
    entry, key = entries(command, kind)[option], (command, kind, option == "debug")
    if key not in BASES:
        BASES[key] = look(given)
    before = BASES[key]
    assert before[0] == (2 if option == "debug" else 0), before[1]
    if isinstance(entry, str):
        value = [] if option in FLAGS else [REFUSED.get(option, 2)]
        code, error, asked, _ = look(given | {option: [f"--{option.replace('_', '-')}", *value]})
        assert (code, asked) == (2, [])
        assert re.search(re.escape(entry), error), error
        assert not Path("out").exists()
    else:
        after = look({name: x for name, x in given.items() if name != INSTEAD.get(option)} | {option: entry})
        assert after != before, f"{entry} has no effect"
        if option != "debug":
            assert after[0] == (2 if "no/such" in entry else 0), after[1]


@pytest.mark.parametrize("option", DENSE)
def test_options_of_adaspa_do_not_go_with_dense(
    option: str, wan_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"preset": ["fast"], "share_cfg_indices": []}
    given = ["--checkpoint", wan_pipeline, *latent_arguments(wan_pipeline), "--out", tmp_path / "out", "--dense"]
    given += [f"--{option.replace('_', '-')}", *values.get(option, [0])]
    assert call(monkeypatch, sample.main, *given) == 2
    assert "a --dense run skips nothing" in capsys.readouterr().err


def test_no_entry_is_of_an_option_that_is_gone() -> None:
    for command, module in COMMANDS.items():
        for kind in (*KINDS, *["text"] * (command == "sample")):
            assert set(entries(command, kind)) == set(inspect.signature(module.main).parameters)
