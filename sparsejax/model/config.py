"""Config of a whole model: the shared dimensions, the layer pattern, and named block specs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Optional

from sparsejax.base.errors import ConfigError, did_you_mean
from sparsejax.base.registry import choice, choices
from sparsejax.blocks import BLOCKS, HALTINGS, RESIDUALS, SELECTIONS, SEQUENCES, SKIMS
from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.halting import HaltingSpec
from sparsejax.blocks.moe import MoESpec
from sparsejax.blocks.skim import Skim
from sparsejax.blocks.spec import BlockSpec
from sparsejax.blocks.streams import Residual
from sparsejax.blocks.tokens import EveryToken, Tokens
from sparsejax.memory.config import MEMORIES, MemorySpec
from sparsejax.model.exits import EXITS, Exits
from sparsejax.model.heads import HEADS, HeadSpec
from sparsejax.model.some_tokens import check_some_tokens, names
from sparsejax.nn.backbone import Backbone

Remat = Literal["none", "full", "dots", "names"]


EMBEDDING = "embedding"
"""The position of what comes before all blocks."""


class NamedSpecs(dict[str, Any]):
    """Specs by name; hashable, so that a config can be a static argument of `jax.jit`."""

    def __hash__(self):  # type: ignore[override]
        return hash(tuple(self.items()))


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One block of the model: its place in the depth, its spec's name, and where its report is found."""

    index: int
    block: str
    position: str  # key of the reports
    repeat: Optional[int]  # index into a stacked report; None where it is not stacked

    @property
    def name(self) -> str:
        return f"{self.index:02d}_{self.block}"


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Backbone):
    """prefix, then `repeats` times the pattern, then suffix; each name in them is a key of `blocks`."""

    vocab_size: int = 256
    prefix: tuple[str, ...] = ()
    pattern: tuple[str, ...] = ("dense", "moe")
    repeats: int = 2
    tied_repeats: bool = False  # all repeats have the same parameters (Universal Transformer, arXiv:1807.03819)
    suffix: tuple[str, ...] = ()
    blocks: Mapping[str, BlockSpec] = choices(BLOCKS, dense=DenseSpec(), moe=MoESpec())
    memory: Mapping[str, MemorySpec] = choices(MEMORIES)  # lookup layers by name, each in the blocks that it names
    streams: Residual = choice(RESIDUALS, "none")  # of the residual; none: the plain one
    sequence: Tokens = choice(SEQUENCES, "none")  # layers that compute on every k-th token of a row; none: on all
    select: Tokens = choice(SELECTIONS, "none")  # layers that compute on tokens chosen for them; none: on all
    skim: Skim = choice(SKIMS, "none")  # tokens that leave on the way; none: no token does
    halting: HaltingSpec = choice(HALTINGS, "none")  # tokens that stop at some layer; none: no token does
    head: HeadSpec = choice(HEADS, "tokens")  # what is scored
    exits: Exits = choice(EXITS, "none")  # output heads after some of the layers
    layer_dropout: float = 0.0  # rows that skip the last layer in training; of those before, exponentially fewer do
    tied_head: bool = True  # the output head is the embedding table
    logit_soft_cap: Optional[float] = None  # c · tanh(logits / c)
    scan: bool = True  # compile the pattern once and scan over repeats; False unrolls, with the same parameters
    remat: Remat = (
        "none"  # recompute in the backward pass: nothing, all, all but matrix products, all but `remat_names`
    )
    remat_names: tuple[str, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "blocks", NamedSpecs(self.blocks))
        object.__setattr__(self, "memory", NamedSpecs(self.memory))
        self._check_pattern()
        self._check_remat()
        self._check_blocks()
        self._check_memory()
        self._check_streams()
        check_some_tokens(self)
        self._check_tied_repeats()
        self._check_hands_on()
        if self.vocab_size < 2:
            raise ConfigError("vocab_size", f"{self.vocab_size} is less than 2")
        if self.logit_soft_cap is not None and self.logit_soft_cap <= 0:
            raise ConfigError("logit_soft_cap", f"{self.logit_soft_cap} is not positive")

    def _check_pattern(self) -> None:
        for where in ("prefix", "pattern", "suffix"):
            for name in getattr(self, where):
                if name not in self.blocks:
                    known = ", ".join(sorted(self.blocks))
                    raise ConfigError(
                        where, f"no block {name!r} in model.blocks; known: {known}.{did_you_mean(name, self.blocks)}"
                    )
        if self.repeats < 0:
            raise ConfigError("repeats", f"{self.repeats} is negative")
        if self.num_layers == 0:
            raise ConfigError("pattern", "the model has no layers: prefix, pattern × repeats and suffix are all empty")

    def _check_remat(self) -> None:
        if self.remat == "names" and not self.remat_names:
            raise ConfigError(
                "remat_names", "is empty, but remat=names keeps what it names; set names, or remat=full to keep nothing"
            )
        known = sorted({name for layer in self.layers for name in self.blocks[layer.block].checkpoint_names})
        for name in self.remat_names:
            if name not in known:
                raise ConfigError(
                    "remat_names",
                    f"{name!r} matches nothing in this model; known: {', '.join(known)}.{did_you_mean(name, known)}",
                )

    def _check_blocks(self) -> None:
        for name in dict.fromkeys(layer.block for layer in self.layers):
            try:
                self.blocks[name].check_backbone(self)
                if self.causal:
                    self.blocks[name].check_causal()
            except ConfigError as error:
                raise error.below(f"blocks.{name}") from None

    def _check_memory(self) -> None:
        for name, spec in self.memory.items():
            for block in spec.blocks:
                if block not in self.blocks:
                    known = ", ".join(sorted(self.blocks))
                    message = f"no block {block!r} in model.blocks; known: {known}.{did_you_mean(block, self.blocks)}"
                    raise ConfigError(f"memory.{name}.blocks", message)
                if block not in self.positions.values():
                    raise ConfigError(f"memory.{name}.blocks", f"no layer of prefix, pattern or suffix is a {block!r}")
                if spec.place == "parallel" and not self.blocks[block].has_network:
                    message = f"parallel, but {block} has no feed-forward network to be beside; allowed: after"
                    raise ConfigError(f"memory.{name}.place", message)
            try:
                spec.check(self, self.vocab_size)
            except ConfigError as error:
                raise error.below(f"memory.{name}") from None

    def memories_at(self, position: str) -> dict[str, MemorySpec]:
        """The memories of the layers at a position, by name."""
        if position == EMBEDDING:
            return {name: spec for name, spec in self.memory.items() if spec.place == EMBEDDING}
        block = self.positions[position]
        return {name: spec for name, spec in self.memory.items() if block in spec.blocks}

    @property
    def memory_positions(self) -> tuple[str, ...]:
        """Where there are memories."""
        return tuple(position for position in (EMBEDDING, *self.positions) if self.memories_at(position))

    def _check_streams(self) -> None:
        if self.ties_head:
            try:
                self.streams.check_tied()
            except ConfigError as error:
                raise error.below("streams") from None
        for name, spec in self.memory.items():
            try:
                spec.check_streams(self.streams.count)
            except ConfigError as error:
                raise error.below(f"memory.{name}") from None
        if self.streams.table_width(self.d_model) == self.d_model:
            return
        for name, spec in self.memory.items():
            if spec.place == EMBEDDING:
                message = f"{EMBEDDING} with streams.embedding=wide: a memory adds to rows of width d_model"
                raise ConfigError(f"memory.{name}.place", message)
            if spec.consume.reads_embedding:
                message = "it reads the embedding, which is wider than d_model with streams.embedding=wide"
                raise ConfigError(f"memory.{name}.consume", f"{message}; allowed: embedding=recycled or projected")

    def _check_tied_repeats(self) -> None:
        for block in dict.fromkeys(self.pattern) if self.tied_repeats else ():
            if self.blocks[block].has_router or any(block in spec.blocks for spec in self.memory.values()):
                message = f"true, but {block!r} has a router or a memory, whose state is that of one layer"
                raise ConfigError("tied_repeats", f"{message}; allowed in the pattern: dense blocks")

    def _check_hands_on(self) -> None:
        adding = {name: self.blocks[name].hands_on for name in self.positions.values() if self.blocks[name].hands_on}
        for name, count in adding.items():
            key = f"blocks.{name}.router.residual"
            if count != self.hands_on:
                first = next(iter(adding))
                told = (
                    f"true, with {count} logits, and {first} has {self.hands_on}; allowed: as many in all such layers"
                )
                raise ConfigError(key, told)
            if self.layer_dropout or self.tokens_of(name) != EveryToken():
                raise ConfigError(key, "true: a token's layers hand it on; it goes with all tokens in all layers")

    @property
    def hands_on(self) -> int:
        """How many logits a router hands to the one above it; 0: none."""
        return next(
            (self.blocks[layer.block].hands_on for layer in self.layers if self.blocks[layer.block].hands_on), 0
        )

    def tokens_of(self, block: str) -> Tokens:
        """On which tokens the layers with this block spec compute."""
        return next((tokens for tokens in (self.sequence, self.select) if names(tokens, block)), EveryToken())

    @property
    def generates(self) -> bool:
        return self.causal and self.head.of_tokens

    @property
    def ties_head(self) -> bool:
        return self.tied_head and self.head.of_tokens

    @property
    def num_layers(self) -> int:
        return len(self.prefix) + len(self.pattern) * self.repeats + len(self.suffix)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every block of the model, from input to output."""
        places = [(name, f"prefix_{i}", None) for i, name in enumerate(self.prefix)]
        places += [(name, f"pattern_{i}", r) for r in range(self.repeats) for i, name in enumerate(self.pattern)]
        places += [(name, f"suffix_{i}", None) for i, name in enumerate(self.suffix)]
        return tuple(Layer(index=n, block=name, position=where, repeat=r) for n, (name, where, r) in enumerate(places))

    def stored(self, layer: Layer) -> Optional[int]:
        """Index of a layer into stacked parameters; None where they are not stacked."""
        return 0 if self.tied_repeats and layer.repeat is not None else layer.repeat

    @property
    def positions(self) -> dict[str, str]:
        """Report key → block name, each once."""
        return {layer.position: layer.block for layer in self.layers}

    def unused(self) -> dict[str, str]:
        reasons = {}
        if not self.head.of_tokens:
            reasons["tied_head"] = "the embedding scores tokens, not classes"
        if self.remat != "names":
            reasons["remat_names"] = f"remat={self.remat}; names count only with remat=names"
        if not self.pattern:
            reasons["repeats"] = "the pattern is empty"
        if not self.pattern or self.repeats == 0:
            reasons["scan"] = "there is no repeated pattern"
        if not self.pattern or self.repeats < 2:
            reasons["tied_repeats"] = "nothing is repeated"
        if not self.causal:
            accepting = [
                *(f"blocks.{name}{part}" for name in self.blocks for part in ("", ".router")),
                "sequence",
                "select",
            ]
            reasons |= {f"{path}.allow_leak": "causal=false: tokens see those after them" for path in accepting}
        adding = [layer.block for layer in self.layers if self.blocks[layer.block].hands_on]
        if len(adding) == 1:
            reasons[f"blocks.{adding[0]}.router.residual"] = "there is no such layer below"
        used = {layer.block for layer in self.layers}
        reasons |= {
            f"blocks.{name}": "no layer of prefix, pattern or suffix uses it"
            for name in self.blocks
            if name not in used
        }
        return reasons
