"""Recurrent readers that skip: Skim-RNN (arXiv:1711.02085) and LSTM-Jump (arXiv:1704.06877) beside a plain LSTM.

Run:  python experiments/recurrent_skim.py [--seeds=0,1,2] [--steps=1500] [--out=experiments]

Two of the estimators in `sparsejax.ops` at work where everything is small enough to count. The task is made up: a
text's class shows in some of its tokens, and some tokens say that so many after them are quoted noise. Writes
`recurrent_skim.json` and `recurrent_skim.md` to `--out`; minutes on one core."""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Optional

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sparsejax.base.structs import struct
from sparsejax.ops.estimators import gumbel_softmax, gumbel_top_k
from sparsejax.ops.reinforce import reinforce_terms

ROOT = Path(__file__).parents[1]
CLASSES, LONGEST_QUOTE, FILLERS = 4, 8, 8
VOCABULARY = CLASSES + LONGEST_QUOTE + FILLERS  # evidence, marks of quotes by their length, filler
LENGTH, BATCH = 40, 64
Params = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """`blind` readers read, or skim, a random part of the text, or every so many-th token of it, instead of what they
    choose."""

    kind: Literal["skim", "jump"] = "jump"
    blind: Optional[Literal["random", "fixed"]] = None
    share: float = 1.0  # of tokens that a blind reader reads, or reads in full
    width: int = 32  # d
    skim_width: int = 4  # d'
    price: float = 0.0  # skim: of the mean of −log p(skim); jump: nats for reading everything
    longest: int = LONGEST_QUOTE + 1  # K: a jump lands so many tokens on at most
    read: int = 1  # R: tokens read before each jump
    jumps: int = LENGTH  # N: after so many jumps and R more tokens it stops


@struct
class Reading:
    """Of a batch: the state at the end, and what was done on the way, `[B, T]`."""

    state: Float[Array, "B D"]
    read: Float[Array, "B T"]  # the part of a full step that a token got: 0 or 1 in evaluation
    log_probability: Float[Array, "B T"]  # skim: of skimming; jump: of the jump taken there, 0 where none was due
    baseline: Float[Array, "B T"]  # the reward expected where a jump was due, 0 elsewhere


def init(key: PRNGKeyArray, reader: Reader) -> Params:
    """All float32. Jumps begin as steps to the next token, mostly, and tokens are read in full, mostly."""
    d, small, keys = reader.width, reader.skim_width, jax.random.split(key, 6)
    normal = lambda i, *shape: jax.random.normal(keys[i], shape) * shape[0] ** -0.5  # noqa: E731
    gates = lambda i, n: {"w": normal(i, 2 * d, 4 * n), "b": jnp.zeros(4 * n).at[n : 2 * n].set(1.0)}  # noqa: E731
    return {
        "embedding": jax.random.normal(keys[0], (VOCABULARY, d)),
        "full": gates(1, d),
        "small": gates(2, small),
        "skim": {"w": normal(3, 2 * d, 2), "b": jnp.array([1.0, 0.0])},  # read in full, skim
        "jump": {"w": normal(4, d, reader.longest + 1), "b": jnp.zeros(reader.longest + 1).at[1].set(2.0)},
        "baseline": {"w": jnp.zeros(d), "b": jnp.zeros(())},
        "head": {"w": normal(5, d, CLASSES), "b": jnp.zeros(CLASSES)},
    }


def lstm(p: Params, x_BD: Array, h_BD: Array, c_BN: Array) -> tuple[Array, Array]:
    """(hidden, cell) of N units that see x and all of h."""
    i, f, g, o = jnp.split(jnp.concatenate([x_BD, h_BD], -1) @ p["w"] + p["b"], 4, axis=-1)
    cell = jax.nn.sigmoid(f) * c_BN + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(cell), cell


def skimmed(p: Params, x_BD: Array, h_BD: Array, c_BD: Array) -> tuple[Array, Array]:
    """The small LSTM renews the first d' dimensions, the others stay."""
    n = p["b"].shape[0] // 4
    h_BN, c_BN = lstm(p, x_BD, h_BD, c_BD[:, :n])
    return jnp.concatenate([h_BN, h_BD[:, n:]], -1), jnp.concatenate([c_BN, c_BD[:, n:]], -1)


def mixed(part_B: Array, new: tuple[Array, Array], old: tuple[Array, Array]) -> tuple[Array, Array]:
    of_both = lambda n, o: part_B[:, None] * n + (1 - part_B[:, None]) * o  # noqa: E731
    return of_both(new[0], old[0]), of_both(new[1], old[1])


def linear(p: Params, x: Array) -> Array:
    return x @ p["w"] + p["b"]


