"""What mkdocs does to this folder to make the site of it.

- Pages that live elsewhere in the repository join it, and links lead to them from wherever they are written.
- The references of the command line and of Python are made from the code.
- Lists need no blank line before them, as on GitHub.
"""

import posixpath
import re
import shutil
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click

from exflow.cli import app

ROOT = Path(__file__).parents[1]
ELSEWHERE = {  # in the repository -> in the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "LICENSE.txt",
    "models/gpt-moe-demo/README.md": "demo-model.md",
    "configs/shapes/README.md": "shapes.md",
    "configs/topology-2x8.yaml": "topology-2x8.yaml",
    "configs/topology-graph.yaml": "topology-graph.yaml",
}
HOME = {site: repository for repository, site in ELSEWHERE.items()}
CLI = "reference/cli.md"
_TARGET = re.compile(r'(\]\(|src="|href=")(?!\w+:|#)([^)"#\s]+)')
_FENCE = re.compile(r"\s*(```|~~~)")
_ITEM = re.compile(r"\s{0,3}([-*]|1\.) ")  # what may interrupt a paragraph


def on_startup(command: str, dirty: bool) -> None:
    """A copy of the package in which every folder says that it is one, as what reads docstrings expects."""
    copy = ROOT / "build" / "api" / "exflow"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ROOT / "exflow", copy, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in (path for path in copy.rglob("*") if path.is_dir()):
        (folder / "__init__.py").touch()


def on_files(files: Files, config: Any) -> Files:
    for path, site in ELSEWHERE.items():
        files.append(File.generated(config, site, abs_src_path=str(ROOT / path)))
    files.append(File.generated(config, CLI, content=cli_reference()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    return separate_lists(relink(markdown, page.file.src_uri))


def relink(markdown: str, page: str) -> str:
    """Links as the repository has them, made to fit the site."""
    here = posixpath.dirname(HOME.get(page, f"docs/{page}"))

    def target(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(here, found[2]))
        site = ELSEWHERE.get(path, path.removeprefix("docs/"))
        return found[1] + posixpath.relpath(site, posixpath.dirname(page) or ".")

    return _TARGET.sub(target, markdown)


def separate_lists(markdown: str) -> str:
    """A blank line before each list that follows a paragraph."""
    lines: list[str] = []
    in_fence = in_list = False
    for line in markdown.splitlines():
        in_fence ^= bool(_FENCE.match(line))
        item = not in_fence and _ITEM.match(line)
        if item and not in_list and lines and lines[-1].strip():
            lines.append("")
        in_list = bool(item) or (in_list and bool(line.strip()))
        lines.append(line)
    return "\n".join(lines)


def cli_reference() -> str:
    """The page about every verb, from the code."""
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="exflow", obj={"TYPER_RICH_MARKUP_MODE": "rich"})
    return get_docs_for_click(obj=command, ctx=context, name="exflow", title="Command line")
