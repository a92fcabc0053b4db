"""Compilers are asked whether they know the flags."""

import importlib.util
import os
import subprocess
import sys

import pytest

from sparsejax.launch import xla_flags
from sparsejax.launch.xla_flags import environment

COMPILE = "import jax; jax.config.update('jax_platforms', 'cpu'); print(jax.jit(lambda x: x + 1)(1))"
DESCRIBE = """
from jax.experimental import topologies
print(len(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices))
"""


def ask(code, **variables):
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True, timeout=120
    )
    return done.stdout.strip(), done.stderr


def test_xla_knows_the_flags_for_gpus():
    assert ask(COMPILE, **environment("gpu", several=True))[0] == "2"
    _, refused = ask(COMPILE, XLA_FLAGS="--xla_gpu_enable_speed=true")
    assert "Unknown flag in XLA_FLAGS: --xla_gpu_enable_speed" in refused


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra `plan`)")
def test_libtpu_knows_the_flags_for_tpus():
    machine = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    counted, said = ask(DESCRIBE, **machine, **environment("tpu", several=True))
    assert counted == "4" and "Unknown command line flag" not in said
    counted, said = ask(DESCRIBE, **machine, LIBTPU_INIT_ARGS="--xla_tpu_enable_speed=true")
    assert counted == "" and "Unknown command line flag 'xla_tpu_enable_speed'" in said


def test_flags_are_named_once_and_say_what_for():
    flags = xla_flags.GPU + xla_flags.TPU + xla_flags.TPU_SLICES
    assert len({flag.name for flag in flags}) == len(flags)
    assert all(len(flag.why) > 20 for flag in flags)


def test_flags_go_where_they_are_read():
    assert environment("gpu", several=False) == {}
    assert set(environment("gpu", several=True)) == {"XLA_FLAGS"}
    one, several = (environment("tpu", several=each)["LIBTPU_INIT_ARGS"] for each in (False, True))
    assert several.startswith(f"{one} --xla_tpu_") and "--xla_gpu_" not in several
