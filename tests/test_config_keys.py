"""Every key of the config changes something: a key that nothing reads fails here, and so does one without a row.

A row gives another value for a key, and where its effect shows: in the traced program of a part, in numbers that are
cheap to compute, or in a test elsewhere, which is named and must exist.
"""

import ast
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sparsejax.base.config import load
from sparsejax.base.config_schema import Choice, Choices, Group, Leaf, defaults, slots
from sparsejax.base.sharding import BATCH_AXES, make_mesh
from sparsejax.data.corpus import open_corpus
from sparsejax.data.loader import train_rows
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.optimizer import learning_rate_at
from sparsejax.train.state import abstract_model, abstract_state, init_state, make_optimizer, state_specs
from sparsejax.train.step import make_eval_step, make_grads_of_step, make_train_step

TESTS = Path(__file__).parent
TINY = {
    "model.d_model": "8",
    "model.num_heads": "2",
    "model.vocab_size": "256",
    "model.repeats": "1",
    "data.name": "synthetic",
    "data.sequence_length": "8",
    "data.batch_size": "4",
    "train.steps": "20",
}
Config = ExperimentConfig


# Where an effect shows. Each is a function of a config whose results are compared for equality.


def parameters(config: Config) -> Any:
    """Name, shape and type of every parameter."""
    with jax.set_mesh(make_mesh(config.mesh)):
        leaves = jax.tree_util.tree_leaves_with_path(abstract_model(config.model)[1])
        return [(jax.tree_util.keystr(path), leaf.shape, leaf.dtype) for path, leaf in leaves]


def initial(config: Config) -> Any:
    """The program that makes a new state, with the seed in it."""
    return program(config, lambda tx: lambda: init_state(config, tx))


def gradients(config: Config) -> Any:
    """The program of loss and gradients."""
    return program(
        config,
        lambda tx: lambda state, batch: make_grads_of_step(config)(state.params, state.model_state, batch, state.step),
        abstract_batch(config),
    )


def evaluation(config: Config) -> Any:
    """The program of an evaluation batch."""
    return program(config, lambda tx: make_eval_step(config), abstract_batch(config))


def training(config: Config) -> Any:
    """The program of a whole step."""
    return program(config, lambda tx: make_train_step(config, tx), abstract_batch(config))


def update(config: Config) -> Any:
    """The program of the optimizer."""
    return program(config, lambda tx: lambda state: tx.update(state.params, state.opt_state, state.params), ())


def rates(config: Config) -> list[float]:
    """The learning rate at some steps."""
    rate = learning_rate_at(config.optimizer, config.train.steps)
    return [float(rate(step)) for step in (0, 1, 5, 10, 15, 18, 19)]


def rows(config: Config) -> list[np.ndarray]:
    """What the first batch holds."""
    source = train_rows(open_corpus(config.data), config.data, config.train.seed)
    return [array.tolist() for array in source.rows(np.arange(config.data.batch_size)).values()]


def mesh_shape(config: Config) -> tuple[int, ...]:
    return make_mesh(config.mesh).devices.shape


def layout(config: Config) -> Any:
    """Where every array of the state lies."""
    with jax.set_mesh(make_mesh(config.mesh)):
        specs = state_specs(config, make_optimizer(config))
        return jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))


def abstract_batch(config: Config) -> tuple[Any]:
    accumulation = config.train.accumulation
    shape = (accumulation, config.data.batch_size // accumulation, config.data.sequence_length)
    sharding = NamedSharding(make_mesh(config.mesh), PartitionSpec(None, BATCH_AXES))
    tokens = jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding)
    batch = dict.fromkeys(("tokens", "targets", "segments", "positions", "domains"), tokens)
    return (batch | {"loss_mask": tokens.update(dtype=bool), "rows": tokens.update(shape=shape[:2])},)


def program(config: Config, make: Callable[[Any], Callable], batch: tuple | None = None) -> str:
    """The text of what `make(optimizer)` does to the state and, if it takes one, a batch; constants included."""
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        tx = make_optimizer(config)
        arguments = () if batch is None else (abstract_state(config, tx, mesh), *batch)
        traced = jax.make_jaxpr(make(tx))(*arguments)
    constants = [np.asarray(jax.random.key_data(c) if is_key(c) else c).tolist() for c in traced.consts]
    return re.sub(r"0x[0-9a-f]+", "", f"{traced.jaxpr}\n{constants}")


def is_key(value: Any) -> bool:
    return isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)


@dataclasses.dataclass(frozen=True)
class Row:
    """Under the settings `given`, `value` for the key shows in `where`, a function or the name of a test."""

    value: str
    where: Callable[[Config], Any] | str
    given: tuple[tuple[str, str], ...] = ()


def row(value: object, where: Callable | str, **given: object) -> Row:
    """A key in `given` has `__` for its dots."""
    return Row(str(value), where, tuple((key.replace("__", "."), str(text)) for key, text in given.items()))


MOE, ROUTER = "model.blocks.moe", "model.blocks.moe.router"


def selection(name: str) -> dict[str, str]:
    return {f"{ROUTER}.selection": name}


def logits(name: str) -> dict[str, str]:
    return {f"{ROUTER}.logits": name}


SOFT = "model.blocks.soft"
LIGHT_HEAVY = "model.blocks.light_heavy"
OF_LIGHT_HEAVY = {LIGHT_HEAVY: "light_heavy", "model.pattern": "(light_heavy,)"}
OF_LIGHT_HEAVY |= {"model.causal": "false", "data.task": "masked", "model.repeats": "1"}
OF_SOFT = {SOFT: "soft", f"{SOFT}.allow_leak": "true", "model.pattern": "(soft,)"}
MERGED = "model.blocks.merged"
OF_MERGED = {MERGED: "merged", "model.pattern": "(merged,)"}
LEAKING = {f"{ROUTER}.allow_leak": "true"}
CAPPED = LEAKING | {f"{ROUTER}.selection.cap": "4"}
RAW = {f"{ROUTER}.weight": "raw"}
TOP_1 = {f"{ROUTER}.selection.k": "1"} | RAW
THRESHOLDS = {f"{ROUTER}.selection": "threshold", f"{ROUTER}.controller": "expert_threshold"}
CHANCE = {f"{ROUTER}.balance": "importance_load", f"{ROUTER}.noise": "gaussian"}
ENTROPY = {f"{ROUTER}.balance": "entropy"}
SELECTORS = logits("dselect_k") | selection("positive") | RAW
SELECTORS |= {f"{ROUTER}.score": "relu", f"{ROUTER}.balance": "selector_entropy"}
LOSS_FREE = {f"{ROUTER}.controller": "loss_free"}
BY_SCORE = {f"{ROUTER}.order": "by_score"}
NEXT_BEST = {f"{ROUTER}.overflow": "next_best"}
ANNEALING = {f"{ROUTER}.controller": "annealing"}
MOMENTUM = {f"{ROUTER}.controller.rule": "momentum"}
SOFT_CLAMPED = {f"{ROUTER}.controller.rule": "soft_clamped"}
SPARSITY = selection("positive") | {f"{ROUTER}.score": "relu", f"{ROUTER}.controller": "sparsity"}
LOOKUP = "model.memory.lookup"
OF_LOOKUP = {LOOKUP: "lookup", f"{LOOKUP}.blocks": "(dense,)"}
NARROW = OF_LOOKUP | {f"{LOOKUP}.consume": "project", f"{LOOKUP}.content.size": "4"}


