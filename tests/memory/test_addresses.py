"""Every address against its slow reference, and the laws of the hashes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.base.errors import ConfigError
from sparsejax.base.reports import MemoryReport
from sparsejax.memory.address import Fixed, Inputs
from sparsejax.memory.addresses import ADDRESSES
from sparsejax.memory.clusters import Clusters, LatentBigrams
from sparsejax.memory.learned import ProductKeys, Softmax
from sparsejax.memory.lsh import CrossPolytope, Euclidean, Hyperplanes
from sparsejax.memory.n_grams import NGrams
from sparsejax.memory.token_ids import TokenId
from sparsejax.ops.lsh import hyperplane_buckets
from sparsejax.ops.ngrams import odd_multipliers, primes_from

from lookups import BACKBONE, SMALL, VOCAB, WIDTH, variants
from reference import memory as slow
from support import host_batch

BATCH = host_batch(3, 12, VOCAB, documents=3, padded=3)
REAL = BATCH["segments"] > 0
STATES = np.random.default_rng(2).normal(size=(*REAL.shape, WIDTH)).astype(np.float32)


def variables_of(address, seed=0):
    made = address.init(jax.random.key(seed), BACKBONE)
    values = {name: jnp.asarray(variable[...]) for name, variable in made.items()}
    running = address.first_running(jax.random.key(seed + 1), BACKBONE)
    return values if running is None else values | {"running": running}


def looked_up(address, variables, h=STATES, batch=BATCH):
    inputs = Inputs(
        tokens=jnp.asarray(batch["tokens"]), segments=jnp.asarray(batch["segments"]), h=jnp.asarray(h), window=None
    )
    return address(inputs, variables, VOCAB)


def assert_ids(address, of_token, variables=None, h=STATES):
    """`of_token(row, place)` gives the ids of one token."""
    found = np.asarray(looked_up(address, variables or {}, h).ids)
    for b, t in np.ndindex(REAL.shape):
        wanted = list(of_token(b, t)) if REAL[b, t] else [-1] * address.lookups
        assert found[b, t].tolist() == wanted, (b, t)


def test_a_token_has_the_row_of_its_id():
    assert_ids(TokenId(), lambda b, t: [BATCH["tokens"][b, t]])


def test_hashed_ids_are_those_of_big_integers():
    address = TokenId(buckets=7, hashes=3, seed=9)
    assert_ids(address, lambda b, t: slow.hashed_id(int(BATCH["tokens"][b, t]), 3, 7, 9))


@pytest.mark.parametrize("orders", [(2, 3), (1, 4), (1,)])
def test_n_grams_are_those_of_big_integers(orders):
    address = NGrams(orders=orders, heads=2, buckets=50, seed=3)
    multipliers = [int(m) for m in odd_multipliers(max(orders), 3)]
    rows = {b: ([int(i) for i in BATCH["tokens"][b]], [int(s) for s in BATCH["segments"][b]]) for b in range(3)}
    assert max(multipliers) > 2**31 and all(m % 2 for m in multipliers)  # products do wrap around
    assert_ids(address, lambda b, t: slow.n_grams(*rows[b], t, orders, 2, 50, multipliers))


def test_n_grams_of_large_ids_wrap_around():
    tokens = np.array([[2**31 - 2, 2**30 + 1, 2**31 - 2]], np.int32)
    batch = {"tokens": tokens, "segments": np.ones_like(tokens)}
    address = NGrams(orders=(2, 3), heads=2, buckets=1000)
    multipliers = [int(m) for m in odd_multipliers(3, 0)]
    wanted = [slow.n_grams(tokens[0].tolist(), [1] * 3, t, (2, 3), 2, 1000, multipliers) for t in range(3)]
    assert np.asarray(looked_up(address, {}, STATES[:1, :3], batch).ids)[0].tolist() == wanted


def test_ids_with_one_canonical_id_have_one_address(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(VOCAB) // 2)
    address = NGrams(orders=(2,), heads=1, buckets=50, canonical=str(tmp_path / "ids.npy"))
    swapped = BATCH | {"tokens": BATCH["tokens"] ^ 1}
    assert np.array_equal(looked_up(address, {}).ids, looked_up(address, {}, batch=swapped).ids)
    with pytest.raises(ConfigError, match=r"32 ids, the vocabulary 33"):
        address.check(BACKBONE, VOCAB + 1)
    with pytest.raises(ConfigError, match=r"canonical: .* could not be read"):
        NGrams(canonical=str(tmp_path / "none.npy"))


def test_an_id_looks_up_all_of_its_rows(tmp_path):
    counts = np.random.default_rng(1).integers(0, 4, VOCAB)
    counts[BATCH["tokens"][0, 0]] = 4
    np.save(tmp_path / "counts.npy", counts)
    address = TokenId(counts=str(tmp_path / "counts.npy"))
    assert (address.lookups, address.rows(VOCAB)) == (4, counts.sum())

    def of_token(b, t):
        token = int(BATCH["tokens"][b, t])
        own = [int(counts[:token].sum()) + n for n in range(counts[token])]
        return own + [-1] * (4 - len(own))

    assert_ids(address, of_token)
    with pytest.raises(ConfigError, match=r"counts: .*32 ids, the vocabulary 33"):
        address.check(BACKBONE, VOCAB + 1)
    np.save(tmp_path / "none.npy", np.zeros(VOCAB, int))
    with pytest.raises(ConfigError, match=r"counts: .* gives no id a row"):
        TokenId(counts=str(tmp_path / "none.npy"))
    with pytest.raises(ConfigError, match=r"counts: .* with buckets=5"):
        TokenId(counts=str(tmp_path / "counts.npy"), buckets=5)


def test_tables_of_n_grams_have_different_primes():
    assert primes_from(50, 4) == (53, 59, 61, 67) == tuple(slow.primes(50, 4))
    assert primes_from(1, 5) == (2, 3, 5, 7, 11)
    assert NGrams(orders=(2, 3), heads=2, buckets=50).rows(VOCAB) == 240


@pytest.mark.parametrize("centre", [False, True])
def test_lsh_buckets_are_those_of_their_equations(centre):
    mean = np.linspace(-1, 1, WIDTH) if centre else np.zeros(WIDTH)
    running = np.append(3.0 * mean, 3.0).astype(np.float32)  # three tokens' worth
    for address, of in (
        (Hyperplanes(bits=4, hashes=2, centre=centre), lambda x, v: slow.hyperplanes(x, v["normals"])),
        (CrossPolytope(columns=5, hashes=2, centre=centre), lambda x, v: slow.cross_polytope(x, v["normals"])),
        (
            Euclidean(projections=3, width=1.5, buckets=11, hashes=2, centre=centre),
            lambda x, v: slow.euclidean(x, v["normals"], v["offsets"], 1.5, 11),
        ),
    ):
        variables = variables_of(address) | ({"running": jnp.asarray(running)} if centre else {})
        plain = {name: np.asarray(value, np.float64) for name, value in variables.items()}
        assert_ids(address, lambda b, t: of(STATES[b, t] - mean, plain), variables)


@pytest.mark.parametrize("share", [False, True])
def test_softmax_takes_the_most_probable(share):
    address = Softmax(entries=6, k=3, weight="share" if share else "probability")
    variables = variables_of(address)
    wanted = lambda b, t: slow.softmax_top_k(STATES[b, t], np.asarray(variables["scores"]), 3, share)  # noqa: E731
    assert_ids(address, lambda b, t: wanted(b, t)[0], variables)
    weights = np.asarray(looked_up(address, variables).weights)
    np.testing.assert_allclose(weights[0, 0], wanted(0, 0)[1], rtol=1e-5)


@pytest.mark.parametrize("k", [3, 16])
@pytest.mark.parametrize("weight", ["softmax", "relu"])
@pytest.mark.parametrize("norm_query", [False, True], ids=["plain", "normed"])
def test_product_keys_are_the_best_of_all_pairs(weight, k, norm_query):
    address = ProductKeys(keys=4, heads=2, k=k, width=6, weight=weight, norm_query=norm_query)
    variables = variables_of(address)
    if norm_query:
        variables["query_scale"] = np.random.default_rng(3).uniform(0.5, 2, (2, 6)).astype(np.float32)
    plain = {name: np.asarray(value, np.float64) for name, value in variables.items()}
    wanted = lambda b, t: slow.product_keys(  # noqa: E731
        STATES[b, t].astype(np.float64),
        plain["query"],
        plain["sub_keys"],
        k,
        weight == "relu",
        plain.get("query_scale"),
    )
    assert_ids(address, lambda b, t: wanted(b, t)[0], variables)
    weights = np.asarray(looked_up(address, variables).weights)
    np.testing.assert_allclose(weights[1, 2], wanted(1, 2)[1], rtol=1e-4, atol=1e-6)


def test_clusters_are_the_nearest_centres_and_follow_what_is_near():
    address = Clusters(clusters=5, heads=2, decay=0.9)
    variables = variables_of(address)
    running = np.asarray(variables["running"], np.float64)
    centres = running[..., :-1] / running[..., -1:]
    wanted = {(b, t): slow.clusters(STATES[b, t].astype(np.float64), centres) for b, t in np.ndindex(REAL.shape)}
    assert_ids(address, lambda b, t: [h * 5 + code for h, code in enumerate(wanted[b, t])], variables)
    sums = np.zeros_like(running)
    for (b, t), codes in wanted.items():
        for h, code in enumerate(codes if REAL[b, t] else []):
            sums[h, code] += np.append(STATES[b, t].reshape(2, -1)[h], 1.0)
    measured = looked_up(address, variables).measured
    np.testing.assert_allclose(measured, sums, rtol=1e-4, atol=1e-5)
    stepped = np.stack([slow.moved(old, new, 0.9) for old, new in zip(running, sums, strict=True)])
    np.testing.assert_allclose(address.next_running(variables["running"], measured), stepped, rtol=1e-4, atol=1e-5)
    assert (sums[..., -1] == 0).any()  # so that one that nothing is near to is among them


def test_latent_bigrams_are_those_of_big_integers():
    address = LatentBigrams(clusters=4, heads=2, buckets=10)
    variables = variables_of(address)
    running = np.asarray(variables["running"], np.float64)
    centres = running[..., :-1] / running[..., -1:]
    codes = [[slow.clusters(x.astype(np.float64), centres) for x in row] for row in STATES]
    segments = BATCH["segments"].tolist()
    assert_ids(address, lambda b, t: slow.latent_bigrams(codes[b], segments[b], t, 4, 10), variables)


def test_every_address_has_a_small_form_under_test():
    assert set(ADDRESSES) <= set(SMALL)


@pytest.mark.parametrize("bits,angle", [(4, 0.5), (8, 0.3), (12, 0.2)])
def test_vectors_at_an_angle_share_a_bucket_as_often_as_the_law_says(bits, angle):
    """(1 − θ/π)^b, over independent tables."""
    tables, rng = 4000, np.random.default_rng(0)
    normals = jnp.asarray(rng.normal(size=(tables, 6, bits)), jnp.float32)
    left, right = np.eye(6)[0], math.cos(angle) * np.eye(6)[0] + math.sin(angle) * np.eye(6)[1]
    same = np.asarray(hyperplane_buckets(jnp.asarray([left, right], jnp.float32), normals))
    p = (1 - angle / math.pi) ** bits
    assert abs((same[0] == same[1]).mean() - p) < 3 * math.sqrt(p * (1 - p) / tables)


def test_hyperplanes_do_not_see_length_and_turn_with_the_space():
    normals = variables_of(Hyperplanes(bits=6, centre=False))["normals"]
    turn, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(WIDTH, WIDTH)))
    buckets = np.asarray(hyperplane_buckets(jnp.asarray(STATES), normals))
    assert len(np.unique(buckets)) > 10
    assert np.array_equal(hyperplane_buckets(jnp.asarray(0.01 * STATES), normals), buckets)
    turned = jnp.einsum("hdb,de->heb", normals, jnp.asarray(turn, jnp.float32))
    assert np.array_equal(hyperplane_buckets(jnp.asarray(STATES @ turn, jnp.float32), turned), buckets)


def test_without_bits_there_is_one_row():
    address = Hyperplanes(bits=0, centre=False)
    assert address.rows(VOCAB) == 1
    assert_ids(address, lambda b, t: [0], variables_of(address))


@pytest.mark.parametrize("offset", [1.0, 2.0])
def test_centring_gives_anisotropic_states_their_buckets_back(offset):
    """12 bits, 64 numbers, a mean of 1 or 2 standard deviations in every coordinate."""
    rng = np.random.default_rng(4)
    states = jnp.asarray(rng.normal(size=(1, 20_000, 64)) + offset, jnp.float32)
    plain = Inputs(tokens=jnp.zeros((1, 20_000), jnp.int32), segments=jnp.ones((1, 20_000), jnp.int32), h=states)
    normals = jnp.asarray(rng.normal(size=(1, 64, 12)), jnp.float32)

    def entropy(address, running):
        found = address(plain, {"normals": normals, "running": running}, VOCAB)
        load = np.bincount(np.asarray(found.ids).ravel(), minlength=4096)
        p = load[load > 0] / load.sum()
        return -(p * np.log2(p)).sum(), found.measured

    address = Hyperplanes(bits=12)
    nothing = address.first_running(jax.random.key(0), BACKBONE)
    assert nothing is not None and not nothing.any()
    uncentred, measured = entropy(address, jnp.zeros(65))
    centred, _ = entropy(address, address.next_running(jnp.zeros(65), measured))
    isotropic, _ = entropy(address, jnp.append(jnp.full(64, offset), 1.0))
    assert uncentred < {1.0: 9.5, 2.0: 7.5}[offset] and centred > 11 and abs(centred - isotropic) < 0.1


def test_a_running_mean_is_that_of_all_that_was_measured_at_first():
    """One step's sums are enough: the count decays as the sums do."""
    address = Hyperplanes(bits=2, decay=0.9)
    variables = variables_of(address)
    measured = looked_up(address, variables).measured
    running = address.next_running(variables["running"], measured)
    np.testing.assert_allclose(running[:-1] / running[-1], STATES[REAL].mean(0), rtol=1e-4, atol=1e-6)
    assert np.array_equal(address.next_running(running, jnp.zeros_like(running)), running)


