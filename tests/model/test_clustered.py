"""MoEfication: a dense network cut into experts, whole again when a token takes all of them."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.base.errors import ConfigError, RequestError
from sparsejax.blocks.moe import MoESpec
from sparsejax.blocks.upcycling import mixture_of_clusters
from sparsejax.model.clustered import balanced_clusters
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.top_k import TopK
from sparsejax.routers.weights import Raw, Unit

from runs import arguments, here, losses

SHORT = {"train__steps": 1, "optimizer__schedule__warmup_steps": 0}
MOE = MoESpec(num_experts=4, d_ff=16, from_dense="clusters", router=RouterConfig(selection=TopK(k=4), weight=Unit()))


def test_planted_clusters_are_found():
    rng = np.random.default_rng(0)
    kinds = rng.permutation(np.repeat(np.arange(4), 6))
    points = np.eye(8)[kinds] * rng.uniform(0.5, 2, (24, 1)) + 0.02 * rng.normal(size=(24, 8))
    order = balanced_clusters(points, 4)
    assert sorted(order) == list(range(24))
    assert all(len(set(found)) == 1 for found in kinds[order].reshape(4, 6))


def test_clusters_are_of_equal_size_whatever_the_points():
    points = np.random.default_rng(1).normal(size=(24, 8))
    points[:20] = points[0]
    order = balanced_clusters(points, 3)
    assert sorted(order) == list(range(24)) and (order == balanced_clusters(points, 3)).all()


def test_experts_are_shards_and_columns_their_means():
    rng = np.random.default_rng(0)
    trained = {
        "norm": rng.normal(size=3),
        "feed_forward/mlp/w_in/weight": rng.normal(size=(3, 8)),
        "feed_forward/mlp/w_out/weight": rng.normal(size=(8, 3)),
    }
    fresh = {
        "norm": np.zeros(3),
        "feed_forward/router/weight": np.zeros((3, 4)),
        "feed_forward/experts/w_in": np.zeros((4, 3, 2)),
        "feed_forward/experts/w_out": np.zeros((4, 2, 3)),
    }
    arrays = lambda given: {name: jnp.asarray(value) for name, value in given.items()}  # noqa: E731
    found = mixture_of_clusters(arrays(fresh), arrays(trained))
    w_in = trained["feed_forward/mlp/w_in/weight"]
    for e in range(4):
        np.testing.assert_allclose(found["feed_forward/experts/w_in"][e], w_in[:, 2 * e : 2 * e + 2], rtol=1e-6)
        np.testing.assert_allclose(
            found["feed_forward/router/weight"][:, e], w_in[:, 2 * e : 2 * e + 2].mean(1), rtol=1e-5
        )
    np.testing.assert_allclose(
        found["feed_forward/experts/w_out"].reshape(8, 3), trained["feed_forward/mlp/w_out/weight"], rtol=1e-6
    )
    with pytest.raises(RequestError, match="logits=linear"):
        mixture_of_clusters(arrays(fresh) | {"feed_forward/router/residual": jnp.zeros((4, 4))}, arrays(trained))
    wide = {"feed_forward/experts/w_in": np.zeros((4, 3, 8)), "feed_forward/experts/w_out": np.zeros((4, 8, 3))}
    with pytest.raises(RequestError, match="part of the width"):
        mixture_of_clusters(arrays(fresh | wide), arrays(trained))


@pytest.mark.parametrize("router", [{"weight": Raw()}, {}])
def test_clusters_add_up_only_with_weights_of_1(router):
    with pytest.raises(ConfigError, match="weight=unit"):
        dataclasses.replace(MOE, router=RouterConfig(selection=TopK(k=4), **router))


def test_all_experts_are_the_dense_network(tmp_path):
    """From a whole run: at k = E rounding is all that differs, at less it is not, and training goes on."""
    dense = tmp_path / "dense"
    words = arguments("train", f"--workdir={dense}", model__pattern="(dense,)", model__repeats=2, **SHORT)
    assert here(*words).status == 0
    cut = {
        "model__blocks__moe__num_experts": 4,
        "model__blocks__moe__d_ff": 16,
        "model__blocks__moe__from_dense": "clusters",
        "model__blocks__moe__router__weight": "unit",
        "model__blocks__moe__dispatch": "grouped",
    }
    said = {}
    for k in (4, 2):
        workdir = tmp_path / f"{k}"
        more = {"model__blocks__moe__router__selection__k": k}
        done = here(*arguments("train", f"--workdir={workdir}", f"--init-from={dense}", **SHORT, **cut, **more))
        assert done.status == 0, done.err
        said[k] = json.loads((workdir / "upcycling.json").read_text())
        assert np.isfinite(list(losses(workdir).values())).all()
    for mode in ("generate", "eval", "train"):
        assert said[4]["logit_difference"][mode] <= 1e-5 * said[4]["largest_logit"]
        assert said[2]["logit_difference"][mode] > 1e-4 * said[2]["largest_logit"]
