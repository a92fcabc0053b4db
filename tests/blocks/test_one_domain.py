"""The experts of one domain as a dense network: as good as the mixture for its tokens."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from sparsejax.base.config import load
from sparsejax.base.errors import ConfigError, RequestError
from sparsejax.blocks.context import Context
from sparsejax.blocks.dense import DenseFeedForward, DenseSpec
from sparsejax.blocks.moe import MoELayer, MoESpec
from sparsejax.blocks.one_domain import network_of_domain
from sparsejax.data.corpus import open_corpus
from sparsejax.data.loader import eval_batches
from sparsejax.model.config import ModelConfig
from sparsejax.nn.mlp import MLP
from sparsejax.routers import presets
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.document_logits import DomainLogits
from sparsejax.routers.tables import ByDomain, Hash
from sparsejax.routers.top_k import TopK
from sparsejax.routers.weights import Constant, Raw
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.upcycle import _some_batch

from runs import arguments, here
from support import ONE_DEVICE, assert_close, host_batch, host_params, on_mesh, put_batch, to_numpy

BACKBONE = ModelConfig(d_model=8, num_heads=2)
X = np.random.default_rng(0).normal(size=(2, 6, 8)).astype(np.float32)
CONFIG = str(Path(__file__).parents[2] / "configs" / "tiny.py")
SHORT = {"train__steps": 1, "optimizer__schedule__warmup_steps": 0}
MOE = MoESpec(num_experts=4, d_ff=6)
ROUTERS = {
    "top-2, raw": (RouterConfig(logits=DomainLogits(domains=3), selection=TopK(k=2), weight=Raw()), {}),
    "TaskMoE, gated": (presets.task_moe(), {"gated": True}),
    "by number": (RouterConfig(selection=ByDomain(k=2), weight=Constant()), {}),
    "with shared experts": (RouterConfig(logits=DomainLogits(domains=3), selection=TopK(k=2)), {"shared_experts": 1}),
}


def by_path(params):
    flat = {"/".join(map(str, path)): variable[...] for path, variable in nnx.to_flat_state(params)}
    return {f"feed_forward/{path}": array for path, array in flat.items()}


@pytest.mark.parametrize("name", ROUTERS)
def test_is_the_mixture_for_tokens_of_the_domain(name):
    router, more = ROUTERS[name]
    spec = dataclasses.replace(MOE, router=router, **more)
    params = host_params(lambda key: MoELayer(key, BACKBONE, spec))
    width = (spec.experts_per_token + spec.shared_experts) * 6
    with on_mesh(ONE_DEVICE) as mesh:
        graph = nnx.split(jax.eval_shape(lambda: MoELayer(jax.random.key(0), BACKBONE, spec)))[0]
        kind = {"gated": spec.gated, "activation": spec.activation}
        dense_graph = nnx.split(
            jax.eval_shape(lambda: DenseFeedForward(MLP(jax.random.key(0), BACKBONE, width, **kind)))
        )

        @jax.jit
        def both(params, batch):
            context = Context(batch=batch, mode="generate")
            expected, _ = nnx.merge(graph, params)(X, context)
            arrays = network_of_domain(by_path(params), spec, 2)
            flat = dict(nnx.to_flat_state(dense_graph[1]))
            flat = {path: v.replace(arrays["/".join(("feed_forward", *map(str, path)))]) for path, v in flat.items()}
            assert len(flat) == len(arrays)
            return nnx.merge(dense_graph[0], nnx.from_flat_state(flat))(X, context)[0], expected

        fields = host_batch(2, 6, padded=0) | {"domains": np.full((2, 6), 2, np.int32)}
        actual, expected = to_numpy(both(params, put_batch(fields, mesh)))
        fields["domains"][:] = 1
        _, other = to_numpy(both(params, put_batch(fields, mesh)))
    assert_close(actual, expected)
    assert np.abs(other - expected).max() > 1e-3


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"router": RouterConfig()}, "must be by_domain"),
        ({"router": RouterConfig(selection=Hash(), weight=Constant())}, "experts of its domain"),
        ({"router": presets.task_moe(), "copy_experts": 1}, "do not make a dense network"),
    ],
)
def test_what_depends_on_more_is_refused(changed, words):
    with pytest.raises(RequestError, match=words):
        network_of_domain({}, dataclasses.replace(MOE, **changed), 0)


def test_a_domain_is_a_number_from_0():
    with pytest.raises(ConfigError, match="negative"):
        DenseSpec(of_domain=-1)


def test_a_run_of_one_domain(tmp_path):
    """From a whole run, with the receipt: on the domain's tokens rounding is all that differs."""
    whole, alone = tmp_path / "whole", tmp_path / "alone"
    by_domain = {"model__blocks__moe__router__logits": "by_domain", "model__blocks__moe__d_ff": 12}
    done = here(*arguments("train", f"--workdir={whole}", **by_domain, **SHORT))
    assert done.status == 0, done.err
    dense = {"model__blocks__moe": "dense", "model__blocks__moe__d_ff": 24, "model__blocks__moe__of_domain": 0}
    done = here(*arguments("train", f"--workdir={alone}", **dense, **SHORT))
    assert done.status == 2 and "blocks.moe.of_domain: 0 has no effect without --init-from=RUN" in done.error
    assert not alone.exists()
    done = here(*arguments("train", f"--workdir={alone}", f"--init-from={whole}", **dense, **SHORT))
    assert done.status == 0, done.err
    said = json.loads((alone / "upcycling.json").read_text())
    assert said["tokens_compared"] > 0
    longer = SHORT | {"train__steps": SHORT["train__steps"] + 1}
    done = here(*arguments("train", f"--workdir={alone}", "--allow-config-change", **dense, **longer))
    assert done.status == 0, done.err  # what goes on has begun already
    assert said["logit_difference"]["generate"] <= 1e-5 * said["largest_logit"]
    # Of a domain that has no text in the validation split, there is nothing to compare.
    nobody = dense | {"model__blocks__moe__of_domain": 9999}
    done = here(*arguments("train", f"--workdir={tmp_path / 'nobody'}", f"--init-from={whole}", **nobody, **SHORT))
    assert done.status == 0 and "not compared with that run" in done.out, done.err


def test_what_is_compared_has_tokens_of_the_domain():
    """Also where the evaluation begins with text of others."""
    config = load(ExperimentConfig, CONFIG).config
    corpus = open_corpus(config.data)
    batches = list(eval_batches(corpus, config.data, config.data.batch_size))
    of_batch = [np.unique(each["domains"][each["segments"] > 0]) for each in batches]
    later = next(domain for domains in of_batch for domain in domains if domain not in of_batch[0])
    with on_mesh(ONE_DEVICE) as mesh:
        batch, compared = _some_batch(config, corpus, mesh, int(later))
        assert compared.any() and np.array_equal(compared, (batch.segments > 0) & (batch.domains == later))
        assert np.array_equal(_some_batch(config, corpus, mesh, None)[1], batches[0]["segments"] > 0)