def test_hyperplanes_are_no_parameters():
    for address in (Hyperplanes(bits=3), Euclidean(), CrossPolytope()):
        assert all(isinstance(variable, Fixed) for variable in address.init(jax.random.key(0), BACKBONE).values())


def test_the_balance_of_a_softmax_is_that_of_a_router():
    """N/k Σ f · P by hand, over two layers of a report whose padding counts for nothing."""
    address = Softmax(entries=6, k=2, balance=0.5)
    variables = variables_of(address)
    found = looked_up(address, variables)
    p = np.stack([slow.softmax(x @ np.asarray(variables["scores"])) for x in STATES[REAL]])
    np.testing.assert_allclose(found.probability_sum, p.sum(0), rtol=1e-5)
    loads = np.bincount(np.asarray(found.ids)[REAL].ravel(), minlength=6)
    tokens = int(REAL.sum())
    wanted = 6 / 2 * np.sum(loads / tokens * p.mean(0))
    twice = lambda value: jnp.stack([jnp.asarray(value)] * 2)  # noqa: E731
    counts = dict.fromkeys(("lookups", "masked"), twice(0))
    report = MemoryReport(
        loads=twice(loads), tokens=twice(tokens), probability_sum=twice(found.probability_sum), **counts
    )
    loss = address.balance_loss(report, jnp.int32(2 * tokens))  # in a step of as many tokens again
    np.testing.assert_allclose(loss, 0.5 * wanted, rtol=1e-5)
    assert looked_up(Softmax(entries=6, k=2), variables).probability_sum is None


