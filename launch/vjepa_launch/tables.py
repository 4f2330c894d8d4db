"""Render rich tables as plain text."""

import io
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text


def render(rows: Iterable[Sequence[str]], *, header: Sequence[str] | None = None) -> str:
    """Return rows as aligned columns of text, without borders, wrapping or trailing spaces."""
    table = Table(*header or (), box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=bool(header))
    for row in rows:
        table.add_row(*map(Text, row))
    output = io.StringIO()
    Console(file=output, width=10_000, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines())
