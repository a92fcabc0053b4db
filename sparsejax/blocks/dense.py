"""The dense block: every token through one feed-forward network."""

from dataclasses import dataclass
from typing import Any, Optional

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from sparsejax.base.cost import Cost
from sparsejax.base.errors import ConfigError, RequestError
from sparsejax.base.ratios import neuron_ratios
from sparsejax.base.reports import NeuronReport, Report
from sparsejax.blocks.context import Context, Mode
from sparsejax.blocks.moe import MoESpec
from sparsejax.blocks.one_domain import network_of_domain
from sparsejax.blocks.residual import TransformerBlock
from sparsejax.blocks.spec import BlockSpec
from sparsejax.blocks.upcycling import Arrays, copied
from sparsejax.nn.backbone import Backbone
from sparsejax.nn.mlp import MLP, ffn_weights, ffn_width
from sparsejax.ops.ffn import Activation


@dataclass(frozen=True, kw_only=True)
class DenseSpec(BlockSpec):
    """Config of a dense block."""

    d_ff: Optional[int] = None  # None: 4 · d_model
    gated: bool = False
    activation: Activation = "gelu"
    of_domain: Optional[int] = None  # with --init-from: the domain whose experts of that run it is made of
    active: Optional[float] = None  # share of neurons that are not silent, of normally distributed ones; None: all

    def __post_init__(self):
        if self.active is not None and not 0 < self.active < 1:
            raise ConfigError("active", f"{self.active} is outside (0, 1); none: all neurons")
        if self.of_domain is not None and self.of_domain < 0:
            raise ConfigError("of_domain", f"{self.of_domain} is negative; none: begin with a dense network")
        if self.d_ff is not None and self.d_ff < 1:
            raise ConfigError("d_ff", f"{self.d_ff} is not positive")

    @property
    def checkpoint_names(self) -> tuple[str, ...]:
        return ("attention", "mlp")

    def build(self, key: PRNGKeyArray, backbone: Backbone) -> TransformerBlock:
        attention_key, mlp_key = jax.random.split(key)
        kind = {"gated": self.gated, "activation": self.activation, "active": self.active}
        mlp = MLP(mlp_key, backbone, ffn_width(backbone, self.d_ff), **kind)
        return TransformerBlock(attention_key, backbone, DenseFeedForward(mlp))

    def check_some_tokens(self) -> None:
        pass  # every token by itself

    def costs(self, backbone: Backbone) -> dict[str, Cost]:
        return {"mlp": Cost.of_matrices(ffn_weights(backbone, ffn_width(backbone, self.d_ff), self.gated))}

    def of_beginning(self) -> dict[str, Any]:
        return {} if self.of_domain is None else {"of_domain": self.of_domain}

    def continued(self, fresh: Arrays, trained: Arrays, before: BlockSpec) -> dict[str, Array]:
        """From a mixture of experts by domain, the experts of one domain."""
        if self.of_domain is None or not isinstance(before, MoESpec):
            return copied(fresh, trained)
        if before.activation != self.activation:
            raise RequestError(f"its activation is {before.activation}, not {self.activation}")
        return copied(fresh, network_of_domain(trained, before, self.of_domain))

    def metrics(self, report: Report, mode: Mode) -> dict[str, float]:
        return {} if report.neurons is None else neuron_ratios(report.neurons)

    def splits(self, backbone: Backbone) -> dict[str, tuple[int, str]]:
        return {"d_ff": (ffn_width(backbone, self.d_ff), "mlp")}


class DenseFeedForward(nnx.Module):
    """An MLP behind the interface that conditional parts share. Its silent neurons are computed all the same."""

    def __init__(self, mlp: MLP):
        self.mlp = mlp

    def __call__(
        self, x_BTD: Float[Array, "B T D"], context: Context
    ) -> tuple[Float[Array, "B T D"], Optional[NeuronReport]]:
        up = self.mlp.up(x_BTD)
        y_BTD = checkpoint_name(self.mlp.down(up), "mlp")
        if self.mlp.active is None:
            return y_BTD, None
        real_BT = context.batch.segments > 0
        active_sum = jnp.sum(jnp.where(real_BT, self.mlp.active_share(up), 0))
        return y_BTD, NeuronReport(tokens=real_BT.sum(dtype=jnp.int32), active_sum=active_sum)