def test_the_floor_of_a_collapse_is_that_of_the_config():
    for kind in (Hyperplanes, Euclidean, CrossPolytope):
        assert kind(entropy_floor=0.1).collapse == 0.1
    assert TokenId().collapse is None and Softmax().collapse is None


def test_a_bfloat16_state_is_hashed_as_its_float32_value():
    address = Hyperplanes(bits=10, centre=False)
    narrow = jnp.asarray(STATES, jnp.bfloat16)
    variables = variables_of(address)
    ids = looked_up(address, variables, narrow).ids
    assert np.array_equal(ids, looked_up(address, variables, np.asarray(narrow, np.float32)).ids)


@pytest.mark.parametrize(
    "make,key,said",
    [
        (lambda: TokenId(hashes=2), "hashes", "set buckets"),
        (lambda: TokenId(buckets=0), "buckets", "0 is not positive"),
        (lambda: NGrams(orders=(3, 2)), "orders", "ascending"),
        (lambda: NGrams(orders=()), "orders", "ascending"),
        (lambda: Hyperplanes(bits=31), "bits", r"outside \[0, 31\)"),
        (lambda: Hyperplanes(decay=1.0), "decay", r"outside \[0, 1\)"),
        (lambda: Softmax(entries=4, k=5), "k", "5 of 4 entries"),
        (lambda: Softmax(k=1, weight="share"), "weight", "no gradient"),
        (lambda: Softmax(balance=-0.1), "balance", "-0.1 is not ≥ 0"),
        (lambda: Softmax(entries=70_000, balance=0.1), "balance", "up to 65536"),
        (lambda: ProductKeys(width=3), "width", "odd"),
        (lambda: ProductKeys(keys=2, k=5), "k", "5 of 2² rows"),
        (lambda: ProductKeys(k=1), "weight", "no gradient"),
        (lambda: LatentBigrams(clusters=2**15, heads=8), "clusters", "uint32"),
        (lambda: Clusters(heads=3).check(BACKBONE, VOCAB), "heads", "do not divide d_model=8"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, key, said):
    with pytest.raises(ConfigError, match=said) as error:
        make()
    assert error.value.key == key


@pytest.mark.parametrize("name", variants(ADDRESSES))
def test_parameters_and_products_are_counted(name):
    address = variants(ADDRESSES)[name]
    parameters = [v for v in address.init(jax.random.key(0), BACKBONE).values() if not isinstance(v, Fixed)]
    assert address.size(BACKBONE)[0] == sum(v[...].size for v in parameters)