def address(name: str) -> dict[str, str]:
    return OF_LOOKUP | {f"{LOOKUP}.address": name}


def content(name: str, consume: str) -> dict[str, str]:
    return OF_LOOKUP | {f"{LOOKUP}.content": name, f"{LOOKUP}.consume": consume}


N_GRAMS, PRODUCT_KEYS = (address(name) | {f"{LOOKUP}.address.heads": "2"} for name in ("n_grams", "product_keys"))
N_GRAMS |= {f"{LOOKUP}.address.buckets": "50"}
PRODUCT_KEYS |= {f"{LOOKUP}.address.keys": "4", f"{LOOKUP}.address.k": "3", f"{LOOKUP}.address.width": "8"}
CLUSTERS, BIGRAMS = (address(name) | {f"{LOOKUP}.address.clusters": "6"} for name in ("clusters", "latent_bigrams"))
SOFTMAX = address("softmax") | {f"{LOOKUP}.address.entries": "6", f"{LOOKUP}.address.k": "2"}
LOOKUP_KEYS: dict[str, Row] = {
    "name": row("lookup", "tests/memory/test_config.py::test_what_cannot_be_is_refused"),
    "blocks": row("(dense, moe)", parameters, **OF_LOOKUP),
    "place": row("parallel", evaluation, **OF_LOOKUP),
    "streams": row("(1,)", "tests/blocks/test_stream_memories.py::test_what_is_looked_up_goes_to_the_streams_named"),
    "shared": row(True, parameters, **(OF_LOOKUP | {f"{LOOKUP}.blocks": "(dense, moe)"})),
    "storage": row("rows", layout, **OF_LOOKUP, mesh__data=2),
    "address.name": row("hyperplanes", parameters, **OF_LOOKUP),
    "address.buckets": row(64, parameters, **OF_LOOKUP),
    "address.counts": row("x.npy", "tests/memory/test_addresses.py::test_an_id_looks_up_all_of_its_rows"),
    "address.hashes": row(2, parameters, **OF_LOOKUP, **{f"{LOOKUP}.address.buckets": 64}),
    "address.seed": row(3, evaluation, **OF_LOOKUP, **{f"{LOOKUP}.address.buckets": 64}),
    "address.orders (n_grams)": row("(2,)", parameters, **N_GRAMS),
    "address.heads (n_grams)": row(3, parameters, **N_GRAMS),
    "address.buckets (n_grams)": row(90, parameters, **N_GRAMS),
    "address.canonical (n_grams)": row(
        "x.npy", "tests/memory/test_addresses.py::test_ids_with_one_canonical_id_have_one_address"
    ),
    "address.seed (n_grams)": row(3, evaluation, **N_GRAMS),
    "address.bits (hyperplanes)": row(5, parameters, **address("hyperplanes")),
    "address.projections (euclidean)": row(3, evaluation, **address("euclidean")),
    "address.width (euclidean)": row(2.0, evaluation, **address("euclidean")),
    "address.buckets (euclidean)": row(64, parameters, **address("euclidean")),
    "address.columns (cross_polytope)": row(9, parameters, **address("cross_polytope")),
    "address.entries (softmax)": row(7, parameters, **SOFTMAX),
    "address.k (softmax)": row(3, evaluation, **SOFTMAX),
    "address.weight (softmax)": row("share", evaluation, **SOFTMAX),
    "address.balance (softmax)": row(0.1, training, **SOFTMAX),
    "address.keys (product_keys)": row(5, parameters, **PRODUCT_KEYS),
    "address.heads (product_keys)": row(3, parameters, **PRODUCT_KEYS),
    "address.k (product_keys)": row(4, evaluation, **PRODUCT_KEYS),
    "address.width (product_keys)": row(6, parameters, **PRODUCT_KEYS),
    "address.norm_query (product_keys)": row(True, parameters, **PRODUCT_KEYS),
    "address.weight (product_keys)": row("relu", evaluation, **PRODUCT_KEYS),
    "address.clusters (clusters)": row(7, parameters, **CLUSTERS),
    "address.heads (clusters)": row(2, parameters, **CLUSTERS),
    "address.decay (clusters)": row(0.5, training, **CLUSTERS),
    "address.clusters (latent_bigrams)": row(7, evaluation, **BIGRAMS),
    "address.heads (latent_bigrams)": row(2, parameters, **BIGRAMS),
    "address.decay (latent_bigrams)": row(0.5, training, **BIGRAMS),
    "address.buckets (latent_bigrams)": row(90, parameters, **BIGRAMS),
    "content.name": row("key_values", parameters, **OF_LOOKUP),
    "content.size": row(4, parameters, **(OF_LOOKUP | {f"{LOOKUP}.consume": "project"})),
    "content.join": row("concat", parameters, **NARROW, **{f"{LOOKUP}.address": "softmax", f"{LOOKUP}.address.k": 2}),
    "content.rank (partial_expert)": row(3, parameters, **content("partial_expert", "expert")),
    "content.activation (partial_expert)": row("relu", evaluation, **content("partial_expert", "expert")),
    "content.d_ff (gate_row)": row(24, parameters, **content("gate_row", "up_projection")),
    "content.pairs (key_values)": row(3, parameters, **content("key_values", "add")),
    "content.over (key_values)": row(
        "token", evaluation, **(PRODUCT_KEYS | {f"{LOOKUP}.content": "key_values", f"{LOOKUP}.consume": "add"})
    ),
    "consume.name": row("concat", parameters, **OF_LOOKUP),
    "consume.kernel (gated_add)": row(3, parameters, **content("vector", "gated_add")),
    "consume.dilation (gated_add)": row(2, evaluation, **content("vector", "gated_add")),
    "consume.activation (gated_output)": row("relu", evaluation, **content("vector", "gated_output")),
    "consume.activation (up_projection)": row("relu", evaluation, **content("gate_row", "up_projection")),
}
TABLES = "optimizer.tables"
TABLE_KEYS: dict[str, Row] = {
    "name": row("sgd", training, **OF_LOOKUP),
    "learning_rate": row(0.5, training, **OF_LOOKUP),
    "b1": row(0.5, training, **OF_LOOKUP),
    "b2": row(0.5, training, **OF_LOOKUP),
    "eps": row(0.5, training, **OF_LOOKUP),
    "learning_rate (adagrad)": row(0.5, training, **OF_LOOKUP, **{TABLES: "adagrad"}),
    "initial (adagrad)": row(0.5, initial, **OF_LOOKUP, **{TABLES: "adagrad"}),
    "eps (adagrad)": row(0.5, training, **OF_LOOKUP, **{TABLES: "adagrad"}),
    "learning_rate (sgd)": row(0.5, training, **OF_LOOKUP, **{TABLES: "sgd"}),
}
for lsh in ("hyperplanes", "euclidean", "cross_polytope"):
    LOOKUP_KEYS |= {
        f"address.hashes ({lsh})": row(2, parameters, **address(lsh)),
        f"address.centre ({lsh})": row(False, evaluation, **address(lsh)),
        f"address.decay ({lsh})": row(0.5, training, **address(lsh)),
        f"address.entropy_floor ({lsh})": row(
            0.1, "tests/memory/test_addresses.py::test_the_floor_of_a_collapse_is_that_of_the_config"
        ),
    }
