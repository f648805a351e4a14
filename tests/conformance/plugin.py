"""The pytest plugin that swaps the classes in Keras's tests, and keeps the outcomes.

`run` starts a process of pytest for each swap, with `-p tests.conformance.plugin`.
"""

from __future__ import annotations

import functools
import gc
import json
import re
import sys
import types
from typing import Any

import pytest

from . import rewrite, swaps


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--swap", choices=swaps.NAMES, required=True)
    parser.addoption("--select", default="", help="a part of the ids of the tests to run")
    parser.addoption("--results", required=True, help="the file to write, a test per line")


def pytest_configure(config: pytest.Config) -> None:
    for marker in ("requires_trainable_backend", "multi_device"):
        config.addinivalue_line("markers", f"{marker}: one of Keras's own")
    # Some tests import this from Keras's conftest.py, which is not in the wheel.
    conftest: Any = types.ModuleType("conftest")
    conftest.skip_if_backend = lambda backend, reason: pytest.mark.skipif(
        backend == "tensorflow", reason=reason
    )
    sys.modules["conftest"] = conftest

    swap = config.getoption("--swap")
    if swap != "stock":
        rewrite.install(_is_test, functools.cache(lambda: swaps.classes(swap)))
    config.pluginmanager.register(_Outcomes(config.getoption("--results")))


def _is_test(module: str) -> bool:
    # The second is the base class of Keras's tests. It trains layers inside a `Model`.
    return module.startswith("keras.src.") and (
        module.endswith("_test") or module == "keras.src.testing.test_case"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    selected = config.getoption("--select")
    items[:] = [item for item in items if selected in _identity(item.nodeid)]
    for item in items:
        if "multi_device" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="for other backends"))
    # Keras's tests collect garbage after each of them, and none of it is from before.
    gc.collect()
    gc.freeze()


def _identity(nodeid: str) -> str:
    # Some ids have the address of a function in them, which differs in each process.
    return re.sub(r"0x[0-9a-f]+", "0x", nodeid)


class _Outcomes:
    """Writes the outcome of each test, once that is known.

    Args:
        path: the file to write, one JSON object per line.
    """

    def __init__(self, path: str) -> None:
        self._file = open(path, "w", buffering=1)
        self._outcomes: dict[str, dict[str, Any]] = {}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._add(report)
            self._write(report.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._add(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._write(nodeid)

    def _add(self, report: Any) -> None:
        new = {"id": _identity(report.nodeid), "outcome": "passed", "seconds": 0.0}
        result = self._outcomes.setdefault(report.nodeid, new)
        result["seconds"] += getattr(report, "duration", 0.0)
        if hasattr(report, "wasxfail"):
            # Passes or fails as it likes.
            result["outcome"] = "xfail"
        # Set-up, call, clean-up and subtests come one by one: the worst counts.
        if result["outcome"] in ("failed", "xfail") or report.passed:
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        text = report.longreprtext
        last_line = (text.strip().splitlines() or [""])[-1]
        result["outcome"] = report.outcome
        result["reason"] = last_line if crash is None else crash.message
        result["text"] = text

    def _write(self, nodeid: str) -> None:
        self._file.write(json.dumps(self._outcomes.pop(nodeid)) + "\n")
