"""`cmp site`: the book as static pages."""

from typing import Annotated

import typer

from cmp.book import site
from cmp.cli.shared import console
from cmp.plots import idea as plot_idea


def build_site(
    picture: Annotated[
        bool, typer.Option("--picture", help="Draw the first page's picture anew instead.")
    ] = False,
) -> None:
    """Build the book's pages; offline, once the packages of the theme are fetched."""
    if picture:
        console.print(f"drawn: {plot_idea.write()}", soft_wrap=True)
        return
    folder = site.make()
    console.print(f"the book: {folder}", soft_wrap=True)
    console.print("to read it: python3 -m http.server --bind 127.0.0.1 --directory _build/html")
