"""What a page is made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Spec = dict[str, Any]
"""A Vega-Lite chart as a dict. `{"data": {"name": NAME}}` shows a data set of its section."""


@dataclass(frozen=True)
class Section:
    """A chapter of the page: trusted HTML, then charts. Whoever writes HTML escapes what he did not write himself.

    `data` holds each data set once for all the page's charts: columns, `{"step": [...], "loss": [...]}`, or a `Grid`.
    """

    title: str
    html: str = ""
    charts: Sequence[Spec] = ()
    data: Mapping[str, Any] = field(default_factory=dict)


class Absent(NamedTuple):
    """A section that the runs give nothing for, and what would."""

    title: str
    line: str


def grid(axes: Mapping[str, Sequence[Any]], value: str, values: Sequence[Any]) -> dict[str, Any]:
    """A data set with a row for every combination of the axes, the last axis running fastest. Null values have none."""
    return {"axes": {name: list(each) for name, each in axes.items()}, "value": value, "values": list(values)}