CLASSIFY = {"data.task": "classify", "data.task.classes": "3", "model.head": "classes", "model.head.classes": "3"}
EXITS = {"model.exits": "heads", "model.exits.layers": "(1,)", "model.repeats": "2"}
EXIT_KEYS: dict[str, Row] = {
    "layers": row("(2,)", gradients, **EXITS),
    "head": row("own", parameters, **EXITS),
    "norm": row("shared", parameters, **EXITS),
    "weights": row("uniform", gradients, **EXITS),
    "scale": row(0.5, gradients, **EXITS),
    "distill": row(0.5, gradients, **EXITS),
    "equilibrium": row(True, gradients, **EXITS),
    "curriculum": row("alternating", gradients, **EXITS),
}
ADAFACTOR = {"optimizer": "adafactor"}
WSD = {"optimizer__schedule": "wsd"}
GATED = {f"{MOE}.shared_experts": 1, f"{MOE}.shared_gate": 0.25}
SPREAD = {"mesh__data": 2, "mesh__expert": 2, "mesh__tensor": 2}
UNTIED = {"model.tied_head": "false"}
KINDS = ("altup", "dynamic_altup", "hyper_connections", "mhc")
OF_STREAMS = {
    "streams": row(3, parameters),
    "select": row("same", evaluation),
    "seed": row(1, evaluation, **{"model.streams.select": "random"}),
    "embedding": row("wide", parameters, **UNTIED),
    "collapse": row("sum", evaluation),
    "final_norm": row("each_stream", evaluation),
    "compute_on (altup)": row("predicted", evaluation),
    "compute_on (dynamic_altup)": row("old", evaluation),
    "modes (dynamic_altup)": row(3, parameters),
    "prediction_stddev (dynamic_altup)": row(1e-4, initial),
    "correction_stddev (dynamic_altup)": row(1e-2, initial),
    "clip (dynamic_altup)": row(1.0, evaluation),
    "dynamic (hyper_connections)": row(False, parameters),
    "scale (hyper_connections)": row(0.1, initial),
    "iterations (mhc)": row(3, evaluation),
    "scale (mhc)": row(0.1, initial),
}


def of_streams() -> dict[str, Row]:
    """The rows of `OF_STREAMS`, those of no kind for each kind."""
    found = {"model.streams.name": row("altup", parameters)}
    for key, change in OF_STREAMS.items():
        for kind in (key.partition(" (")[2].rstrip(")"),) if " (" in key else KINDS:
            given = (("model.streams", kind), *change.given)
            found[f"model.streams.{key.partition(' ')[0]} ({kind})"] = dataclasses.replace(change, given=given)
    return found


ENCODER = CLASSIFY | {"model.causal": "false", "model.pattern": "(dense,)", "model.repeats": "2", "model.scan": "false"}
SCHEDULE = {"model.skim.shares": "(0.9, 0.7)"}
LADDER, HARD = {"model.skim.ladder": "(0.8, 0.6)"}, {"model.skim.stage": "hard"}
OF_SKIM = {
    "stage": row("hard", gradients),
    "execution": row("compact", evaluation, **LADDER),
    "ladder": row("(0.8, 0.5)", evaluation),
    "coefficient (ltp)": row(0.7, gradients),
    "coefficient (power_bert)": row(0.7, gradients),
    "coefficient (transkimmer)": row(0.7, gradients),
    "budget (ltp)": row("l2", gradients),
    "budget (power_bert)": row("l2", gradients),
    "budget (transkimmer)": row("hard", gradients),
    "estimator (transkimmer)": row("straight_through", gradients),
    "threshold (ltp)": row(0.02, evaluation),
    "temperature (ltp)": row(0.1, gradients),
    "rate (ltp)": row(3.0, evaluation),
    "bins (power_bert)": row(5, parameters),
    "rate (power_bert)": row(3.0, evaluation),
    "bias (transkimmer)": row(2.0, initial),
    "shares (schedule)": row("(0.9, 0.6)", evaluation),
    "by (schedule)": row("place", evaluation),
    "merge (tome)": row(0.5, evaluation),
}


def of_skim() -> dict[str, Row]:
    """The rows of `OF_SKIM`, those of no kind for each kind: traced for one, for all in the contract's tests."""
    found = {"model.skim.name": row("ltp", parameters, **ENCODER)}
    for key, change in OF_SKIM.items():
        for kind in (key.partition(" (")[2].rstrip(")"),) if " (" in key else SKIMS:
            given = ENCODER | {"model.skim": kind} | dict(change.given) | (SCHEDULE if kind == "schedule" else {})
            elsewhere = " (" not in key and kind != "ltp"
            where = "tests/contracts/test_skim_contract.py::TestEveryMethod" if elsewhere else change.where
            found[f"model.skim.{key.partition(' ')[0]} ({kind})"] = Row(change.value, where, tuple(given.items()))
    return found


SKIMS = ("ltp", "power_bert", "transkimmer", "schedule", "tome")


HALTING = {"model.pattern": "(dense,)", "model.repeats": "3"}
OF_HALTING = {
    "execution": row("masked", evaluation),
    "epsilon": row(0.1, evaluation),
    "coefficient": row(0.7, gradients),
    "bias (act)": row(2.0, initial),
    "bias (ponder_net)": row(2.0, initial),
    "rate (ponder_net)": row(0.5, gradients),
    "quantile (ponder_net)": row(0.3, evaluation),
    "scale (a_vit)": row(3.0, evaluation),
    "shift (a_vit)": row(1.0, evaluation),
    "depth (a_vit)": row(1.0, gradients),
    "deviation (a_vit)": row(2.0, gradients),
    "prior (a_vit)": row(0.7, gradients),
}


