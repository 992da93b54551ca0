"""The Python blocks of docs/interop.md that are marked to be run in a given environment."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "interop.md"


def blocks(environment: str) -> list[str]:
    """In order. Every Python block of the page must carry a mark."""
    text = PAGE.read_text(encoding="utf-8")
    marked = re.findall(r"<!-- run: (\w+) -->\n```python\n(.*?)```", text, re.DOTALL)
    assert len(marked) == text.count("```python")
    assert {name for name, _ in marked} == {"here", "devinterp1", "devinterp2", "others"}
    return [code for name, code in marked if name == environment]
