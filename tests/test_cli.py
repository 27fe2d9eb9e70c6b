"""The command line: what a person sees, and what misuse gets."""

import errno
import inspect
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from unittest.mock import Mock

import forked
import pyarrow
import pyarrow.parquet as pq
import pytest
import torch
import typer
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm
from typer.testing import CliRunner

from cmp import cli, config, data, errors, evaluation, models, parsing, project, starts
from cmp.cli import shared
from cmp.embedded.manifest import embedded_manifests
from cmp.errors import CmpError
from cmp.readers import class_statistics
from cmp.releases import compare
from cmp.runs import checkpoints, launch

run = CliRunner().invoke


def test_a_message_shows_only_the_ends_of_an_endless_name(capsys):
    cli.complain(f"/here/{'long' * 1250}.yaml: no such file")
    said = capsys.readouterr().err
    assert said.startswith("cmpt: /here/long") and said.endswith("long.yaml: no such file\n")
    assert len(said) < 500
    path = "/".join(["folder"] * 80)
    cli.complain(path)
    assert capsys.readouterr().err == f"cmpt: {path}\n"


def test_list_names_every_dataset_with_its_counts():
    lines = run(cli.app, ["data", "list"]).stdout.splitlines()
    for dataset in embedded_manifests().values():
        [line] = [line for line in lines if f" {dataset.name} " in line]
        numbers = [int(cell) for cell in line.replace("│", " ").split() if cell.isdigit()]
        assert numbers == [n for n in dataset.counts.model_dump().values() if n]


def test_show_writes_a_contact_sheet(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    sheet = tmp_path / "flags.png"
    result = run(cli.app, ["data", "show", "new-flags", "--sheet=~/flags.png"])  # as shells pass it
    assert "Circle Flags by HatScripts, MIT" in result.stdout
    assert "96 classes" in result.stdout
    with Image.open(sheet) as image:
        assert image.size == (8 * 132, 8 * 144)
        assert len(image.getcolors(100_000)) > 100


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data", "show", "nothing"], ["nothing", "new-flags"]),
        (["data", "build", "nothing"], ["nothing", "new-flags"]),
        (["eval", "tinny"], ["tinny", "tiny"]),
        (["eval", "tiny", "--seed", "77"], ["77", "cmpt pretrain tiny --seed 77"]),
        (["eval", "tiny", "--start", "absent.safetensors"], ["absent.safetensors"]),
        (["pretrain", "tiny", "schedule.peek=1"], ["schedule.peek", "schedule.peak"]),
        (["pretrain", "RN50"], ["RN50", "tiny-vit"]),
        (["run", "quick", "model.name=tinny", "--dry-run"], ["tinny", "tiny"]),
        (["run", "quick", "seed=77"], ["annealed base 77", "cmpt pretrain small --seed 77"]),
        (["book", "--chapter", "04", "-P", "profile=quick,cpu"], ["-P profile", "--profile"]),
        (
            ["run", "quick", "model.start=cosine", "seed=9"],
            ["cmpt pretrain small schedule.name=cosine"],
        ),
        (["run", "quick", "mixture.buffer=0.2"], ["must be 1, not"]),
        (["run", "quick", "foo=1"], ["foo: unknown key"]),
        (["doctor", "model.name=tiny"], ["model.name=tiny", "settings need --profile"]),
        (["budget", "--total", "-5"], ["--total", "-5", "above 0"]),
        (["budget", "--total", "nan"], ["--total", "nan"]),
        (["budget", "--total", "inf"], ["--total", "inf"]),
        (["budget", "--total", "1e300"], ["--total", "at most"]),
        (["plan", "--gmafs", "inf"], ["compute", "inf"]),
        (["plan", "--gpu-hours", "1e300"], ["compute", "at most"]),
        (["plan", "--model", "vit-b-16", "--gpu-hours", "1"], ["did you mean 'ViT-B-16'?"]),
        (["run", "quick", "training.budget=1e300"], ["training.budget", "1000000"]),
        (
            ["run", "quick", "training.batch=2147483647"],
            ["training.batch", "training.batch="],
        ),
        (
            ["run", "quick", "model.name=local-dir:/no", "model.start=hub"],
            ["model.name", "no weights"],
        ),
        (
            ["run", "quick", "model.name=hf-hub:///", "model.start=hub", "--dry-run"],
            ["model.name", "hf-hub:///"],
        ),
        (["stream", "import", "/dev/zero", "x"], ["/dev/zero", "not a regular file"]),
        (["stream", "make", "x", "--counts", "/dev/zero"], ["/dev/zero", "not a regular file"]),
        (["stream", "make", "a/b"], ["'a/b'", "letters, digits"]),
        (["stream", "make", "embedded"], ["'embedded'", "choose another"]),
        (["eval", "tiny", "--start", "/dev/zero"], ["/dev/zero", "not a file"]),
        (["--plugin", "/dev/zero", "doctor"], ["/dev/zero", "no such regular file"]),
        (
            ["merge", "interpolation", "/dev/zero", "/dev/zero", "-o", "x.safetensors"],
            ["no such regular file"],
        ),
        (["data", "show", "new-flags", "--sheet", "thesis.txt"], ["--sheet", "ends in .png"]),
        (["data", "show", "new-flags", "--sheet", "gone/a.png"], ["--sheet", "folder gone"]),
        (["eval", "tiny", "--device", "tpu"], ["device 'tpu'", "choose cpu"]),
        (["study", "99"], ["99.yaml", "no such study", "front"]),
        (["study", "front", "--device", "tpu", "--dry-run"], ["device 'tpu'", "choose cpu"]),
        (["study", "front", "--profile", "quick", "--publish"], ["cpu profile, not 'quick'"]),
        (["book", "--publish", "--profile", "cpu"], ["--publish", "leave out --profile"]),
        (["book", "--publish", "--seeds", "2"], ["--publish", "--seeds"]),
        (["book", "-P", "profile=cpu"], ["-P profile", "--profile"]),
        (["lab", "--diff", "03", "--reset", "03"], ["only one of --diff, --reset"]),
        (["lab", "--diff", "03", "--prepare"], ["only one of", "--prepare"]),
        (["study", "front", "--resume"], ["--resume", "alone", "repeat its command"]),
        (["study", "--pause", "--resume"], ["--pause and --resume", "alone"]),
        (["study", "--resume", "--jobs", "3"], ["--pause and --resume", "alone"]),
        (["site", "--picture", "--predictions"], ["only one of --picture", "--predictions"]),
        (["doctor", "--micro-batch", "7"], ["--micro-batch: needs --profile"]),
        (["doctor", "--compile"], ["--compile: needs --profile"]),
        (["results", "verify", "3f2a", "--sample", "2"], ["--sample", "leave out the id"]),
    ],
)
def test_misuse_is_refused_by_name(arguments, words):
    error = run(cli.app, arguments).exception
    assert isinstance(error, CmpError)
    assert "\n" not in str(error)
    for word in words:
        assert word in str(error)


