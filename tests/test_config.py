"""Configs: strict, canonical, and errors that name the key."""

import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from benchmark.pretraining import PRETRAINING
from cmp import cli, config
from cmp.errors import CmpError
from cmp.parsing import read_yaml
from cmp.runs import launch

run = CliRunner().invoke


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"schedule": {"peek": 1e-3}}, ["schedule.peek", "schedule.peak"]),
        ({"shedule": {"peak": 1e-3}}, ["shedule", "schedule"]),
        ({"training": {"steps": "many"}}, ["training.steps", "many"]),
        ({"training": {"steps": "40"}}, ["training.steps"]),
        ({"training": {"steps": 40.5}}, ["training.steps"]),
        ({"training": {"steps": 0}}, ["training.steps"]),
        ({"training": {"batch": True}}, ["training.batch"]),
        ({"schedule": {"peak": -1.0}}, ["schedule.peak"]),
        ({"schedule": {"peak": float("nan")}}, ["schedule.peak"]),
        ({"schedule": {"name": "cosin"}}, ["schedule.name", "cosine"]),
        ({"mixture": {"pretraining": 0.5}}, ["mixture", "must be 1"]),
        ({"mixture": {"pretraining": 2.0}}, ["mixture.pretraining"]),
        ({"seeds": {"stream": -1}}, ["seeds.stream"]),
        ({"stream": None}, ["stream"]),
        ([], ["config"]),
    ],
)
def test_a_bad_config_is_refused_by_key(tree, words):
    with pytest.raises(CmpError) as error:
        config.parse(tree)
    for word in words:
        assert word in str(error.value)


def test_a_recipe_is_short_for_its_settings():
    tree = config.override(config.profile("cpu"), ["recipe=default"])
    written = [
        "mixture.pretraining=0.25",
        "mixture.update=0.25",
        "mixture.buffer=0.5",
        "merging.policy=ema",
        "schedule.name=cosine",
    ]
    plain = config.parse(config.override(config.profile("cpu"), written))
    assert config.parse(tree) == plain
    assert plain.stream.tasks == 20
    assert "recipe" not in str(plain.to_dict())


def test_what_is_set_by_name_has_its_say_over_a_recipe():
    run = config.parse({"recipe": "default", "merging": {"policy": "zs"}, "seed": 1})
    assert (run.merging.policy, run.merging.weight, run.carries_moments) == ("zs", 0.5, True)
    with pytest.raises(CmpError, match=r"must be 1, not 0\.5"):
        config.parse({"recipe": "default", "mixture": {"buffer": 0.0}})
    with pytest.raises(CmpError, match=r"recipe: 'best': unknown; the recipes are: default"):
        config.parse({"recipe": "best"})
    with pytest.raises(CmpError, match="recipe: 3"):
        config.parse({"recipe": 3})
    with pytest.raises(CmpError, match="merging"):
        config.parse({"recipe": "default", "merging": 3})


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("schedule=wsd", "schedule is a section; set schedule.name=wsd"),
        ("stream=random", "stream is a section; set stream.order=random"),
        ("sched.peak=0.1", "sched: unknown key; did you mean 'schedule.peak'?"),
        ("recipe=foo", "'foo': unknown; the recipes are: default"),
        ("methods=lora", "did you mean 'method.name'?"),
        ("lr=0.1", "did you mean 'schedule.peak'?"),
        ("batch_size=64", "did you mean 'training.batch'?"),
        ("merge=ties", "did you mean 'merging.policy' or 'merging.rule'?"),
        ("seeds.dat=1", "did you mean 'seeds.data'?"),
        ("sed=1", "did you mean 'seed'?"),
    ],
)
def test_a_wrong_assignment_is_answered_with_the_right_one(assignment, words):
    with pytest.raises(CmpError, match=re.escape(words)):
        config.parse(config.override(config.profile("cpu"), [assignment]))


def test_a_dotted_key_in_a_file_is_answered_with_its_section():
    with pytest.raises(CmpError, match=r"unknown key; write it as `model: \{name: \.\.\.\}`"):
        config.parse({"model.name": "small"})


def test_the_path_of_a_model_may_hold_a_space():
    assert config.Model("local-dir:/my models/new").name == "local-dir:/my models/new"
    with pytest.raises(CmpError, match=r"model\.name"):
        config.parse({"model": {"name": "hf-hub:my models/new"}})


