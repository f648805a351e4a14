"""The pytest plugin that runs Keras's tests with the classes swapped and keeps results.

`run` starts one process of pytest for each swap, with `-p tests.conformance.plugin`.
"""

from __future__ import annotations

import functools
import json
import sys
import types
from typing import Any

import pytest

from tests.conformance import rewrite, swaps


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--swap", choices=swaps.NAMES, required=True)
    parser.addoption("--results", required=True, help="a file to write, one JSON per line")


def pytest_configure(config: pytest.Config) -> None:
    for marker in ("requires_trainable_backend", "multi_device"):
        config.addinivalue_line("markers", f"{marker}: one of Keras's own")
    # Some of Keras's tests import this from Keras's conftest.py, which is not installed.
    conftest = types.ModuleType("conftest")
    conftest.skip_if_backend = lambda backend, reason: pytest.mark.skipif(  # type: ignore[attr-defined]
        backend == "tensorflow", reason=reason
    )
    sys.modules["conftest"] = conftest
    swap = config.getoption("--swap")
    if swap != "stock":
        rewrite.install(
            # Keras's base class of tests trains every layer inside a `Model`.
            lambda name: name.startswith("keras.")
            and (name.endswith("_test") or name == "keras.src.testing.test_case"),
            functools.cache(lambda: swaps.classes(swap)),
        )
    config.pluginmanager.register(_Results(config.getoption("--results")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "multi_device" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="for JAX and PyTorch"))


class _Results:
    """Writes a line for each part of a test as soon as it is known.

    When the process dies, what went before is there.
    """

    def __init__(self, path: str) -> None:
        self.file = open(path, "w", buffering=1)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.write(report, report.duration)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.write(report, 0.0)

    def write(self, report: Any, duration: float) -> None:
        reason = ""
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = str(report.longrepr)[-500:] if crash is None else crash.message
        elif report.skipped:
            reason = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else "xfail")
        line = {
            "id": report.nodeid,
            "outcome": report.outcome,
            "when": report.when,
            "duration": duration,
            "reason": reason,
            "text": str(report.longrepr) if report.failed else "",
        }
        self.file.write(json.dumps(line) + "\n")
