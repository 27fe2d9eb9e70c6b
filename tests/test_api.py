"""The public API: what it lists, that its examples run, and that importing it is quick."""

import dataclasses
import doctest
import inspect
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import cmp
from cmp import registry
from tests import api_reference

MAX_EXAMPLE_LINES = 5


def test_every_name_is_there_and_has_a_short_example():
    for name in cmp.__all__:
        text = inspect.getdoc(getattr(cmp, name))
        assert text and "Example:" in text, name
        lines = [line for line in text.partition("Example:")[2].splitlines() if line.strip()]
        code = [line for line in lines if line.strip().startswith((">>>", "..."))]
        assert 1 <= len(code) <= MAX_EXAMPLE_LINES, name


def failing_examples(folder):
    """Name -> what is wrong with its example, for names whose example does not do what it says."""
    failing = {}
    for name in sorted(cmp.__all__):
        names = {"cmp": cmp, "torch": torch, "folder": folder, "save_file": save_file}
        text = inspect.getdoc(getattr(cmp, name)).partition("Example:")[2]
        example = doctest.DocTestParser().get_doctest(text, names, name, None, 0)
        report: list[str] = []
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
        if runner.run(example, out=report.append).failed:
            failing[name] = "".join(report)
    return failing


def test_examples_run(tmp_path, monkeypatch, own_options):
    assert failing_examples(tmp_path) == {}


@pytest.mark.long
@pytest.mark.defect
def test_the_page_says_which_examples_need_the_benchmark(tmp_path):
    code = (
        "import pathlib; from tests import test_api; "
        f"print(*test_api.failing_examples(pathlib.Path({str(tmp_path)!r})))"
    )
    environment = os.environ | {"CMP_BUILD": str(tmp_path / "empty")}
    output = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=api_reference.PAGE.parents[1],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    _, *entries = api_reference.HEADING.split(api_reference.PAGE.read_text(encoding="utf-8"))
    entries = dict(zip(entries[::2], entries[1::2], strict=True))
    assert output.split() == sorted(n for n, text in entries.items() if "`cmpt data build`" in text)


@pytest.mark.defect
def test_the_page_gives_the_arguments_of_every_kind_of_option():
    page = api_reference.PAGE.read_text(encoding="utf-8")
    given = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", page, re.M))
    assert given.keys() == registry.KINDS.keys()
    for kind, name in (("schedule", "wsd"), ("meta_schedule", "rsqrt"), ("merge_rule", "ties"),
                       ("order", "random"), ("buffer", "reservoir")):  # fmt: skip
        arguments = inspect.signature(registry.get_option(kind, name).value).parameters
        assert given[kind].count(",") == len(arguments) - 1, kind


@pytest.mark.defect
def test_every_section_of_a_config_is_public():
    fields = cmp.RunConfig.__dataclass_fields__.values()
    sections = [field.type for field in fields if dataclasses.is_dataclass(field.type)]
    assert [getattr(cmp, section.__name__, None) for section in sections] == sections
    assert len(sections) == 10


def test_the_reference_page_is_that_of_the_docstrings():
    page = api_reference.PAGE.read_text(encoding="utf-8")
    assert sorted(api_reference.HEADING.findall(page)) == sorted(cmp.__all__)
    message = "write it again: python -m tests.api_reference"
    assert page == api_reference.reference_page(), message
    assert "#### `Schedule.durations`\n" in page and "StepResult(loss: " in page


def test_what_stands_below_the_name_of_an_option_is_written_anew(tmp_path, monkeypatch):
    known = api_reference.PAGE.read_text(encoding="utf-8")
    page = tmp_path / "api.md"
    page.write_text(
        re.sub(r"(### `cmp\.(?:run|merge)`\n).*?(?=^##)", r"\1", known, flags=re.M | re.S)
    )
    monkeypatch.setattr(api_reference, "PAGE", page)
    assert page.read_text() != known == api_reference.reference_page()


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import cmp, sys; print([m for m in ('torch', 'pandas', 'pydantic') if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing_like_it"):
        cmp.nothing_like_it  # noqa: B018
