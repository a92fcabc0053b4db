"""The two ways a command can end badly, and the exit status each one has.

`RequestError` means that what was asked for is wrong (a config value, a flag, a file): one line, status 2, nothing
written. `RunError` means that a sound request failed while it ran: a one-line cause and the trace, status 1."""

import difflib
import sys
import traceback
from collections.abc import Iterable


class RequestError(Exception):
    """The request is wrong. `str(error)` is one line that names the key, the value and what is allowed."""


class ConfigError(RequestError):
    """A config value is wrong. `key` is its dotted path below `config`, relative to the dataclass that found it."""

    def __init__(self, key: str, message: str):
        self.key, self.message = key, message
        super().__init__(f"config.{key}: {message}" if key else message)

    def below(self, prefix: str) -> "ConfigError":
        """The same error seen from the parent that holds the dataclass under `prefix`."""
        return ConfigError(f"{prefix}.{self.key}" if self.key else prefix, self.message)


def leaks(key: str, reason: str) -> ConfigError:
    """That at `key` a causal model would let a token see later ones."""
    return ConfigError(key, f"{reason}, which a causal model must not see; allow_leak=true accepts that")


class RunError(Exception):
    """A run failed for a reason we can name; the trace follows the line."""


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """' Did you mean 'x'?' for the nearest allowed name, or '' when none is near."""
    near = difflib.get_close_matches(name, list(allowed), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def outcome(error: BaseException) -> tuple[int, str]:
    """The exit status of a command that this error ends, and the line that tells it."""
    if isinstance(error, RequestError):
        return 2, f"error: {_one_line(error)}"
    if isinstance(error, KeyboardInterrupt):
        return 130, "failed: interrupted"
    cause = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
    return 1, f"failed: {_one_line(cause)}"


def tell(error: BaseException) -> int:
    """Prints the line to standard error, for a failed run the trace, too, and returns the exit status."""
    status, line = outcome(error)
    trace = traceback.format_exc() if status == 1 else ""
    if status != 130:  # who interrupts a command knows
        sys.stderr.write(f"{line}\n{trace}")  # one write: other threads may write
    return status


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
