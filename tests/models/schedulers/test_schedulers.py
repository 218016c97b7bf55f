"""Schedulers and guidance against diffusers: the same toy model sampled by both, float32."""

import dataclasses
import math

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_dpm_cogvideox, scheduling_flow_match_euler_discrete

from adaspa_jax import SparseConfig, denoise
from models import schedulers
from models.pipeline import guidance
from models.schedulers import CogVideoXDDIM, CogVideoXDPM, FewStep, FlowMatchEuler, UniPC
from tests.relative_error import relative_error

EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 7.0}
UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "flow_shift": 3.0,
    "prediction_type": "flow_prediction",
    "solver_order": 2,
    "solver_type": "bh2",
    "timestep_spacing": "linspace",
    "use_flow_sigmas": True,
}
DDIM = {
    "_class_name": "CogVideoXDDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "snr_shift_scale": 1.0,
    "timestep_spacing": "trailing",
}
DPM = DDIM | {"_class_name": "CogVideoXDPMScheduler"}
STEPS = [1, 2, 3, 4, 7, 30, 50]


def diffusers_scheduler(config):
    return getattr(diffusers, config["_class_name"]).from_config(config)


def hunyuan_sigmas(steps):
    return np.linspace(1.0, 0.0, steps + 1)[:-1]


def noise():
    return np.random.default_rng(0).normal(size=(2, 5, 16)).astype(np.float32)


def their_model(x, t):
    """Depends on time and mixes; mild, or it would amplify the rounding of either side past the tolerance."""
    return torch.tanh(0.7 * x.roll(1, -1) + 0.3 * x) * (0.5 + t.float() / 2000) + torch.sin(3 * x) / 10


def our_model(x, t):
    return jnp.tanh(0.7 * jnp.roll(x, 1, -1) + 0.3 * x) * (0.5 + t / 2000) + jnp.sin(3 * x) / 10


def run_theirs(scheduler):
    x = torch.from_numpy(noise())
    for t in scheduler.timesteps:
        x = scheduler.step(their_model(x, t), t, x, return_dict=False)[0]
    return x


def run_ours(scheduler, steps, x=None):
    def step(carry, row):
        latents = scheduler.latents(carry)
        return scheduler.step(carry, our_model(latents, row["timestep"]), row), None

    carry, _ = jax.lax.scan(step, scheduler.init(jnp.asarray(noise() if x is None else x)), scheduler.tables(steps))
    return scheduler.latents(carry)


@pytest.mark.parametrize("shift", [1.0, 7.0])
@pytest.mark.parametrize("steps", STEPS)
def test_euler_with_the_sigmas_of_hunyuan_video(steps, shift):
    theirs = diffusers_scheduler(EULER | {"shift": shift})
    theirs.set_timesteps(sigmas=hunyuan_sigmas(steps))
    ours = schedulers.from_config(EULER | {"shift": shift})
    np.testing.assert_array_equal(ours.tables(steps)["timestep"], theirs.timesteps.numpy())
    np.testing.assert_array_equal(ours.tables(steps)["dt"], np.diff(theirs.sigmas.numpy()))
    assert relative_error(run_ours(ours, steps), run_theirs(theirs)) < 1e-6


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("steps", STEPS)
def test_euler_with_default_sigmas(steps, shift):
    theirs = diffusers_scheduler(EULER | {"shift": shift})
    theirs.set_timesteps(steps)
    ours = dataclasses.replace(schedulers.from_config(EULER), shift=shift, default_sigmas=True)
    np.testing.assert_array_equal(ours.tables(steps)["timestep"], theirs.timesteps.numpy())
    assert relative_error(run_ours(ours, steps), run_theirs(theirs)) < 1e-6


