"""This machine: its number of CPU devices, settled before JAX starts a backend, and its cache folder."""

import contextlib
import os
from pathlib import Path
from typing import Any

import jax


def cache_root() -> Path:
    """Where corpora and compiled programs are kept: $SPARSEJAX_CACHE, else `sparsejax` in the user's cache folder."""
    chosen, caches = os.environ.get("SPARSEJAX_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(chosen or Path(caches) / "sparsejax").expanduser()


def prepare_devices(count: int) -> None:
    """Makes a machine without accelerators show `count` devices, and keeps compiled programs between processes.

    Call it before anything that touches a device; a backend that runs already stays as it is. A count set by the user
    (`JAX_NUM_CPU_DEVICES`, or in `XLA_FLAGS`) is left alone. Programs are kept in `JAX_COMPILATION_CACHE_DIR`, or in
    the cache folder if that is not set.
    """
    config: Any = jax.config  # its options are attributes that it defines at run time
    on_cpu = (config.jax_platforms or "cpu") == "cpu"
    chosen = config.jax_num_cpu_devices > 0 or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if count > 1 and on_cpu and not chosen:
        # Where the backend runs already and has too few devices, the mesh says so with the numbers.
        with contextlib.suppress(RuntimeError):
            config.update("jax_num_cpu_devices", count)
    if not config.jax_compilation_cache_dir:
        config.update("jax_compilation_cache_dir", str(cache_root() / "xla"))
