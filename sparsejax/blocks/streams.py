"""What every residual of K streams has in common: its settings, and what a layer does with its streams.

A kind of residual says by its `Mixer` how the coefficients of `ops.streams.updated` come about. The block inside is
that of the layer pattern and sees one stream of width D: what it costs, and its cache, are those of the plain model."""

import abc
import dataclasses
from dataclasses import dataclass
from typing import Literal, Optional

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sparsejax.base.cost import Cost
from sparsejax.base.errors import ConfigError
from sparsejax.base.sharding import BATCH_AXES
from sparsejax.base.structs import struct
from sparsejax.blocks.context import BlockCache, BlockOutput, Context
from sparsejax.blocks.stream_ends import Collapse, OneEnd, Spread, StreamEnds
from sparsejax.blocks.stream_report import stream_report
from sparsejax.nn.backbone import Backbone
from sparsejax.nn.linear import Linear
from sparsejax.ops.streams import Streams, added, updated

Active = int | Int[Array, ""]
"""The stream that a layer computes on: a number that the compiler knows, where all layers of a position agree on it."""


@struct
class Prediction:
    """What a layer knows before its block has run; the coefficients are those of `ops.streams.updated`."""

    u: Float[Array, "B T D"]  # what the block computes on
    transition: Float[Array, "K K *BT"]
    expected: Float[Array, "K *BT"]
    gain: Float[Array, "K *BT"]  # unless it depends on what the block finds (`Mixer.gain`)


class Mixer(nnx.Module, abc.ABC):
    """The coefficients of one layer."""

    @abc.abstractmethod
    def predict(self, streams: Streams, active: Active) -> Prediction: ...

    def gain(self, prediction: Prediction, y_BTD: Float[Array, "B T D"]) -> Float[Array, "K *BT"]:
        """How much each stream takes of what the block found."""
        return prediction.gain


class Residual:
    """A config's description of the residual: the base of the frozen dataclasses in `blocks.RESIDUALS`."""

    def around(self, block: nnx.Module, key: PRNGKeyArray, backbone: Backbone, layers: tuple[int, ...]) -> nnx.Module:
        """`block` joined to the residual, as the layers with these numbers use it."""
        return block

    def ends(self, key: PRNGKeyArray, backbone: Backbone) -> OneEnd:
        """Where it begins and ends."""
        return OneEnd()

    @property
    def count(self) -> int:
        """K: streams that there are."""
        return 1

    def costs(self, backbone: Backbone) -> dict[str, Cost]:
        """Component → cost of what comes to each layer."""
        return {}

    def end_costs(self, backbone: Backbone) -> dict[str, Cost]:
        """Component → cost of what comes to the model's two ends."""
        return {}

    def table_width(self, d_model: int) -> int:
        """Width of the embedding table's rows."""
        return d_model

    def head_width(self, d_model: int) -> int:
        """Width of what the output head reads."""
        return d_model

    def norm_width(self, d_model: int) -> int:
        """Width of the final norm."""
        return self.head_width(d_model)

    def check_tied(self) -> None:
        """Raises `ConfigError` unless the embedding table can be the output head."""

    def check_training(self, num_layers: int) -> None:
        """Raises `ConfigError` when training could never tell some of the streams apart."""


@dataclass(frozen=True, kw_only=True)
class OneStream(Residual):
    """The plain residual: x + f(x)."""