def skim(
    p: Params, tokens_BT: Int[Array, "B T"], key: Optional[PRNGKeyArray], given_BT: Optional[Bool[Array, "B T"]] = None
) -> Reading:
    """Skim-RNN: each token is read in full or skimmed, by a Gumbel-softmax draw in training. `given_BT`: in full where
    it says so."""
    batch, length = tokens_BT.shape
    keys = None if key is None else jax.random.split(key, length)
    given_TB = None if given_BT is None else given_BT.T.astype(jnp.float32)

    def step(carry, seen):
        (h, c), (x, k, given) = carry, seen
        logits = linear(p["skim"], jnp.concatenate([x, h], -1))
        full_B = gumbel_softmax(logits, k, hard=k is None)[:, 0]
        full_B = full_B if given is None else given
        carry = mixed(full_B, lstm(p["full"], x, h, c), skimmed(p["small"], x, h, c))
        return carry, (full_B, jax.nn.log_softmax(logits)[:, 1])

    zeros = jnp.zeros((batch, p["baseline"]["w"].shape[0]))
    x_TBD = p["embedding"][tokens_BT.T]
    (h, _), (full_TB, log_TB) = jax.lax.scan(step, (zeros, zeros), (x_TBD, keys, given_TB))
    return Reading(state=h, read=full_TB.T, log_probability=log_TB.T, baseline=jnp.zeros(tokens_BT.shape))


def read_only(p: Params, tokens_BT: Int[Array, "B T"], keep_BT: Bool[Array, "B T"]) -> Reading:
    """A plain LSTM over the tokens to keep: of all of them, the plain LSTM."""

    def step(carry, seen):
        x, keep = seen
        return mixed(keep.astype(jnp.float32), lstm(p["full"], x, *carry), carry), None

    zeros = jnp.zeros((len(tokens_BT), p["baseline"]["w"].shape[0]))
    (h, _), _ = jax.lax.scan(step, (zeros, zeros), (p["embedding"][tokens_BT.T], keep_BT.T))
    none = jnp.zeros(tokens_BT.shape)
    return Reading(state=h, read=keep_BT.astype(jnp.float32), log_probability=none, baseline=none)


def jump(
    p: Params,
    reader: Reader,
    tokens_BT: Int[Array, "B T"],
    key: Optional[PRNGKeyArray],
    given_BT: Optional[Int[Array, "B T"]] = None,
) -> Reading:
    """LSTM-Jump: after every R tokens a jump, drawn in training and the likeliest in evaluation: 0 stops, κ lands κ
    tokens on. `given_BT`: the jump to take where one is due."""
    batch, length = tokens_BT.shape
    keys = None if key is None else jax.random.split(key, length)
    given_TB = None if given_BT is None else given_BT.T

    def step(carry, seen):
        (h, c, wait, block, jumped, live), (x, k, given) = carry, seen
        reads = live & (wait == 0)
        h, c = mixed(reads.astype(jnp.float32), lstm(p["full"], x, h, c), (h, c))
        block = block + reads
        at_end = reads & (block == reader.read)
        due = at_end & (jumped < reader.jumps)
        logits = linear(p["jump"], h)
        taken = gumbel_top_k(logits, 1, k)[:, 0] if given is None else given
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), taken[:, None], axis=-1)[:, 0]
        live = live & jnp.where(at_end, due & (taken > 0), True)
        wait = jnp.where(due, taken - 1, wait - 1)
        carry = (h, c, jnp.maximum(wait, 0), jnp.where(at_end, 0, block), jumped + due, live)
        expected = linear(p["baseline"], jax.lax.stop_gradient(h))
        return carry, (reads.astype(jnp.float32), jnp.where(due, log_p, 0), jnp.where(due, expected, 0))

    zeros, none = jnp.zeros((batch, p["baseline"]["w"].shape[0])), jnp.zeros(batch, jnp.int32)
    start = (zeros, zeros, none, none, none, jnp.ones(batch, bool))
    (h, *_), found = jax.lax.scan(step, start, (p["embedding"][tokens_BT.T], keys, given_TB))
    read_TB, log_TB, baseline_TB = found
    return Reading(state=h, read=read_TB.T, log_probability=log_TB.T, baseline=baseline_TB.T)


