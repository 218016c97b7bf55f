"""Straight from the file onto (sharded) devices: the same values, every slice read once, little memory besides."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.torch import load_file, save_file

import models
from models.checkpoint import key_table
from models.checkpoint.loading import open_source
from models.checkpoint.safetensors_folder import SINGLE
from tests.convert.test_interrupted import DEMO, large_checkpoint

ROOT = DEMO.parents[2]

SHARDED = """
import json, math, sys
from pathlib import Path
from unittest import mock
import jax, numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import models
from models.checkpoint.key_table import Leaf

source, converted = sys.argv[1:]
mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
read, values = Leaf.read, 0

def counted(self, *args, **kwargs):
    global values
    out = read(self, *args, **kwargs)
    values += out.size
    return out

def flat(model):
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(model))}

def both(path, shape):  # the last axis over "b", the first, of layers if there are any, over "a"
    if shape[-1] % 2:
        return NamedSharding(mesh, P())
    first = ("a" if shape[0] % 2 == 0 else None,) if len(shape) > 1 else ()
    return NamedSharding(mesh, P(*first, *(None,) * (len(shape) - 2), "b"))

expected = flat(models.from_pretrained(source))
for placement in (NamedSharding(mesh, P()), both, lambda path, shape: None):
    for path in (source, converted):
        values, seen = 0, []
        with mock.patch.object(Leaf, "read", counted):
            found = flat(models.from_pretrained(path, sharding=placement, progress=lambda *n: seen.append(n)))
        total = sum(value.size for value in expected.values())
        assert values == (total if path == source else 0), (values, total)
        assert seen[-1] == (total, total) and len(seen) == len(expected)
        for key, value in found.items():
            wanted = placement if isinstance(placement, NamedSharding) else placement(key, value.shape)
            assert wanted is None or value.sharding.is_equivalent_to(wanted, value.ndim), key
            assert value.dtype == expected[key].dtype
            np.testing.assert_array_equal(value, expected[key], err_msg=key)
split = flat(models.from_pretrained(source, sharding=both)).values()
print(sum(4 * value.addressable_shards[0].data.size == value.size for value in split))
"""

MEASURED = """
import sys
import jax
import models

def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024

jax.block_until_ready(jax.numpy.zeros(1))
import models.checkpoint.loading
start = memory("VmRSS")
model = models.from_pretrained(sys.argv[1])
print(memory("VmHWM") - start)
"""


def run(script: str, *arguments: Path, devices: int = 1) -> str:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-c", script, *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_sharded_over_four_devices_every_slice_is_read_once(tmp_path: Path) -> None:
    from convert.writer import convert

    convert(DEMO, tmp_path / "converted")
    assert int(run(SHARDED, DEMO, tmp_path / "converted", devices=4)) > 20


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_is_the_weights_and_one_parameter(tmp_path: Path) -> None:
    large_checkpoint(tmp_path / "src")
    source = open_source(tmp_path / "src")
    sizes = [leaf.size * source.dtype.itemsize / 2**20 for leaf in source.leaves]
    peak = float(run(MEASURED, tmp_path / "src").split()[-1])
    print(f"peak {peak:.0f} MiB, largest {max(sizes):.0f}, all {sum(sizes):.0f}")
    assert peak < sum(sizes) + max(sizes) + 100


def test_every_slice_of_a_stacked_parameter_equals_that_of_the_whole() -> None:
    source = open_source(DEMO)
    for leaf in source.leaves:
        whole = leaf.read(source.tensors)
        index = tuple(slice(n // 3, n - n // 4) for n in leaf.shape)
        np.testing.assert_array_equal(leaf.read(source.tensors, None, index), whole[index])
        wide = leaf.read(source.tensors, np.dtype(np.float32), index)
        np.testing.assert_array_equal(wide, whole[index].astype(np.float32))


def test_broken_weights_in_a_slice_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_table, "is_finite", lambda value: False)
    replicated = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(ValueError, match="NaN or infinite"):
        models.from_pretrained(DEMO, sharding=replicated)


def test_weights_that_the_dtype_cannot_hold_are_found(tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "demo")
    file = tmp_path / "demo/transformer" / SINGLE
    tensors = load_file(file)
    key = "transformer_blocks.1.attn.to_q.weight"
    tensors = {name: value.float() for name, value in tensors.items()}
    tensors[key][3, 5] = 1e6
    save_file(tensors, file)
    models.from_pretrained(tmp_path / "demo", dtype="bfloat16")
    with pytest.raises(ValueError, match=rf"tensor '{key}' has values that float16 cannot hold; load it in float32"):
        models.from_pretrained(tmp_path / "demo", dtype="float16")


def test_parameters_are_taken_over_by_jax_without_a_copy() -> None:
    source = open_source(DEMO)
    for leaf in source.leaves[:3]:
        value = leaf.read(source.tensors)
        array = jax.device_put(value, jax.devices("cpu")[0])
        assert array.unsafe_buffer_pointer() == value.ctypes.data
    state = nnx.state(models.from_pretrained(DEMO))
    assert not any(leaf.committed for leaf in jax.tree.leaves(state))
