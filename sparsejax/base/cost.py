"""What a component costs, in parameters, FLOPs and bytes, known from a config alone."""

import dataclasses
from dataclasses import dataclass

CONVENTION = "2 per multiply-add of matrix products, (T + 1) / 2 keys if causal, training thrice the forward pass"
"""How FLOPs are counted. Runs that recorded another one do not compare by FLOPs."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one component. `active` are the parameters that a token's forward pass uses: k of E experts, all else whole.

    FLOPs are 2 × the multiply-adds of matrix products, forward: `per_token` for every token, `per_key` for every key
    that a query attends to, `routed` for a token all of whose k pairs are processed, `per_row` for what experts,
    or a head of classes, do once for a row of the batch, however long it is. An embedding table counts whole among the
    active parameters, as is usual, though a token reads one row of it; of a memory's table the rows that a token looks
    up count.

    `gathered` are bytes of table rows that one token's forward pass fetches."""

    parameters: int = 0
    active: int = 0
    per_token: float = 0
    per_key: float = 0
    routed: float = 0
    per_row: int = 0
    gathered: float = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(**{name: getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__})

    def again(self) -> "Cost":
        """Of the same parameters in one more place."""
        return dataclasses.replace(self, parameters=0, active=0)

    def every_kth(self, k: float) -> "Cost":
        """Of the same parameters when they see every k-th token alone, and those only each other."""
        return self.of_some(1 / k, 1 / k**2)

    def of_some(self, tokens: float, pairs: float) -> "Cost":
        """Of the same parameters when they see this part of the tokens alone, and of the pairs of them."""
        less = {name: getattr(self, name) * tokens for name in ("per_token", "routed", "gathered")}
        return dataclasses.replace(self, **less, per_key=self.per_key * pairs)

    def flops(self, keys: float, row_length: float) -> float:
        """Of one token that attends to `keys` keys in every layer, forward, none of its pairs being dropped; with its
        part of what is done for a row of `row_length` tokens."""
        return self.per_token + keys * self.per_key + self.routed + self.per_row / row_length

    @staticmethod
    def of_matrices(weights: int) -> "Cost":
        """Of matrices that every token is multiplied with."""
        return Cost(parameters=weights, active=weights, per_token=2 * weights)