OF_HALTINGS = {
    "execution": ("act", "a_vit", "ponder_net"),
    "epsilon": ("act", "a_vit"),
    "coefficient": ("act", "a_vit", "ponder_net"),
}


def of_halting() -> dict[str, Row]:
    """The rows of `OF_HALTING`, those of no kind for each kind that has them."""
    found = {"model.halting.name": row("act", parameters, **HALTING)}
    for key, change in OF_HALTING.items():
        for kind in (key.partition(" (")[2].rstrip(")"),) if " (" in key else OF_HALTINGS[key]:
            given = tuple((HALTING | {"model.halting": kind}).items())
            found[f"model.halting.{key.partition(' ')[0]} ({kind})"] = dataclasses.replace(change, given=given)
    return found


def of_nested() -> dict[str, Row]:
    """Rows of choices inside entries that are no default: gates, budgets, curricula."""
    narrow = {"model.blocks.narrow": "dense", "model.pattern": "(dense, narrow)"}
    not_binary = "tests/blocks/test_layer_routing.py::test_what_cannot_be_is_refused"
    gates = {
        "gumbel": {"temperature": 0.5, "hard": False},
        "hard_concrete": {"temperature": 0.5, "low": -0.2, "high": 1.2},
    }
    budgets = {
        "l1": {"target": 0.3},
        "l2": {"target": 0.3},
        "kl": {"depth": 0.3, "deviation": 2.0},
        "hard": {"target": 0.3, "damping": 0.5, "rate": 0.1, "most": 5.0},
    }
    found = {}
    for path, kind, given in (
        ("model.select", "d_llm", narrow | {"model.select.blocks": "(narrow,)"}),
        ("model.skim", "transkimmer", ENCODER),
    ):
        for gate, fields in gates.items():
            for name, value in fields.items():
                chosen = given | {path: kind, f"{path}.estimator": gate}
                if path == "model.select" and (gate != "gumbel" or name == "hard"):
                    found[f"{path}.estimator.{name} ({gate})"] = row(value, not_binary)
                    continue
                found[f"{path}.estimator.{name} ({gate})"] = Row(str(value), gradients, tuple(chosen.items()))
    for budget, fields in budgets.items():
        for name, value in fields.items():
            where = training if name in ("rate", "most") else gradients
            chosen = ENCODER | {"model.skim": "ltp", "model.skim.budget": budget}
            found[f"model.skim.budget.{name} ({budget})"] = Row(str(value), where, tuple(chosen.items()))
    curricula = {"rotational": ("every", 3), "gradual": ("until", 0.7), "two_stage": ("start", 0.7)}
    for curriculum, (name, value) in curricula.items():
        chosen = {"model.exits": "heads", "model.exits.layers": "(1,)", "model.exits.curriculum": curriculum}
        found[f"model.exits.curriculum.{name} ({curriculum})"] = Row(str(value), training, tuple(chosen.items()))
    return found


def of_sequence() -> dict[str, Row]:
    """Rows of layers that compute on some tokens, for each kind."""
    narrow = {"model.blocks.narrow": "dense", "model.pattern": "(dense, narrow)"}
    leak = "tests/blocks/test_sequence.py::TestConfig"
    found = {"model.sequence.name": row("altup", parameters, **narrow)}
    for kind in ("altup", "skip", "pool"):
        given = narrow | {"model.sequence": kind} | ({"model.sequence.allow_leak": "true"} if kind == "pool" else {})
        for key, value in {"stride": 2, "blocks": "(narrow,)", "documents": 1}.items():
            found[f"model.sequence.{key} ({kind})"] = row(value, evaluation, **given)
    return found | {"model.sequence.allow_leak (pool)": row(True, leak)}


def of_selection() -> dict[str, Row]:
    """Rows of layers that compute on chosen tokens, for each kind."""
    narrow = {"model.blocks.narrow": "dense", "model.pattern": "(dense, narrow)"}
    found = {"model.select.name": row("mixture_of_depths", parameters, **narrow)}
    for kind in ("mixture_of_depths", "random"):
        for key, value in {"capacity": 0.5, "blocks": "(narrow,)", "execution": "masked"}.items():
            found[f"model.select.{key} ({kind})"] = row(value, gradients, **narrow, **{"model.select": kind})
    routed = {"target": 0.3, "coefficient": 0.5, "hidden": 8, "estimator": "straight_through", "blocks": "(narrow,)"}
    for key, value in (routed | {"always": 3, "bias": 1.0, "execution": "masked"}).items():
        where = {"bias": initial, "always": evaluation, "execution": evaluation}.get(key, gradients)
        given = {"model.pattern": "(dense, narrow)"} | narrow | {"model.select": "d_llm"}
        found[f"model.select.{key} (d_llm)"] = row(value, where, **given)
    given = narrow | {"model.select": "coda"} | {"model.causal": "false", "data.task": "masked"}
    chosen = {"capacity": 0.5, "blocks": "(narrow,)", "execution": "masked", "by": "place", "gate": "straight_through"}
    for key, value in (chosen | {"epsilon": 0.5, "iterations": 20, "adapter": 8}).items():
        found[f"model.select.{key} (coda)"] = row(value, gradients, **given)
    leak = "tests/blocks/test_light_heavy.py::TestConfig"
    found["model.select.allow_leak (coda)"] = row(True, leak)
    given = narrow | {"model.select": "mixture_of_depths"}
    found["model.select.gate (mixture_of_depths)"] = row("sigmoid", evaluation, **given)
    found["model.select.serving (mixture_of_depths)"] = row("router", parameters, **given)
    found["model.select.serving_loss (mixture_of_depths)"] = row(0.5, gradients, **given)
    tied = {"model.blocks.narrow": "dense", "model.pattern": "(narrow,)", "model.tied_repeats": "true"}
    for kind in ("mixture_of_recursions", "random_recursions"):
        given = tied | {"model.repeats": 3, "model.scan": "false", "model.select": kind}
        for key, value in {"capacity": 0.6, "execution": "masked"}.items():
            found[f"model.select.{key} ({kind})"] = row(value, gradients, **given)
        found[f"model.select.blocks ({kind})"] = row("(narrow,)", "tests/blocks/test_recursion.py::TestConfig")
    given = given | {"model.select": "mixture_of_recursions"}
    found["model.select.gate (mixture_of_recursions)"] = row("raw", evaluation, **given)
    found["model.select.serving (mixture_of_recursions)"] = row("router", parameters, **given)
    return found | {"model.select.serving_loss (mixture_of_recursions)": row(0.5, gradients, **given)}


