"""Axis 6, balance: what keeps the load even. Each is 1.0 at perfect balance before its coefficient."""

from dataclasses import dataclass
from typing import Literal, Protocol

from sparsejax.base.errors import ConfigError
from sparsejax.base.registry import Registry

Scope = Literal["sequence", "device", "microbatch", "global"]


class Balance(Protocol):
    @property
    def coefficient(self) -> float: ...

    @property
    def scope(self) -> Scope: ...


@dataclass(frozen=True, kw_only=True)
class NoBalance:
    """No pressure; the balance of the whole batch is still measured."""

    @property
    def coefficient(self) -> float:
        return 0.0

    @property
    def scope(self) -> Scope:
        return "microbatch"


@dataclass(frozen=True, kw_only=True)
class LoadBalance:
    """E/k · Σ_e f_e · P_e over the tokens of one unit, averaged over units (Switch, arXiv:2101.03961, eq. 4, for any
    k).

    The narrower the unit, the more the loss forbids experts to specialise: a row (`sequence`), what one device holds
    of a microbatch (`device`), a microbatch, or the tokens of the whole step (`global`). `sequence` and `global` do
    not depend on mesh or accumulation; with accumulation `global` costs one more forward pass, in which the loads are
    counted."""

    coefficient: float = 0.01
    scope: Scope = "global"

    def __post_init__(self):
        if self.coefficient <= 0:
            raise ConfigError(
                "coefficient", f"{self.coefficient} is not positive; for no balance loss choose balance = 'none'"
            )


BALANCES = Registry("balance", {"load_balance": LoadBalance, "none": NoBalance})
