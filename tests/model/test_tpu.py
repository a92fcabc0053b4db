"""A whole training step through the real TPU compiler, for a pod that nobody owns."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import dataclasses, json
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from sparsejax.base.sharding import BATCH_AXES, MeshConfig
from sparsejax.data.config import DataConfig
from sparsejax.model.config import ModelConfig
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.state import abstract_state, make_optimizer
from sparsejax.train.step import make_train_step

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4")
devices = np.array(topology.devices).reshape(2, 4, 2)
mesh = jax.sharding.Mesh(devices, ("data", "expert", "tensor"), axis_types=(AxisType.Explicit,) * 3)
config = ExperimentConfig(
    model=ModelConfig(d_model=256, num_heads=2, repeats=2, dtype="bfloat16", remat="full"),
    data=DataConfig(batch_size=16, sequence_length=1024),
    mesh=MeshConfig(data=2, expert=4, tensor=2),
)
with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    tx = make_optimizer(config)
    state = abstract_state(config, tx, mesh)
    rows = NamedSharding(mesh, P(None, BATCH_AXES))
    ints = jax.ShapeDtypeStruct((1, 16, 1024), jnp.int32, sharding=rows)
    batch = dict.fromkeys(("tokens", "targets", "segments", "positions", "domains"), ints)
    batch |= {"loss_mask": ints.update(dtype=bool), "rows": ints.update(shape=(1, 16))}
    compiled = jax.jit(make_train_step(config, tx), donate_argnums=0).lower(state, batch).compile()
text = compiled.as_text()
names = ("tpu_custom_call", "all-to-all", "reduce-scatter")
print(json.dumps({name: text.count(name) for name in names}))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install libtpu (no TPU)"
)
def test_a_step_compiles_for_a_pod_with_flash_attention_and_the_exchange():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["tpu_custom_call"] >= 2, "attention=auto should be the flash kernel, forward and backward"
    assert found["all-to-all"] >= 2 and found["reduce-scatter"] >= 1