def test_recipes_are_settings_that_any_profile_takes():
    for name in config.RECIPES:
        for profile in config.PROFILES:
            tree = config.override(config.profile(profile), [f"recipe={name}"])
            run = dict(config.flat_keys(config.parse(tree).to_dict()))
            assert run.items() >= dict(config.flat_keys(config.RECIPES[name])).items()


def test_a_recipe_stands_between_a_profile_and_what_is_asked_for():
    own = ["optimizer.carry=false", "recipe=default"]
    run_config = config.parse(config.override(config.profile("gpu"), own))
    assert run_config.mixture.buffer == config.RECIPES["default"]["mixture"]["buffer"]
    assert not run_config.optimizer.carry
    tree = {"recipe": "default", "mixture": {"pretraining": 0, "update": 0.5, "buffer": 0.5}}
    assert config.parse(tree).mixture.update == 0.5


def test_one_seed_sets_all_and_each_can_be_set_alone():
    seeds = config.parse({"seed": 3, "seeds": {"stream": 5}}).seeds
    assert seeds == config.Seeds(stream=5, init=3, data=3, augment=3)


def test_a_seed_of_a_command_or_a_call_sets_the_seeds_of_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("seeds: {stream: 5, init: 6}")
    seeds = config.read_config(str(path), ["seeds.data=7", "seed=3"]).seeds
    assert seeds == config.Seeds(stream=3, init=3, data=7, augment=3)
    seeds = launch.from_keywords(str(path), {"seeds": {"data": 7}, "seed": 3}).seeds
    assert seeds == config.Seeds(stream=3, init=3, data=7, augment=3)


def test_a_round_trip_keeps_what_it_changes():
    tree = config.override({}, ["schedule.peak=0.0004", "seed=2"])
    parsed = config.parse(tree)
    assert config.parse(parsed.to_dict()) == parsed
    assert config.parse(parsed.to_dict()).changes() == parsed.changes()
    assert parsed.schedule.peak == 0.0004
    changed = {f"seeds.{name}": 2 for name in ("stream", "init", "data", "augment")}
    assert parsed.changes() == {"schedule.peak": 0.0004} | changed


def test_overriding_leaves_the_profile_alone():
    before = repr(config.PROFILES)
    config.override(config.PROFILES["quick"], ["stream.tasks=2"])
    assert repr(config.PROFILES) == before


def test_a_section_may_be_given_as_a_mapping_and_its_other_keys_stay():
    given = ["schedule={peak: 0.1}"]
    assert config.override({}, given) == {"schedule": {"peak": 0.1}}
    tree = {"schedule": {"name": "wsd", "peak": 0.2}}
    assert config.override(tree, given) == {"schedule": {"name": "wsd", "peak": 0.1}}
    with pytest.raises(CmpError, match="training"):
        config.parse(config.override(config.profile("quick"), ["training=3"]))


@pytest.mark.parametrize(
    ("settings", "accepted"), [([], {0, 3}), (["training.passes=2"], {0, 1, 2, 3})]
)
def test_steps_are_given_for_every_task_or_with_passes_for_the_first_ones(settings, accepted):
    for known in range(5):
        steps = [9] * known
        tree = config.override({}, ["stream.tasks=3", f"training.task_steps={steps}", *settings])
        if known in accepted:
            assert config.parse(tree).training.task_steps == tuple(steps)
        else:
            with pytest.raises(CmpError, match=f"task_steps: {known} numbers for 3 tasks"):
                config.parse(tree)


@pytest.mark.parametrize("text", ["1e-3", "0.001", "1E-3", "1.0e-3", "+1e-3"])
def test_numbers_may_be_written_as_people_write_them(text):
    tree = config.override(config.profile("quick"), [f"schedule.peak={text}"])
    assert config.parse(tree).schedule.peak == 0.001


@pytest.mark.parametrize("text", ["/home/me/pics #2", "/x/my: pics", "2026", "[old]", "a # b: c"])
def test_a_text_is_taken_as_it_stands(text):
    run_config = config.parse(config.override({}, [f"data={text}", f"model.start='{text}'"]))
    assert (run_config.data, run_config.model.start) == (text, text)


