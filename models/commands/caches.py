"""What is kept between runs, in the user's cache folder: XDG_CACHE_HOME/adaspa_jax, or ~/.cache/adaspa_jax.

All of it may be deleted at any time; what was longest out of use goes when there is too much.
"""

import contextlib
import os
import tempfile
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

_LEAST_SECONDS = 0.2
"""Of a compilation that is worth a file."""
MOST_BYTES = 8 << 30
"""Of one kind of thing."""


def cache_folder(name: str) -> Path | None:
    """The folder for one kind of thing, which need not be there yet; None: this user has no home."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # A relative one is to be ignored, says the XDG specification.
        base = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    except RuntimeError:
        return None
    return base / "adaspa_jax" / name


def trim(folder: Path) -> None:
    """Deletes files of ours, those used longest ago first, until MOST_BYTES are left."""
    used = []
    for path in folder.iterdir():
        # Another run may delete as well.
        with contextlib.suppress(OSError):
            if path.is_file() and not path.is_symlink():
                facts = path.stat()
                used.append((max(facts.st_atime, facts.st_mtime), facts.st_size, path))
    left = sum(size for _, size, _ in used) - MOST_BYTES
    for _, size, path in sorted(used):
        if left <= 0:
            break
        with contextlib.suppress(OSError):
            path.unlink()
        left -= size


def keep_compiled(given: str | None) -> str | None:
    """Makes JAX keep what it compiles from now on: in a folder, "off", or None: in the user's, or where JAX is set to.

    Returns what is to be said if the user's folder cannot be written; nothing is kept then. Raises ValueError if the
    folder that was given cannot be.
    """
    if given == "":
        raise ValueError("--compile-cache is empty; name a folder, or off")
    if given == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    if given is None and getattr(jax.config, "jax_compilation_cache_dir", None):  # JAX_COMPILATION_CACHE_DIR
        return None
    folder = cache_folder("compiled") if given is None else Path(given)
    if folder is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if given is None:
            trim(folder)
    except OSError as error:
        if given is None:
            return f"compiled programs are not kept: {folder} cannot be written ({error.strerror})"
        raise ValueError(
            f"--compile-cache {given} cannot be written ({error.strerror}); name another folder, or off"
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)
    compilation_cache.reset_cache()  # which looks at its folder once
    return None
