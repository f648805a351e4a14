"""The core of the everyday tests in another environment: what `docs/versions.md` says.

    python -m tests.reliability.versions ENVIRONMENT     the Python of a virtual environment
    python -m tests.reliability.versions --core          the paths of the core, for pytest

The environment has pytest and the packages in the versions to be tried. What came of it is
a row of the table, which replaces the row of the same versions.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.reliability import report

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "versions.md"
# Models, saving, configs of hooks, freezing, and a slice of the modes.
CORE = [
    "tests/models/test_saving.py",
    "tests/models/test_private_names.py",
    "tests/models/test_errors.py",
    "tests/update/test_private_names.py",
    "tests/hooks/test_configs.py",
    "tests/hooks/test_freezing_schedules.py",
    "tests/modes/test_gate.py",
    "tests/modes/test_micro_batches.py",
]
_PACKAGES = ("tensorflow", "keras", "keras-tuner", "numpy")


def run(python: str) -> dict[str, str]:
    """Runs the core with a Python, and returns a row of the table."""
    program = (
        "import json, platform; from importlib import metadata as m; print(json.dumps("
        f"[platform.python_version()] + [m.version(p) for p in {_PACKAGES}]))"
    )
    found = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
    versions = json.loads(found.stdout)
    command = [python, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *CORE]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout[-3000:], done.stderr[-2000:])
    counts = dict(re.findall(r"(\d+) (passed|failed|error)", done.stdout))
    counts = {name: number for number, name in counts.items()}
    row = dict(zip(("Python", *_PACKAGES), versions, strict=True))
    row["passed"] = counts.get("passed", "0")
    row["failed"] = str(int(counts.get("failed", 0)) + int(counts.get("error", 0)))
    return {**row, "date": datetime.date.today().isoformat()}


def record(row: dict[str, str]) -> None:
    """Puts a row into the table of the page."""
    results = json.loads(report.RESULTS.read_text()) if report.RESULTS.exists() else {}
    key = ("Python", *_PACKAGES)
    rows = [r for r in results.get("versions", []) if [r[k] for k in key] != [row[k] for k in key]]
    results["versions"] = sorted([*rows, row], key=lambda r: [r[k] for k in key])
    report.RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write(results["versions"])


def write(rows: list[dict[str, str]]) -> None:
    begin, end = report.BEGIN.format("versions"), report.END
    before, rest = PAGE.read_text(encoding="utf-8").split(begin, 1)
    _, after = rest.split(end, 1)
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    lines += [f"| {' | '.join(row[name] for name in names)} |" for row in rows]
    PAGE.write_text("\n".join([f"{before}{begin}", *lines, f"{end}{after}"]), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["--core"]:
        print(" ".join(CORE))
    else:
        record(run(sys.argv[1]))
