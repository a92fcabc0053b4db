"""Every test sees eight virtual CPU devices, and compiles little and once."""

import gc
import pathlib
import sys

import jax
import pytest

TESTS = pathlib.Path(__file__).parent
sys.path.insert(0, str(TESTS))  # for `support` and `reference`, whatever pytest's import mode

import cheap  # noqa: E402

cheap.use()
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# Tests compile thousands of times what they execute: cheap code, kept between runs.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_compilation_cache_dir", str(TESTS.parent / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)

LONGEST = (
    "contracts/test_router_contract.py",
    "test_config_keys.py",
    "train/test_resume.py",
    "train/test_loop.py",
    "test_readme.py",
    "blocks/test_moe.py",
    "model/test_lm.py",
    "train/test_step.py",
)
"""Files that take minutes. They come first, or one worker would sit over one of them while the others have finished."""


def pytest_configure(config):
    config.option.loadscopereorder = False  # xdist would start with the files that have the most tests


def pytest_collection_modifyitems(items):
    places = {TESTS / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))  # the order within a file stays


def pytest_collection_finish():
    """What is imported by now stays: the collector need not look at it again, nor at every few objects of a trace."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture
def one_device():
    """A mesh of one device, in force."""
    from support import on_mesh

    with on_mesh((1, 1, 1)) as mesh:
        yield mesh


@pytest.fixture(scope="session", autouse=True)
def _traced_once():
    from runs import traced_once

    with traced_once():
        yield