def test_eval_prints_every_dataset_by_role_and_the_aggregates(monkeypatch):
    monkeypatch.setattr(data, "load_data", lambda source: forked.small_corpus())
    result = run(cli.app, ["eval", "tiny"])
    assert result.exit_code == 0, result.output
    first = [line.split()[0] for line in result.output.splitlines() if line.split()]
    assert [name for name in first if name in ("new-flags", "shapes", "A_KA", "A_ZS", "GM")] == [
        "new-flags", "shapes", "A_KA", "A_ZS", "GM"
    ]  # fmt: skip


def test_eval_names_the_base_of_a_model_of_the_book_alone(monkeypatch):
    monkeypatch.setattr(data, "load_data", lambda source: None)
    network = models.create_model("tiny")
    scores = evaluation.evaluate(network, "tiny", forked.small_corpus())
    monkeypatch.setattr(models, "load_model", lambda *_: network)
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: scores)
    other = ["eval", "ViT-B-32", "--start", "laion2b_s34b_b79k", "--device", "cpu"]
    assert "ViT-B-32, laion2b_s34b_b79k, test, in" in run(cli.app, other).output
    assert "tiny, annealed base 0, test, in" in run(cli.app, ["eval", "tiny"]).output


def test_the_command_that_serves_the_site_works_in_any_folder(monkeypatch):
    monkeypatch.setattr("lab.site.make_site", lambda: Path("/my project/_build/html"))
    assert "--directory '/my project/_build/html'" in run(cli.app, ["site"]).output


def test_a_wrong_choice_is_answered_with_the_choices():
    result = run(cli.app, ["eval", "tiny", "--split", "train"])
    assert result.exit_code == 2
    assert "train" in result.output and "validation" in result.output