def jump_one(p: Params, reader: Reader, tokens_T: Int[Array, " T"]) -> Float[Array, " D"]:
    """The state that `jump` ends in in evaluation, of one text: tokens jumped over are never touched."""
    zeros, length = jnp.zeros((1, p["baseline"]["w"].shape[0])), len(tokens_T)

    def going(carry):
        return carry[2] < length

    def step(carry):
        h, c, place, block, jumped = carry
        h, c = lstm(p["full"], p["embedding"][tokens_T[place]][None], h, c)
        block = block + 1
        at_end = block == reader.read
        taken = jnp.argmax(linear(p["jump"], h)[0])
        stops = at_end & ((jumped == reader.jumps) | (taken == 0))
        place = jnp.where(stops, length, place + jnp.where(at_end, taken, 1))
        return h, c, place, jnp.where(at_end, 0, block), jumped + at_end

    none = jnp.int32(0)
    return jax.lax.while_loop(going, step, (zeros, zeros, none, none, none))[0][0]


def kept(reader: Reader, shape: Sequence[int], key: PRNGKeyArray) -> Bool[Array, "B T"]:
    """What a blind reader reads in full: `share` of the tokens, at random, or at equal distances."""
    if reader.blind == "random":
        return jax.random.uniform(key, tuple(shape)) < reader.share
    place = jnp.floor(jnp.arange(shape[1] + 1) * reader.share)
    return jnp.broadcast_to(place[1:] > place[:-1], tuple(shape))


def read_text(p: Params, reader: Reader, tokens_BT: Int[Array, "B T"], key: Optional[PRNGKeyArray]) -> Reading:
    """As this reader reads. Nothing is random without a key but what a blind reader draws, always the same."""
    keep = kept(reader, tokens_BT.shape, jax.random.key(0) if key is None else key) if reader.blind else None
    if reader.kind == "skim":
        return skim(p, tokens_BT, key, keep)
    return jump(p, reader, tokens_BT, key) if keep is None else read_only(p, tokens_BT, keep)


