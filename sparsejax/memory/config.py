"""The lookup layer's config: one point of the grid, what goes with what, and what it costs."""

from dataclasses import dataclass
from typing import Literal

from sparsejax.base.cost import Cost
from sparsejax.base.errors import ConfigError
from sparsejax.base.registry import Registry, choice
from sparsejax.memory.address import Address
from sparsejax.memory.addresses import ADDRESSES
from sparsejax.memory.consume import Consume
from sparsejax.memory.consumes import CONSUMES
from sparsejax.memory.contents import CONTENTS, Content, KeyValues, Part
from sparsejax.nn.backbone import Backbone
from sparsejax.nn.table import Storage

Place = Literal["before_attention", "before_feed_forward", "parallel", "after", "embedding"]

ROW_BYTES = 4
"""Of one number of a table: float32."""


@dataclass(frozen=True, kw_only=True)
class MemorySpec:
    """One lookup layer, in some of the model's blocks. The default adds a vector by token id."""

    address: Address = choice(ADDRESSES, "token_id")
    content: Content = choice(CONTENTS, "vector")
    consume: Consume = choice(CONSUMES, "add")
    blocks: tuple[str, ...] = ()  # names in model.blocks; none goes with place=embedding
    place: Place = "before_feed_forward"  # parallel: beside the feed-forward network, on its input
    streams: tuple[int, ...] = (0,)  # of model.streams that it is added to, counted from the one a layer computes on
    shared: bool = False  # one table for all its layers
    storage: Storage = "replicated"  # split by rows or features over the devices, or kept in the host's memory

    def __post_init__(self):
        content, consume = CONTENTS.name_of(self.content), CONSUMES.name_of(self.consume)
        if self.content.kind not in self.consume.accepts:
            fit = ", ".join(name for name, entry in CONTENTS.items() if entry.kind in self.consume.accepts)
            raise ConfigError("consume", f"{consume} does not go with content={content}; it goes with content={fit}")
        if self.place == "embedding" and self.blocks:
            raise ConfigError("blocks", f"place=embedding is in no block; allowed: (), not {self.blocks}")
        if not self.streams or min(self.streams) < 0 or list(self.streams) != sorted(set(self.streams)):
            raise ConfigError("streams", f"{self.streams} are not ascending numbers ≥ 0; allowed: (1,) or the like")
        if self.place == "embedding" and self.streams != (0,):
            raise ConfigError("streams", f"{self.streams} with place=embedding, where there is but one; allowed: (0,)")
        if self.storage == "host" and self.address.known_at != "input":
            early = ", ".join(name for name, entry in ADDRESSES.items() if entry.known_at == "input")
            late = f"address={ADDRESSES.name_of(self.address)} is known in the layer alone"
            raise ConfigError("storage", f"host needs addresses known from the input ({early}); {late}")

    def check(self, backbone: Backbone, vocab_size: int) -> None:
        """Raises `ConfigError` when it is nowhere in the model or does not go with its widths."""
        if self.place != "embedding" and not self.blocks:
            raise ConfigError("blocks", f"place={self.place} is in blocks of the model, but none is named")
        try:
            self.address.check(backbone, vocab_size)
        except ConfigError as error:
            raise error.below("address") from None
        if isinstance(self.content, KeyValues) and self.content.over == "token" and self.address.lookups == 1:
            raise ConfigError("content.over", "token, but a token looks up one row alone; allowed: row")
        rows, width = self.address.rows(vocab_size), self.value_width(backbone)
        if rows >= 2**31:
            raise ConfigError("address", f"{rows} rows are more than an int32 can number; allowed: less than {2**31}")
        if self.consume.full_width and width != backbone.d_model:
            name = CONSUMES.name_of(self.consume)
            raise ConfigError(
                "content", f"consume={name} adds what is looked up to d_model={backbone.d_model} numbers, not {width}"
            )

    def check_streams(self, streams: int) -> None:
        """Raises `ConfigError` unless a residual of so many streams has those that it is added to."""
        if max(self.streams) < streams:
            return
        message = f"{self.streams} reaches the {max(self.streams)}. stream after the one that a layer computes on"
        if streams == 1:
            raise ConfigError("streams", f"{message}, but there is no other; set model.streams=altup, or streams=(0,)")
        raise ConfigError("streams", f"{message}, but there are {streams}; allowed: 0 … {streams - 1}")

    def unused(self) -> dict[str, str]:
        return {"shared": "place=embedding is one layer"} if self.place == "embedding" else {}

    @property
    def own_norm(self) -> bool:
        """Whether its layers normalise their input themselves. In parallel they get that of the feed-forward network,
        and elsewhere there may be nothing that reads it."""
        reads = self.address.known_at == "layer" or self.content.reads_state or self.consume.reads_state
        return reads and self.place != "parallel"

    def rows(self, vocab_size: int) -> int:
        """Of the table."""
        return self.address.rows(vocab_size)

    def row_parts(self, backbone: Backbone) -> tuple[Part, ...]:
        """How a row of the table begins, part by part."""
        return self.content.parts(backbone, zero=not self.consume.starts_at_zero)

    def row_width(self, backbone: Backbone) -> int:
        return self.content.width(backbone)

    def value_width(self, backbone: Backbone) -> int:
        return self.content.value_width(backbone, self.address.lookups)

    def splits(self, backbone: Backbone) -> dict[str, int]:
        """Config field → size of what the mesh axis `tensor` must split evenly."""
        return {"content": self.value_width(backbone)} if self.consume.splits_value else {}

    def costs(self, backbone: Backbone, vocab_size: int, layers: int) -> dict[str, Cost]:
        """Component → cost of `layers` layers together. A table's padding is not counted."""
        lookups, width = self.address.lookups, self.row_width(backbone)
        fetched, stored = layers * lookups * width, (1 if self.shared else layers) * self.rows(vocab_size) * width
        learned, addressing = self.address.size(backbone)
        consumed, consuming = self.consume.size(backbone, self.value_width(backbone))
        consumed += backbone.d_model if self.own_norm else 0
        consuming += lookups * self.content.products(backbone)

        def each(parameters: int, products: int) -> Cost:
            size = layers * parameters
            return Cost(parameters=size, active=size, per_token=2 * layers * products)

        costs = {
            "memory_table": Cost(parameters=stored, active=min(fetched, stored), gathered=fetched * ROW_BYTES),
            "memory_address": each(learned, addressing),
            "memory_consume": each(consumed, consuming),
        }
        return {name: cost for name, cost in costs.items() if cost != Cost()}


MEMORIES = Registry("memory", {"lookup": MemorySpec})