def test_eval_takes_the_start_that_a_run_takes(monkeypatch):
    monkeypatch.setattr(data, "load_data", lambda source: forked.small_corpus())
    starts = []
    load = models.load_model
    monkeypatch.setattr(
        models, "load_model", lambda model, seed: starts.append(model) or load(model, seed)
    )
    assert run(cli.app, ["eval", "tiny", "--start", "random"]).exit_code == 0
    assert starts == [config.Model("tiny", "random")]
    cpu = ["--device", "cpu"]
    error = run(cli.app, ["eval", "ViT-B-32", "--start", "laion2b_s34b_b79q", *cpu]).exception
    assert isinstance(error, CmpError) and "laion2b_s34b_b79k" in str(error)


COUNTED = "stream make mine --model tiny --seed 3 --counts COUNTS"


@pytest.mark.parametrize(
    ("command", "module", "function", "arrives"),
    [
        ("eval tiny --split validation", evaluation, "evaluate", {"split": "validation"}),
        (
            "compare tiny:annealed tiny:annealed --split validation",
            compare, "compare", {"split": "validation", "arrived": None},
        ),
        (
            "compare tiny:annealed tiny:annealed --new ''",
            compare, "compare", {"split": "test", "arrived": []},
        ),
        (
            "run quick --tensorboard boards",
            launch, "compute", {"boards": {"tensorboard": "boards"}},
        ),
        (COUNTED, models, "load_model", {"config": config.Model("tiny"), "seed": 3}),
        (COUNTED, class_statistics, "measure_classes", {"name": "tiny", "counts": {"a cat": 2}}),
    ],
)  # fmt: skip
def test_an_option_reaches_what_it_is_for(
    tmp_path, monkeypatch, command, module, function, arrives
):
    arrived = {}
    signature = inspect.signature(getattr(module, function))

    def stop(*args, **kwargs):
        arrived.update(signature.bind(*args, **kwargs).arguments)
        raise typer.Exit

    monkeypatch.setattr(data, "load_data", lambda source: None)
    # the base that --seed names need not be on this machine
    monkeypatch.setattr(models, "load_model", lambda *_: models.create_model("tiny"))
    monkeypatch.setattr(module, function, stop)
    (tmp_path / "counts.csv").write_text("class,count\na cat,2\n")
    words = shlex.split(command.replace("COUNTS", str(tmp_path / "counts.csv")))
    result = run(cli.app, words)
    assert result.exit_code == 0, result.exception
    assert {key: arrived.get(key) for key in arrives} == arrives


@pytest.mark.parametrize("peaks", ["0", "-0.1", "0.1,1000", "nan", "0.1,x"])
def test_peaks_out_of_range_are_refused(tmp_path, peaks):
    command = ["tune", "--start", "tiny", "--data", str(tmp_path), "-o", str(tmp_path / "x.yaml")]
    error = run(cli.app, [*command, "--peaks", peaks]).exception
    assert isinstance(error, CmpError) and str(error).startswith(f"--peaks: {peaks!r}")


@pytest.mark.parametrize(
    ("settings", "device"),
    [
        (["quick"], "cpu"),
        (["gpu", "data=pictures"], "cuda"),
        (["quick", "model.name=ViT-B-32"], "cuda"),
    ],
)
def test_the_device_follows_from_the_model(settings, device):
    run_config = config.read_config(settings[0], settings[1:])
    assert starts.default_device(run_config.model.name) == device
    assert starts.default_device(run_config.model.name, "cuda:1") == "cuda:1"


OUTSIDE = """import sys
from importlib import metadata
installed = metadata.entry_points
metadata.entry_points = lambda group: [] if group == "cmp.commands" else installed(group=group)
from cmp.cli import main
for command in sys.argv[1:]:
    sys.argv = ["cmpt", *command.split()]
    try:
        main()
    except SystemExit as stop:
        for stream in (sys.stdout, sys.stderr):
            print(f"\\0{stop.code}\\0", end="", file=stream)
"""
NEED_A_CHECKOUT = ("study front --publish", "book --dry-run", "data build", "results verify")
NO_DATASET, TOO_LONG = "data show nothing", f"data init {'a' * 300}"


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """Command -> (status, standard output, standard error) in an empty folder, as from a wheel: no
    book, no folder `_build`; all in one process, for it starts slowly."""
    commands = ["doctor", NO_DATASET, TOO_LONG, *NEED_A_CHECKOUT]
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2])}
    environment.pop("CMP_BUILD", None)
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDE, *commands],
        cwd=tmp_path_factory.mktemp("empty"), env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    said, errors = done.stdout.split("\0"), done.stderr.split("\0")
    statuses = map(int, said[1::2])
    return dict(zip(commands, zip(statuses, said[::2], errors[::2], strict=False), strict=True))


