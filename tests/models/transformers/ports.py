"""What the tests of all ports share: parity with diffusers, full-size checkpoints by shapes, AdaSpa inside."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import models
from adaspa_jax import SparseConfig, SparseState, StepKind
from models.checkpoint import loading
from models.checkpoint.key_table import plan
from models.checkpoint.registry import PORTS
from models.transformers.base import VideoTransformer
from tests.relative_error import relative_error

Inputs = dict[str, Any]
CUBE = SparseConfig(block_size=16, token_order="cube")


def reference(cls: type, options: dict[str, Any]) -> Any:
    """A torch model with random weights, none of them ones or zeros."""
    torch.manual_seed(0)
    model = cls(**options).float().eval()  # CogVideoX builds its learned positions in float64
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if parameter.ndim == 1 or "pos_embed" in name:  # norms and biases start as ones and zeros
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def rounded(model: Any) -> Any:
    """The torch model in bfloat16, as `from_pretrained(torch_dtype=)` makes it: some modules stay float32."""
    model, kept = copy.deepcopy(model), set(model._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        if not kept & set(name.split(".")):
            parameter.data = parameter.data.bfloat16()
    return model


def _torch(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    def one(name: str, x: Any) -> Any:
        if isinstance(x, tuple):  # RoPE tables stay float32
            return tuple(torch.from_numpy(part) for part in x)
        tensor = torch.from_numpy(x)
        return tensor.to(dtype) if tensor.is_floating_point() and name != "timestep" else tensor

    return {name: one(name, x) for name, x in inputs.items()}


def jax_inputs(inputs: Inputs, dtype: Any = jnp.float32) -> Inputs:
    """Floats in `dtype`, but the timestep in float32; integers in int32."""

    def one(name: str, x: np.ndarray) -> jax.Array:
        if not np.issubdtype(x.dtype, np.floating):
            return jnp.asarray(x, jnp.int32)
        return jnp.asarray(x, jnp.float32 if name == "timestep" else dtype)

    return {name: one(name, x) for name, x in inputs.items() if name != "image_rotary_emb"}


def call(model: VideoTransformer, inputs: Inputs, config: SparseConfig | None = None) -> np.ndarray:
    """One jitted forward pass."""
    graph, weights = nnx.split(model)
    run = jax.jit(lambda weights, inputs: nnx.merge(graph, weights)(**inputs, config=config))
    return np.asarray(run(weights, inputs), np.float32)


def check_parity(cls: type, options: dict[str, Any], sizes: list[Inputs], folder: Path) -> None:
    """float32 to 5e-6, in raster order at the first size and in cubes at the last; bfloat16 as near as torch's."""
    wide = reference(cls, options)
    wide.save_pretrained(folder)
    model = models.from_pretrained(folder)
    for inputs, config in zip(sizes, (None, CUBE), strict=True):
        with torch.no_grad():
            expected = wide(**_torch(inputs, torch.float32), return_dict=False)[0].numpy()
        assert relative_error(call(model, jax_inputs(inputs), config), expected) <= 5e-6
    with torch.no_grad():
        theirs = rounded(wide)(**_torch(sizes[-1], torch.bfloat16), return_dict=False)[0].float().numpy()
    ours = call(models.from_pretrained(folder, dtype="bfloat16"), jax_inputs(sizes[-1], jnp.bfloat16), CUBE)
    assert relative_error(ours, expected) <= 1.5 * relative_error(theirs, expected)


def check_checkpoint(cls: type, options: dict[str, Any], keys: int, parameters: int) -> None:
    """Every key of the full-size checkpoint fills one parameter of its shape, and every parameter is filled."""
    with torch.device("meta"):
        reference = cls(**options)
    tensors, port = reference.state_dict(), PORTS[cls.__name__]
    config = port.config.from_dict(dict(reference.config))
    assert config == port.config.from_dict(options)  # the same defaults
    model = loading.abstract_model(port, config, jnp.bfloat16)
    leaves = plan(tensors, port.rules, loading.parameter_shapes(model), port.stacks)
    used = [key for leaf in leaves for key in leaf.keys]
    assert len(used) == len(set(used)) == keys
    assert set(used) == set(tensors)
    assert sum(leaf.size for leaf in leaves) == parameters


