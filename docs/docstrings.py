"""Docstrings on the site: what is written as a table, names and their meanings side by side, stays one."""

import re
from typing import Any

from griffe import Extension, Object

_ROW = re.compile(r"\w[\w, ]*? {2,}\S")


class Tables(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = with_tables(obj.docstring.value)


def with_tables(text: str) -> str:
    """Each row and what continues it indented, which is code to Markdown."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        row = bool(_ROW.match(line)) or (inside and line.startswith(" "))
        if row and not inside:
            lines.append("")
        inside = row
        lines.append(f"    {line}" if row else line)
    return "\n".join(lines)