def loss_terms(
    p: Params, reader: Reader, reading: Reading, labels_B: Int[Array, " B"]
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """(the loss of each text, its surrogate): the gradient of their sum is that of the expected loss."""
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(linear(p["head"], reading.state), labels_B)
    if reader.kind == "skim" or reader.blind:
        priced = -reader.price * reading.log_probability.mean(-1)
        return cross_entropy + priced, jnp.zeros_like(cross_entropy)
    loss = cross_entropy + reader.price * reading.read.mean(-1)
    policy, error = reinforce_terms(reading.log_probability, reading.baseline, -loss[:, None])
    due = reading.log_probability != 0
    return loss, jnp.where(due, policy + error, 0).sum(-1)


def draw_texts(key: PRNGKeyArray, batch: int) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """(tokens, classes). A token is evidence, right in 3 of 5 cases, or the mark of a quote, as likely; in a quote
    every token of the vocabulary that is no mark is as likely as any other."""
    keys = jax.random.split(key, 6)
    shape = (LENGTH, batch)
    labels = jax.random.randint(keys[0], (batch,), 0, CLASSES)
    right = jax.random.uniform(keys[1], shape) < 0.6
    evidence = jnp.where(right, labels, jax.random.randint(keys[2], shape, 0, CLASSES))
    quotes = jax.random.uniform(keys[3], shape) < 0.5
    lengths = jax.random.randint(keys[4], shape, 1, LONGEST_QUOTE + 1)
    noise = jax.random.randint(keys[5], shape, 0, CLASSES + FILLERS)
    noise = jnp.where(noise < CLASSES, noise, noise + LONGEST_QUOTE)

    def step(left, seen):
        evidence, mark, length, noise = seen
        token = jnp.where(left > 0, noise, jnp.where(mark, CLASSES + length - 1, evidence))
        return jnp.where(left > 0, left - 1, jnp.where(mark, length, 0)), token

    _, tokens = jax.lax.scan(step, jnp.zeros(batch, jnp.int32), (evidence, quotes, lengths, noise))
    return tokens.T, labels


def train(reader: Reader, seeds: Sequence[int], steps: int) -> list[Params]:
    """Adam, its rate falling to 0; all seeds at once."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(3e-3, steps)))

    def step(carry, key):
        p, moments = carry
        text_key, read_key = jax.random.split(key)
        tokens, labels = draw_texts(text_key, BATCH)

        def objective(p):
            return sum(term.mean() for term in loss_terms(p, reader, read_text(p, reader, tokens, read_key), labels))

        updates, moments = optimizer.update(jax.grad(objective)(p), moments)
        return (optax.apply_updates(p, updates), moments), None

    @jax.jit
    @jax.vmap
    def run(key):
        p = init(key, reader)
        keys = jax.random.split(jax.random.fold_in(key, 1), steps)
        return jax.lax.scan(step, (p, optimizer.init(p)), keys)[0][0]

    stacked = run(jnp.stack([jax.random.key(seed) for seed in seeds]))
    return [jax.tree.map(lambda leaf: leaf[i], stacked) for i in range(len(seeds))]


def multiply_adds(reader: Reader, read: float) -> float:
    """Of one token on average, its reader looking at, or reading in full, this share."""
    d, small = reader.width, reader.skim_width
    full = 2 * d * 4 * d
    if reader.kind == "skim":
        choice = 0 if reader.blind else 2 * d * 2
        return read * full + (1 - read) * 2 * d * 4 * small + choice
    return read * (full + (0 if reader.blind else d * (reader.longest + 1) / reader.read))


def evaluate(p: Params, reader: Reader, texts: int = 20_000) -> dict[str, float]:
    """Accuracy, the share of tokens read in full, multiply-adds a token; on texts that training has not seen."""
    tokens, labels = draw_texts(jax.random.key(2**31 - 1), texts)
    reading = jax.jit(partial(read_text, reader=reader, key=None))(p, tokens_BT=tokens)
    share = float(reading.read.mean())
    accuracy = float((jnp.argmax(linear(p["head"], reading.state), -1) == labels).mean())
    return {"accuracy": accuracy, "read": share, "multiply_adds": multiply_adds(reader, share)}


def seconds_one_by_one(p: Params, reader: Reader, texts: int = 200) -> dict[str, float]:
    """Median seconds for one text at a time: of a plain LSTM over all of it, and of one that jumps."""
    tokens, _ = draw_texts(jax.random.key(1), texts)
    plain = jax.jit(lambda p, t: read_only(p, t[None], jnp.ones((1, LENGTH), bool)).state)
    jumping = jax.jit(lambda p, t: jump_one(p, reader, t))

    def median(run: Callable[[Params, Array], Array]) -> float:
        taken = []
        for text in tokens:
            begun = time.perf_counter()
            run(p, text).block_until_ready()
            taken.append(time.perf_counter() - begun)
        return float(np.median(taken[texts // 10 :]))

    return {"plain": median(plain), "jump": median(jumping)}


def study(seeds: Sequence[int], steps: int) -> dict[str, Any]:
    """Name of an arm → figures of every seed. Blind arms read what the arm they belong to read, on average."""
    results: dict[str, Any] = {}

    def of(name: str, reader: Reader) -> list[Params]:
        trained = train(reader, seeds, steps)
        results[name] = [evaluate(p, reader) for p in trained]
        print(name, [round(run["accuracy"], 4) for run in results[name]], flush=True)
        return trained

    of("plain LSTM", Reader(blind="fixed", share=1.0))
    for name, reader in (
        ("Skim-RNN, γ = 0.02", Reader(kind="skim", price=0.02)),
        ("LSTM-Jump, price 0.5", Reader(kind="jump", price=0.5)),
    ):
        trained = of(name, reader)
        share = float(np.mean([run["read"] for run in results[name]]))
        for blind in ("random", "fixed"):
            of(f"{name}: {blind}", replace(reader, blind=blind, share=share, price=0.0))
        if reader.price == 0.5:
            results["seconds"] = [seconds_one_by_one(p, reader) for p in trained]
    return results


def page(results: dict[str, Any], command: str) -> str:
    """Means over seeds, as Markdown."""
    lines = ["# Recurrent readers that skip", "", f"`{command}` made this page.", ""]
    lines += ["| arm | accuracy | read in full | multiply-adds a token |", "|---|---|---|---|"]
    for name, runs in results.items():
        if name == "seconds":
            continue
        accuracy = np.array([run["accuracy"] for run in runs])
        spread = f" ± {accuracy.std(ddof=1):.2%}" if len(runs) > 1 else ""
        read, cost = (np.mean([run[key] for run in runs]) for key in ("read", "multiply_adds"))
        lines.append(f"| {name} | {accuracy.mean():.1%}{spread} | {read:.1%} | {cost:,.0f} |")
    times = {key: 1e6 * np.median([run[key] for run in results["seconds"]]) for key in ("plain", "jump")}
    lines += [
        "",
        f"One text at a time, compiled: {times['plain']:.0f} µs for the plain LSTM, {times['jump']:.0f} µs for",
        "`LSTM-Jump, price 0.5`, which never touches what it jumps over.",
    ]
    return "\n".join(lines) + "\n"


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=ROOT / "experiments")
    args = parser.parse_args(argv)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    results = study(seeds, args.steps)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "recurrent_skim.json").write_text(json.dumps(results, indent=1) + "\n")
    command = f"python experiments/recurrent_skim.py --seeds={args.seeds} --steps={args.steps}"
    path = args.out / "recurrent_skim.md"
    reading = path.read_text().partition("\n## Reading")[1:] if path.exists() else ("", "")
    path.write_text(page(results, command) + "".join(reading))


if __name__ == "__main__":
    main()
