"""What goes wrong in training that a loss does not show, as rules over the newest rows and loads of a run.

Each rule looks at the last windows of training (`Seen`), oldest first, and says what holds at the newest. They are
pure, so the log of a run and its report say the same."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

WINDOWS = 8
"""How many windows the rules look back."""
REPEATED = 3
"""Windows in a row in which a state has to hold; one may be chance, or a batch."""


@dataclass(frozen=True)
class Alert:
    """One thing that is wrong at `step`. `layer` is "" for the whole model; `remedy` names a setting to try."""

    kind: str
    layer: str
    step: int
    text: str
    cause: str
    remedy: str

    @property
    def about(self) -> tuple[str, str]:
        """The same for the same trouble at another step."""
        return self.kind, self.layer

    @property
    def line(self) -> str:
        where = f"{self.layer}: " if self.layer else ""
        return f"{self.kind}: {where}{self.text}; likely {self.cause}; try {self.remedy}"


class Seen(NamedTuple):
    """A window of training: its row of metrics and its arrays, as in `metrics.jsonl` and `routing/STEP.npz`."""

    row: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]


History = Sequence[Seen]


def alerts(history: History) -> list[Alert]:
    """What is wrong at the newest of these windows."""
    return [alert for rule in RULES for alert in rule(history[-WINDOWS:])] if history else []


def collapse(history: History) -> Iterator[Alert]:
    """A layer sends nearly all pairs to as few experts as a token has: those learn, the others never will.

    Counted in effective experts, exp of the entropy of the load, against the k experts of a token."""
    for layer, loads_WE, k in _layers(history):
        if len(loads_WE) < REPEATED or loads_WE.shape[1] <= 2 * k:
            continue
        effective = [_effective(load_E) for load_E in loads_WE[-REPEATED:]]
        if max(effective) < 1.25 * k:
            yield Alert(
                "collapse",
                layer,
                _step(history),
                f"{effective[-1]:.1f} of {loads_WE.shape[1]} experts do the work of all, with {k:g} for a token",
                "a router that was pushed to an early favourite faster than balancing pushed back",
                f"model.blocks.{_block(layer)}.router.balance.coefficient higher, its controller loss_free, or a lower "
                "optimizer.learning_rate at first (optimizer.schedule.warmup_steps)",
            )


def starvation(history: History) -> Iterator[Alert]:
    """Experts under 1 % of the mean load for several windows, where so few pairs cannot be chance."""
    collapsed = {alert.layer for alert in collapse(history)}
    for layer, loads_WE, _ in _layers(history):
        recent = loads_WE[-REPEATED:]
        if layer in collapsed or len(recent) < REPEATED or recent.mean(-1).min() < 100:
            continue
        starved = np.flatnonzero((recent < 0.01 * recent.mean(-1, keepdims=True)).all(0))
        if len(starved):
            names = ", ".join(map(str, starved[:8])) + (", …" if len(starved) > 8 else "")
            yield Alert(
                "starvation",
                layer,
                _step(history),
                f"{len(starved)} of {loads_WE.shape[1]} experts get under 1 % of an even share: {names}",
                "experts that lost early and get no gradient to win tokens back",
                f"model.blocks.{_block(layer)}.router.balance.coefficient higher, its controller loss_free, or fewer "
                f"experts (model.blocks.{_block(layer)}.num_experts)",
            )


def oscillation(history: History) -> Iterator[Alert]:
    """Loads that swing about the mean from window to window; chance changes sides only half of the time."""
    for layer, loads_WE, _ in _layers(history):
        if len(loads_WE) < WINDOWS:
            continue
        off_WE = loads_WE / np.maximum(loads_WE.mean(-1, keepdims=True), 1e-9) - 1
        large = np.abs(off_WE[:-1]) > 0.1
        turns = (off_WE[1:] * off_WE[:-1] < 0)[large]
        if large.mean() > 0.5 and turns.mean() > 0.8 and np.abs(off_WE).mean() > 0.2:
            router = f"model.blocks.{_block(layer)}.router"
            yield Alert(
                "oscillating bias",
                layer,
                _step(history),
                f"{100 * turns.mean():.0f} % of loads change sides from window to window, {np.abs(off_WE).mean():.2f} "
                "of the mean away from it",
                "a balancing force that overshoots: a bias that moves too far at a time",
                f"{router}.controller.rate lower (loss_free), its decay nearer 1 (quantile), or {router}.balance."
                "coefficient lower",
            )


def rising_drops(history: History) -> Iterator[Alert]:
    """More pairs find no slot than at the window's beginning."""
    drops = _values(history, "moe/drop_fraction")
    if len(drops) == WINDOWS and drops[-1] > 0.1:
        before, now = np.mean(drops[: WINDOWS // 2]), np.mean(drops[WINDOWS // 2 :])
        if now - before > 0.05:
            yield Alert(
                "drops rising",
                "",
                _step(history),
                f"{100 * drops[-1]:.0f} % of pairs are dropped; they were {100 * drops[0]:.0f} %",
                "loads that become less even than the slots allow",
                "capacity_factor or balance.coefficient of the block higher, or dispatch=grouped, which drops nothing",
            )


def stuck_balance(history: History) -> Iterator[Alert]:
    """The balance loss has a weight, is not near 1 and has stopped falling."""
    rows = [seen.row for seen in history if seen.row.get("loss/balance")]
    values = _values([Seen(row, {}) for row in rows], "moe/balance_loss")
    if len(values) == WINDOWS and min(values) > 1.2 and max(values) - min(values) < 0.01 * np.mean(values):
        yield Alert(
            "balance loss stuck",
            "",
            _step(history),
            f"it stays at {values[-1]:.2f}, and 1 is balanced",
            "a gradient of the balance too weak against that of the loss, or saturated scores",
            "router.balance.coefficient or router.z_loss of the block higher",
        )


def growing_logits(history: History) -> Iterator[Alert]:
    """The router's logits are large and still grow: scores saturate, and in bfloat16 they round to ties."""
    values = _values(history, "moe/router_z")
    if len(values) == WINDOWS and values[-1] > 100 and values[-1] > 2 * values[0]:
        yield Alert(
            "router logits growing",
            "",
            _step(history),
            f"the mean of logsumexp² is {values[-1]:.0f} and was {values[0]:.0f}",
            "nothing that holds the logits back",
            "router.z_loss of the block higher, or its router.logit_cap",
        )


def stuck_selector(history: History) -> Iterator[Alert]:
    """A selector asks for more than it has room for, or pays a price that cannot rise any more, and nothing moves."""
    for group, remedy in (("select", "a ladder of model.skim with more room"), ("sequence", "more slots for anchors")):
        lost = _values(history, f"{group}/unplaced_fraction")
        if len(lost) == WINDOWS and min(lost) > 0.05:
            text = f"{100 * lost[-1]:.0f} % of tokens were chosen and found no room, in {WINDOWS} windows in a row"
            cause = "a selector that wants more tokens than its room, which then decides in its place"
            yield Alert("selector stuck at its budget", "", _step(history), f"{group}: {text}", cause, remedy)
    price, kept = _values(history, "select/price"), _values(history, "select/keep_fraction")
    if len(price) == len(kept) == WINDOWS and abs(price[-1]) > 1 and _still(price, 1e-6) and _still(kept, 1e-3):
        yield Alert(
            "selector stuck at its budget",
            "",
            _step(history),
            f"its price stays at {price[-1]:g} and it keeps {100 * kept[-1]:.1f} % of tokens",
            "a price at its limit that selection no longer follows",
            "model.skim.budget.target nearer to what is kept, model.skim.budget.most higher, or soft gates that have "
            "not saturated (their temperature)",
        )


RULES: tuple[Callable[[History], Iterator[Alert]], ...] = (
    collapse,
    starvation,
    oscillation,
    rising_drops,
    stuck_balance,
    growing_logits,
    stuck_selector,
)


def _layers(history: History) -> Iterator[tuple[str, np.ndarray, float]]:
    """(layer, assigned pairs [W, E] of the windows that have them, experts of a token) of every layer at the newest."""
    for key in history[-1].arrays:
        if key.endswith("/assigned"):
            layer = key.removesuffix("/assigned")
            having = [seen.arrays for seen in history if key in seen.arrays]
            loads_WE = np.stack([np.asarray(arrays[key], np.float64) for arrays in having])
            tokens = float(having[-1].get(f"{layer}/tokens", 0))
            yield layer, loads_WE, max(round(loads_WE[-1].sum() / tokens) if tokens else 1, 1)


def _effective(load_E: np.ndarray) -> float:
    p = load_E[load_E > 0] / max(load_E.sum(), 1.0)
    return float(np.exp(-(p * np.log(p)).sum())) if len(p) else float(len(load_E))


def _values(history: History, key: str) -> list[float]:
    found = [seen.row.get(key) for seen in history]
    return [value for value in found if value is not None]


def _still(values: Sequence[float], part: float) -> bool:
    return max(values) - min(values) <= part * abs(values[-1])


def _block(layer: str) -> str:
    """A layer is named by its place and its block, `03_moe`."""
    return layer.partition("_")[2] or layer


def _step(history: History) -> int:
    return int(history[-1].row["step"])
