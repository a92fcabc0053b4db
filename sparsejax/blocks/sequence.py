"""Layers that compute on every k-th token of a document: Sequence-AltUp (Baykal et al., arXiv:2301.13310) and the two
baselines that it is compared with, stride-and-skip and average pooling.

The anchor of token i of a document is a(i) = k ⌊i / k⌋, so that a document computes the same wherever it is packed. The
block runs on the anchors alone, one after the other, each at its position in the document; its keys and values in a
cache are those of ⌈T / k⌉ tokens."""

import abc
import dataclasses
from dataclasses import dataclass
from typing import Any, Optional

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray

from sparsejax.base.cost import Cost
from sparsejax.base.errors import ConfigError, leaks
from sparsejax.base.reports import SequenceReport
from sparsejax.base.sharding import BATCH_AXES, on_each_device
from sparsejax.base.structs import Batch, struct
from sparsejax.blocks.context import BlockCache, BlockOutput, Context
from sparsejax.blocks.tokens import NOWHERE, ROWS, Tokens, context_at, report_of
from sparsejax.nn.backbone import Backbone
from sparsejax.nn.linear import param
from sparsejax.ops.anchors import Places, at, places, room, window_means


@struct
class Spread:
    """What tokens take from the slot of their anchor. An anchor becomes `own`; another token x, and one whose anchor
    came before these tokens, `kept` · x + `carried`."""

    own: Float[Array, "B S D"]
    carried: Float[Array, "B S D"]
    kept: Float[Array, ""]


class Sharing(nnx.Module, abc.ABC):
    """How what a layer made of its anchors comes to the other tokens."""

    @abc.abstractmethod
    def __call__(self, x_BSD: Float[Array, "B S D"], y_BSD: Float[Array, "B S D"]) -> Spread:
        """From the input and the output of the block, float32."""


class Correction(Sharing):
    """ŷ_i = α₁ x_i + α₂ x_a(i) and y_i = ŷ_i + β (ỹ_a(i) − ŷ_a(i)), sorted so that β = 1 makes anchors exactly ỹ."""

    def __init__(self):
        self.prediction = param(jnp.array([1.0, 0.0], jnp.float32), (None,), "stream")  # α₁, α₂
        self.correction = param(jnp.ones((), jnp.float32), (), "stream")  # β

    def __call__(self, x_BSD, y_BSD):
        own, anchors = self.prediction[...]
        gain = self.correction[...]
        return Spread(
            own=(1 - gain) * (own + anchors) * x_BSD + gain * y_BSD,
            carried=gain * (y_BSD - own * x_BSD) + (1 - gain) * anchors * x_BSD,
            kept=own,
        )


class Nothing(Sharing):
    """Tokens that are no anchors stay as they are."""

    def __call__(self, x_BSD, y_BSD):
        return Spread(own=y_BSD, carried=jnp.zeros_like(y_BSD), kept=jnp.ones(()))


class Everything(Sharing):
    """All tokens become their anchor."""

    def __call__(self, x_BSD, y_BSD):
        return Spread(own=y_BSD, carried=y_BSD, kept=jnp.zeros(()))


@dataclass(frozen=True, kw_only=True)
class EveryKth(Tokens, abc.ABC):
    """What all ways to compute on every k-th token can be told."""

    stride: int = 4  # k
    blocks: tuple[str, ...] = ()  # names in model.blocks whose layers do so; (): all
    documents: int = 8  # in a row that there is room for, whatever their lengths; anchors beyond it are not computed

    def __post_init__(self):
        for name in ("stride", "documents"):
            if getattr(self, name) < 1:
                raise ConfigError(name, f"{getattr(self, name)} is not positive")

    def unused(self) -> dict[str, str]:
        return {"documents": "stride=1: there is room for every token"} if self.stride == 1 else {}

    pools = False
    """Whether the block is given the mean of an anchor and the tokens that share it."""

    @abc.abstractmethod
    def sharing(self) -> Sharing:
        """Of one layer."""

    def around(
        self, block: nnx.Module, key: PRNGKeyArray, backbone: Backbone, layers: tuple[int, ...]
    ) -> "SequenceBlock":
        return SequenceBlock(block, self.sharing(), self)

    def room(self, length: int, cached: bool = False) -> int:
        return room(length, self.stride, 1 if cached else self.documents)

    def empty_cache(self, rows: int, d_model: int) -> dict[str, Array]:
        return {"anchor": jnp.zeros((rows, d_model), jnp.float32, out_sharding=P(BATCH_AXES, None))}

    def costs(self, of_block: dict[str, Cost], backbone: Backbone, layers: int) -> dict[str, Cost]:
        return {name: cost.every_kth(self.stride) for name, cost in of_block.items()}


@dataclass(frozen=True, kw_only=True)
class SequenceAltUp(EveryKth):
    """Predict, compute, correct along positions: three learned numbers a layer. At first, a token gets what the layer
    adds to its anchor."""

    def sharing(self) -> Correction:
        return Correction()

    def costs(self, of_block, backbone, layers):
        return super().costs(of_block, backbone, layers) | {"sequence": Cost(parameters=3, active=3)}


@dataclass(frozen=True, kw_only=True)
class StrideAndSkip(EveryKth):
    """Tokens that are no anchors skip the layer."""

    def sharing(self) -> Nothing:
        return Nothing()


