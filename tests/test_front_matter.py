"""The package, its citation and the newest entry of the changelog name the same version."""

import cmp
from cmp.parsing import parse_yaml
from cmp.project import project_folder


def test_the_citation_and_the_changelog_name_this_version():
    citation = parse_yaml((project_folder() / "CITATION.cff").read_text())
    assert str(citation["version"]) == cmp.__version__
    changelog = (project_folder() / "CHANGELOG.md").read_text()
    newest = next(line for line in changelog.splitlines() if line.startswith("## "))
    assert newest in ("## Unreleased", f"## {cmp.__version__} ({citation['date-released']})")
