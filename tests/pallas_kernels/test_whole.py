"""A kernel on operands that several devices share is refused outside of shard_map: XLA would gather them in silence."""

import os
import subprocess
import sys

SHARED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from pallas_kernels import flash_attention, mosaic_gpu

mosaic_gpu.unsupported = lambda request: None
mosaic_gpu.flash_attention = lambda call: (call.q, call.q[..., 0])  # what runs is not the matter here
attend = lambda x: flash_attention(x, x, x, implementation="mosaic_gpu")
plain = np.ones((2, 4, 16, 64), np.float32)

def refused(run, *x):
    try:
        run(*x)
    except NotImplementedError as error:
        expected = "flash_attention of mosaic_gpu would run whole on each of 4 devices, its operands gathered: call it "
        assert str(error).startswith(expected + "inside jax.shard_map"), error
        return
    raise AssertionError("accepted")

for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = Mesh(np.array(jax.devices()), ("heads",), axis_types=(kind,))
    x = jax.device_put(plain, NamedSharding(mesh, P(None, "heads")))
    refused(attend, x)
    refused(jax.jit(attend).lower, x)
    with jax.enable_x64(True):
        refused(jax.jit(jax.vmap(attend)).lower, x[None])
    spread = jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=P(None, "heads"), out_specs=P(None, "heads")))
    assert spread(x).shape == x.shape
two = Mesh(np.array(jax.devices()).reshape(1, 4), ("data", "heads"), axis_types=(AxisType.Auto,) * 2)
some = lambda axes: jax.jit(jax.shard_map(attend, mesh=two, in_specs=P(), out_specs=P(), axis_names={axes}))
refused(some("data").lower, plain)
some("heads").lower(plain)
for alone in (attend(jnp.asarray(plain)), jax.jit(attend)(plain), jax.jit(jax.vmap(attend))(plain[None])[0]):
    assert alone.shape == plain.shape
print("refused")
"""


def test_operands_of_several_devices() -> None:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    ended = subprocess.run([sys.executable, "-c", SHARED], capture_output=True, text=True, env=environment)
    assert ended.stdout == "refused\n", ended.stderr[-2000:]
