"""How sizes, lists and tables are written."""

from __future__ import annotations

from collections.abc import Sequence

_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_MAX_LISTED = 3


def file_size(num_bytes: int) -> str:
    """A number of bytes with three significant digits in the largest decimal unit that fits, such as "1.76 GB".

    Below 1 kB the bytes are written out, such as "512 bytes".
    """
    for unit_bytes, unit in _UNITS:
        # From the number on that is rounded to one of this unit, so that 999,600 is "1.00 MB" and not "1000 kB".
        if num_bytes >= 0.9995 * unit_bytes and num_bytes >= 1000:
            value = num_bytes / unit_bytes
            num_decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{value:.{num_decimals}f} {unit}"
    return f"{num_bytes} byte{'' if num_bytes == 1 else 's'}"


def first_few(problems: Sequence[str]) -> str:
    """The first three of a list, and how many more there are, such as "a; b; c; and 7 more"."""
    num_others = len(problems) - _MAX_LISTED
    return "; ".join([*problems[:_MAX_LISTED], *([f"and {num_others} more"] if num_others > 0 else [])])


def in_columns(rows: Sequence[Sequence[str]], is_markdown: bool) -> str:
    """Rows of cells, the first of which is the header, as text in columns or as a Markdown table."""
    header = rows[0]
    if is_markdown:
        marked = [header, ["---"] * len(header), *rows[1:]]
        return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in marked)
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