@dataclass(frozen=True, kw_only=True)
class AveragePooling(EveryKth):
    """The layer computes on the mean of k tokens, and all of them become its output. The mean looks ahead."""

    allow_leak: bool = False  # accepts that a token sees up to k − 1 tokens after it

    pools = True

    def sharing(self) -> Everything:
        return Everything()

    def check_causal(self) -> None:
        ahead = self.stride - 1
        if ahead and not self.allow_leak:
            raise leaks("allow_leak", f"a token is averaged with up to {ahead} after it")

    def unused(self) -> dict[str, str]:
        alone = {"allow_leak": "stride=1: a token is averaged with itself alone"} if self.stride == 1 else {}
        return super().unused() | alone

    def check_cached(self) -> None:
        if self.stride > 1:
            raise ConfigError("name", "pool averages tokens that are not there yet; allowed in generation: altup, skip")


class SequenceBlock(nnx.Module):
    """A block that runs on the anchors of its rows."""

    def __init__(self, block: nnx.Module, sharing: Sharing, settings: EveryKth):
        self.block, self.sharing, self.settings = block, sharing, settings

    def __call__(
        self, x_BTD: Float[Array, "B T D"], context: Context, cache: Optional[BlockCache] = None
    ) -> BlockOutput:
        with jax.named_scope("anchors"):
            x_BSD, where = self._gathered(x_BTD, context.batch, cached=cache is not None)
            seen = context_at(context, where.token_BS)
        out = self.block(x_BSD, dataclasses.replace(seen, batch=self._placed(seen.batch)), cache)
        before = None if cache is None else cache.anchor
        with jax.named_scope("correct"):
            spread = self.sharing(x_BSD.astype(jnp.float32), out.x.astype(jnp.float32))
            y_BTD, latest = _spread(x_BTD, where, spread, before)
        after = None if out.cache is None else dataclasses.replace(out.cache, anchor=latest)
        report = report_of(out.report, where.token_BS, x_BTD.shape[1])
        kept_BT = where.anchor_BT & ~where.unplaced_BT if context.record else None
        report = dataclasses.replace(report, sequence=_report(context.batch, where), kept=kept_BT)
        return dataclasses.replace(out, x=y_BTD, report=report, cache=after)

    def _gathered(
        self, x_BTD: Float[Array, "B T D"], batch: Batch, cached: bool
    ) -> tuple[Float[Array, "B S D"], Places]:
        """What the block computes on, and where it comes from."""
        stride, slots = self.settings.stride, self.settings.room(x_BTD.shape[1], cached)

        def local(x_BTD: Array, batch: Batch) -> tuple[Array, Places]:
            where = places(batch.segments, batch.positions, stride, slots)
            pooled = self.settings.pools
            x_BSD = window_means(x_BTD, where.slot_BT, slots) if pooled else at(x_BTD, where.token_BS)
            return x_BSD, where

        return on_each_device(local, (ROWS, ROWS), (ROWS, ROWS))(x_BTD, batch)

    def _placed(self, batch: Batch) -> Batch:
        """The batch of the anchors, with their places in a cache."""
        places_BS = jnp.where(batch.segments > 0, batch.positions // self.settings.stride, NOWHERE)
        return dataclasses.replace(batch, places=places_BS)


def _spread(
    x_BTD: Float[Array, "B T D"], where: Places, spread: Spread, before_BD: Optional[Float[Array, "B D"]]
) -> tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
    """(all tokens after the layer, what is carried to the tokens that come next). `before`: what is carried to these;
    without it, tokens whose anchor is not among them stay as they are, as padding does and what found no room."""

    def local(x_BTD: Array, where: Places, spread: Spread, before_BD: Optional[Array]) -> tuple[Array, Array]:
        slots = spread.carried.shape[1]
        first_BD = jnp.zeros_like(spread.carried[:, 0]) if before_BD is None else before_BD
        carried_BSD = jnp.concatenate([first_BD[:, None], spread.carried], axis=1)
        known_BT = (where.slot_BT < slots) & (where.slot_BT >= (0 if before_BD is None else -1))
        wide_BTD = x_BTD.astype(jnp.float32)
        others_BTD = spread.kept * wide_BTD + at(carried_BSD, jnp.where(known_BT, where.slot_BT + 1, 0))
        own_BTD = at(spread.own, jnp.where(where.anchor_BT, where.slot_BT, slots))
        y_BTD = jnp.where(where.anchor_BT[..., None], own_BTD, others_BTD)
        y_BTD = jnp.where(known_BT[..., None], y_BTD, wide_BTD)
        last_B = where.anchor_BT.sum(-1, keepdims=True)
        return y_BTD.astype(x_BTD.dtype), at(carried_BSD, last_B)[:, 0]

    whole: Any = P()
    in_slots: Any = Spread(own=ROWS, carried=ROWS, kept=whole)
    specs = (ROWS, ROWS, in_slots, ROWS)
    return on_each_device(local, specs, (ROWS, ROWS))(x_BTD, where, spread, before_BD)


def _report(batch: Batch, where: Places) -> SequenceReport:
    count = lambda true: true.sum(dtype=jnp.int32)  # noqa: E731
    return SequenceReport(
        tokens=count(batch.segments > 0),
        anchors=count(where.anchor_BT),
        unplaced=count(where.unplaced_BT),
        slots=jnp.asarray(where.token_BS.size, jnp.int32),
    )
