"""The page: sections one after another, in one file that asks no one for anything."""

from collections.abc import Sequence
from html import escape

import exflow
from exflow.report.data import Report
from exflow.report.draw import colours
from exflow.report.glossary import glossary
from exflow.report.script import SCRIPT
from exflow.report.sections import Section
from exflow.report.style import css

# nothing but what is in the file itself may be loaded
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(report: Report, made: Sequence[Section]) -> str:
    """The whole HTML document."""
    shown = [*made, Section("glossary", "Words", glossary())]
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
{_head(report)}
</head>
<body>
<svg width="0" height="0" style="position:absolute" aria-hidden="true">{colours.filters()}</svg>
<a class="skip" href="#content">To the content</a>
<header>
{_top(report, shown)}
</header>
<main id="content">
{"".join(map(_section, shown))}
</main>
<footer>
<p>Made by exflow {exflow.__version__}. Traffic is counted token by token, by the rules of the runtime;
nothing was run.</p>
</footer>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _head(report: Report) -> str:
    return f"""\
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>ExFlow report: {_model(report)}</title>
<link rel="icon" href="data:,">
<style>{css()}</style>"""


def _top(report: Report, shown: Sequence[Section]) -> str:
    links = "".join(f'<li><a href="#{each.anchor}">{escape(each.title)}</a></li>' for each in shown)
    return f"""\
<h1>Routing and placement of {_model(report)}</h1>
<p>Which experts its tokens visit, and what moves between GPUs under each plan.</p>
<nav aria-label="Sections"><ul>{links}</ul></nav>"""


def _section(each: Section) -> str:
    return f"""\
<section id="{each.anchor}" aria-labelledby="{each.anchor}-title">
<h2 id="{each.anchor}-title">{escape(each.title)}</h2>
{each.body}
</section>
"""


def _model(report: Report) -> str:
    return escape(report.about.model or "a model without a name")
