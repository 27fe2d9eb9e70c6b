"""The tables of ATTRIBUTION.md, one row per package: `python -m tests.attribution`."""

import re

from cmp.embedded.manifest import embedded_manifests, load_packages
from cmp.files import write_atomic
from cmp.project import project_folder

PAGE = project_folder() / "ATTRIBUTION.md"
THEME = project_folder() / "book" / "_theme"
LICENCES = {
    "Apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
    "BSD-3-Clause": "https://opensource.org/license/bsd-3-clause",
    "CC-BY-3.0": "https://creativecommons.org/licenses/by/3.0/",
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
    "CC-BY-SA-4.0": "https://creativecommons.org/licenses/by-sa/4.0/",
    "ISC": "https://opensource.org/license/isc",
    "MIT": "https://opensource.org/license/mit",
}
TABLE = re.compile(r"(\|(?:---\|)+\n)(?:\|.*\n)*")
"""The line below a table's head, and the rows."""


def attribution_text(page: str) -> str:
    """Return the content of ATTRIBUTION.md with its two tables written anew: the packages of the
    data, and those of the site.

    Args:
        page: What it says now, of which all but the rows stays.
    """
    data, site = [], []
    for name, package in load_packages().items():
        users = ", ".join(d.name for d in embedded_manifests().values() if name in d.sources)
        data.append(f"{_row(package)} {users} |\n")
    for package in load_packages(THEME).values():
        site.append(f"{_row(package)}\n")
    rows = iter(["".join(data), "".join(site)])
    return TABLE.sub(lambda found: found[1] + next(rows), page)


def _row(package) -> str:
    licence = f"[{package.licence}]({LICENCES[package.licence]})"
    source = f"{package.attribution} ({package.url})"
    return f"| {source} | {licence} | `{package.package}` {package.version} |"


if __name__ == "__main__":
    write_atomic(PAGE, attribution_text(PAGE.read_text(encoding="utf-8")))
