"""What selectors and logits declare of themselves is so, and what they do not declare is not.

Entries are found by name, as in `test_router_contract.py`, where the causal ones and those that leak are told apart."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts.test_router_contract import PARTNERS, variants

from sparsejax.base.errors import ConfigError
from sparsejax.ops.assignment import by_token
from sparsejax.routers.candidates import Candidates, Noise, Traits
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.logits import LOGITS
from sparsejax.routers.lots import Lots
from sparsejax.routers.orders import ORDERS
from sparsejax.routers.overflow import NextBest
from sparsejax.routers.router import decide
from sparsejax.routers.top_k import SecondExpert, TopK
from sparsejax.routers.weights import Constant

from support import known

GROUPS, SIZE, EXPERTS = 4, 16, 8
RNG = np.random.default_rng(0)
LOGITS_GSE = RNG.normal(size=(GROUPS, SIZE, EXPERTS)).astype(np.float32)
SELECTIONS = dict(variants("selection")) | {
    f"second_{policy}": SecondExpert(policy=policy, threshold=0.4)
    for policy in ("all", "none", "threshold", "random", "sampling")
}
every_selection = pytest.mark.parametrize("name", SELECTIONS)


def fields(seed: int = 0) -> dict:
    """What is known of tokens beside their scores, and a key for chance."""
    draw = np.random.default_rng(seed)
    number = lambda most: jnp.asarray(draw.integers(0, most, (GROUPS, SIZE)), jnp.int32)  # noqa: E731
    lots = {name: number(2**20).astype(jnp.uint32) for name in ("document", "token")}
    shared = jnp.full((GROUPS, SIZE), draw.integers(2**20), jnp.uint32)
    return {
        "tokens": {"tokens": number(100), "previous": number(100)},
        "domains": {"domains": number(EXPERTS)},
        "lots": {"lots": Lots(shared=shared, **lots)},
        "noise": jax.random.split(jax.random.key(seed), GROUPS),
    }


GIVEN, OTHERS = fields(1), fields(2)


@functools.cache
def _chooser(name: str, training: bool, draws: bool, slots: int):
    """Scores and `fields` → 1 where a token goes to an expert, `[G, S, E]`."""
    selection = SELECTIONS[name]
    router = RouterConfig(**(PARTNERS.get(("selection", name), {}) | {"selection": selection, "allow_leak": True}))

    @jax.jit
    def choose(logits_GSE, given):
        more = given["tokens"] | given["domains"] | given["lots"]
        noise = Noise(keys_B=given["noise"], row_length=SIZE, groups=(GROUPS, SIZE)) if draws else None
        inputs = known(np.ones((GROUPS, SIZE), bool), slots, training=training, noise=noise, **more)
        rows = router.controller.rows
        state = jnp.full((rows, EXPERTS), -1 / EXPERTS) if rows else None  # thresholds at the mean of a softmax
        pairs = decide(logits_GSE, inputs, router, state).pairs
        experts, valid = by_token(pairs.expert, pairs), by_token(pairs.valid, pairs)
        return (jax.nn.one_hot(experts, EXPERTS, dtype=jnp.int32) * valid[..., None]).sum(-2)

    return choose


def chosen(
    name: str, training: bool = True, draws: bool = True, slots: int = 5, logits=LOGITS_GSE, **changed
) -> np.ndarray:
    return np.asarray(_chooser(name, training, draws, slots)(jnp.asarray(logits), GIVEN | changed))


@every_selection
def test_beyond_k(name):
    """Exactly where it is declared a token may have more experts than its selection counts on; where it is not, every
    token has as many, or fewer where the selection decides by their scores how many."""
    pairs, k = chosen(name).sum(-1), SELECTIONS[name].experts_per_token
    assert (pairs > k).any() == SELECTIONS[name].traits.beyond_k
    fewer = name in ("second_none", "second_threshold", "second_random", "top_p")
    assert SELECTIONS[name].traits.beyond_k or (pairs < k).any() == fewer


@every_selection
def test_single_experts_are_sent_on_and_no_others(name):
    entry = SELECTIONS[name]
    if "k" in getattr(entry, "__dataclass_fields__", {}):
        entry = dataclasses.replace(entry, k=1)
    refused = False
    try:
        NextBest().check(entry)
    except ConfigError:
        refused = True
    traits = entry.traits
    assert refused == (entry.experts_per_token > 1 or traits.beyond_k or traits.fits or traits.fixed)


@every_selection
def test_train_only(name):
    """Exactly where it is declared evaluation takes the k best by score, while training, were it without chance, takes
    others."""
    selection = SELECTIONS[name]
    best = np.argsort(-LOGITS_GSE, axis=-1)[..., : selection.experts_per_token]
    best = (best[..., None] == np.arange(EXPERTS)).any(-2)
    trained, evaluated = (np.array_equal(chosen(name, training, draws=False), best) for training in (True, False))
    assert (evaluated and not trained) == selection.traits.train_only


@every_selection
@pytest.mark.parametrize("need", OTHERS)
def test_needs(name, need):
    """Exactly what is declared changes who is chosen."""
    same = np.array_equal(chosen(name, **{need: OTHERS[need]}), chosen(name))
    assert same != (need in SELECTIONS[name].traits.needs)


@every_selection
def test_fixed(name):
    """Exactly where it is declared scores do not change who is chosen."""
    assert np.array_equal(chosen(name, logits=-LOGITS_GSE), chosen(name)) == SELECTIONS[name].traits.fixed


@every_selection
def test_together(name):
    """Exactly where it is declared a whole group has the same experts in training."""
    first = chosen(name)
    assert (first == first[:, :1]).all() == SELECTIONS[name].traits.together


@every_selection
def test_fits(name):
    """Exactly where it is declared no expert is chosen by more tokens than it has slots, whatever they want."""
    crowd = LOGITS_GSE + 5 * np.arange(EXPERTS, dtype=np.float32)
    same = np.zeros_like(GIVEN["domains"]["domains"])
    loads = chosen(
        name, slots=1, logits=crowd, domains={"domains": same}, tokens={"tokens": same, "previous": same}
    ).sum(1)
    assert (loads <= 1).all() == SELECTIONS[name].traits.fits


@every_selection
def test_reinforce(name):
    """Exactly where it is declared constant weights are accepted of a choice that looks at scores."""
    traits = SELECTIONS[name].traits
    settings = PARTNERS.get(("selection", name), {}) | {"selection": SELECTIONS[name], "weight": Constant()}
    try:
        accepted = RouterConfig(**settings, allow_leak=True) is not None
    except ConfigError as error:
        assert error.key == "weight"
        accepted = False
    assert accepted == bool(traits.reinforce or traits.fixed)


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize("need", ["blind", "domains", "tokens"])
def test_logits(name, need):
    """Exactly where it is declared they do not look at vectors, or look at what else is known."""
    entry = LOGITS[name]()
    x = jnp.asarray(RNG.normal(size=(GROUPS, SIZE, 6)), jnp.float32)
    parameters = {key: leaf[...] for key, leaf in entry.init(jax.random.key(0), 6, EXPERTS).items()}

    def found(x, given):
        inputs = known(np.ones((GROUPS, SIZE), bool), **given["tokens"], **given["domains"])
        return np.asarray(entry(x, parameters, inputs, EXPERTS))

    if need == "blind":
        assert np.array_equal(found(-x, GIVEN), found(x, GIVEN)) == entry.traits.blind
    else:
        same = np.array_equal(found(x, GIVEN | {need: OTHERS[need]}), found(x, GIVEN))
        assert same != (need in entry.traits.needs)


@pytest.mark.parametrize("name", ORDERS)
def test_an_order_needs_noise_exactly_when_it_says_so(name):
    order, scores = ORDERS[name](), jax.nn.softmax(jnp.asarray(LOGITS_GSE))

    def listed(seed):
        keys = jax.random.split(jax.random.key(seed), GROUPS)
        noise = Noise(keys_B=keys, row_length=SIZE, groups=(GROUPS, SIZE))
        inputs = known(np.ones((GROUPS, SIZE), bool), noise=noise)
        given = Candidates(logits=scores, scores=scores, ranking=scores, inputs=inputs)
        return np.asarray(order(TopK()(given), given).token)

    assert np.array_equal(listed(1), listed(2)) != ("noise" in order.traits.needs)


def test_every_trait_is_read():
    """One that nothing depends on would be a claim and no more."""
    from runs import ROOT

    text = "\n".join(path.read_text() for path in (ROOT / "sparsejax").rglob("*.py"))
    for field in dataclasses.fields(Traits):
        assert f"traits.{field.name}" in text, field.name
