"""FlowMatchEuler against diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from models.schedulers import FlowMatchEuler
from tests.relative_error import relative_error

CONFIG = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 7.0}


def reference(scheduler, steps):
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1])
    return scheduler


@pytest.mark.parametrize("shift", [1.0, 7.0])
@pytest.mark.parametrize("steps", [1, 4, 6, 20, 50])
def test_a_run_equals_diffusers(steps, shift):
    noise = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    theirs = reference(FlowMatchEulerDiscreteScheduler(shift=shift), steps)
    x = torch.from_numpy(noise)
    for t in theirs.timesteps:
        velocity = torch.sin(2 * x) + torch.cos(t / 200) * x.roll(1, -1)
        x = theirs.step(velocity, t, x, return_dict=False)[0]

    ours = FlowMatchEuler(shift)

    def step(carry, row):
        latents = ours.latents(carry)
        velocity = jnp.sin(2 * latents) + jnp.cos(row["timestep"] / 200) * jnp.roll(latents, 1, -1)
        return ours.step(carry, velocity, row), None

    carry, _ = jax.lax.scan(step, ours.init(jnp.asarray(noise)), ours.tables(steps))
    assert relative_error(ours.latents(carry), x) < 1e-6


@pytest.mark.parametrize("steps", [4, 50])
def test_tables_equal_diffusers(steps):
    theirs = reference(FlowMatchEulerDiscreteScheduler(shift=7.0), steps)
    tables = FlowMatchEuler(7.0).tables(steps)
    assert {name: (x.dtype, x.shape) for name, x in tables.items()} == {
        "timestep": (np.float32, (steps,)),
        "dt": (np.float32, (steps,)),
    }
    np.testing.assert_array_equal(tables["timestep"], theirs.timesteps.numpy())
    np.testing.assert_array_equal(tables["dt"], np.diff(theirs.sigmas.numpy()))


def test_a_step_keeps_the_dtype_of_the_latents():
    row = {"dt": jnp.float32(-0.25)}
    out = FlowMatchEuler().step(jnp.ones(3, jnp.float32), jnp.full(3, 2, jnp.bfloat16), row)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, 0.5)


def test_from_config():
    assert FlowMatchEuler.from_config(CONFIG) == FlowMatchEuler(7.0, 1000)
    # diffusers' default, not HunyuanVideo's
    assert FlowMatchEuler.from_config({"_class_name": CONFIG["_class_name"]}).shift == 1.0
    assert FlowMatchEuler.from_config(dict(FlowMatchEulerDiscreteScheduler(shift=5.0).config) | CONFIG).shift == 7.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "UniPCMultistepScheduler"}, "UniPCMultistepScheduler"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ({"shift_terminal": 0.1}, "shift_terminal"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas"),
        ({"stochastic_sampling": True}, "stochastic_sampling"),
        ({"invert_sigmas": True}, "invert_sigmas"),
        ({"shift": "seven"}, "'seven'"),
        ({"shift": 0}, "shift=0"),
        ({"shift": float("nan")}, "shift=nan"),
        ({"num_train_timesteps": 0}, "=0"),
    ],
)
def test_from_config_refuses_what_would_sample_differently(change, message):
    with pytest.raises(ValueError, match=message):
        FlowMatchEuler.from_config(CONFIG | change)


def test_steps_must_be_positive():
    with pytest.raises(ValueError, match="steps=0"):
        FlowMatchEuler().tables(0)
