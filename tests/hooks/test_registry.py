"""What `keras_tapefit.hooks` exports is the one list of hooks; every other is held to it."""

import importlib
import inspect
import io
import pydoc
import re
import sys
import types
from pathlib import Path

import pytest
import test_configs

from keras_tapefit import backward, gradients, hooks

ROOT = Path(__file__).parent.parent.parent
HOOKS = sorted(
    name
    for name in hooks.__all__
    if inspect.isclass(getattr(hooks, name))
    and issubclass(getattr(hooks, name), hooks.GradientHook)
    and name != "GradientHook"
)


def names_in(text):
    """Returns the hooks that a page names in its own font."""
    return {name for name in HOOKS if re.search(rf"[`.]{name}\b", text)}


def test_the_list_is_what_there_is():
    defined = {
        name
        for module in Path(hooks.__file__).parent.glob("*.py")
        for name in re.findall(
            r"register_keras_serializable.*\nclass (\w+)\(", module.read_text("utf-8")
        )
    }
    assert set(HOOKS) == defined and len(HOOKS) > 15


def test_configs_are_tested():
    assert sorted(test_configs.HOOKS) == HOOKS


def test_equivalence_is_tested(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests")
    cases = importlib.import_module("equivalence.cases")
    of_methods = {name for name in cases.HOOKS if cases.HOOKS[name].backward is not None}
    assert {name.split()[0] for name in cases.HOOKS.keys() - of_methods} == set(HOOKS)
    methods = set(backward.__all__) - {"Backpropagation", "GradientMethod", "MicroBatches"}
    assert of_methods == methods


def test_the_table_of_the_readme_has_every_hook():
    readme = (ROOT / "README.md").read_text("utf-8")
    table = readme[readme.index("| hook |") : readme.index("`compile(backward=")]
    first_column = [row.split("|")[1] for row in table.splitlines() if row.startswith("|")]
    assert sorted(re.findall(r"`(\w+)`", " ".join(first_column))) == HOOKS


def test_each_hook_can_be_chosen():
    assert names_in((ROOT / "docs" / "choose.md").read_text("utf-8")) == set(HOOKS)


@pytest.mark.parametrize("package", [hooks, backward, gradients], ids=lambda p: p.__name__)
def test_packages_show_their_public_names_and_no_others(package):
    assert dir(package) == package.__all__
    modules = {n for n in dir(package) if isinstance(getattr(package, n), types.ModuleType)}
    assert modules == ({"units"} if package is gradients else set())
    assert not any(name.startswith("_") for name in dir(package))
    source = Path(package.__file__).read_text("utf-8")
    imported = set(re.findall(r"import \w+ as ([a-zA-Z]\w*)", source))
    assert set(dir(package)) == imported
    page = io.StringIO()
    pydoc.doc(package, output=page)
    for name in dir(package):
        assert name in page.getvalue()
    namespace = {}
    exec(f"from {package.__name__} import *", namespace)
    assert namespace.keys() - {"__builtins__"} == set(dir(package))
    assert package.__name__ in sys.modules