def check_full_size_call(
    cls: type, options: dict[str, Any], shapes: dict[str, tuple[int, ...]], latent_shape: tuple[int, int, int]
) -> None:
    """A bfloat16 step of the full-size model with AdaSpa, by shapes alone."""
    port, sparse = PORTS[cls.__name__], SparseConfig(block_size=128)
    text, batch = shapes["encoder_hidden_states"][1], shapes["hidden_states"][0]

    def step(kind: jax.Array, inputs: Inputs) -> Any:
        create: Any = port.model
        model = create(port.config.from_dict(options), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        state = model.init_state(sparse, batch, latent_shape, text)
        return model(**inputs, config=sparse, state=state, step_kind=kind), state

    integers = {"encoder_attention_mask": jnp.int32, "timestep": jnp.float32}
    inputs = {name: jax.ShapeDtypeStruct(shape, integers.get(name, jnp.bfloat16)) for name, shape in shapes.items()}
    (sample, new_state), state = jax.eval_shape(step, jax.ShapeDtypeStruct((), jnp.int32), inputs)
    channels = port.config.from_dict(options).out_channels
    expected = list(shapes["hidden_states"])
    expected[2 if "CogVideoX" in cls.__name__ else 1] = channels
    assert (list(sample.shape), sample.dtype) == (expected, jnp.bfloat16)
    assert new_state == state


def _search_then_sparse(
    model: VideoTransformer, inputs: Inputs, config: SparseConfig, latent_shape: tuple[int, int, int], text: int
) -> tuple[np.ndarray, tuple[SparseState, ...]]:
    """The samples of a sparse step after a search on the same latents, and the state."""
    graph, weights = nnx.split(model)
    batch = inputs["hidden_states"].shape[0]

    @jax.jit
    def run(weights: Any, inputs: Inputs, state: Any, kind: Any) -> Any:
        return nnx.merge(graph, weights)(**inputs, config=config, state=state, step_kind=kind)

    state = model.init_state(config, batch, latent_shape, text)
    _, state = run(weights, inputs, state, jnp.int32(StepKind.FUSED_SEARCH))
    sample, state = run(weights, inputs, state, jnp.int32(StepKind.SPARSE))
    return np.asarray(sample), state


def check_adaspa(
    create: Callable[[], VideoTransformer], inputs: Inputs, latent_shape: tuple[int, int, int], text: int
) -> None:
    """Sparsity 0 is dense; 0.8 keeps a fifth of the blocks, exactly, and all blocks of text in every row."""
    model, inputs = create(), jax_inputs(inputs)
    everything = SparseConfig(sparsity=0.0, block_size=16)
    dense = call(model, inputs, everything)
    sample, _ = _search_then_sparse(model, inputs, everything, latent_shape, text)
    assert relative_error(sample, dense) <= 5e-6

    config = SparseConfig(sparsity=0.8, block_size=16)
    layout = model.layout(latent_shape, text, config)
    assert layout.num_blocks == 20
    assert layout.text_blocks == (-(-text // 16) if model.joint_text else 0)
    sample, state = _search_then_sparse(model, inputs, config, latent_shape, text)
    assert 1e-4 < relative_error(sample, dense) < 1
    assert tuple(len(stack.counts) for stack in state) == model.stack_sizes()
    for stack in state:
        counts, indices = np.asarray(stack.counts), np.asarray(stack.indices)
        assert (counts.mean((1, 2, 3)) == 4).all()
        used = np.arange(indices.shape[-1]) < counts[..., None]
        for block in range(layout.video_blocks, layout.num_blocks):
            assert ((indices == block) & used).any(-1).all()
