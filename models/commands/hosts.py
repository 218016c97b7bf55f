"""Several hosts that run one command together: how they find each other, and which of them writes.

All start the same command. On a TPU slice, under SLURM, Open MPI or Kubernetes JAX finds the others by itself; anywhere
else three variables of the environment say where they are: JAX_COORDINATOR_ADDRESS (host:port of the first),
JAX_NUM_PROCESSES and JAX_PROCESS_ID (from 0).
"""

import os

import jax
from rich.console import Console

COUNT, OWN = "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def join() -> None:
    """Waits for the other hosts, before anything uses a device. ValueError if they cannot be found."""
    given = {}
    for name in (COUNT, OWN):
        if (text := os.environ.get(name)) is not None:
            if not text.isascii() or not text.isdigit():
                raise ValueError(f"--distributed: {name}={text!r} is no number")
            given[name] = int(text)
    if given and len(given) < 2:
        raise ValueError(f"--distributed: {COUNT} and {OWN} go together; set both, or neither")
    try:
        jax.distributed.initialize(num_processes=given.get(COUNT), process_id=given.get(OWN))
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--distributed: the hosts do not find each other ({error}); set JAX_COORDINATOR_ADDRESS, {COUNT} and {OWN}"
        ) from error


def is_first() -> bool:
    """Whether this is the host that writes and prints; true where there is one. Asks for no device."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def stderr() -> Console:
    """Where progress goes: the standard error of the first host."""
    return Console(stderr=True, quiet=not is_first())