FEW = [(1000.0, 750.0, 500.0, 250.0), (1000.0, 757.0, 522.0), (999.0,)]


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("timesteps", FEW, ids=str)
@pytest.mark.parametrize("renoise", [False, True])
def test_a_few_given_timesteps(timesteps, shift, renoise, monkeypatch):
    theirs = diffusers_scheduler(EULER | {"shift": shift, "stochastic_sampling": renoise})
    theirs.set_timesteps(sigmas=[t / 1000 for t in timesteps])
    drawn, draw = [], scheduling_flow_match_euler_discrete.randn_tensor

    def record(*args, **kwargs):
        drawn.append(draw(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(scheduling_flow_match_euler_discrete, "randn_tensor", record)
    torch.manual_seed(0)
    expected = run_theirs(theirs)
    table = jnp.asarray(np.stack([x.numpy() for x in drawn])) if renoise else None
    ours = FewStep(timesteps, shift, renoise, noise=lambda key, number, latents: table[number])
    tables = ours.tables(len(timesteps))
    np.testing.assert_array_equal(tables["timestep"], theirs.timesteps.numpy())
    np.testing.assert_array_equal(np.append(tables["sigma"], 0), theirs.sigmas.numpy())
    assert relative_error(run_ours(ours, len(timesteps)), expected) < 1e-6


def test_the_noise_of_a_few_steps_is_the_seeds():
    run = lambda seed: run_ours(FewStep(FEW[0], renoise=True, seed=seed), 4)
    np.testing.assert_array_equal(run(3), run(3))
    assert relative_error(run(4), run(3)) > 0.1


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
@pytest.mark.parametrize("steps", STEPS)
def test_unipc(steps, shift):
    theirs = diffusers_scheduler(UNIPC | {"flow_shift": shift})
    theirs.set_timesteps(steps)
    theirs.set_begin_index(0)
    ours = schedulers.from_config(UNIPC | {"flow_shift": shift})
    np.testing.assert_array_equal(ours.tables(steps)["timestep"], theirs.timesteps.numpy())
    assert relative_error(run_ours(ours, steps), run_theirs(theirs)) < 1e-6


OPTIONS = [{"snr_shift_scale": 3.0}, {"rescale_betas_zero_snr": False}, {"set_alpha_to_one": False}]
COGVIDEOX = [(steps, {}) for steps in STEPS] + [(steps, options) for steps in (7, 50) for options in OPTIONS]


@pytest.mark.parametrize(("steps", "options"), COGVIDEOX, ids=str)
def test_ddim(steps, options):
    theirs = diffusers_scheduler(DDIM | options)
    theirs.set_timesteps(steps)
    ours = schedulers.from_config(DDIM | options)
    np.testing.assert_array_equal(ours.tables(steps)["timestep"], theirs.timesteps.numpy())
    assert relative_error(run_ours(ours, steps), run_theirs(theirs)) < 1e-6


@pytest.mark.parametrize(("steps", "options"), COGVIDEOX, ids=str)
def test_dpm_with_the_noise_of_torch(steps, options, monkeypatch):
    theirs = diffusers_scheduler(DPM | options)
    theirs.set_timesteps(steps)
    drawn, draw = [], scheduling_dpm_cogvideox.randn_tensor

    def record(*args, **kwargs):
        drawn.append(draw(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(scheduling_dpm_cogvideox, "randn_tensor", record)
    generator = torch.Generator().manual_seed(0)
    x, before, used = torch.from_numpy(noise()), None, []
    for i, t in enumerate(theirs.timesteps):
        back = theirs.timesteps[i - 1] if i else None
        x, before = theirs.step(their_model(x, t), before, t, back, x, generator=generator)
        x = x.float()  # the pipeline's cast
        used.append(drawn[-1])  # of the two that a second-order step draws
    table = jnp.asarray(torch.stack(used).numpy())
    ours = dataclasses.replace(schedulers.from_config(DPM | options), noise=lambda key, number, latents: table[number])
    np.testing.assert_array_equal(ours.tables(steps)["timestep"], theirs.timesteps.numpy())
    assert relative_error(run_ours(ours, steps), x) < 1e-6


def test_dpm_draws_fresh_noise_from_its_seed():
    start = np.zeros((64, 64), np.float32)
    scheduler = CogVideoXDPM()
    row = {name: table[0] for name, table in scheduler.tables(4).items()}
    step = lambda carry: scheduler.step(carry, jnp.zeros_like(carry.latents), row)
    first = step(scheduler.init(jnp.asarray(start)))
    second = step(first._replace(latents=jnp.asarray(start), x0=jnp.asarray(start)))
    for latents in (first.latents, second.latents):
        np.testing.assert_allclose(latents.std(), row["from_noise"], rtol=0.05)
    assert abs(np.corrcoef(first.latents.ravel(), second.latents.ravel())[0, 1]) < 0.05

    run = jax.jit(lambda seed: run_ours(dataclasses.replace(scheduler, seed=seed), 4))
    np.testing.assert_array_equal(run(3), run(3))
    assert relative_error(run(4), run(3)) > 0.1
    np.testing.assert_array_equal(run(jax.random.key(3)), run(3))


@pytest.mark.parametrize("scheduler", [FlowMatchEuler(), UniPC(), CogVideoXDDIM(), CogVideoXDPM()])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_denoising_scan_runs_each(scheduler, dtype):
    """In its protocol, tables as they are; a prediction of another dtype leaves the latents' dtype alone."""
    config = SparseConfig(steps=6)

    def predict(latents, row, state, kind):
        return our_model(latents, row["timestep"]).astype(jnp.bfloat16), state

    latents, _, _ = denoise(predict, scheduler, scheduler.tables(6), jnp.asarray(noise()).astype(dtype), (), config)
    assert latents.dtype == dtype
    assert np.isfinite(np.asarray(latents, np.float32)).all()


@pytest.mark.parametrize("scheduler", [FlowMatchEuler(), UniPC(), CogVideoXDDIM(), CogVideoXDPM()])
def test_tables_are_finite_float32_scalars(scheduler):
    for steps in [*STEPS, 61, 1000]:
        tables = scheduler.tables(steps)
        number = tables.pop("number", np.arange(steps, dtype=np.int32))
        np.testing.assert_array_equal(number, np.arange(steps))
        assert number.dtype == np.int32
        for name, table in tables.items():
            assert (table.dtype, table.shape) == (np.float32, (steps,)), name
            assert np.isfinite(table).all(), name
    with pytest.raises(ValueError, match="steps=0"):
        scheduler.tables(0)


@pytest.mark.parametrize("scheduler", [CogVideoXDDIM(), CogVideoXDPM()])
def test_more_steps_than_timesteps(scheduler):
    with pytest.raises(ValueError, match="steps=1001 must be at most train_timesteps=1000"):
        scheduler.tables(1001)


def test_from_config():
    assert schedulers.from_config(EULER) == FlowMatchEuler.from_config(EULER) == FlowMatchEuler(7.0, 1000)
    # diffusers' defaults, not the models'
    assert FlowMatchEuler.from_config({"_class_name": EULER["_class_name"]}).shift == 1.0
    assert schedulers.from_config({k: v for k, v in UNIPC.items() if k != "flow_shift"}) == UniPC(1.0)
    assert schedulers.from_config({k: v for k, v in DDIM.items() if k != "snr_shift_scale"}) == CogVideoXDDIM(3.0)
    for config, expected in (
        (EULER, FlowMatchEuler()),
        (UNIPC, UniPC()),
        (DDIM, CogVideoXDDIM()),
        (DPM, CogVideoXDPM()),
    ):
        written = dict(diffusers_scheduler(config).config) | {"_class_name": config["_class_name"]}
        assert schedulers.from_config(written) == expected


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (EULER, {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        (EULER, {"shift_terminal": 0.1}, "shift_terminal"),
        (EULER, {"use_karras_sigmas": True}, "use_karras_sigmas"),
        (EULER, {"stochastic_sampling": True}, "stochastic_sampling"),
        (EULER, {"invert_sigmas": True}, "invert_sigmas"),
        (EULER, {"shift": "seven"}, "'seven'"),
        (EULER, {"shift": 0}, "shift=0"),
        (EULER, {"shift": float("nan")}, "shift=nan"),
        (EULER, {"num_train_timesteps": 0}, "=0"),
        (UNIPC, {"prediction_type": "epsilon"}, "prediction_type='epsilon'.*'flow_prediction'"),
        (UNIPC, {"use_flow_sigmas": False}, "use_flow_sigmas=False"),
        (UNIPC, {"solver_order": 3}, "solver_order=3 .*must be 2"),
        (UNIPC, {"solver_type": "bh1"}, "bh1"),
        (UNIPC, {"lower_order_final": False}, "lower_order_final"),
        (UNIPC, {"disable_corrector": [0]}, "disable_corrector"),
        (UNIPC, {"thresholding": True}, "thresholding"),
        (UNIPC, {"final_sigmas_type": "sigma_min"}, "sigma_min"),
        (UNIPC, {"flow_shift": -1}, "shift=-1"),
        (DDIM, {"prediction_type": "epsilon"}, "prediction_type"),
        (DDIM, {"timestep_spacing": "leading"}, "timestep_spacing='leading'"),
        (DDIM, {"beta_schedule": "linear"}, "beta_schedule"),
        (DDIM, {"trained_betas": [0.1]}, "trained_betas"),
        (DDIM, {"snr_shift_scale": 0}, "snr_shift_scale=0"),
        (DDIM, {"beta_end": 1.5}, "beta_end=1.5"),
        (DDIM, {"rescale_betas_zero_snr": 1}, "rescale_betas_zero_snr=1 must be true or false"),
        (DPM, {"timestep_spacing": "linspace"}, "timestep_spacing"),
    ],
)
def test_from_config_refuses_what_would_sample_differently(config, change, message):
    with pytest.raises(ValueError, match=message):
        schedulers.from_config(config | change)


@pytest.mark.parametrize("name", ["DDIMScheduler", None, []])
def test_an_unknown_scheduler_is_told_what_is_supported(name):
    with pytest.raises(ValueError, match=r"not supported; supported: .*UniPCMultistepScheduler.*CogVideoXDPMScheduler"):
        schedulers.from_config({"_class_name": name})


def test_a_scheduler_of_another_class_is_refused():
    with pytest.raises(ValueError, match="UniPCMultistepScheduler"):
        FlowMatchEuler.from_config(UNIPC)


def test_guidance():
    uncond, cond = jnp.asarray([1.0, 2.0]), jnp.asarray([2.0, 0.0])
    np.testing.assert_array_equal(guidance.cfg(uncond, cond, 6.0), [7.0, -10.0])
    np.testing.assert_array_equal(guidance.cfg(uncond, cond, 1.0), cond)
    assert guidance.cfg(uncond.astype(jnp.bfloat16), cond.astype(jnp.bfloat16), jnp.float32(6)).dtype == jnp.float32
    table = guidance.constant_scale(5.0, 3)
    assert (table.dtype, table.tolist()) == (np.float32, [5.0] * 3)


@pytest.mark.parametrize("steps", [4, 30, 50])
def test_dynamic_guidance_is_the_formula_of_the_cogvideox_pipeline(steps):
    timesteps = CogVideoXDPM().tables(steps)["timestep"]
    expected = [
        1 + 6.0 * ((1 - math.cos(math.pi * ((steps - int(t)) / steps) ** 5.0)) / 2) for t in timesteps
    ]  # as written there
    table = guidance.dynamic_scale(6.0, timesteps)
    assert table.dtype == np.float32
    np.testing.assert_allclose(table, expected, rtol=1e-6)


def test_guidance_must_be_finite():
    with pytest.raises(ValueError, match="scale=nan"):
        guidance.constant_scale(float("nan"), 3)
    with pytest.raises(ValueError, match="scale=inf"):
        guidance.dynamic_scale(float("inf"), np.arange(3))