@dataclass(frozen=True, kw_only=True)
class StreamSettings(Residual, abc.ABC):
    """What all residuals of several streams can be told. At first every stream is the plain model's hidden state."""

    streams: int = 2  # K
    select: Literal["same", "alternating", "random"] = "alternating"  # the stream that a layer computes on: 0, ℓ mod K…
    seed: int = 0  # of select=random, which is drawn once for each layer
    embedding: Spread = "recycled"  # one row of width D for all streams, of width K · D, or D and a matrix for each
    collapse: Collapse = "mean"  # of the streams into what the head reads
    final_norm: Literal["collapsed", "each_stream"] = "collapsed"  # of what is left after that, or of each before

    def __post_init__(self):
        if self.streams < 1:
            raise ConfigError("streams", f"{self.streams} is not positive")

    def unused(self) -> dict[str, str]:
        if self.streams == 1:
            return dict.fromkeys(("select", "seed", "embedding", "collapse", "final_norm"), "there is but one stream")
        return {} if self.select == "random" else {"seed": f"select={self.select} draws nothing"}

    @property
    def count(self) -> int:
        return self.streams

    def active(self, layer: int) -> int:
        """The stream that layer number `layer` of the model computes on."""
        if self.select == "random":
            return int(np.random.default_rng((self.seed, layer)).integers(self.streams))
        return layer % self.streams if self.select == "alternating" else 0

    @abc.abstractmethod
    def mixer(self, key: PRNGKeyArray, backbone: Backbone) -> Mixer:
        """The coefficients of one layer."""

    @property
    def begins_symmetric(self) -> bool:
        """Whether the coefficients of all streams that are not active begin equal."""
        return True

    def around(self, block, key, backbone, layers):
        return StreamedBlock(block, self.mixer(key, backbone), tuple(map(self.active, range(max(layers) + 1))), layers)

    def ends(self, key, backbone):
        norm_each = self.final_norm == "each_stream"
        return StreamEnds(key, backbone, self.streams, self.embedding, self.collapse, norm_each)

    def end_costs(self, backbone):
        matrices = (self.streams - 1) * [self.embedding, self.collapse].count("projected")
        return {"stream_projections": Cost.of_matrices(matrices * backbone.d_model**2)} if matrices else {}

    def table_width(self, d_model: int) -> int:
        return d_model * (self.streams if self.embedding == "wide" else 1)

    def head_width(self, d_model: int) -> int:
        return d_model * (self.streams if self.collapse == "concatenate" else 1)

    def norm_width(self, d_model: int) -> int:
        return d_model if self.final_norm == "each_stream" else self.head_width(d_model)

    def check_tied(self) -> None:
        if self.table_width(1) != self.head_width(1):
            wide = self.embedding == "wide"
            raise ConfigError(
                "collapse",
                f"{self.collapse} with embedding={self.embedding}: the head would be "
                f"{'narrower' if wide else 'wider'} than the embedding table that it is tied to; "
                f"set collapse={'concatenate' if wide else 'mean'}, or model.tied_head=false",
            )

    def check_training(self, num_layers: int) -> None:
        active = set(map(self.active, range(num_layers)))
        plain_ends = self.embedding == "recycled" and self.collapse in ("mean", "sum")
        if self.streams - len(active) > 1 and plain_ends and self.begins_symmetric:
            raise ConfigError(
                "streams",
                f"{self.streams} would never be more than {len(active) + 1}: with embedding={self.embedding}, "
                f"collapse={self.collapse} and {len(active)} active (select={self.select}, {num_layers} layers), the "
                "others begin as copies and get equal gradients in every step; use select=alternating in no fewer "
                f"layers than streams, embedding=wide, or streams={len(active) + 1}",
            )


def coefficients_of(key: PRNGKeyArray, d_model: int, numbers: int, stddev: float) -> Linear:
    """From a token's vector to so many coefficients, in float32."""
    spec = P(BATCH_AXES, None, None)
    made = {"stddev": stddev, "out_spec": spec, "dtype": "float32", "group": "stream"}
    return Linear(key, "btd,dn->btn", (d_model, numbers), ("embed", None), **made)


class StreamedBlock(nnx.Module):
    """A block whose input and output are K streams, and which computes on one."""

    def __init__(self, block: nnx.Module, mixer: Mixer, active: tuple[int, ...], layers: tuple[int, ...]):
        """`active`: stream of each layer of the model; `layers`: the numbers of those that use this block."""
        self.block, self.mixer = block, mixer
        of_these = {active[layer] for layer in layers}
        self.active = of_these.pop() if len(of_these) == 1 else active

    def __call__(self, streams: Streams, context: Context, cache: Optional[BlockCache] = None) -> BlockOutput:
        active = self.active if isinstance(self.active, int) else jnp.asarray(self.active)[context.layer]
        with jax.named_scope("predict"):
            prediction = self.mixer.predict(streams, active)
        out = self.block(prediction.u, context, cache)
        with jax.named_scope("correct"):
            gain = self.mixer.gain(prediction, out.x)
            coefficients = (prediction.transition, gain, prediction.expected)
            new = updated(streams, out.x, *coefficients)
            for after, delta_BTD in out.aside.items():
                new = added(new, delta_BTD, (active + after) % len(new))
        report = out.report
        if context.mode != "generate":
            own = stream_report(streams, new, out.x, *coefficients, mask_BT=context.batch.segments > 0)
            report = dataclasses.replace(report, streams=own)
        return dataclasses.replace(out, x=new, report=report, aside={})