def test_the_shell_prints_a_sentence_and_ends_with_status_2(outside):
    status, said, errors = outside[NO_DATASET]
    assert (status, said) == (2, "")
    assert errors.startswith("cmpt: no dataset is called 'nothing'")
    assert errors.count("\n") == 1


def test_version():
    assert run(cli.app, ["--version"]).stdout.startswith("cmpt 0.")


WITHOUT_TORCH = """import sys
from cmp import cli
from typer.testing import CliRunner
for command in sys.argv[1:]:
    said = CliRunner().invoke(cli.app, command.split()).output
    slow = {"torch", "numpy", "pandas"} & sys.modules.keys()
    print(command, *said.split(), "waits" if slow else "is fast", sep=" ")
"""


def test_no_help_and_no_typing_error_waits_for_slow_imports():
    wrong = {"rnu": "'run'?", "run nowhere.yaml": "", "update --dta x": "--data"}
    commands = {f"{words} --help": f"Usage: root {words} " for words, _ in leaves()} | wrong
    line = [sys.executable, "-c", WITHOUT_TORCH, *commands]
    said = subprocess.run(line, capture_output=True, text=True, timeout=120).stdout.splitlines()
    for answer, (command, words) in zip(said, commands.items(), strict=True):
        assert answer.startswith(command) and words in answer and answer.endswith("is fast")


@pytest.mark.parametrize("threads", ["0", "100000"])
def test_no_threads_and_more_than_any_machine_has_are_refused_by_the_option(threads):
    commands = ["eval tiny", "run quick", "stream make x", "pretrain tiny"]
    commands += ["bench step", "merge ties a b -o c"]
    for command in commands:
        result = run(cli.app, [*command.split(), "--threads", threads])
        assert result.exit_code == 2 and "--threads" in result.output


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("results verify ''", "run_id"),
        ("release show ''", "RELEASE"),
        ("update r --data x -o y --retain x --retain ''", "--retain"),
        ("update r --data '' -o y", "--data"),
        ("eval tiny --data ''", "--data"),
    ],
)
def test_an_empty_value_stands_for_nothing(command, name):
    """It is of a variable that is not set, and would name the current folder or any run."""
    result = run(cli.app, shlex.split(command), env={"COLUMNS": "200"})
    assert result.exit_code == 2 and f"{name}': must not be empty" in result.output


def test_a_batch_that_no_shapes_could_have_is_refused_by_the_option():
    result = run(cli.app, ["budget", "--batch", "2147483647"])
    assert result.exit_code == 2 and "--batch" in result.output


def test_what_a_dry_run_advises_works():
    """The start of the profile is of embedded models; none could be pretrained for another."""
    said = run(cli.app, ["run", "quick", "model.name=ViT-B-16", "--dry-run"]).output
    assert "set model.start to a tag" in said and "cmpt pretrain ViT-B-16" not in said


def test_the_build_folder_is_one_wherever_a_child_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CMP_BUILD", "mine")
    assert run(cli.app, ["study", "--pause"]).exit_code == 0
    assert os.environ["CMP_BUILD"] == str(tmp_path / "mine")
    assert (tmp_path / "mine" / "paused").exists()


def test_only_a_checkout_of_this_project_holds_the_build_folder(tmp_path, monkeypatch):
    """A folder `_build` may be of Sphinx, and that of the manifests anybody's."""
    monkeypatch.delenv("CMP_BUILD", raising=False)
    for folder in (inner := tmp_path / "checkout" / "docs", tmp_path / "_build"):
        folder.mkdir(parents=True)
    (tmp_path / "data_manifests").mkdir()
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "theirs"\n')
    monkeypatch.chdir(inner)
    assert project.build_folder() == inner / "_build"
    shutil.copy(Path(cli.__file__).parents[2] / "pyproject.toml", inner.parent)
    assert project.build_folder() == inner.parent / "_build"


def test_a_disk_that_refuses_is_a_sentence(outside):
    status, _, errors = outside[TOO_LONG]
    assert status == 2 and "File name too long" in errors
    assert "Traceback" not in errors


