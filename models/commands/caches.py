"""What is kept between runs, in the user's cache folder: XDG_CACHE_HOME/adaspa_jax, or ~/.cache/adaspa_jax.

All of it may be deleted at any time.
"""

import os
from pathlib import Path


def cache_folder(name: str) -> Path | None:
    """The folder for one kind of thing, which need not be there yet; None: this user has no home."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # A relative one is to be ignored, says the XDG specification.
        base = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    except RuntimeError:
        return None
    return base / "adaspa_jax" / name
