"""Conditional computation on one backbone, one trainer and one ledger, from one config.

Nothing is imported until it is used, so that `python -m sparsejax --help` answers at once.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsejax.base.config import choose as choose
    from sparsejax.base.config_tree import Node

__version__ = "0.1.0"


def default_config() -> "Node":
    """The default experiment as a locked ConfigDict, for a config file's `get_config` to edit and return."""
    from sparsejax.base.config import to_config_dict
    from sparsejax.train.config import ExperimentConfig

    return to_config_dict(ExperimentConfig())


def __getattr__(name: str) -> Any:
    if name == "choose":
        from sparsejax.base.config import choose

        return choose
    raise AttributeError(f"module 'sparsejax' has no attribute {name!r}")
