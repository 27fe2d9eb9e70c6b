"""What a repository shows around its code: citation, dev container, workflow, templates."""

import json
import re

import pytest
import yaml

import cmp
from cmp.parsing import parse_yaml
from cmp.project import project_folder

ROOT = project_folder()


def test_the_citation_names_this_version_and_the_guide():
    citation = parse_yaml((ROOT / "CITATION.cff").read_text())
    needed = {"cff-version", "message", "title", "authors", "version", "license"}
    assert needed <= citation.keys() and citation["cff-version"] == "1.2.0"
    assert str(citation["version"]) == cmp.__version__
    [guide] = citation["references"]
    assert "2408.14471" in guide["url"] and guide["authors"]


def test_the_dev_container_makes_what_make_makes():
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    first, second = container["onCreateCommand"].split(" && ")
    assert first == "make .venv/.ready" and second == ".venv/bin/cmpt data build"
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"(?m)^READY := \.venv/\.ready$", makefile)
    assert re.search(r"(?m)^\t\$\(BIN\)/cmpt data build$", makefile)


def test_the_workflow_runs_what_runs_anywhere():
    workflow = parse_yaml((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step.get("run") for step in workflow["jobs"]["test"]["steps"]]
    assert ".ci/run" in steps and (ROOT / ".ci" / "run").exists()


@pytest.mark.defect
def test_the_newest_open_clip_is_tried_each_week():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert workflow[True]["schedule"]  # `on` is true in YAML
    job = workflow["jobs"]["newest-open-clip"]
    step = job["steps"][-1]
    assert step["env"] == {"CMP_OPEN_CLIP": "open_clip_torch"}
    _, path, _, chosen = step["run"].rsplit(maxsplit=3)
    assert f"def test_the_{chosen}_is_split_or_refused" in (ROOT / path).read_text()
    for name, which in (("test", "!="), ("newest-open-clip", "==")):
        assert workflow["jobs"][name]["if"] == f"github.event_name {which} 'schedule'"


@pytest.mark.parametrize("name, asks", [("bug", "report"), ("result", "runs")])
def test_an_issue_asks_for_what_helps(name, asks):
    form = parse_yaml((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert form["name"] and form["description"]
    fields = {field["id"]: field for field in form["body"]}
    assert asks in fields
    assert all({"type", "attributes"} <= field.keys() for field in form["body"])
    assert "make lint" in (ROOT / ".github" / "pull_request_template.md").read_text()
