"""Fill the templates of pages and cards, which are files beside this module."""

import html
import math
import re
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from cmp.errors import clean_text
from cmp.releases import sentences

LONGEST = 90
"""The most characters of a name or a caption in HTML; the rest is cut off."""


def render(template: str, **values: object) -> str:
    """Return a template filled in.

    Args:
        template: The name of its file. In one of HTML, whatever is filled in is escaped.
        **values: What it names.
    """
    return _environment.get_template(template).render(values)


def escape_html(value: object, longest: int = LONGEST) -> Markup:
    """Return a user's text for HTML: escaped, without control characters, and cut if too long."""
    text = clean_text(str(value)).encode("utf-8", "ignore").decode()  # without half characters
    return Markup(html.escape(text if len(text) <= longest else text[: longest - 1] + "…"))


def escape_markdown(text: str) -> str:
    """Return a user's text as one line of Markdown, with markup escaped."""
    return re.sub(r"([\\<|`\[])", r"\\\1", " ".join(clean_text(text).split()))


def code_span(text: str) -> str:
    """Return a text as one line for a code span, where only a backtick is markup."""
    return " ".join(clean_text(text).split()).replace("`", "'")


def markdown_table(table: pd.DataFrame) -> str:
    """Return a table in Markdown without its index, and with one decimal."""
    texts = table.map(
        lambda value: f"{value:.1f}" if isinstance(value, float) else escape_markdown(str(value))
    )
    rows = [[*table.columns], ["---"] * table.shape[1], *texts.to_numpy()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


_environment = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=select_autoescape(["html.j2"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_environment.filters |= {
    "text": escape_html,
    "markdown": escape_markdown,
    "code": code_span,
    "table": markdown_table,
    "decimal": sentences.decimal,
    "signed": sentences.signed,
    "count_of": sentences.count_of,
    "thousands": "{:,.0f}".format,
}
_environment.tests["nan"] = math.isnan
_environment.globals["interval"] = sentences.interval_in_words
