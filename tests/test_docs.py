"""Runs the Python in README.md and docs/, and holds what the pages say to the code."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path

import pages
import pytest
from pages import ALL_PAGES, DOCS, NOTEBOOK, PAGES, ROOT, blocks_of, cells_of, extras_of

import keras_tapefit
from keras_tapefit import backward, callbacks, hooks, plots, tuning

# These train for longer than the others.
SLOW = (
    "choose",
    "several_losses",
    "find_nan",
    "tutorial",
    "fine_tune_and_freeze",
    "save_and_deploy",
    "see_the_gradients",
    "several_machines",
    "tour",
    "tune",
)
# What a block needs besides the dependencies: a package, and what shows that.
NEEDS = {
    "scikit-learn": r"^ *(from|import) sklearn\b",
    "matplotlib": r"\bplots\.\w+\(|^ *(from|import) matplotlib\b",
    "tensorboard": r"\bTensorBoard\(|GradientTensorBoard\(|\.search\(|import tensorboard\b",
    "pandas": r"\.to_pandas\(|^ *(from|import) pandas\b",
}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page.stem in SLOW else [], id=page.stem)
        for page in [*PAGES, NOTEBOOK]
    ],
)
def test_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    # For programs that a page starts.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pages.run(page, tmp_path)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore::Warning")  # of other libraries, about each other
@pytest.mark.parametrize("library", ["lightning", "torch", "optax"])
def test_snippets_of_other_libraries(library, capsys, tmp_path, monkeypatch):
    """They print what the block beside them prints."""
    pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    found = [b for b in blocks_of(DOCS / "migrate.md", "py") if f"import {library}\n" in b.code]
    if library == "torch":
        found = [block for block in found if "lightning" not in block.code]
    (block,) = found
    exec(compile(block.code, library, "exec"), {})
    assert capsys.readouterr().out.splitlines()[-1] == block.expected


def test_the_notebook_is_that_of_the_tutorial():
    path = DOCS / "make_notebook.py"
    spec = importlib.util.spec_from_file_location("make_notebook", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.notebook()
    assert NOTEBOOK.read_text("utf-8") == made, "run `python docs/make_notebook.py`"
    code = [block.code for block in blocks_of(DOCS / "tutorial.md")]
    assert [block.code for block in cells_of(NOTEBOOK)] == code


def test_links_between_pages_lead_somewhere():
    for page in ALL_PAGES:
        text = page.read_text(encoding="utf-8")
        for link, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", text):
            if link.startswith(("http://", "https://")):
                continue
            there = page.parent / link if link else page
            assert there.exists(), f"{page.name}: {link}"
            if anchor:
                assert anchor in anchors_of(there), f"{page.name}: {link}#{anchor}"


def anchors_of(page: Path) -> set[str]:
    """Returns the names of headings, made as GitHub and MyST make them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def extras() -> dict[str, set[str]]:
    """Returns the packages that each extra brings."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return {
        name: set(re.findall(r'"([\w-]+)', packages))
        for name, packages in re.findall(r"^(\w+) = \[(.*?)\]", table, re.M | re.S)
    }


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name != "README.md"],
    ids=lambda p: p.stem,
)
def test_a_page_says_which_extra_it_needs(page):
    code = "\n".join(block.code for block in blocks_of(page))
    needed = {package for package, sign in NEEDS.items() if re.search(sign, code, re.M)}
    names = extras_of(page)
    brought = set().union(*(extras()[name] for name in names))
    assert needed <= brought, f"{page.name} needs {needed - brought} too"
    assert bool(needed) == bool(names)


def test_extras_bring_what_their_parts_import():
    assert {"matplotlib"} <= extras()["plots"]
    # KerasTuner imports it in every search, and does not declare it.
    assert {"tensorboard"} <= extras()["tuning"]
    assert {"tensorboard"} <= extras()["tensorboard"]
    sources = [path.read_text("utf-8") for path in (ROOT / "examples").glob("*.py")]
    needed = {
        package
        for package, sign in NEEDS.items()
        if any(re.search(sign, source, re.M) for source in sources)
    }
    assert needed == {"scikit-learn", "matplotlib", "tensorboard"}
    assert needed <= extras()["examples"]
    assert set(NEEDS) <= extras()["examples"] & extras()["test"]


def test_no_page_installs_from_an_index():
    for page in ALL_PAGES:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"install[^\n]*keras-tapefit", text), page.name


def test_names_on_pages_are_there():
    rooms = {"hooks": hooks, "backward": backward, "callbacks": callbacks}
    rooms |= {"plots": plots, "tuning": tuning}
    pattern = rf"(?<![\w./])({'|'.join(rooms)})\.([a-zA-Z_]\w*)"
    for page in ALL_PAGES:
        for room, name in re.findall(pattern, page.read_text(encoding="utf-8")):
            # What CONTRIBUTING.md adds as an example.
            if name != "SignGradient":
                assert hasattr(rooms[room], name), f"{page.name}: {room}.{name}"


def test_headings_of_the_faq_are_messages_of_the_library():
    page = (DOCS / "faq.md").read_text(encoding="utf-8")
    part = page.partition("## Messages of this library")[2].partition("\n## ")[0]
    messages = re.findall(r"^### `(.+)`$", part, re.M)
    assert len(messages) >= 5
    sources = [path.read_text("utf-8") for path in (ROOT / "keras_tapefit").rglob("*.py")]
    # Strings in several lines, as one; names are quoted in messages and not in headings.
    source = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources)).replace("`", "")
    for message in messages:
        for piece in re.split(r"'\.\.\.'|\d+", message):
            assert piece.strip() in source, f"no message says {piece.strip()!r}"


def test_readme_lists_every_hook():
    table = (ROOT / "README.md").read_text("utf-8").partition("\n## Hooks\n")[2]
    for name, thing in vars(hooks).items():
        if inspect.isclass(thing) and issubclass(thing, hooks.GradientHook):
            if thing is not hooks.GradientHook:
                assert f"`{name}`" in table, f"README.md does not name the hook {name}"


def test_all_log_entries_are_listed():
    """As the sources name them, with the names that a hook of no name has."""
    listed = (DOCS / "log_entries.md").read_text(encoding="utf-8")
    found = set()
    for path in (ROOT / "keras_tapefit").rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        found |= set(re.findall(r"(?:report\(|Report\(None, )f?\"([^\"]+)\"", source))
        found |= set(re.findall(r"entry = \"(\w+)\" if self._name is None", source))
    assert len(found) >= 6
    for name in found:
        name = name.replace("{self._entry}", "gradient").replace("{entry}", "update_ratio")
        name = re.sub(r"\{.*\}", "<path>", name)
        assert f"`{name}`" in listed or f"`val_{name}`" in listed, name


def test_readme_fit_example_is_complete_by_line_30():
    first = blocks_of(ROOT / "README.md")[0]
    assert ".fit(" in first.code
    assert first.line + first.code.count("\n") < 30
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_readme_has_the_two_commands_that_ci_runs():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = dict(re.findall(r"<!-- ci: (\w+) -->\n```bash\n(.+)\n```\n", readme))
    assert list(commands) == ["quickstart", "tests"]
    assert commands["quickstart"].endswith("examples/quickstart.py")
    assert commands["tests"].endswith("-m pytest")


@pytest.mark.parametrize("page", ["README.md", "docs/install.md", "docs/guarantees.md"])
def test_versions_are_those_of_the_package(page):
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    text = (ROOT / page).read_text(encoding="utf-8")
    for package, name in (("tensorflow", "TensorFlow"), ("keras", "Keras")):
        (bound,) = re.findall(rf'^    "{package}>=([\d.]+)"', project, re.M)
        assert f"{name} {bound} or later" in text
    (least, beyond) = re.findall(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', project)[0]
    assert f"Python 3.{least} to 3.{int(beyond) - 1}" in text
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {keras_tapefit.__version__}\n" in citation
