"""What goes with what in the config of a model whose tokens do not all go through all of its layers."""

from typing import TYPE_CHECKING, Optional

from sparsejax.base.errors import ConfigError, did_you_mean
from sparsejax.blocks import HALTINGS, SELECTIONS, SKIMS
from sparsejax.blocks.halting import TokenHalting
from sparsejax.blocks.recursion import Recursions
from sparsejax.blocks.skim import Skimming
from sparsejax.blocks.streams import OneStream
from sparsejax.blocks.tokens import EveryToken, Tokens

if TYPE_CHECKING:
    from sparsejax.model.config import ModelConfig


def check_some_tokens(config: "ModelConfig") -> None:
    """Raises `ConfigError` for a sequence, selection, skim, halting or exits that the model cannot have."""
    _check_tokens(config, "sequence", config.sequence)
    _check_tokens(config, "select", config.select)
    _check_apart(config)
    _check_recursions(config)
    _check_skim(config)
    _check_exits(config)
    _check_halting(config)


def names(tokens: Tokens, block: str) -> bool:
    """Whether layers with this block spec are to compute on some tokens alone."""
    return not isinstance(tokens, EveryToken) and (not tokens.blocks or block in tokens.blocks)


def _check_tokens(config: "ModelConfig", field: str, tokens: Tokens) -> None:
    if isinstance(tokens, EveryToken):
        return
    for name in tokens.blocks:
        if name not in config.positions.values():
            known = sorted(set(config.positions.values()))
            message = f"no layer of prefix, pattern or suffix is a {name!r}; known: {', '.join(known)}."
            raise ConfigError(f"{field}.blocks", message + did_you_mean(name, known))
    wrong = {name: reason for name in config.positions.values() if (reason := _not_shortened(config, name))}
    named = next((name for name in wrong if names(tokens, name)), None)
    if named is not None:
        fit = ", ".join(dict.fromkeys(name for name in config.positions.values() if name not in wrong)) or "none here"
        raise ConfigError(f"{field}.blocks", f"{named}: {wrong[named]}; blocks that can be named: {fit}")
    routed = next((n for n in config.positions.values() if names(tokens, n) and config.blocks[n].has_router), None)
    if tokens.needs_dense and routed is not None:
        raise ConfigError(f"{field}.blocks", f"{routed}: a layer with a router needs all tokens; name dense ones")
    if config.causal:
        try:
            tokens.check_causal()
        except ConfigError as error:
            raise error.below(field) from None


def _check_apart(config: "ModelConfig") -> None:
    both = next((n for n in config.positions.values() if names(config.sequence, n) and names(config.select, n)), None)
    if both is not None:
        message = f"{both} computes on every k-th token by model.sequence already; allowed: other blocks"
        raise ConfigError("select.blocks", message)


def _check_recursions(config: "ModelConfig") -> None:
    if not isinstance(config.select, Recursions):
        return
    name = SELECTIONS.name_of(config.select)
    own = [block for block in dict.fromkeys(config.positions.values()) if names(config.select, block)]
    around = (*config.prefix, *config.suffix) if config.pattern else ()  # unrolled, its recursions are in the prefix
    if not config.tied_repeats or len(own) != 1 or config.pattern not in ((own[0],), ()) or own[0] in around:
        message = (
            f"{name}: one block is its recursions; it goes with tied_repeats=true and a pattern of that block alone"
        )
        raise ConfigError("select", f"{message}, which no layer of prefix or suffix is (select.blocks names it)")
    if not isinstance(config.streams, OneStream) or config.exits.depths or config.layer_dropout:
        raise ConfigError("select", f"{name} goes with streams=none, exits=none and layer_dropout=0")
    if config.select.execution == "compact" and config.pattern and (config.scan or config.remat != "none"):
        message = "compact: every recursion has a shape of its own; it goes with scan=false and remat=none"
        raise ConfigError("select.execution", f"{message}, execution=masked with all")


def _check_skim(config: "ModelConfig") -> None:
    if not isinstance(config.skim, Skimming):
        return
    name = SKIMS.name_of(config.skim)
    if config.causal or config.head.of_tokens:
        message = f"{name}: tokens that leave have no scores; it goes with causal=false and head=classes"
        raise ConfigError("skim", message)
    plain = isinstance(config.streams, OneStream) and config.sequence == config.select == EveryToken()
    if not plain:
        raise ConfigError("skim", f"{name} goes with streams=none, sequence=none and select=none")
    if config.attention == "splash":
        raise ConfigError("attention", f"splash keeps no weights for skim={name} to read; allowed: auto, xla")
    for block in dict.fromkeys(config.positions.values()):
        if config.blocks[block].has_router or _not_shortened(config, block):
            raise ConfigError("skim", f"{name}: layers that are {block!r} need all tokens; allowed: dense ones")
    if config.skim.execution == "compact" and ((config.scan and config.repeats > 1) or config.remat != "none"):
        message = "compact: every layer has a shape of its own; it goes with scan=false and remat=none"
        raise ConfigError("skim.execution", message)
    try:
        config.skim.check(config.num_layers)
    except ConfigError as error:
        raise error.below("skim") from None


def _check_exits(config: "ModelConfig") -> None:
    try:
        config.exits.check(config.num_layers)
    except ConfigError as error:
        raise error.below("exits") from None
    if config.exits.depths and isinstance(config.skim, Skimming):
        raise ConfigError("exits", f"an exit reads all tokens, and skim={SKIMS.name_of(config.skim)} takes some away")
    if not 0 <= config.layer_dropout < 1:
        raise ConfigError("layer_dropout", f"{config.layer_dropout} is outside [0, 1)")


def _check_halting(config: "ModelConfig") -> None:
    if not isinstance(config.halting, TokenHalting):
        return
    name = HALTINGS.name_of(config.halting)
    plain = isinstance(config.streams, OneStream) and config.sequence == config.select == EveryToken()
    if not plain or isinstance(config.skim, Skimming) or config.exits.depths or config.layer_dropout:
        others = "streams, sequence, select, skim and exits=none, and layer_dropout=0"
        raise ConfigError("halting", f"{name} goes with {others}")
    if config.halting.by_step and not config.head.of_tokens:
        raise ConfigError("halting", f"{name}: it weighs the losses of tokens; it goes with head=tokens")
    for block in dict.fromkeys(config.positions.values()):
        if config.blocks[block].has_router or _not_shortened(config, block):
            raise ConfigError("halting", f"{name}: layers that are {block!r} need all tokens; allowed: dense ones")


def _not_shortened(config: "ModelConfig", block: str) -> Optional[str]:
    """Why layers with this block spec cannot compute on some tokens of a row."""
    try:
        config.blocks[block].check_some_tokens()
    except ConfigError as error:
        return error.message
    memory = next((name for name, spec in config.memory.items() if block in spec.blocks), None)
    return None if memory is None else f"its memory {memory!r} reads a table for every token"
