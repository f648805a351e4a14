"""`docs/reliability.md`, from the last result of each command.

python -m tests.reliability.report          writes the page from the results there are
python -m tests.reliability.report PART ...  runs these parts first: files, kills,
                                             search, leaks
"""

from __future__ import annotations

import datetime
import json
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
PAGE = HERE.parent.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- {}: written by a command -->", "<!-- end -->"


def record(part: str, rows: list[dict[str, Any]]) -> None:
    """Keeps the result of a part, with the date and the versions, and writes the page."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    versions = {name: metadata.version(name) for name in ("tensorflow", "keras", "keras-tuner")}
    results[part] = {
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version(), **versions},
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write()


def write() -> None:
    """Puts the results into the page, each between its marks."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    text = PAGE.read_text(encoding="utf-8")
    for part in results.keys() - {"versions"}:
        result = results[part]
        begin = BEGIN.format(part)
        if begin not in text:
            continue
        before, rest = text.split(begin, 1)
        _, after = rest.split(END, 1)
        text = f"{before}{begin}\n{_table(result)}\n{END}{after}"
    PAGE.write_text(text, encoding="utf-8")


def _table(result: dict[str, Any]) -> str:
    rows = result["rows"]
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    lines += [f"| {' | '.join(_shown(row[name]) for name in names)} |" for row in rows]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return "\n".join([*lines, "", f"{result['date']}: {versions}."])


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def main(parts: list[str]) -> None:
    from importlib import import_module

    for part in parts:
        record(part, import_module(f"tests.reliability.{part}").run())
    write()


if __name__ == "__main__":
    main(sys.argv[1:])
