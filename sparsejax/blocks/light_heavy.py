"""Every token through a light branch, chosen ones through a heavy one as well: conditional computation of CoLT5
(arXiv:2303.09752), for encoders.

With the weights q, s and f of three choices (`blocks.soft_choice`) and h the normalised x

    x'_i = x_i + A_light(h_i, h) + q_i A_heavy(h_i, s h)      A_light sees tokens nearby, A_heavy those that s chose,
    y_i = x'_i + F_light(h'_i) + f_i F_heavy(h'_i)

and a weight is 0 where a token is not chosen. Heavy branches compute on chosen tokens alone (`compact`), or, equal in
value and gradient, on all of them (`masked`)."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, Optional

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sparsejax.base.cost import Cost
from sparsejax.base.errors import ConfigError
from sparsejax.base.reports import Report
from sparsejax.base.sharding import on_each_device
from sparsejax.base.structs import Batch
from sparsejax.blocks.context import BlockCache, BlockOutput, Context
from sparsejax.blocks.lookups import Lookups
from sparsejax.blocks.soft_choice import Chosen, SoftChoice, SoftChooser, check_share, heavy_report, slots
from sparsejax.blocks.spec import BlockSpec
from sparsejax.blocks.tokens import ROWS
from sparsejax.nn.attention import Attention
from sparsejax.nn.backbone import Backbone, branch
from sparsejax.nn.linear import RMSNorm
from sparsejax.nn.mlp import MLP, ffn_weights, ffn_width
from sparsejax.ops.anchors import at
from sparsejax.ops.attention import keys_nearby
from sparsejax.ops.ffn import Activation
from sparsejax.ops.selection import last_until, put


@dataclass(frozen=True, kw_only=True)
class LightHeavySpec(SoftChoice, BlockSpec):
    """Config of a block with light and heavy branches."""

    capacity: float = 0.125  # share of a row's tokens that the heavy network computes on
    query_capacity: float = 0.125  # share that heavy attention computes on
    key_capacity: float = 0.25  # share that those attend to
    light_heads: Optional[int] = None  # of num_heads, the others being heavy; None: a quarter of them, at least one
    radius: int = 32  # tokens that light attention sees on each side
    light_d_ff: Optional[int] = None  # hidden width of the light network; None: d_model / 2
    d_ff: Optional[int] = None  # hidden width of the heavy network; None: 4 · d_model
    gated: bool = False
    activation: Activation = "gelu"
    execution: Literal["compact", "masked"] = "compact"  # masked: the same values, all tokens being computed

    def __post_init__(self):
        super().__post_init__()
        for name in ("capacity", "query_capacity", "key_capacity"):
            check_share(name, getattr(self, name))
        for name in ("light_heads", "radius", "light_d_ff", "d_ff"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(name, f"{value} is not positive")

    def check_backbone(self, backbone: Backbone) -> None:
        light = self.heads(backbone)[0]
        if light >= backbone.num_heads:
            message = f"{light} of num_heads={backbone.num_heads} leave none for heavy attention"
            raise ConfigError("light_heads", f"{message}; allowed: fewer, of two heads or more")
        if backbone.attention == "splash":
            raise ConfigError(
                "name", "splash attends over whole rows, a light_heavy block does not; allowed: auto, xla"
            )

    def check_cached(self) -> None:
        raise ConfigError("name", "tokens are chosen among whole rows, which generation lacks; train and evaluate it")

    @property
    def checkpoint_names(self) -> tuple[str, ...]:
        return ("attention", "mlp")

    def build(self, key: PRNGKeyArray, backbone: Backbone) -> "LightHeavyBlock":
        return LightHeavyBlock(key, backbone, self)

    def heads(self, backbone: Backbone) -> tuple[int, int]:
        """Of light and heavy attention."""
        light = max(backbone.num_heads // 4, 1) if self.light_heads is None else self.light_heads
        return light, backbone.num_heads - light

    def branches(self, backbone: Backbone) -> tuple[Backbone, Backbone]:
        """The dimensions of light and heavy attention. Each has the most key heads that divide its own and the
        model's."""
        light, heavy = (branch(backbone, n, math.gcd(n, backbone.kv_heads)) for n in self.heads(backbone))
        return light, heavy

    def widths(self, backbone: Backbone) -> tuple[int, int]:
        """Hidden widths of the light and the heavy network."""
        light = max(backbone.d_model // 2, 1) if self.light_d_ff is None else self.light_d_ff
        return light, ffn_width(backbone, self.d_ff)

    def seen(self, backbone: Backbone) -> int:
        """Tokens that light attention sees, itself among them."""
        return (1 if backbone.causal else 2) * self.radius + 1

    def costs(self, backbone: Backbone) -> dict[str, Cost]:
        (light, heavy), h = self.branches(backbone), backbone.width_of_head
        queries, keys = (2 * backbone.d_model * h * n for n in (heavy.num_heads, heavy.kv_heads))
        of_light = Cost.of_matrices(2 * backbone.d_model * h * (light.num_heads + light.kv_heads))
        some = lambda weights, share: Cost.of_matrices(weights).every_kth(1 / share)  # noqa: E731
        of_heavy = some(queries, self.query_capacity) + some(keys, self.key_capacity)
        light_mlp, heavy_mlp = (ffn_weights(backbone, d_ff, self.gated) for d_ff in self.widths(backbone))
        more = {"norm": Cost(parameters=2 * h, active=2 * h)} if backbone.qk_norm else {}  # of the second attention
        more |= {"selection": Cost.of_matrices(3 * backbone.d_model)} if self.by == "learned" else {}
        return more | {
            "attention_projections": of_light + of_heavy,
            "attention_scores": Cost(
                per_token=4 * h * light.num_heads * self.seen(backbone),
                per_key=4 * h * heavy.num_heads * self.query_capacity * self.key_capacity,
            ),
            "mlp": Cost.of_matrices(light_mlp) + some(heavy_mlp, self.capacity),
        }

    def padding_flops(self, backbone: Backbone, length: int) -> float:
        """Blocks of light attention have more keys than tokens see, and k is a whole number."""
        shares = {name: getattr(self, name) for name in ("capacity", "query_capacity", "key_capacity")}
        rounded = dataclasses.replace(self, **{name: slots(share, length) / length for name, share in shares.items()})
        keys = (length + 1) / 2 if backbone.causal else length
        of = lambda spec: sum(cost.flops(keys, length) for cost in spec.costs(backbone).values())  # noqa: E731
        computed = keys_nearby(length, self.radius, backbone.causal)
        if computed < length:
            computed *= -(-length // self.radius) * self.radius / length
        more = 4 * backbone.width_of_head * self.heads(backbone)[0] * (computed - self.seen(backbone))
        return of(rounded) - of(self) + more

    def splits(self, backbone: Backbone) -> dict[str, tuple[int, str]]:
        light, heavy = self.branches(backbone)
        widths = self.widths(backbone)
        heads = math.gcd(light.kv_heads, heavy.kv_heads)
        return {"light_heads": (heads, "kv_heads"), "light_d_ff": (widths[0], "mlp"), "d_ff": (widths[1], "mlp")}


class LightHeavyBlock(nnx.Module):
    """Three choices, two attentions, two networks."""

    def __init__(self, key: PRNGKeyArray, backbone: Backbone, spec: LightHeavySpec):
        keys, (light, heavy) = jax.random.split(key, 7), spec.branches(backbone)
        norm = lambda: RMSNorm(backbone.d_model, backbone.norm_epsilon)  # noqa: E731
        choose = lambda n, share: SoftChooser(keys[n], backbone, share, spec, n)  # noqa: E731
        self.query_chooser, self.key_chooser = choose(0, spec.query_capacity), choose(1, spec.key_capacity)
        self.attention_norm = norm()
        self.light_attention, self.heavy_attention = Attention(keys[3], light), Attention(keys[4], heavy)
        self.token_chooser = choose(2, spec.capacity)
        self.feed_forward_norm = norm()
        kind, (light_d_ff, d_ff) = {"gated": spec.gated, "activation": spec.activation}, spec.widths(backbone)
        self.light, self.heavy = MLP(keys[5], backbone, light_d_ff, **kind), MLP(keys[6], backbone, d_ff, **kind)
        self.memories = nnx.Dict()
        self.radius, self.compact = spec.radius, spec.execution == "compact"

    def __call__(
        self, x_BTD: Float[Array, "B T D"], context: Context, cache: Optional[BlockCache] = None
    ) -> BlockOutput:
        batch, lookups = context.batch, Lookups(self.memories, context, cache)
        x_BTD = lookups.at("before_attention", x_BTD)
        with jax.named_scope("attention"):
            h_BTD = self.attention_norm(x_BTD)
            queries, keys = self.query_chooser(h_BTD, context), self.key_chooser(h_BTD, context)
            nearby_BTD = self.light_attention.nearby(h_BTD, batch.positions, batch.segments, self.radius, self.compact)
            attend = self._heavy_attention if self.compact else self._masked_attention
            x_BTD = x_BTD + nearby_BTD + attend(h_BTD, queries, keys, batch)
        x_BTD = lookups.at("before_feed_forward", x_BTD)
        with jax.named_scope("feed_forward"):
            h_BTD = self.feed_forward_norm(x_BTD)
            tokens = self.token_chooser(h_BTD, context)
            heavy = self._heavy if self.compact else self._masked
            y_BTD = checkpoint_name(self.light(h_BTD), "mlp") + heavy(h_BTD, tokens)
        x_BTD = lookups.at("parallel", x_BTD, h_BTD) + y_BTD
        x_BTD = lookups.at("after", x_BTD)
        report = Report(
            memory=lookups.reports,
            heavy=heavy_report((queries, keys, tokens), batch.segments > 0),
            kept=tokens.chosen if context.record else None,
        )
        return BlockOutput(x=x_BTD, report=report, reads=lookups.reads, aside=lookups.aside)

    def _heavy_attention(
        self, h_BTD: Float[Array, "B T D"], queries: Chosen, keys: Chosen, batch: Batch
    ) -> Float[Array, "B T D"]:
        def local(h_BTD, positions_BT, segments_BT, queries, keys):
            q, k = queries.slots, keys.slots
            keys_BSD = weighted(at(keys.weight, k), at(h_BTD, k))
            of_queries = at(h_BTD, q), at(positions_BT, q), at(segments_BT, q)
            return *of_queries, keys_BSD, at(positions_BT, k), at(segments_BT, k, otherwise=-1), last_until(q, k)

        given = on_each_device(local, (ROWS,) * 5, (ROWS,) * 7)(h_BTD, batch.positions, batch.segments, queries, keys)
        return spread(self.heavy_attention.to_some(*given), queries, h_BTD)

    def _masked_attention(
        self, h_BTD: Float[Array, "B T D"], queries: Chosen, keys: Chosen, batch: Batch
    ) -> Float[Array, "B T D"]:
        order_BT = jnp.zeros_like(batch.positions) + jnp.arange(h_BTD.shape[1], dtype=jnp.int32)
        seen_BT: Int[Array, "B T"] = jnp.where(keys.chosen, batch.segments, -1)
        of_keys = weighted(keys.weight, h_BTD), batch.positions, seen_BT
        found = self.heavy_attention.to_some(h_BTD, batch.positions, batch.segments, *of_keys, order_BT)
        return weighted(queries.weight, found)

    def _heavy(self, h_BTD: Float[Array, "B T D"], tokens: Chosen) -> Float[Array, "B T D"]:
        (h_BKD,) = on_each_device(lambda h, slots: (at(h, slots),), (ROWS, ROWS), (ROWS,))(h_BTD, tokens.slots)
        return spread(checkpoint_name(self.heavy(h_BKD), "mlp"), tokens, h_BTD)

    def _masked(self, h_BTD: Float[Array, "B T D"], tokens: Chosen) -> Float[Array, "B T D"]:
        return weighted(tokens.weight, checkpoint_name(self.heavy(h_BTD), "mlp"))


def weighted(weight: Float[Array, "B S"], x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    """Each vector times its weight, float32 in between."""
    return (weight[..., None] * x.astype(jnp.float32)).astype(x.dtype)


def spread(out_BKD: Float[Array, "B K D"], chosen: Chosen, like_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """What was computed for chosen tokens, times their weights, in their places; zeros elsewhere."""

    def local(out_BKD: Array, chosen: Chosen, like_BTD: Array) -> tuple[Array]:
        out_BKD = weighted(at(chosen.weight, chosen.slots), out_BKD)
        return (put(jnp.zeros_like(like_BTD, out_BKD.dtype), out_BKD, chosen.slots),)

    return on_each_device(local, (ROWS,) * 3, (ROWS,))(out_BKD, chosen, like_BTD)[0]
