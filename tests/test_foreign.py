"""Weights that others made, and the way back to open_clip."""

import dataclasses
import json
import os
import re
import shutil
import signal

import forked
import open_clip
import options
import pytest
import torch
from huggingface_hub import constants
from pictures import picture, tree, write_manifest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from siglip import SIGLIP_VISION
from typer.testing import CliRunner

from cmp import cli, config, evaluation, models, starts
from cmp.bench import networks  # noqa: F401, open_clip gets its models
from cmp.cli import exporting
from cmp.config import Model, RunConfig
from cmp.data import load_data
from cmp.embedded import packed
from cmp.errors import CmpError, Interrupted
from cmp.files import SHORT_ID
from cmp.merging.files import merge_files
from cmp.project import build_folder
from cmp.runs import identity, launch, logs, lookup, preflight, store, verify
from cmp.runs.lookup import unfinished_runs
from cmp.runs.runner import Observer
from lab.evidence import studies

SMALL = (
    "stream.tasks=2", "training.steps=2", "training.batch=8", "evaluation.subset=8",
    "evaluation.full=false", "training.precision=fp32",
)  # fmt: skip
NANO = "bench-nano"


@pytest.fixture
def corpus(monkeypatch):
    """A small part of the benchmark, for the test and for the runs of its commands."""
    found = forked.small_corpus()
    monkeypatch.setattr(packed, "load_embedded", lambda *roles: found)
    return found


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """An open_clip network with random weights, and the files that it may come in."""
    folder = tmp_path_factory.mktemp("theirs")
    fused = models.create_fused_model(NANO, 7)
    weights = {name: x.detach().contiguous() for name, x in fused.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    torch.save(weights, folder / "plain.pt")
    parallel = {f"module.{name}": x for name, x in weights.items()}
    torch.save({"epoch": 3, "state_dict": parallel}, folder / "epoch_3.pt")
    save_file(models.create_model(NANO, 7).state_dict(), folder / "split.safetensors")
    return folder, fused.eval()


@pytest.fixture
def with_data(tmp_path, monkeypatch):
    """A build folder of the test's own, with the same data."""
    (tmp_path / "data").symlink_to((build_folder() / "data").resolve())
    monkeypatch.setenv("CMP_BUILD", str(tmp_path))


def write_config(folder, model_cfg=None, preprocess_cfg=None) -> str:
    """Make a folder a model as hubs have them, but for its weights; the model's name."""
    about = {"model_cfg": model_cfg or open_clip.get_model_config(NANO)}
    about |= {"preprocess_cfg": preprocess_cfg} if preprocess_cfg else {}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    return f"local-dir:{folder}"


def features(model, x, texts) -> tuple:
    """A model's features of images and texts."""
    with torch.no_grad():
        return models.encode_image(model.eval(), x), models.encode_text(model, texts)


def features_by_open_clip(network, x, texts) -> tuple:
    """The same without a line of this package."""
    network.eval()
    with torch.no_grad():
        return network.encode_image(x, normalize=True), network.encode_text(texts, normalize=True)


def shell(*words) -> str:
    """What a command prints, which succeeds."""
    done = CliRunner().invoke(cli.app, [*map(str, words)])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


@pytest.mark.numbers
@pytest.mark.parametrize(
    "name", ["model.safetensors", "plain.pt", "epoch_3.pt", "split.safetensors"]
)
def test_every_layout_of_a_checkpoint_gives_the_same_network(theirs, name):
    folder, fused = theirs
    model = models.load_model(Model(NANO, str(folder / name)), 0)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = models.tokenizer(NANO)(["a red cat", "one object"])
    expected = features_by_open_clip(fused, x, tokens)
    torch.testing.assert_close(features(model, x, tokens), expected, atol=1e-6, rtol=0)


def test_another_architecture_is_refused_with_tensors_that_differ(theirs):
    folder, _ = theirs
    for model, name in (("bench-micro", "epoch_3.pt"), ("tiny", "model.safetensors")):
        with pytest.raises(
            CmpError, match=rf"{name}: .*another architecture than '{model}'.*visual"
        ):
            models.load_model(Model(model, str(folder / name)), 0)


class Thing:
    """What only an unpickler could read."""


def test_what_is_no_checkpoint_is_refused(tmp_path):
    torch.save({"state_dict": {"a": Thing}}, tmp_path / "code.pt")
    (tmp_path / "text.safetensors").write_text("not tensors")
    for name in ("code.pt", "text.safetensors"):
        start = Model(NANO, str(tmp_path / name))
        with pytest.raises(CmpError, match=rf"{name}.*damaged or contains more than tensors") as e:
            models.load_model(start, 0)
        assert "weights_only" not in str(e.value)  # torch would run what is in the file
        with pytest.raises(CmpError, match=rf"{name}: cannot be read .* only tensors") as e:
            identity.start_identity(RunConfig(model=start))
        assert "trust" not in str(e.value)


def test_a_start_that_is_nothing_is_refused_with_the_model_s_tags():
    with pytest.raises(CmpError, match=r"model\.start: 'anealed': .*laion2b_s34b_b88k"):
        models.load_model(Model("ViT-B-16", "anealed"), 0)
    with pytest.raises(CmpError, match=r"model\.name=ViT-B-32-quickgelu"):
        starts.locate_weights("ViT-B-32", "openai")
    assert "hf_hub" in starts.pretrained_tag("ViT-B-16", "laion2b_s34b_b88k")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, and an empty cache of hubs."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


HUB = "hf-hub:someone/nano"


def test_what_a_hub_would_give_is_refused_offline_with_a_sentence(offline):
    with pytest.raises(CmpError, match="not on this machine and cannot be downloaded"):
        starts.locate_weights("ViT-B-16", "laion2b_s34b_b88k")
    with pytest.raises(CmpError, match=r"model\.start.*cannot be downloaded"):
        models.load_model(Model(HUB, "hub"), 0)
    with pytest.raises(CmpError, match=r"model\.start=hub"):
        models.load_model(Model(HUB, "annealed"), 0)
    with pytest.raises(CmpError, match=r"'hub'.*hf-hub:"):
        models.load_model(Model(NANO, "hub"), 0)


def test_a_folder_with_a_config_is_a_model(theirs, tmp_path):
    name = write_config(tmp_path, preprocess_cfg={"mean": [0.5] * 3})
    with pytest.raises(CmpError, match="no weights in that folder"):
        models.load_model(Model(name, "hub"), 0)
    shutil.copy(theirs[0] / "model.safetensors", tmp_path / "open_clip_model.safetensors")
    model = models.load_model(Model(name, "hub"), 0)
    expected = models.weights_digest(models.create_model(NANO, 7))
    assert models.weights_digest(model) == expected
    assert tuple(model.visual.image_mean) == (0.5, 0.5, 0.5)


@pytest.mark.defect
def test_the_device_of_a_folder_s_model_follows_from_its_config(tmp_path):
    name = write_config(tmp_path, open_clip.get_model_config("small"))
    assert starts.default_device(name) == "cpu"
    assert starts.default_device(name, "cuda:1") == "cuda:1"
    write_config(tmp_path)
    assert starts.default_device(name) == "cuda"
    (tmp_path / "open_clip_config.json").unlink()
    assert starts.default_device(name) == "cpu"  # loading it then names the config


@pytest.mark.defect
def test_a_folder_s_model_takes_the_weights_of_another_file(theirs, corpus, tmp_path):
    """As the dry run says: both look at the file, not at the weights beside the config."""
    own = models.create_fused_model(NANO, 1)
    save_file(own.state_dict(), tmp_path / "open_clip_model.safetensors")
    name, file = write_config(tmp_path), str(theirs[0] / "model.safetensors")
    model = models.load_model(Model(name, file), 0)
    expected = models.weights_digest(models.create_model(NANO, 7))
    assert models.weights_digest(model) == expected
    of_start = {}
    for start in (file, "hub", str(tmp_path / "absent.safetensors"), "annealed"):
        run_config = RunConfig(model=Model(name, start))
        [check] = [x for x in preflight.check_needs(run_config, "cpu") if x.what == "weights"]
        of_start[start] = check.state
        try:
            lookup.fetch_start(run_config)
        except CmpError:
            assert check.state == preflight.MISSING
        else:
            assert check.state == preflight.PRESENT
    assert [*of_start.values()].count(preflight.PRESENT) == 2
    configs = [RunConfig(model=Model(name, start)) for start in (file, "hub")]
    assert len({identity.run_id_of(each, corpus) for each in configs}) == 2


@pytest.mark.defect
def test_a_dry_run_refuses_a_hub_s_weights_for_a_model_of_no_hub():
    check = preflight.check_needs(RunConfig(model=Model(NANO, "hub")), "cpu")[1]
    assert (check.what, check.state) == ("weights", preflight.MISSING)


def test_weights_in_the_hub_s_cache_are_found_without_a_network(offline, theirs, monkeypatch):
    weights = "snapshots/abc/open_clip_model.safetensors"
    held = {"refs/main": b"abc", weights: (theirs[0] / "model.safetensors").read_bytes()}
    hub = tree(offline / "models--someone--nano", held)
    preset = {"hf_hub": "someone/nano/", "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5)}
    presets = {"theirs": preset}
    monkeypatch.setattr(starts, "pretrained_tag", lambda name, start: presets.get(start, {}))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(offline), raising=False)
    assert starts.locate_weights(NANO, "theirs") == hub / weights
    model = models.load_model(Model(NANO, "theirs"), 0)
    assert model.visual.image_mean == preset["mean"]


def test_an_id_counts_weights_by_content_wherever_they_lie(corpus, theirs, tmp_path):
    folder, _ = theirs

    def run_id(path):
        return identity.run_id_of(RunConfig(model=Model(NANO, str(path))), corpus)

    moved = shutil.copy(folder / "model.safetensors", tmp_path / "elsewhere.safetensors")
    first = run_id(folder / "model.safetensors")
    assert run_id(moved) == first
    weights = load_file(moved)
    torch.save(weights, tmp_path / "saved.pt")
    torch.save({"epoch": 3, "state_dict": weights}, tmp_path / "trained.pt")
    assert run_id(tmp_path / "saved.pt") == run_id(tmp_path / "trained.pt") == first
    damaged = {"no.pt": b"no checkpoint", "no.safetensors": b"", "no.npz": b"PK"}
    tree(tmp_path, damaged)
    for name in damaged:
        with pytest.raises(CmpError, match=f"{name}: cannot be read as a checkpoint that contains"):
            run_id(tmp_path / name)
    weights["logit_scale"] += 1
    save_file(weights, moved)
    assert run_id(moved) != first


def test_an_id_counts_how_a_file_says_that_images_are_prepared(corpus, theirs, tmp_path):
    """Only what differs from the model's own way: what this package exports says all of it."""
    path = tmp_path / "start.safetensors"
    of_file = RunConfig(model=Model(NANO, str(path)))
    plain = load_file(theirs[0] / "model.safetensors")
    own = models.create_model(NANO).visual.preprocess_cfg
    ids = {}
    for case, settings in {"own": own, "none": {}, "other": own | {"mean": [0.5] * 3}}.items():
        save_file(plain, path, {"preprocess_cfg": json.dumps(settings)})
        ids[case] = identity.run_id_of(of_file, corpus)
    save_file(plain, path)
    assert ids["own"] == ids["none"] == identity.run_id_of(of_file, corpus) != ids["other"]
    name = write_config(tmp_path, preprocess_cfg={"mean": [0.5] * 3})
    of_folder = RunConfig(model=Model(name, str(path)))
    first = identity.run_id_of(of_folder, corpus)
    save_file(plain, path, {"preprocess_cfg": json.dumps(own | {"mean": [0.5] * 3})})
    assert identity.run_id_of(of_folder, corpus) == first
    save_file(plain, path, {"preprocess_cfg": json.dumps(own)})
    assert identity.run_id_of(of_folder, corpus) != first
    for text in ("x", "[]", '{"evil": 1}'):
        save_file(plain, path, {"preprocess_cfg": text})
        with pytest.raises(CmpError, match=r"start\.safetensors: metadata: preprocess_cfg"):
            models.load_model(of_file.model, 0)


def test_an_id_counts_the_network_and_the_tokenizer_of_a_folder(corpus, theirs, tmp_path):
    """Except a usual network of open_clip's, which the weights determine."""
    shutil.copy(theirs[0] / "model.safetensors", tmp_path / "open_clip_model.safetensors")
    network = open_clip.get_model_config(NANO)
    text = network["text_cfg"] | {"hf_tokenizer_name": "someone/words"}
    usual, squash = (network, {"fill_color": None}), (network, {"resize_mode": "squash"})
    quick, words = (network | {"quick_gelu": True},), (network | {"text_cfg": text},)

    def entries(about, start="hub"):
        run_config = RunConfig(model=Model(write_config(tmp_path, *about), start))
        found = identity.run_identity(run_config, corpus)
        ids.append(identity.json_digest(found))
        return found.keys() & {"network"}

    ids: list[str] = []
    assert not entries(usual)
    for about in (quick, squash, words):
        assert entries(about)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert entries(words)
    for about in (usual, quick):  # no weights say anything of it
        assert entries(about, "random")
    assert len({*ids}) == len(ids) == 7


@pytest.fixture
def fetched(theirs, with_data, tmp_path, monkeypatch):
    """Weights under the tag "theirs" that are on this machine once they are fetched; how often."""
    place, times = tmp_path / "cache.safetensors", []

    def fetch(name, start):
        if not place.exists():
            times.append(start)
            shutil.copy(theirs[0] / "model.safetensors", place)
        return place

    found = {"cached_weights": lambda *_: place if place.exists() else None}
    found |= {"locate_weights": fetch, "pretrained_tag": lambda *_: {"mean": (0.5,) * 3}}
    for name, function in found.items():
        monkeypatch.setattr(starts, name, function)
    return times


TAGGED = [*SMALL, f"model.name={NANO}", "model.start=theirs"]


def test_a_run_without_its_weights_has_no_id(corpus, fetched):
    run_config = config.parse(config.override({}, TAGGED))
    with pytest.raises(CmpError, match=r"weights 'theirs' .* are not on this machine"):
        identity.run_id_of(run_config, corpus)
    assert studies.missing_runs([run_config]) == [run_config]
    assert fetched == []


@pytest.mark.parametrize("way", ["library", pytest.param("shell", marks=pytest.mark.long)])
def test_weights_are_fetched_before_a_run_gets_its_id(corpus, fetched, tmp_path, way):
    (tmp_path / "mine.yaml").write_text("{}")
    run_config = config.parse(config.override({}, TAGGED))
    for _ in range(2):  # computed, and then looked up
        if way == "library":
            launch.run_one(run_config)
        else:
            shell("run", tmp_path / "mine.yaml", *TAGGED, "--device", "cpu")
        assert store.stored_ids() == [identity.run_id_of(run_config, corpus)[:SHORT_ID]]
    assert fetched == ["theirs"]


@pytest.mark.long
def test_a_stopped_run_whose_weights_were_fetched_is_resumed(corpus, fetched):
    run_config = config.parse(config.override({}, TAGGED))

    def stop(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        launch.run_one(run_config, Observer(step=stop))
    [progress] = unfinished_runs()
    launch.run_one(run_config)
    assert store.stored_ids() == [progress.run[:SHORT_ID]]


def test_a_study_fetches_weights_before_its_workers_start(corpus, fetched, monkeypatch):
    runs_of = [config.parse(config.override({}, [*TAGGED, f"seeds.data={n}"])) for n in (0, 1)]
    begun = []

    def compute(todo, jobs, device, finished, stop):
        begun.extend(identity.run_id_of(each, corpus) for each in todo)
        return {todo[0]: "no reason"}

    monkeypatch.setitem(studies.BACKENDS, "local", compute)
    with pytest.raises(CmpError, match="no reason") as caught:
        studies.compute_runs(runs_of)
    assert (len(begun), fetched) == (2, ["theirs"])
    assert begun[0][:SHORT_ID] in str(caught.value)


def scores_of(path, corpus, run_config):
    """What open_clip loads from a file, scored as a run scores: its table after two tasks."""
    fused, _, _ = open_clip.create_model_and_transforms(run_config.model.name, pretrained=str(path))
    model = models.split_attention(fused)
    precision = run_config.training.precision
    scores = evaluation.evaluate(model, run_config.model.name, corpus, "test", 8, precision)
    return scores.datasets["score"]


LORA = ("method.name=lora", "merging.policy=ema")


@pytest.mark.numbers
@pytest.mark.usefixtures("with_data")
@pytest.mark.parametrize(
    "settings", [pytest.param((), id="full"), pytest.param(LORA, id="lora", marks=pytest.mark.long)]
)
def test_there_and_back(corpus, theirs, tmp_path, settings):
    """open_clip -> run -> export -> open_clip: the scores are those that the run reported."""
    folder, _ = theirs
    start = folder / "epoch_3.pt"
    given = [*SMALL, *settings, f"model.name={NANO}", f"model.start={start}"]
    shell("run", "quick", *given, "--device", "cpu")
    run_config = config.parse(config.override(config.profile("quick"), given))
    run = store.load_run(identity.run_id_of(run_config, corpus))
    out = tmp_path / "out.safetensors"
    shell("export", run.id[:SHORT_ID], "-o", out)
    for path, tasks in ((folder / "model.safetensors", 0), (out, 2)):
        reported = run.metrics[run.metrics["task"] == tasks].set_index("dataset")["score"]
        scores = scores_of(path, corpus, run_config)
        assert scores.to_dict() == pytest.approx(reported.to_dict(), abs=1e-6)
    assert load_file(out).keys() == load_file(folder / "model.safetensors").keys()


@pytest.mark.numbers
@pytest.mark.usefixtures("with_data")
@pytest.mark.parametrize("name", [pytest.param(NANO, marks=pytest.mark.long), "small"])
def test_a_run_becomes_a_folder_of_the_hub(corpus, theirs, tmp_path, name):
    """It loads by its folder alone, with the same features, and its card says what was done."""
    given = [*SMALL, f"model.name={name}", "merging.policy=ema", "evaluation.full=true"]
    given += [f"model.start={theirs[0] / 'epoch_3.pt'}"] * (name == NANO)
    shell("run", "quick", *given, "--keep-weights", "--device", "cpu")
    run_config = config.parse(config.override(config.profile("quick"), given))
    run = store.load_run(identity.run_id_of(run_config, corpus))
    out = tmp_path / "updated"
    export = "export", run.id[:SHORT_ID], "--to", "hf", "-o"
    shell(*export, out)
    assert {path.name for path in out.iterdir()} == {
        "README.md", "open_clip_config.json", "open_clip_model.safetensors", "export.json",
    }  # fmt: skip
    again, prepare = open_clip.create_model_from_pretrained(f"local-dir:{out}")
    given = torch.randn(4, 3, 32, 32), models.tokenizer(name)(["a red cat", "one object"])
    found, expected = features_by_open_clip(again, *given), features(store.final_model(run), *given)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert prepare.transforms[0].size == 32
    card = (out / "README.md").read_text()
    assert f"# {name}, after 2 updates" in card
    assert "| merging.policy | ema |" in card
    last = store.trajectory(run.metrics).query("scope == 'full'")["A_ZS"].round(1)
    assert f"| A_ZS |  | {last.iloc[0]} | {last.iloc[-1]} |" in card
    assert "| new-flags | adapt | " in card
    assert ("from cmp.embedded.models import tokenizer" in card) == (name == "small")
    shell(*export, out)  # its own files are replaced
    mine = tree(tmp_path / "mine", {"thesis.tex": b"all of it"})
    refused = CliRunner().invoke(cli.app, [*export, str(mine)]).exception
    assert isinstance(refused, CmpError) and "'thesis.tex' has changed since" in str(refused)
    assert (mine / "thesis.tex").read_text() == "all of it"


@pytest.mark.numbers
@pytest.mark.usefixtures("with_data")
def test_an_embedded_model_goes_the_same_way_if_its_weights_are_kept(corpus, tmp_path):
    shell("run", "quick", *SMALL)
    run_config = config.parse(config.override(config.profile("quick"), SMALL))
    run_id, out = identity.run_id_of(run_config, corpus)[:SHORT_ID], tmp_path / "tiny.safetensors"

    def refused(out) -> str:
        return str(CliRunner().invoke(cli.app, ["export", run_id, "-o", str(out)]).exception)

    assert "--keep-weights" in refused(out)
    before = store.load_run(run_id).weights
    shell("run", "quick", *SMALL, "--keep-weights")
    run = store.load_run(run_id)
    assert run.weights == before
    assert "cmp.embedded.models" in shell("export", run_id, "-o", out)
    reported = run.metrics[run.metrics["task"] == 2].set_index("dataset")["score"]
    assert scores_of(out, corpus, run_config).to_dict() == pytest.approx(reported.to_dict())
    assert ".safetensors" in refused(tmp_path / "x.pt")
    weights = load_file(store.weights_path(run.id))
    weights["logit_scale"] += 1
    save_file(weights, store.weights_path(run.id))
    assert "damaged" in refused(out)


def own_pictures(folder, roles, size=(40, 30), kind="PNG", **about):
    """A collection of a set per role, each with two classes of pictures that are not square."""
    for number, role in enumerate(roles):
        for species, name in enumerate(("oak", "red fox")):
            seed = 100 * number + 50 * species
            files = {f"{n}.{kind.lower()}": picture(seed + n, size, kind) for n in range(16)}
            tree(folder / role / name, files)
        keys = {"name": role, "role": role, "reader": {"path": role}}
        write_manifest(folder / f"{role}.yaml", **keys, **about.get(role, {}))
    return folder


def run_and_export(folder, out, *given):
    """Take a model through the shell: run, list, show, export. The stored run and what was said."""
    settings = f"data={folder}", *SMALL, *given
    said = [shell("run", "quick", *settings, "--keep-weights", "--device", "cpu")]
    [run_id] = store.stored_ids()
    said += [shell("results", "ls"), shell("results", "show", run_id)]
    said.append(shell("export", run_id, "-o", out))
    assert not any(re.search(r"(?<![\w-])nan\b", each) for each in said)
    return store.load_run(run_id), said


WITHOUT_POOL = ("mixture.pretraining=0", "mixture.update=0.5", "mixture.buffer=0.5")
ROLES = {
    "pool": ("mixture.replay=1", "mixture.select=random"),
    "substitute": ("mixture.pool=substitute", "mixture.replay=1", "mixture.select=random"),
    "adapt": WITHOUT_POOL, "eval": WITHOUT_POOL, "transfer": WITHOUT_POOL,
}  # fmt: skip


@pytest.mark.numbers
@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("role", options.one_in(5, ROLES))
def test_own_pictures_of_one_role_beside_the_stream_s(theirs, tmp_path, role):
    """A set that there is none of has no score, and a dash stands for it everywhere."""
    folder = own_pictures(tmp_path / "own", dict.fromkeys(["adapt", role]))
    start = theirs[0] / "model.safetensors"
    out, given = tmp_path / "out.safetensors", (f"model.name={NANO}", f"model.start={start}")
    run, (_, listed, shown, _) = run_and_export(folder, out, *given, *ROLES[role])
    last = store.trajectory(run.metrics).iloc[-1]
    assert last.A_KA >= 0 and (last.A_ZS >= 0) == (role == "eval")
    if role != "eval":
        [line] = [line for line in listed.splitlines() if run.id[:SHORT_ID] in line]
        assert line.split()[3] == "-" and re.search(r"2 +subset +[\d.]+ +- +-", shown)
    reported = run.metrics[run.metrics["task"] == 2].set_index("dataset")["score"]
    scores = scores_of(out, load_data(str(folder)), run.config)
    assert scores.to_dict() == pytest.approx(reported.to_dict(), abs=1e-6)
    scored = shell("eval", NANO, "--device", "cpu", "--start", out, "--data", folder)
    assert role == "eval" or re.search(r"GM +-", scored)


@pytest.mark.usefixtures("build")
def test_a_stream_whose_pictures_are_all_for_training(tmp_path):
    folder = own_pictures(tmp_path / "own", ["adapt", "eval"], adapt={"splits": {"train": 1.0}})
    run, (_, _, shown, _) = run_and_export(
        folder, tmp_path / "out.safetensors", "model.name=tiny", *WITHOUT_POOL
    )
    assert set(run.metrics["role"]) == {"eval"}
    assert re.search(r"2 +subset +- +[\d.]+ +-", shown)
    assert verify.compare_runs(run, run).answer == "bitwise equal"


@pytest.mark.usefixtures("build")
def test_a_run_without_scores_is_left_out_of_the_list(tmp_path):
    folder = own_pictures(tmp_path / "own", ["adapt"])
    run, _ = run_and_export(folder, tmp_path / "out.safetensors", *WITHOUT_POOL)
    run.metrics[:0].to_parquet(store.run_folder(run.id) / "metrics.parquet")
    assert "left out" in shell("results", "ls")


HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


@pytest.fixture
def siglip(tmp_path):
    """The name of a small model that squashes pictures and was made for the sigmoid loss."""
    text = {
        "context_length": 16, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 2,
        "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "final_ln_after_pool": True,
    }  # fmt: skip
    network = {
        "embed_dim": 48, "init_logit_bias": -10, "custom_text": True,
        "vision_cfg": SIGLIP_VISION, "text_cfg": text,
    }  # fmt: skip
    folder = tmp_path / "siglip"
    folder.mkdir()
    name = write_config(folder, network, {**HALF, "resize_mode": "squash"})
    model = open_clip.create_model(name, load_weights=False)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return name


def loaded_by_open_clip(said):
    """The network and the preprocessing that the lines which `cmpt export` prints make."""
    names = {"open_clip": open_clip}
    exec("\n".join(line for line in said.splitlines() if "open_clip." in line), names)
    return names["model"].eval(), names["preprocess"]


@pytest.mark.numbers
@pytest.mark.usefixtures("build")
def test_a_model_that_squashes_goes_there_and_back(siglip, tmp_path):
    """open_clip, with its own preprocessing and no line of this package, gives the features that
    the run was scored by."""
    folder = own_pictures(tmp_path / "own", ["adapt", "eval"])
    out = tmp_path / "out.safetensors"
    given = (f"model.name={siglip}", "model.start=hub", *WITHOUT_POOL)
    run, (*_, exported) = run_and_export(folder, out, *given)
    corpus = load_data(str(folder))
    ours = store.final_model(run).eval()
    assert models.preprocessing(ours).resize_mode == "squash"
    theirs, preprocess = loaded_by_open_clip(exported)
    rows = corpus.rows("test")
    opened = [Image.open(folder / corpus.table["group"].iloc[row]) for row in rows]
    pixels = torch.stack([preprocess(image) for image in opened])
    with torch.no_grad():
        expected = theirs.encode_image(pixels, normalize=True)
    got = evaluation.image_features(ours, corpus, rows, "fp32")
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_preprocessing_that_cannot_be_followed_is_refused_by_name(siglip, tmp_path):
    config_file = tmp_path / "siglip" / "open_clip_config.json"
    tree_ = json.loads(config_file.read_text())
    for key, value in (("resize_mode", "fit"), ("interpolation", "lanczos"), ("mean", 0.5)):
        changed = tree_ | {"preprocess_cfg": {key: value}}
        config_file.write_text(json.dumps(changed))
        with pytest.raises(CmpError, match=rf"preprocess_cfg: not supported \({key}"):
            models.preprocessing(models.load_model(Model(siglip, "hub"), 0))


@pytest.mark.parametrize("layers", [10**30, [2, 2, 10**9]])
def test_a_model_of_endless_layers_is_refused_soon(siglip, tmp_path, layers):
    config_file = tmp_path / "siglip" / "open_clip_config.json"
    about = json.loads(config_file.read_text())
    about["model_cfg"]["text_cfg"]["layers"] = layers
    config_file.write_text(json.dumps(about, indent=1))
    with pytest.raises(CmpError, match=r"its config cannot be read \(more than 999 layers"):
        models.create_model(siglip)


def test_a_model_of_boundless_width_is_refused_before_it_is_created(siglip, tmp_path, monkeypatch):
    config_file = tmp_path / "siglip" / "open_clip_config.json"
    about = json.loads(config_file.read_text())
    about["model_cfg"]["text_cfg"]["width"] = 3 * 10**6
    config_file.write_text(json.dumps(about, indent=1))
    create = open_clip.create_model
    on_meta = lambda *x, device, **y: create(*x, device=device, **y)  # noqa: E731
    monkeypatch.setattr(open_clip, "create_model", on_meta)
    with pytest.raises(CmpError, match=r"has [\d,]{15,} parameters by its config, but at most 10,"):
        models.create_model(siglip)


def test_an_update_of_an_update_sees_pictures_as_the_first_model_did(theirs, tmp_path, monkeypatch):
    """A tag of open_clip says how pictures are prepared; a file that is exported keeps it."""
    folder, _ = theirs
    preset = {**HALF, "resize_mode": "squash"}
    monkeypatch.setattr(starts, "pretrained_tag", lambda name, start: preset)
    monkeypatch.setattr(starts, "locate_weights", lambda *_: folder / "model.safetensors")
    first = models.load_model(Model(NANO, "theirs"), 0)
    models.export_weights(first, tmp_path / "out.safetensors")
    monkeypatch.undo()
    again = models.load_model(Model(NANO, str(tmp_path / "out.safetensors")), 0)
    assert models.preprocessing(again) == models.preprocessing(first)
    assert models.preprocessing(again).resize_mode == "squash"
    said = exporting.loading_code(NANO, again, tmp_path / "out.safetensors")
    _, preprocess = loaded_by_open_clip(said)
    assert tuple(preprocess.transforms[0].size) == (32, 32)
    assert preprocess.transforms[-1].mean == (0.5,) * 3
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, tmp_path / "bad.safetensors", {"preprocess_cfg": "[not json"})
    with pytest.raises(CmpError, match=r"bad\.safetensors"):
        models.load_from_file(NANO, tmp_path / "bad.safetensors")


def test_a_merge_keeps_how_images_are_prepared(theirs, tmp_path):
    """Export, merge, load: the merged model is scored with the mean and size of its parents."""
    model = models.load_from_file(NANO, theirs[0] / "model.safetensors")
    default, paths = models.preprocessing(model), []
    half = {**HALF, "resize_mode": "squash"}
    for name, settings in {"new": half, "old": half, "other": {}}.items():
        paths.append(tmp_path / f"{name}.safetensors")
        model.visual.preprocess_cfg |= settings or dataclasses.asdict(default)
        models.export_weights(model, paths[-1])
    paths.append(theirs[0] / "model.safetensors")  # of open_clip, which says nothing of images
    out = tmp_path / "merged.safetensors"
    as_half = dataclasses.replace(default, **half)
    for parents, expected in (
        (paths[:2], as_half), ([paths[0], paths[3]], as_half), ([paths[3], paths[1]], as_half),
        ([paths[3]] * 2, default),
    ):  # fmt: skip
        merge_files("interpolation", parents, out)
        assert models.preprocessing(models.load_from_file(NANO, out)) == expected
    out.unlink()
    with pytest.raises(CmpError, match=r"new\.safetensors and .*other\.safetensors .*differently"):
        merge_files("interpolation", [paths[0], paths[2]], out)
    assert not out.exists()


@pytest.mark.long
@pytest.mark.usefixtures("with_data")
def test_a_vit_b_16_goes_from_jpegs_to_the_hub(tmp_path):
    """The full route at its real size, on a CPU: two updates of a step, logged, exported, loaded
    by open_clip alone with equal features."""
    roles = "adapt", "pool", "eval"
    folder = own_pictures(tmp_path / "pictures", roles, (298, 224), "JPEG")
    given = [
        f"data={folder}", "model.start=random", "stream.tasks=2", "training.steps=1",
        "training.batch=8", "training.budget=null", "mixture.replay=1.0", "merging.policy=ema",
        "evaluation.subset=1", "evaluation.full=false", "training.precision=fp32",
    ]  # fmt: skip
    shell("run", "gpu", "--device", "cpu", *given)
    [run_id] = store.stored_ids()
    log = logs.read_log(logs.log_path(run_id))
    assert log["loss"].notna().sum() == 2
    assert log["done"].dropna().tolist() == [0, 1, 2]
    out = tmp_path / "hub"
    shell("export", run_id[:SHORT_ID], "-o", out, "--to", "hf")
    again, _ = open_clip.create_model_from_pretrained(f"local-dir:{out}")
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    tokens = models.tokenizer("ViT-B-16")(["an oak", "a red fox"])
    expected = features(store.final_model(store.load_run(run_id)), x, tokens)
    found = features_by_open_clip(again, x, tokens)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
