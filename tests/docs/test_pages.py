"""The pages: alike on GitHub and on the site, and the site's parts that are made from the code.

`make docs` builds the site itself and checks all links.
"""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import typer

from exflow import cli

markdown = pytest.importorskip("markdown")
pytest.importorskip("mkdocs")
from markdown_it import MarkdownIt  # noqa: E402

ROOT = Path(__file__).parents[2]
SITE_EXTENSIONS = ["attr_list", "tables", "toc", "pymdownx.highlight", "pymdownx.superfences"]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = load("hooks")
PAGES = [path for path in hooks.ELSEWHERE if path.endswith(".md")]
WRITTEN = [path for path in sorted((ROOT / "docs").rglob("*.md")) if path.name != "api.md"]
PAGES += [str(path.relative_to(ROOT)) for path in WRITTEN]


def parts(html: str) -> dict[str, int]:
    """Count the parts of each kind."""
    return {tag: len(re.findall(f"<{tag}[ >]", html)) for tag in ("pre", "li", "table", "tr", "h2", "h3")}


@pytest.mark.parametrize("source", PAGES)
def test_a_page_reads_alike_on_github_and_on_the_site(source: str) -> None:
    text = (ROOT / source).read_text()
    on_github = MarkdownIt("commonmark").enable("table").render(text)
    on_site = markdown.markdown(hooks.separate_lists(text), extensions=SITE_EXTENSIONS)
    assert parts(on_site) == parts(on_github)


def test_links_to_files_elsewhere_lead_to_their_pages() -> None:
    on_start = {
        "[a](docs/dev/log.md#x)": "[a](dev/log.md#x)",
        "[a](configs/shapes/README.md)": "[a](shapes.md)",
        "![a](docs/figures/routes.svg)": "![a](figures/routes.svg)",
        "[a](https://b.c/docs/d) [e](#f)": "[a](https://b.c/docs/d) [e](#f)",
    }
    assert {link: hooks.relink(link, "index.md") for link in on_start} == on_start
    deeper = hooks.relink("[a](../../README.md) [b](../dev/log.md)", "how-to/vllm.md")
    assert deeper == "[a](../index.md) [b](../dev/log.md)"


def test_the_reference_knows_every_verb_and_option() -> None:
    page = hooks.cli_reference()
    top = typer.main.get_command(cli.app)
    for name, command in top.commands.items():  # type: ignore[attr-defined]
        assert f"## `exflow {name}`" in page
        for each in command.params:
            assert each.hidden or each.opts[0] in page


def test_tables_of_docstrings_stay_tables() -> None:
    text = "Place.\n\nseed   a number\n       of the search\nlimit  seconds\n\nRaises it."
    table = "    seed   a number\n           of the search\n    limit  seconds"
    assert load("docstrings").with_tables(text) == f"Place.\n\n\n{table}\n\nRaises it."


@pytest.mark.parametrize("name", ["exchange", "visits"])
def test_a_drawing_is_what_its_script_draws(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs" / "figures")
    drawn = importlib.import_module(name).picture()
    assert (ROOT / "docs" / "figures" / f"{name}.svg").read_text(encoding="utf-8") == drawn


@pytest.mark.all
@pytest.mark.slow
def test_the_picture_shows_what_the_code_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs" / "figures")
    routes = importlib.import_module("routes")
    svg = (ROOT / "docs" / "figures" / "routes.svg").read_text()
    said = re.search(r"(\d+)% stay on their GPU .*?(\d+)%", svg)
    assert said is not None
    stay = [100 * float(np.mean(plan.local)) for plan in routes.report_of_both().plans]
    assert [float(each) for each in said.groups()] == pytest.approx(stay, abs=1)
