"""The citation that a repository shows beside its code."""

import cmp
from cmp.parsing import parse_yaml
from cmp.project import project_folder


def test_the_citation_names_this_version():
    citation = parse_yaml((project_folder() / "CITATION.cff").read_text())
    assert str(citation["version"]) == cmp.__version__