def test_a_pipe_is_not_waited_for(tmp_path):
    pipe = str(tmp_path / "x.safetensors")
    os.mkfifo(pipe)
    for command, words in (
        (f"merge interpolation {pipe} {pipe} -o y.safetensors", "regular file"),
        (f"eval tiny --start {pipe}", "not a file"),
    ):
        assert words in str(run(cli.app, command.split()).exception)


def leaves():
    """Every command, those of groups too, by its words."""
    for name, command in typer.main.get_command(cli.app).commands.items():
        for child in getattr(command, "commands", {None: command}).items():
            yield (f"{name} {child[0]}" if child[0] else name), child[1]


@pytest.mark.parametrize(("words", "command"), list(leaves()))
def test_every_command_has_an_example_that_it_takes_and_explains_its_options(words, command):
    [example] = re.findall(r"^Example: cmpt (.*)$", command.help, re.M)
    assert example.startswith(words)
    arguments = shlex.split(example.removeprefix(words))
    command.make_context(words, arguments)  # refuses what it does not take
    for parameter in command.params:
        assert parameter.name == "help" or parameter.help.endswith("."), parameter.name


def test_the_only_option_of_a_command_may_have_a_long_description():
    text, words = shared.split_docstring("Do it.\n\nArgs:\n    way: One that\n        is long.")
    assert (text, words) == ("Do it.", {"way": "One that is long."})


def test_the_help_is_grouped_and_names_every_command_once():
    lines = run(cli.app, ["--help"], env={"COLUMNS": "200"}).stdout.splitlines()
    panels = [line.strip("╭─╮ ") for line in lines if line.startswith("╭")]
    assert sorted(panels) == sorted(["Options", *cli.PANELS, "Book and plug-ins"])
    names = [line.split()[1] for line in lines if line.startswith("│ ")]
    ours = [name for panel in cli.PANELS.values() for name in panel]
    ours += ["book", "lab", "plan", "pretrain", "site", "study"]
    assert sorted(name for name in names if not name.startswith("--")) == sorted(ours)


@pytest.mark.parametrize("command", NEED_A_CHECKOUT)
def test_outside_a_checkout_the_book_s_commands_say_what_they_need(outside, command):
    status, said, errors = outside[command]
    assert (status, said) == (2, "")
    assert len(errors.splitlines()) == 1 and "repository" in errors


def test_doctor_checks_the_batches_that_a_run_refuses():
    settings = ["quick", "training.batch=4096"]
    said = run(cli.app, ["doctor", "--profile", *settings])
    [line] = [line for line in said.output.splitlines() if line.startswith("batches")]
    words = "4096 takes more samples from a pool than it holds; training.batch="
    assert said.exit_code == 1 and words in line
    assert words in str(run(cli.app, ["run", *settings, "--dry-run"]).exception)
    well = run(cli.app, ["doctor", "--profile", "quick"])
    assert well.exit_code == 0 and "batches   here" in well.output


