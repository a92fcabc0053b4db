"""HTML tables."""

from collections.abc import Sequence


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], numeric_from: int = 1) -> str:
    """A table of HTML cells; those from a column on are figures, set right. It scrolls by itself on a narrow screen."""
    head = "".join(f"<th{_right(place, numeric_from)}>{title}</th>" for place, title in enumerate(titles))
    body = "".join(
        "<tr>" + "".join(f"<td{_right(place, numeric_from)}>{cell}</td>" for place, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _right(place: int, numeric_from: int) -> str:
    return ' class="number"' if place >= numeric_from else ""