TABLE: dict[str, Row] = {
    "model.d_model": row(16, parameters),
    "model.num_heads": row(4, parameters),
    "model.num_kv_heads": row(1, parameters),
    "model.head_dim": row(8, parameters),
    "model.qk_norm": row(True, parameters),
    "model.rope_theta": row(500.0, evaluation),
    "model.attention_soft_cap": row(30.0, evaluation),
    "model.attention": row("splash", "tests/train/test_bad_input.py::test_wrong_values"),
    "model.dtype": row("bfloat16", evaluation),
    "model.norm_epsilon": row(1e-4, evaluation),
    "model.vocab_size": row(300, parameters),
    "model.prefix": row("(dense,)", parameters),
    "model.pattern": row("(dense,)", parameters),
    "model.repeats": row(2, parameters),
    "model.suffix": row("(moe,)", parameters),
    "model.blocks.dense.name": row("moe", parameters),
    "model.blocks.dense.d_ff": row(24, parameters),
    "model.blocks.dense.gated": row(True, parameters),
    "model.blocks.dense.activation": row("relu", evaluation),
    "model.blocks.dense.of_domain": row(1, "tests/blocks/test_one_domain.py::test_a_run_of_one_domain"),
    "model.blocks.dense.active": row(0.25, evaluation),
    "model.blocks.moe.name": row("dense", parameters),
    f"{MOE}.num_experts": row(4, parameters),
    f"{MOE}.d_ff": row(24, parameters),
    f"{MOE}.gated": row(True, parameters),
    f"{MOE}.activation": row("relu", evaluation),
    f"{MOE}.pooled": row(True, parameters),
    f"{MOE}.shared_experts": row(1, parameters),
    f"{MOE}.mix_shared": row(True, parameters, **{f"{MOE}.shared_experts": 1}),
    f"{MOE}.from_dense": row("clusters", "tests/model/test_clustered.py::test_all_experts_are_the_dense_network"),
    f"{MOE}.shared_gate": row(0.5, parameters, **{f"{MOE}.shared_experts": 1}),
    f"{MOE}.shared_gate_coefficient": row(0.5, gradients, **GATED),
    f"{MOE}.shared_gate_dropout": row(0.5, gradients, **GATED),
    f"{MOE}.zero_experts": row(1, parameters),
    f"{MOE}.copy_experts": row(1, evaluation),
    f"{MOE}.constant_experts": row(1, parameters),
    f"{MOE}.group_size": row(16, evaluation),
    f"{MOE}.capacity_factor": row(2.0, gradients),
    f"{MOE}.eval_capacity_factor": row(1.0, evaluation),
    f"{MOE}.expert_dropout": row(0.3, gradients),
    f"{MOE}.gating_dropout": row(0.3, gradients),
    f"{MOE}.gating_dropout_by": row("stay", gradients, **{f"{MOE}.gating_dropout": 0.3}),
    f"{MOE}.capacity_convention": row("per_token", evaluation),
    f"{MOE}.dispatch": row("einsum", evaluation),
    f"{SOFT}.name": row("soft", "tests/blocks/test_soft.py::test_a_language_model_has_to_allow_the_leak"),
    f"{SOFT}.num_experts": row(4, parameters, **OF_SOFT),
    f"{SOFT}.slots_per_expert": row(2, parameters, **OF_SOFT),
    f"{SOFT}.d_ff": row(24, parameters, **OF_SOFT),
    f"{SOFT}.gated": row(True, parameters, **OF_SOFT),
    f"{SOFT}.activation": row("relu", evaluation, **OF_SOFT),
    f"{SOFT}.allow_leak": row(True, "tests/blocks/test_soft.py::test_a_language_model_has_to_allow_the_leak"),
    "model.blocks.attention.name": row(
        "attention", "tests/blocks/test_attention.py::test_neither_its_weights_nor_its_products_are_there"
    ),
    f"{MERGED}.name": row("merged", "tests/blocks/test_merged.py::test_a_language_model_has_to_allow_the_leak"),
    f"{MERGED}.num_experts": row(4, parameters, **OF_MERGED),
    f"{MERGED}.d_ff": row(24, parameters, **OF_MERGED),
    f"{MERGED}.gated": row(True, parameters, **OF_MERGED),
    f"{MERGED}.activation": row("relu", evaluation, **OF_MERGED),
    f"{MERGED}.segment_length": row(4, evaluation, **OF_MERGED),
    f"{MERGED}.first_segment": row("own", "tests/blocks/test_merged.py::test_what_a_token_sees"),
    f"{MERGED}.allow_leak": row(True, "tests/blocks/test_merged.py::test_a_language_model_has_to_allow_the_leak"),
    f"{LIGHT_HEAVY}.name": row(
        "light_heavy", "tests/blocks/test_light_heavy.py::test_the_block_is_that_of_the_equation"
    ),
    f"{LIGHT_HEAVY}.capacity": row(0.5, evaluation, **OF_LIGHT_HEAVY),
    f"{LIGHT_HEAVY}.query_capacity": row(0.5, evaluation, **OF_LIGHT_HEAVY),
    f"{LIGHT_HEAVY}.key_capacity": row(0.5, evaluation, **OF_LIGHT_HEAVY),
    f"{LIGHT_HEAVY}.light_heads": row(3, parameters, **OF_LIGHT_HEAVY, model__num_heads=4),
    f"{LIGHT_HEAVY}.radius": row(2, evaluation, **OF_LIGHT_HEAVY),
    f"{LIGHT_HEAVY}.light_d_ff": row(6, parameters, **OF_LIGHT_HEAVY),
    f"{LIGHT_HEAVY}.d_ff": row(24, parameters, **OF_LIGHT_HEAVY),
    f"{LIGHT_HEAVY}.gated": row(True, parameters, **OF_LIGHT_HEAVY),
    f"{LIGHT_HEAVY}.activation": row("relu", evaluation, **OF_LIGHT_HEAVY),
    f"{LIGHT_HEAVY}.execution": row("masked", evaluation, **OF_LIGHT_HEAVY),
    f"{LIGHT_HEAVY}.by": row("place", parameters, **OF_LIGHT_HEAVY),
    f"{LIGHT_HEAVY}.gate": row("straight_through", evaluation, **OF_LIGHT_HEAVY),
    f"{LIGHT_HEAVY}.epsilon": row(0.5, evaluation, **OF_LIGHT_HEAVY),
    f"{LIGHT_HEAVY}.iterations": row(20, evaluation, **OF_LIGHT_HEAVY),
    f"{LIGHT_HEAVY}.allow_leak": row(True, "tests/blocks/test_light_heavy.py::TestConfig"),
    f"{MOE}.buffer_factor": row(1.25, gradients, **{f"{MOE}.dispatch": "grouped", "mesh.expert": "2"}),
    f"{MOE}.exchange": row("ragged_all_to_all", gradients, **{f"{MOE}.dispatch": "grouped", "mesh.expert": "2"}),
    f"{MOE}.replicated": row(True, layout, **SPREAD),
    f"{MOE}.grouped_matmul": row("ragged_dot", evaluation, **{f"{MOE}.dispatch": "grouped"}),
    f"{ROUTER}.score.name": row("sigmoid", evaluation),
    f"{ROUTER}.selection.name": row("top_p", evaluation),
    f"{ROUTER}.selection.k": row(3, evaluation),
    f"{ROUTER}.selection.policy (second_expert)": row("none", evaluation, **selection("second_expert")),
    f"{ROUTER}.selection.threshold (second_expert)": row(0.4, evaluation, **selection("second_expert")),
    f"{ROUTER}.selection.k (prototypes)": row(4, evaluation, **selection("prototypes")),
    f"{ROUTER}.selection.p (top_p)": row(0.3, evaluation, **selection("top_p")),
    f"{ROUTER}.selection.k (top_p)": row(3, evaluation, **selection("top_p")),
    f"{ROUTER}.selection.k (positive)": row(3, evaluation, **selection("positive")),
    f"{ROUTER}.selection.most (positive)": row(5, evaluation, **selection("positive")),
    f"{ROUTER}.selection.above (positive)": row(0.2, evaluation, **selection("positive")),
    f"{ROUTER}.selection.k (threshold)": row(3, evaluation, **THRESHOLDS),
    f"{ROUTER}.selection.most (threshold)": row(4, evaluation, **THRESHOLDS),
    f"{ROUTER}.controller.decay (expert_threshold)": row(0.5, training, **THRESHOLDS),
    f"{ROUTER}.logits.selectors (dselect_k)": row(3, parameters, **logits("dselect_k")),
    f"{ROUTER}.logits.gamma (dselect_k)": row(2.0, evaluation, **logits("dselect_k")),
    f"{ROUTER}.score.temperature": row(2.0, evaluation),
    f"{ROUTER}.selection.k (expert_choice)": row(3, evaluation, **selection("expert_choice"), **LEAKING),
    f"{ROUTER}.selection.cap (expert_choice)": row(3, evaluation, **selection("expert_choice"), **LEAKING),
    f"{ROUTER}.selection.iterations (expert_choice)": row(9, evaluation, **selection("expert_choice"), **CAPPED),
    f"{ROUTER}.selection.temperature (expert_choice)": row(0.1, evaluation, **selection("expert_choice"), **CAPPED),
    f"{ROUTER}.selection.k (hash)": row(3, evaluation, **selection("hash"), **RAW),
    f"{ROUTER}.selection.kind (hash)": row("bigram", evaluation, **selection("hash"), **RAW),
    f"{ROUTER}.selection.path (hash)": row("counts.npy", "tests/routers/test_tables.py::TestFiles"),
    f"{ROUTER}.selection.seed (hash)": row(3, evaluation, **selection("hash"), **RAW),
    f"{ROUTER}.selection.k (by_domain)": row(3, evaluation, **selection("by_domain"), **RAW),
    f"{ROUTER}.selection.k (sinkhorn)": row(2, training, **selection("sinkhorn"), **LEAKING, **RAW),
    f"{ROUTER}.selection.iterations (sinkhorn)": row(2, training, **selection("sinkhorn"), **LEAKING, **RAW),
    f"{ROUTER}.selection.temperature (sinkhorn)": row(0.5, training, **selection("sinkhorn"), **LEAKING, **RAW),
    f"{ROUTER}.selection.precision (balanced_assignment)": row(
        0.1, training, **selection("balanced_assignment"), **LEAKING, **RAW
    ),
    f"{ROUTER}.logits.name": row("cosine", evaluation),
    f"{ROUTER}.logits.start": row("zeros", initial),
    f"{ROUTER}.logits.width (cosine)": row(8, parameters, **logits("cosine")),
    f"{ROUTER}.logits.temperature (cosine)": row(1.0, initial, **logits("cosine")),
    f"{ROUTER}.logits.lowest (cosine)": row(0.1, evaluation, **logits("cosine")),
    f"{ROUTER}.logits.width (product_key)": row(8, parameters, **logits("product_key")),
    f"{ROUTER}.logits.domains (by_domain)": row(3, parameters, **logits("by_domain")),
    f"{ROUTER}.logits.pool (by_sequence)": row("first", evaluation, **logits("by_sequence")),
    f"{ROUTER}.selection.coefficient (policy)": row(0.5, gradients, **selection("policy"), **RAW),
    f"{ROUTER}.selection.baseline (policy)": row(0.5, gradients, **selection("policy"), **RAW),
    f"{ROUTER}.selection.k (random)": row(3, evaluation, **selection("random"), **RAW),
    f"{ROUTER}.selection.evaluation (random)": row("document", evaluation, **selection("random"), **RAW),
    f"{ROUTER}.selection.seed (random)": row(3, evaluation, **selection("random"), **RAW),
    f"{ROUTER}.selection.entropy (policy)": row(0.5, gradients, **selection("policy"), **RAW),
    f"{ROUTER}.noise.name": row("gaussian", training),
    f"{ROUTER}.noise.scale (gaussian)": row(2.0, training, **{f"{ROUTER}.noise": "gaussian"}),
    f"{ROUTER}.noise.scale (gumbel)": row(2.0, training, **{f"{ROUTER}.noise": "gumbel"}),
    f"{ROUTER}.noise.floor (learned)": row(0.1, training, **{f"{ROUTER}.noise": "learned"}),
    f"{ROUTER}.limit.name": row("groups", evaluation),
    f"{ROUTER}.limit.groups (groups)": row(2, evaluation, **{f"{ROUTER}.limit": "groups"}),
    f"{ROUTER}.limit.kept (groups)": row(3, evaluation, **{f"{ROUTER}.limit": "groups"}),
    f"{ROUTER}.limit.best (groups)": row(1, evaluation, **{f"{ROUTER}.limit": "groups"}),
    f"{ROUTER}.controller.name": row("loss_free", evaluation),
    f"{ROUTER}.controller.rate (loss_free)": row(0.1, training, **LOSS_FREE),
    f"{ROUTER}.controller.rule (loss_free)": row("proportional", training, **LOSS_FREE),
    f"{ROUTER}.controller.momentum (loss_free)": row(0.5, training, **LOSS_FREE, **MOMENTUM),
    f"{ROUTER}.controller.sharpness (loss_free)": row(3.0, training, **LOSS_FREE, **SOFT_CLAMPED),
    f"{ROUTER}.controller.initial (sparsity)": row(1e-6, training, **SPARSITY),
    f"{ROUTER}.controller.factor (sparsity)": row(1.5, training, **SPARSITY),
    f"{ROUTER}.controller.start (annealing)": row(3.0, evaluation, **ANNEALING),
    f"{ROUTER}.controller.end (annealing)": row(0.5, evaluation, **ANNEALING),
    f"{ROUTER}.controller.steps (annealing)": row(50, evaluation, **ANNEALING),
    f"{ROUTER}.controller.decay (quantile)": row(0.5, training, **{f"{ROUTER}.controller": "quantile"}),
    f"{ROUTER}.order.name": row("token_major", evaluation),
    f"{ROUTER}.overflow.name": row("next_best", evaluation, **TOP_1, **LEAKING, **BY_SCORE),
    f"{ROUTER}.overflow.rounds (next_best)": row(
        2, evaluation, **TOP_1, **LEAKING, **{f"{ROUTER}.overflow": "next_best"}
    ),
    f"{ROUTER}.weight.name": row("raw", evaluation),
    f"{ROUTER}.weight.scale": row(2.0, evaluation),
    f"{ROUTER}.weight.value (constant)": row(0.3, evaluation, **selection("hash"), **{f"{ROUTER}.weight": "constant"}),
    f"{ROUTER}.logit_cap": row(5.0, evaluation),
    f"{ROUTER}.allow_leak": row(True, "tests/contracts/test_router_contract.py::test_a_leak_has_to_be_allowed"),
    f"{ROUTER}.weight.drop": row("after", evaluation),
    f"{ROUTER}.weight.scale (raw)": row(2.0, evaluation, **{f"{ROUTER}.weight": "raw"}),
    f"{ROUTER}.balance.name": row("none", gradients),
    f"{ROUTER}.balance.coefficient": row(0.5, gradients),
    f"{ROUTER}.balance.scope": row("sequence", gradients),
    f"{ROUTER}.balance.count": row("first", gradients),
    f"{ROUTER}.balance.free_weight": row(0.5, gradients, **{f"{MOE}.zero_experts": 1}),
    f"{ROUTER}.balance.expert_groups": row(2, gradients),
    f"{ROUTER}.balance.group_share": row(0.5, gradients, **{f"{ROUTER}.balance.expert_groups": 2}),
    f"{ROUTER}.balance.coefficient (selector_entropy)": row(0.5, gradients, **SELECTORS),
    f"{ROUTER}.balance.form (importance_load)": row("shazeer", gradients, **CHANCE),
    f"{ROUTER}.balance.importance (importance_load)": row(0.1, gradients, **CHANCE),
    f"{ROUTER}.balance.load (importance_load)": row(0.1, gradients, **CHANCE),
    f"{ROUTER}.balance.scope (importance_load)": row("microbatch", gradients, **CHANCE),
    f"{ROUTER}.balance.local (entropy)": row(0.1, gradients, **ENTROPY),
    f"{ROUTER}.balance.overall (entropy)": row(0.1, gradients, **ENTROPY),
    f"{ROUTER}.balance.least (entropy)": row(3.0, gradients, **ENTROPY),
    f"{ROUTER}.balance.domains (entropy)": row(2, gradients, **ENTROPY),
    f"{ROUTER}.balance.scope (entropy)": row("microbatch", gradients, **ENTROPY),
    f"{ROUTER}.z_loss": row(0.5, gradients),
    f"{ROUTER}.jitter": row(0.01, gradients),
    f"{ROUTER}.input_dropout": row(0.1, gradients),
    f"{ROUTER}.exploration": row(0.1, gradients),
    f"{ROUTER}.residual": row(True, parameters, **{"model.repeats": "2"}),
    f"{ROUTER}.output_masking": row(0.1, gradients),
    **of_streams(),
    **of_sequence(),
    **of_selection(),
    **{f"{LOOKUP}.{key}": of_key for key, of_key in LOOKUP_KEYS.items()},
    **{f"{TABLES}.{key}": of_key for key, of_key in TABLE_KEYS.items()},
    **of_skim(),
    **of_nested(),
    **of_halting(),
    "model.tied_repeats": row(True, parameters, **HALTING),
    "model.causal": row(False, evaluation, **CLASSIFY),
    "model.head.name": row("classes", "tests/train/test_tasks.py::TestRefused"),
    "model.head.classes (classes)": row(4, "tests/train/test_tasks.py::TestRefused"),
    "model.head.pool (classes)": row("first", evaluation, **CLASSIFY, model__causal=False),
    "model.exits.name": row("heads", "tests/model/test_exits.py::test_what_cannot_be_is_refused"),
    **{f"model.exits.{key} (heads)": of_key for key, of_key in EXIT_KEYS.items()},
    "model.layer_dropout": row(0.1, gradients),
    "model.tied_head": row(False, parameters),
    "model.logit_soft_cap": row(30.0, evaluation),
    "model.scan": row(False, evaluation),
    "model.remat": row("full", gradients),
    "model.remat_names": row("(mlp,)", gradients, model__remat="names", model__remat_names="(attention,)"),
    "data.name": row("no_such_corpus", "tests/train/test_bad_input.py::test_wrong_values"),
    "data.path": row("x.txt", "tests/train/test_resume.py::test_another_text_is_flagged", data__name="text"),
    "data.text_feature": row("body", "tests/train/test_bad_input.py::test_a_file_that_holds_no_documents"),
    "data.validation_fraction": row(0, "tests/train/test_bad_input.py::test_texts_that_cannot_be_trained_on"),
    "data.task.name": row("masked", "tests/train/test_tasks.py::TestRefused"),
    "data.task.rate (masked)": row(0.5, rows, data__task="masked", model__causal=False),
    "data.task.classes (classify)": row(4, "tests/train/test_tasks.py::TestRefused"),
    "data.task.validation_fraction (classify)": row(0.5, rows, **CLASSIFY),
    "data.task.validation_rows (classify)": row(5, "tests/data/test_tasks.py::TestClassify"),
    "data.tokenizer": row("x.json", "tests/train/test_bad_input.py::test_wrong_values"),
    "data.sequence_length": row(16, rows),
    "data.batch_size": row(8, rows),
    "data.cache": row("/tmp", "tests/test_config_keys.py::test_the_cache_lies_where_it_should"),
    "data.prefetch": row(0, "tests/test_config_keys.py::test_reading_ahead_is_as_configured"),
    "data.workers": row(2, "tests/test_config_keys.py::test_reading_ahead_is_as_configured"),
    "mesh.data": row(2, mesh_shape),
    "mesh.expert": row(2, mesh_shape),
    "mesh.tensor": row(2, mesh_shape),
    "mesh.rules.embed": row(None, layout, **SPREAD),
    "mesh.rules.mlp": row(None, layout, **SPREAD),
    "mesh.rules.heads": row(None, layout, **SPREAD),
    "mesh.rules.kv_heads": row(None, layout, **SPREAD),
    "mesh.rules.vocab": row(None, layout, **SPREAD),
    "mesh.rules.experts": row(None, layout, **SPREAD),
    "optimizer.name": row("adafactor", update),
    "optimizer.learning_rate": row(0.5, rates),
    "optimizer.learning_rate (adafactor)": row(0.5, rates, **ADAFACTOR),
    "optimizer.schedule.name": row("constant", rates),
    "optimizer.schedule.warmup_steps": row(5, rates),
    "optimizer.schedule.final_fraction": row(0.5, rates),
    "optimizer.schedule.final_fraction (wsd)": row(0.5, rates, **WSD),
    "optimizer.schedule.decay_fraction (wsd)": row(0.5, rates, **WSD),
    "optimizer.clip_norm": row(0.5, training),
    "optimizer.weight_decay": row(0.5, update),
    "optimizer.weight_decay_groups": row("(expert,)", update),
    "optimizer.b1": row(0.5, update),
    "optimizer.b2": row(0.5, update),
    "optimizer.eps": row(1e-3, update),
    "optimizer.scale_by_parameter (adafactor)": row(False, update, **ADAFACTOR),
    "optimizer.decay_rate (adafactor)": row(0.5, update, **ADAFACTOR),
    "optimizer.factored_from (adafactor)": row(2, update, **ADAFACTOR),
    "optimizer.update_clip (adafactor)": row(2.0, update, **ADAFACTOR),
    "optimizer.momentum (adafactor)": row(0.5, update, **ADAFACTOR),
    "train.steps": row(40, rates),
    "train.seed": row(7, initial),
    "train.log_every": row(5, "tests/train/test_loop.py::test_rows_come_at_the_first_step_every_so_many_and_the_last"),
    "train.accumulation": row(2, gradients),
    "train.consistency": row(1.0, gradients),
    "train.max_nonfinite": row(3, "tests/train/test_loop.py::test_a_run_that_stays_nan_stops_and_names_the_module"),
    "train.trace": row("(1,)", "tests/train/test_trace.py::test_a_step_of_training_is_traced"),
    "train.profile": row("(1, 2)", "tests/train/test_loop.py::test_a_profile_is_written_on_request"),
    "train.tensorboard": row(False, "tests/test_end_to_end.py::test_what_train_leaves_behind"),
    "eval.every": row(5, "tests/train/test_loop.py::test_rows_come_at_the_first_step_every_so_many_and_the_last"),
    "eval.batches": row(1, "tests/train/test_evaluate.py::test_more_batches_can_be_asked_for"),
    "eval.passages": row(4, "tests/train/test_passages.py::test_the_file_has_rows_from_several_places_of_the_split"),
    "checkpoint.every": row(5, "tests/train/test_loop.py::test_rows_come_at_the_first_step_every_so_many_and_the_last"),
    "checkpoint.keep": row(1, "tests/test_end_to_end.py::test_what_train_leaves_behind"),
    "checkpoint.keep_every": row(5, "tests/test_end_to_end.py::test_what_train_leaves_behind"),
}


def keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Every leaf of the schema, whatever is chosen; ' (ENTRY)' after what only an entry that is no default has. A
    choice inside such an entry stands once for all entries that have it."""
    for name, slot in slots(schema).items():
        path = prefix + name
        if isinstance(slot, Leaf):
            yield path
        elif isinstance(slot, Group):
            yield from keys(slot.schema, f"{path}.")
        elif isinstance(slot, Choices):
            for entry, of_entry in slot.registry.items():
                yield f"{path}.{entry}.name"
                yield from keys(of_entry, f"{path}.{entry}.")
        elif isinstance(slot, Choice):
            yield f"{path}.name"
            default = type(defaults(schema)[name])
            yield from keys(default, f"{path}.")
            for entry, of_entry in slot.registry.items():
                for key in of_entry.__dataclass_fields__:
                    if definer(of_entry, key) is not definer(default, key):
                        yield f"{path}.{key} ({entry})"
                        inside = slots(of_entry)[key]
                        if isinstance(inside, Choice):
                            for kind, of_kind in inside.registry.items():
                                yield from (f"{path}.{key}.{each} ({kind})" for each in of_kind.__dataclass_fields__)


def definer(schema: type, key: str) -> type | None:
    """The class that gives the field, which may be one above `schema`."""
    return next((each for each in schema.__mro__ if key in vars(each).get("__annotations__", {})), None)


KEYS = list(dict.fromkeys(keys(ExperimentConfig)))


def config_of(*settings: tuple[tuple[str, str], ...]) -> Config:
    """Refuses settings without effect, as the command line does."""
    merged = dict(TINY) | {path: text for each in settings for path, text in each}
    return load(ExperimentConfig, None, list(merged.items())).config


@functools.cache
def before(where: Callable, given: tuple[tuple[str, str], ...]) -> Any:
    return where(config_of(given))


def test_every_key_has_a_row_and_every_row_a_key():
    assert len(KEYS) > 90
    assert set(KEYS) == set(TABLE), "a key without a row, or a row without a key"


@pytest.mark.parametrize("key", TABLE)
def test_the_key_changes_something(key):
    change = TABLE[key]
    if isinstance(change.where, str):
        file, name = change.where.split("::")
        functions = [node.name for node in ast.parse((TESTS.parent / file).read_text()).body if hasattr(node, "name")]
        assert name in functions, f"{change.where} is no test"
        return
    path = key.partition(" ")[0]
    changed = config_of(change.given, ((path, change.value),))
    assert change.where(changed) != before(change.where, change.given)


@pytest.mark.parametrize("where", [parameters, initial, gradients, evaluation, update, rates, rows, layout])
def test_the_same_config_shows_no_change(where):
    """Else a difference says nothing: addresses, or the order of a set, may have got into a text."""
    assert where(config_of()) == before(where, ())


def test_the_cache_lies_where_it_should(tmp_path):
    text = tmp_path / "corpus.txt"
    text.write_text("some text " * 100)
    given = (("data.name", "text"), ("data.path", str(text)))
    open_corpus(config_of(given, (("data.cache", str(tmp_path / "cache")),)).data)
    assert list((tmp_path / "cache" / "tokens").rglob("train.tokens.bin"))


def test_reading_ahead_is_as_configured(monkeypatch):
    """grain is told how many batches to keep ready and how many threads fill them."""
    import grain

    from sparsejax.data import loader

    told = []
    options = grain.ReadOptions
    monkeypatch.setattr(loader.grain, "ReadOptions", lambda **given: told.append(given) or options(**given))
    for prefetch, workers in ((4, 1), (2, 3), (0, 1)):
        data = dataclasses.replace(config_of().data, prefetch=prefetch, workers=workers)
        loader.eval_batches(open_corpus(data), data, 4, 1).close()
    assert [tuple(given.values()) for given in told] == [(1, 4), (3, 2), (0, 0)]
