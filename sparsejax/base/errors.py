"""The two ways a command can end badly, and the exit status each one has.

`RequestError` means that what was asked for is wrong (a config value, a flag, a file): one line, status 2, nothing
written. `RunError` means that a sound request failed while it ran: a one-line cause and the trace, status 1."""

import difflib
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


class RunError(Exception):
    """A run failed for a reason we can name; the trace follows the line."""


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """' Did you mean 'x'?' for the nearest allowed name, or '' when none is near."""
    near = difflib.get_close_matches(name, list(allowed), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
