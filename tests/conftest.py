"""Every test sees eight virtual CPU devices, and compiles little and once."""

import pathlib
import sys

import jax
import pytest

TESTS = pathlib.Path(__file__).parent
sys.path.insert(0, str(TESTS))  # for `support` and `reference`, whatever pytest's import mode

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# Tests compile thousands of times what they execute: cheap code, kept between runs.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_compilation_cache_dir", str(TESTS.parent / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


@pytest.fixture
def one_device():
    """A mesh of one device, in force."""
    from support import on_mesh

    with on_mesh((1, 1, 1)) as mesh:
        yield mesh
