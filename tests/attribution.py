"""The table of ATTRIBUTION.md, one row per package: `python -m tests.attribution`."""

from cmp.embedded.manifest import embedded_manifests, load_packages
from cmp.files import write_atomic
from cmp.project import project_folder

PAGE = project_folder() / "ATTRIBUTION.md"
TABLE_HEAD = "|---|---|---|---|\n"
"""What stands between the text above the table and its rows."""


def attribution_text(page: str) -> str:
    """Return the content of ATTRIBUTION.md, its table written anew: one row per package.

    Args:
        page: What it says now, of which the text above the rows stays.
    """
    rows = []
    for name, package in load_packages().items():
        users = ", ".join(d.name for d in embedded_manifests().values() if name in d.sources)
        source = f"{package.attribution} ({package.url})"
        version = f"`{package.package}` {package.version}"
        rows.append(f"| {source} | {package.licence} | {version} | {users} |")
    return page.partition(TABLE_HEAD)[0] + TABLE_HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    write_atomic(PAGE, attribution_text(PAGE.read_text(encoding="utf-8")))
