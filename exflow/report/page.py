"""The page: all sections in one HTML file that loads nothing from elsewhere.

Its templates are in templates/, one a section; its style sheets and its script in static/.
"""

from collections.abc import Sequence
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import exflow
from exflow.report.data import Report
from exflow.report.draw import colours
from exflow.report.draw.figure import cell, number
from exflow.report.glossary import MEANINGS, anchor
from exflow.report.sections import Section
from exflow.report.static import content


def page(report: Report, made: Sequence[Section]) -> str:
    """Render the whole HTML document."""
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            report=report,
            sections=[*made, Section("glossary", "Words")],
            model=report.about.model or "a model without a name",
            version=exflow.__version__,
        )
    )


@cache
def _environment() -> Environment:
    """Make the template environment. It escapes all text that is not marked as markup."""
    environment = Environment(
        loader=PackageLoader("exflow.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    environment.filters |= {"anchor": anchor, "cell": cell, "number": number}
    environment.globals |= {
        "colours": colours.css(),
        "filters": colours.filters(),
        "meanings": MEANINGS,
        "static": lambda name: Markup(content(name)),
    }
    return environment
