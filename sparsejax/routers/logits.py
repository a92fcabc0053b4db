"""Axis 1, logits: a token's vector → one float32 number per expert. What a router learns, it learns here."""

from typing import Protocol

from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from sparsejax.base.registry import Registry
from sparsejax.routers.candidates import Inputs, Traits
from sparsejax.routers.document_logits import DomainLogits, SequenceLogits
from sparsejax.routers.projections import Cosine, Linear, Parameters, ProductKey
from sparsejax.routers.smooth_step import DSelectK


class Logits(Protocol):
    @property
    def traits(self) -> Traits: ...

    def init(self, key: PRNGKeyArray, d_model: int, num_experts: int) -> dict[str, nnx.Param]:
        """Its parameters by name."""
        ...

    def size(self, d_model: int, num_experts: int) -> tuple[int, int]:
        """(number of parameters, multiply-adds of one token's matrix products)."""
        ...

    def __call__(
        self, x_GSD: Float[Array, "G S D"], parameters: Parameters, inputs: Inputs, num_experts: int
    ) -> Float[Array, "G S E"]: ...


LOGITS = Registry(
    "logits",
    {
        "linear": Linear,
        "cosine": Cosine,
        "product_key": ProductKey,
        "by_domain": DomainLogits,
        "by_sequence": SequenceLogits,
        "dselect_k": DSelectK,
    },
)