def test_doctor_sees_a_build_folder_in_which_nothing_can_be_written(build, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    said = run(cli.app, ["doctor", "--profile", "quick"])
    assert f"disk      missing   nothing can be written to {build.parent}" in said.output
    assert said.exit_code == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.long
def test_doctor_takes_the_options_that_it_advises():
    large = ["doctor", "--profile", "gpu", "training.batch=1024", "model.start=laion2b"]
    said = run(cli.app, large).output
    assert "--micro-batch 512 needs 47 GB, and with --checkpoint-activations the same" in said
    assert "batch needs 16 GB" in said
    assert "nor a tag of 'ViT-B-16'; open_clip's tags for it: openai, " in said
    said = run(cli.app, [*large, "--micro-batch", "512"]).output
    assert "memory    here      a step needs 47 GB" in said
    said = run(cli.app, [*large, "--checkpoint-activations"]).output
    assert "memory    here      a step needs 16 GB" in said


def test_doctor_works_in_an_empty_folder(outside):
    status, said, errors = outside["doctor"]
    assert (status, errors) == (1, "")
    lines = {line.split()[0]: line for line in said.splitlines()}
    assert "missing" in lines["data"] and "cmpt data build" in lines["data"]
    assert "12 of small" in lines["bases"]  # those of the checkout


@pytest.fixture
def bug(monkeypatch):
    """A command line whose command has a bug."""

    def fail():
        raise KeyError("no such\nkey")

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


@pytest.mark.defect
def test_a_bug_is_a_sentence_above_its_traceback(bug, capfd):
    with pytest.raises(SystemExit) as end:
        cli.main()
    sentence, *lines = capfd.readouterr().err.splitlines()
    assert end.value.code == 70
    assert sentence.startswith("cmpt: a bug in this program or") and "open an issue" in sentence
    assert lines[0] == "Traceback (most recent call last):" and lines[-1].startswith("KeyError: ")
    assert '    raise KeyError("no such\\nkey")' in lines


@pytest.mark.defect
@pytest.mark.parametrize("width", ["30", "80"])
def test_a_long_name_does_not_cut_off_the_numbers_beside_it(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", width)
    cells = ("12.3", "45.6", "−10.1", "−12.4 to 3.4", 12, "1.5", 1234)
    others = ("–", "–", "–", "no interval", 0, "-", 0)
    columns = ("", "before", "now", "change", "95%", "lost", "% lost", "gained")
    shared.print_table(columns, [("a-set-" * 9, *cells), ("b", *others)])
    said = capsys.readouterr().out
    assert "−10.1 −12.4 to 3.4   12    1.5  1,234" in said and "no interval" in said
    assert "a-set-a-set-" in said  # not a letter a line
    assert "a-set-" * 9 in "".join(line.split(" ")[1] for line in said.splitlines() if line)


@pytest.mark.defect
def test_a_locale_in_which_names_would_be_misread_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "iso8859-1")
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "not UTF-8 but iso8859-1, so names of files would be misread" in capsys.readouterr().err


@pytest.mark.defect
def test_a_terminal_without_all_letters_stops_nothing(bug, monkeypatch, tmp_path):
    streams = [(tmp_path / name).open("w", encoding="latin-1") for name in "ab"]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    monkeypatch.setattr(cli, "app", lambda: [typer.echo("− of α", err=is_err) for is_err in (0, 1)])
    with pytest.raises(SystemExit):
        cli.main()
    for stream in streams:
        stream.close()
        assert Path(stream.name).read_bytes() == b"? of ?\n"


def broken_stream(kind):
    """A stream to a full disk, to a reader that has ended, or one that was closed."""
    if kind == "full":
        return open("/dev/full", "w")
    ends = os.pipe()
    os.close(ends[0])
    return os.fdopen(ends[1], "w") if kind == "left" else os.close(ends[1])


@pytest.mark.defect
@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("kind", ["full", "left", "closed"])
def test_a_run_whose_output_cannot_be_written_goes_on(bug, monkeypatch, capfd, name, kind):
    """Its bar, its lines and its warnings are lost, and a full disk is said."""
    done = []

    def work():
        with tqdm(total=9, mininterval=0) as bar:
            for step in range(9):
                bar.update()
                bar.write(f"step {step}")
        typer.echo("x" * 9999, err=name == "stderr")
        warnings.warn("careful", stacklevel=1)
        done.append(True)

    monkeypatch.setattr(cli, "app", work)
    monkeypatch.setattr(sys, name, broken_stream(kind))
    with pytest.raises(SystemExit) as end:
        cli.main()
    is_said = (name, kind) == ("stdout", "full")
    assert done and end.value.code == (2 if is_said else 0)
    assert ("No space left" in capfd.readouterr().err) == is_said


LIMITS = [
    (torch.OutOfMemoryError("CUDA out of memory: 20 GiB.\nMore"), "--micro-batch .*training.batch"),
    (MemoryError(), "memory ran out .*--micro-batch .*training.batch"),
    (pyarrow.lib.ArrowMemoryError("malloc of size 64 failed"), "ran out .malloc of size 64 failed"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "memory ran out"),
    (ImportError("libtorch.so: failed to map segment: Cannot allocate memory"), "memory ran out"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory ran out"),
    (RuntimeError("can't start new thread"), "no further thread .*--threads .*CMP_WORKERS"),
    (OSError(errno.EAGAIN, "Resource temporarily unavailable"), "no further thread or process"),
]
"""Errors of a machine that is too small, and what is said of them."""


@pytest.mark.defect
@pytest.mark.parametrize(("error", "words"), LIMITS)
def test_a_limit_of_the_machine_is_no_fault(bug, monkeypatch, capfd, error, words):
    monkeypatch.setattr(cli, "app", Mock(side_effect=error))
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capfd.readouterr().err
    assert end.value.code == 2 and len(said.splitlines()) == 1
    assert re.search(words, said)


@pytest.mark.parametrize(("error", "words"), LIMITS[1:])
def test_a_limit_of_the_machine_is_no_damage(tmp_path, monkeypatch, error, words):
    fail, path = Mock(side_effect=error), tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with (
        pytest.raises(CmpError, match=rf"^a: .*{words}"),
        errors.explain_errors("a", "; repair it"),
    ):
        fail()
    monkeypatch.setattr(pq, "read_schema", fail)
    with pytest.raises(type(error)):
        parsing.read_table(path, {})
    monkeypatch.setattr(models, "safe_open", fail)
    with pytest.raises(type(error)):
        models.load_from_file("tiny", path)


def test_a_checkpoint_that_memory_does_not_hold_is_not_damaged(tmp_path, monkeypatch):
    """A damaged one is passed over, and deleted with the next."""
    refuse = Mock(side_effect=SafetensorError("Cannot allocate memory (os error 12)"))
    monkeypatch.setattr(checkpoints, "safe_open", refuse)
    (tmp_path / "a").touch()
    with pytest.raises(CmpError, match="memory ran out") as refusal:
        checkpoints.read_progress(tmp_path / "a")
    assert not isinstance(refusal.value, checkpoints.Damaged)


def test_a_warning_is_told_once(bug, monkeypatch, capfd):
    say = lambda words: warnings.warn(words, stacklevel=1)  # noqa: E731
    monkeypatch.setattr(cli, "app", lambda: [say(words) for words in ("same", "same", "other")])
    with pytest.raises(SystemExit), warnings.catch_warnings(action="always"):
        cli.main()
    assert capfd.readouterr().err.splitlines() == ["cmpt: same", "cmpt: other"]


def test_what_breaks_a_command_off_is_no_bug(bug, monkeypatch):
    monkeypatch.setattr(cli, "app", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        cli.main()


@pytest.mark.defect
@pytest.mark.parametrize(
    "command",
    ["merge interpolation a b -o", "export 3f2a -o", "export 3f2a --to hf -o",
     "export tiny:random --to onnx -o"],
)  # fmt: skip
def test_nothing_is_written_into_a_folder_that_is_not_there(tmp_path, command):
    """A folder that is misspelt is not made."""
    out = tmp_path / "reslts" / "new.safetensors"
    error = run(cli.app, [*command.split(), str(out)]).exception
    assert isinstance(error, CmpError)
    assert "--out" in str(error) and str(out.parent) in str(error) and "create it" in str(error)
    assert not out.parent.exists()


@pytest.mark.defect
@pytest.mark.parametrize(
    "command", ["run quick", "run quick --dry-run", "doctor --profile quick", "eval tiny"]
)
def test_a_device_of_another_kind_is_refused_with_those_there_are(command):
    error = run(cli.app, [*command.split(), "--device", "mps"]).exception
    assert isinstance(error, CmpError)
    assert "device 'mps'" in str(error) and "cpu" in str(error) and "cuda" in str(error)
    assert len(str(error)) < 100


@pytest.mark.defect
def test_the_shortcuts_of_a_config_are_explained_and_numbers_are_whole():
    for name, words in (("seed", "seeds"), ("recipe", "default")):
        said = run(cli.app, ["config", name])
        assert said.exit_code == 0 and words in said.output
    said = run(cli.app, ["config"]).output
    assert "at most 1,048,576" in said and "e+" not in said


@pytest.mark.defect
def test_in_a_deleted_folder_a_command_says_so(tmp_path, monkeypatch):
    monkeypatch.delenv("CMP_BUILD", raising=False)
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    error = run(cli.app, ["results", "ls"]).exception
    assert isinstance(error, CmpError) and "has been deleted; change to another" in str(error)


@pytest.mark.defect
def test_ctrl_c_during_the_first_imports_prints_nothing(tmp_path):
    slow = "import pathlib, time\npathlib.Path('begun').touch()\ntime.sleep(60)\n"
    (tmp_path / "typer.py").write_text(slow)
    path = os.pathsep.join([str(tmp_path), str(Path(cli.__file__).parents[2])])
    process = subprocess.Popen(
        [sys.executable, "-m", "cmp", "doctor"], cwd=tmp_path, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path},
        # a shell's background job ignores Ctrl-C, and so would this process
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    forked.await_true((tmp_path / "begun").exists, "an import")
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == b""
    assert process.returncode == -signal.SIGINT