@pytest.mark.parametrize("assignment", ["schedule.peak", "schedule.peak.x=1", "stream.tasks=[1"])
def test_a_bad_assignment_is_refused(assignment):
    with pytest.raises(CmpError, match=assignment.split("=")[0].replace(".", r"\.")):
        config.parse(config.override(config.parse({}).to_dict(), [assignment]))


@pytest.mark.parametrize("tree", [*config.PROFILES.values(), PRETRAINING])
def test_profiles_parse(tree):
    assert config.parse(tree)


def test_a_key_that_stands_twice_in_a_file_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("seed: 1\nseed: 2\n")
    with pytest.raises(CmpError, match="'seed' is given twice"):
        read_yaml(path)


@pytest.mark.defect
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: config.RunConfig(model={"name": "tiny"}), ["RunConfig: model", "Model(...)"]),
        (lambda: config.RunConfig(modell=config.Model()), ["modell", "'model'"]),
        (lambda: config.Schedule(peak=-1.0), ["Schedule: peak", "greater than 0", "-1.0"]),
        (lambda: config.Method("lorra"), ["Method: name", "'lorra'", "'lora'"]),
        (lambda: config.Merging(rule="ties"), ["rule 'ties'", "merging.policy=ema"]),
        (
            lambda: config.Merging(weight=0.3),
            ["weight 0.3", "leave it out, or choose policy 'ema'"],
        ),
        (lambda: config.Merging("zero-all", weight=0.3), ["weight 0.3", "use shares 'newest'"]),
        (lambda: config.Training(steps="3"), ["Training: steps", "'3'"]),
        (lambda: config.Stream(traits="nowhere"), ["traits 'nowhere'", "'random' reads no stat"]),
        (lambda: config.Stream("given", equal="images"), ["equal 'images'", "the updates that"]),
    ],
)
def test_a_section_made_in_python_is_refused_by_key(make, words):
    with pytest.raises(CmpError) as error:
        make()
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words)


def test_a_schedule_alone_is_refused_like_every_section():
    """In a process that has imported nothing else."""
    code = "import cmp\ntry: cmp.Schedule(peak=-1.0)\nexcept cmp.CmpError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Schedule: peak: ")


@pytest.mark.defect
@pytest.mark.parametrize(
    ("assignment", "names"),
    [
        ("peak=1e-3", ["schedule.peak"]),
        ("rank=4", ["method.rank"]),
        ("reverse=true", ["merging.reverse", "stream.reverse"]),
    ],
)
def test_a_key_without_its_section_is_answered_with_it(assignment, names):
    with pytest.raises(CmpError) as error:
        config.parse(config.override(config.profile("quick"), [assignment]))
    assert sorted(re.findall(r"'(\w+\.\w+)'", str(error.value))) == names


KEY = re.compile(r"^(\S+) = (.*)\n((?:    .+\n)+)", re.M)
"""A key of `cmpt config`: its default, and what is said of it."""


@pytest.mark.defect
def test_the_shell_explains_every_key():
    said = run(cli.app, ["config"]).output
    shown = {key: (default, about) for key, default, about in KEY.findall(said)}
    assert list(shown) == list(config.defaults())
    for key, (default, about) in shown.items():
        assert about.rstrip().endswith(".") and about.count("\n") >= 2, key
        if key not in ("mixture.pretraining", "mixture.update", "mixture.buffer"):  # of six digits
            tree = config.override({}, [f"{key}={default}"])
            assert dict(config.flat_keys(tree)) == {key: config.defaults()[key]}
    assert "in images" in shown["mixture.capacity"][1]
    assert "from 0 to 1" in shown["schedule.warmup"][1]
    assert "wsd" in shown["schedule.name"][1]
    assert max(map(len, said.splitlines())) <= 80


@pytest.mark.defect
def test_the_shell_explains_a_section_or_a_key_and_names_the_nearest():
    section = run(cli.app, ["config", "seeds"]).output
    assert section.startswith("seeds: ") and len(KEY.findall(section)) == 4
    assert [key for key, *_ in KEY.findall(run(cli.app, ["config", "data"]).output)] == ["data"]
    assert len(KEY.findall(run(cli.app, ["config", "schedule.peak"]).output)) == 1
    assert "did you mean 'schedule'" in str(run(cli.app, ["config", "shedule"]).exception)
