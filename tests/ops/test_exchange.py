"""The dropless exchange against a simulation of the devices, one row at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sparsejax.ops.assignment import choice_major_pairs, fill_slots
from sparsejax.ops.dispatch import dispatch_rows
from sparsejax.ops.exchange import common_level, exchange_rows, plan_exchange

from support import on_mesh, to_numpy

DEVICES, TOKENS, K, EXPERTS, WIDTH = 4, 12, 2, 8, 3
PAIRS, EACH = TOKENS * K, EXPERTS // DEVICES
ROOMS = {"for all": DEVICES * PAIRS, "tight": PAIRS + 3, "hardly any": 5}


def drawn(load: str):
    """(tokens `[X, T, D]`, experts `[X, T, K]`, which tokens count) on each device."""
    rng = np.random.default_rng(1)
    odds = np.log({"even": np.ones(EXPERTS), "uneven": np.arange(1, EXPERTS + 1) ** 3.0}[load])
    experts = np.argsort(-odds - rng.gumbel(size=(DEVICES, TOKENS, EXPERTS)), axis=-1)[..., :K]
    mask = np.ones((DEVICES, TOKENS), bool)
    mask[1, -4:] = False
    return rng.normal(size=(DEVICES, TOKENS, WIDTH)).astype(np.float32), experts.astype(np.int32), mask


@functools.cache
def moved(room: int):
    """`call(x, experts, mask, ct)` on all devices: plan, rows received, rows come home, and what a cotangent of the
    received becomes at home."""

    def local(x_1TD, experts_1TK, mask_1T, ct_1QD):
        pairs = choice_major_pairs(experts_1TK, jnp.ones(experts_1TK.shape), mask_1T)
        slots = fill_slots(pairs, EXPERTS, 1, None)
        plan = plan_exchange(pairs, slots, EXPERTS, room, "expert")
        out = functools.partial(exchange_rows, "all_to_all", "expert", room, leg=plan.outward, back=plan.homeward)
        sent_ND = dispatch_rows(x_1TD[0], plan.index)
        received_QD, pull = jax.vjp(lambda rows: out(rows), sent_ND)
        home_ND = exchange_rows("all_to_all", "expert", PAIRS, received_QD, plan.homeward, plan.outward)
        results = (plan, received_QD, home_ND, pull(ct_1QD[0])[0])
        return jax.tree.map(lambda value: value[None], results)

    by_device = P("expert")
    return jax.jit(jax.shard_map(local, in_specs=by_device, out_specs=by_device))


@functools.cache
def results(load: str, room: str):
    x, experts, mask = drawn(load)
    ct = np.random.default_rng(2).normal(size=(DEVICES, ROOMS[room], WIDTH)).astype(np.float32)
    with on_mesh((1, DEVICES, 1)):
        place = lambda array: jax.device_put(array, jax.NamedSharding(jax.sharding.get_mesh(), P("expert")))  # noqa: E731
        out = to_numpy(moved(ROOMS[room])(*map(place, (x, experts, mask, ct))))
    return x, experts, mask, ct, out


def simulated(experts, mask, room):
    """For every device the (source, pair) of each row it receives, in order; as many as fit, of every source and
    expert the first, level by level as long as a whole level fits."""
    asked = [[[] for _ in range(EXPERTS)] for _ in range(DEVICES)]
    for source in range(DEVICES):
        for pair in range(PAIRS):
            choice, token = divmod(pair, TOKENS)
            if mask[source, token]:
                asked[source][experts[source, token, choice]].append((source, pair))
    received = []
    for device in range(DEVICES):
        lists = [asked[source][device * EACH + e] for source in range(DEVICES) for e in range(EACH)]
        level = 0
        while level < PAIRS and sum(min(len(each), level + 1) for each in lists) <= room:
            level += 1
        received.append([row for each in lists for row in each[:level]])
    return received


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("load", ["even", "uneven"])
class TestRows:
    def test_every_device_receives_the_rows_that_fit_in_order_of_source_and_expert(self, load, room):
        x, experts, mask, _, (plan, received_XQD, _, _) = results(load, room)
        for device, rows in enumerate(simulated(experts, mask, ROOMS[room])):
            assert plan.received[device] == len(rows)
            expected = [x[source, pair % TOKENS] for source, pair in rows]
            np.testing.assert_array_equal(received_XQD[device, : len(rows)], np.reshape(expected, (-1, WIDTH)))
            of_expert = [experts[source, pair % TOKENS, pair // TOKENS] - device * EACH for source, pair in rows]
            np.testing.assert_array_equal(plan.expert_Q[device, : len(rows)], of_expert)

    def test_what_does_not_fit_is_told_and_counted(self, load, room):
        _, experts, mask, _, (plan, *_) = results(load, room)
        kept = {row for rows in simulated(experts, mask, ROOMS[room]) for row in rows}
        real = np.tile(mask, K)
        expected = [[real[d, p] and (d, p) not in kept for p in range(PAIRS)] for d in range(DEVICES)]
        np.testing.assert_array_equal(plan.lost_P, expected)
        assert plan.lost_P.any() == (room != "for all" and (load, room) != ("even", "tight"))
        owner = np.where(mask[..., None], experts // EACH, -1)
        np.testing.assert_array_equal(plan.wanted, [(owner == device).sum() for device in range(DEVICES)])

    def test_rows_come_home_to_where_they_were(self, load, room):
        x, _, _, _, (plan, _, home_XND, _) = results(load, room)
        for device in range(DEVICES):
            gone = plan.index.token_N[device] < TOKENS
            assert gone.sum() == plan.outward.out_size_X[device].sum()
            np.testing.assert_array_equal(home_XND[device][gone], x[device][plan.index.token_N[device][gone]])

    def test_the_transpose_of_the_way_there_is_the_way_home(self, load, room):
        _, _, _, ct, (plan, _, _, back_XND) = results(load, room)
        _, experts, mask = drawn(load)
        at_home = np.zeros((DEVICES, PAIRS, WIDTH), np.float32)
        for device, rows in enumerate(simulated(experts, mask, ROOMS[room])):
            for number, (source, pair) in enumerate(rows):
                at_home[source, plan.index.slot_P[source, pair]] += ct[device, number]
        for device in range(DEVICES):
            gone = plan.index.token_N[device] < TOKENS
            np.testing.assert_array_equal(back_XND[device][gone], at_home[device][gone])


def test_the_common_level_is_the_highest_that_fits():
    rng = np.random.default_rng(3)
    for _ in range(200):
        counts, room = rng.integers(0, 12, rng.integers(1, 9)), int(rng.integers(0, 60))
        fits = [level for level in range(13) if np.minimum(counts, level).sum() <= room]
        expected = counts.max() if counts.sum() <= room else max(fits)
        assert common_level(jnp.asarray(counts, jnp.int32), room) == expected, (counts, room)
