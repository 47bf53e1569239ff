"""Sections of a page as Markdown.  Pure."""

from __future__ import annotations

from typing import Any

HIDDEN = ("tpots_ms", "raw")  # long lists: they are in the JSON


def sections_text(sections: dict[str, Any]) -> str:
    """Each section under a heading: values in one table, lists of rows in tables of their own."""
    return "\n\n".join(f"### {name}\n\n{_section(found)}" for name, found in sections.items())


def _section(found: Any) -> str:
    if not isinstance(found, dict):
        return _cell(found)
    plain = {name: value for name, value in _flat(found).items() if not _is_rows(value)}
    rows = {name: value for name, value in _flat(found).items() if _is_rows(value)}
    parts = []
    if plain:
        lines = ["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in plain.items())]
        parts.append("\n".join(lines))
    parts += [f"{name}:\n\n{_table(value)}" for name, value in rows.items()]
    return "\n\n".join(parts)


def _flat(found: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as ``outer, inner``."""
    flat: dict[str, Any] = {}
    for key, value in found.items():
        if str(key).split(",")[-1].strip() in HIDDEN:
            continue
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{name}, ")
        else:
            flat[name] = value
    return flat


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _table(rows: list[dict[str, Any]]) -> str:
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in HIDDEN]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(_cell(row.get(name, "-")) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_cell(one) for one in value)
    return "-" if value is None else str(value).replace("|", "\\|").replace("\n", " ")
