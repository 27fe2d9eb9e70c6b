"""FoMo-in-Flux in its authors' layout: manifests of all sets, and what of them is there."""

import json

import pytest
from pictures import picture, tar, tree
from typer.testing import CliRunner

from cmp import cli
from cmp.data import load_data
from cmp.errors import CmpError
from cmp.readers import checks, collection, files
from cmp.readers.manifest import FileSet, load_manifests


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Where the data of the collection "fomo" lie."""
    monkeypatch.setenv("CMP_BUILD", str(tmp_path))
    (tmp_path / "fomo").mkdir()
    return tmp_path / "fomo"


def fomo_sets() -> dict[str, FileSet]:
    return {dataset.name: dataset for dataset, _ in load_manifests("fomo")}


def info(root, folder, split, names, captions=None, suffix=""):
    """An info file: images of two classes in turn."""
    captions = captions or [f"caption of {name}" for name in names]
    about = {
        name: {"target": n % 2, "default_caption": None, "synthetic_merged_caption": caption}
        for n, (name, caption) in enumerate(zip(names, captions, strict=True))
    }
    tree(root / "00_info", {f"{folder}_{split}{suffix}.json": json.dumps(about).encode()})


def small(root, folder, classes=("fox", "owl")):
    """A set of six images: four to train, two to test."""
    tree(root / "00_info", {f"{folder}_classnames.json": json.dumps(list(classes)).encode()})
    names = {split: [f"{split}/{n}.png" for n in range(count)] for split, count in COUNTS.items()}
    for split, each in names.items():
        info(root, folder, split, each)
    tree(root / folder, {n: picture(7) for each in names.values() for n in each})


COUNTS = {"train": 4, "test": 2}


def with_counts(name, train=4, test=2, classes=2) -> FileSet:
    """A manifest of the package, of a smaller set."""
    content = fomo_sets()[name].model_dump(exclude_none=True)
    content["counts"] = {"classes": classes, "train": train, "test": test}
    return FileSet.model_validate(content)


def test_all_sets_have_a_manifest():
    sets = fomo_sets()
    roles = [dataset.role for dataset in sets.values()]
    assert len(sets) == 63 and roles.count("adapt") == 41 and roles.count("eval") == 22
    train = sum(each.counts.train for each in sets.values() if each.role == "adapt")
    test = {r: sum(e.counts.test for e in sets.values() if e.role == r) for r in ("adapt", "eval")}
    # the paper's code: 1.760M, .453M and .314M images; 18,392 classes of the adaptation sets
    assert (round(train, -3), round(test["adapt"], -3), round(test["eval"], -3)) == (
        1_760_000, 453_000, 314_000,
    )  # fmt: skip
    assert sum(each.counts.classes for each in sets.values() if each.role == "adapt") == 18_392
    scores = [e.zero_shot for e in sets.values() if (e.role, e.task) == ("adapt", "classification")]
    assert round(sum(scores) / len(scores), 2) == 39.23
    assert {e.name for e in sets.values() if e.task == "retrieval"} == {
        "FSCOCO", "MSCOCO", "FLICKR30K",
    }  # fmt: skip
    assert all(each.licence and each.reader.folder == each.name for each in sets.values())


@pytest.mark.defect
@pytest.mark.parametrize("source", ["embedded", "shop"])
def test_a_source_that_is_not_read_from_manifests_is_told_so(monkeypatch, source):
    monkeypatch.setattr("cmp.data.named_sources", lambda: ["embedded", "fomo", "shop"])
    with pytest.raises(CmpError, match=f"'{source}' is not read from manifests; give fomo or"):
        load_manifests(source)


def test_captions_labels_and_splits(root):
    small(root, "DTD")
    index = collection.read_index(with_counts("DTD"), root)
    assert index.counts() == {"classes": 2, "train": 4, "validation": 0, "test": 2}
    assert index.table["label"].tolist() == ["fox", "owl"] * 3
    assert index.table["captions"][1] == ["caption of train/1.png"]
    assert index.read(0) == (root / "DTD/train/0.png").read_bytes()
    assert collection.dataset_state(with_counts("DTD"), root).state == "present"


def test_every_label_is_a_class_whatever_blanks_its_name_has(root):
    small(root, "DTD", ("fox ", " owl"))
    index = collection.read_index(with_counts("DTD"), root)
    assert index.classes == ["fox", "owl"] and set(index.table["label"]) == {"fox", "owl"}


def test_a_default_caption_comes_first_and_none_is_the_prompt(root):
    small(root, "DTD")
    path = root / "00_info/DTD_train.json"
    about = json.loads(path.read_text())
    about["train/0.png"]["default_caption"] = ["one", "two"]
    about["train/1.png"]["synthetic_merged_caption"] = None
    path.write_text(json.dumps(about))
    found = collection.read_index(with_counts("DTD"), root).table["captions"]
    assert found[0] == ["one", "two"] and found[1] == ["A photo of a owl texture."]


def test_smaller_images_and_tars(root):
    small(root, "MTSD")
    names = [f"BIRDSNAP_train_224/{n}.png" for n in range(4)]
    tests = [f"BIRDSNAP_test_224/{n}.png" for n in range(2)]
    info(root, "BIRDSNAP", "train", names, suffix="_224")
    info(root, "BIRDSNAP", "test", tests, suffix="_224")
    tree(root / "00_info", {"BIRDSNAP_classnames.json": b'["jay", "wren"]'})
    held = [picture(n) for n in range(6)]
    members = [(f"BIRDSNAP/{name}", x) for name, x in zip(names + tests, held, strict=True)]
    tar(root / "BIRDSNAP.tar", members[::-1])
    index = collection.read_index(with_counts("BIRDSNAP"), root)
    assert [index.read(position) for position in index.table["position"]] == held
    assert collection.dataset_state(with_counts("BIRDSNAP"), root).state == "present"
    tar(root / "BIRDSNAP.tar", members[:-1])
    state = collection.dataset_state(with_counts("BIRDSNAP"), root)
    assert state.state == "partial" and "BIRDSNAP_test_224/1.png" in state.reason


def test_hostile_info_files(root):
    small(root, "DTD")
    names = ["../../etc/passwd", "/etc/passwd", "train/0.png", "train/1.png"]
    info(root, "DTD", "train", names)
    path = root / "00_info/DTD_train.json"
    about = json.loads(path.read_text())
    about["train/0.png"]["target"], about["train/1.png"] = -1, "no record"
    path.write_text(json.dumps(about))
    faults = [": ".join(fault) for fault in collection.read_index(with_counts("DTD"), root).faults]
    outside = files.OUTSIDE.problem
    assert sorted(faults) == [
        f"{outside}: DTD/../../etc/passwd", f"{outside}: DTD//etc/passwd",
        "target is not a class: DTD/train/0.png", "target is not a class: DTD/train/1.png",
    ]  # fmt: skip
    path.write_text("[" * 100_000)
    with pytest.raises(CmpError, match=r"DTD_train\.json: cannot be read"):
        collection.read_index(with_counts("DTD"), root)


def test_retrieval_sets_have_captions_and_no_classes(root):
    about = {f"{n}.png": {"default_caption": [f"a {n}", f"the {n}"]} for n in range(3)}
    tree(root / "00_info", {"FLICKR30K_test.json": json.dumps(about).encode()})
    tree(root / "FLICKR30K", {f"{n}.png": picture(n) for n in range(3)})
    index = collection.read_index(with_counts("FLICKR30K", 0, 3, 1), root)
    assert index.counts()["test"] == 3 and index.classes == ["FLICKR30K"] and not index.faults
    assert index.table["captions"][2] == ["a 2", "the 2"]


def test_data_check_says_what_is_there(root, monkeypatch):
    small(root, "DTD")  # whole, but not as many as the benchmark counts
    small(root, "CUB200")
    (root / "CUB200/test/1.png").unlink()
    small(root, "STL10")
    (root / "STL10/test/0.png").write_bytes(b"damaged")
    monkeypatch.setenv("COLUMNS", "160")
    result = CliRunner().invoke(cli.app, ["data", "check", "fomo"])
    cells = [line.split() for line in result.output.splitlines()]  # empty cells leave none
    row = {name: rest for name, *rest in filter(None, cells) if rest[:1] in (["adapt"], ["eval"])}
    assert len(row) == 63 and result.exit_code == 1
    assert row["DTD"][:3] == ["adapt", "2/47", "4/1880"] and row["DTD"][-2:] == ["wrong", "counts"]
    assert row["CUB200"][-3:] == ["1/5794", "64.1", "partial"]
    assert row["STL10"][-1] == "faulty" and len(row["STL10"]) == 5  # nothing trains on it
    assert [state for *_, state in row.values()].count("absent") == 60
    assert "CUB200: 1 of 6 images are missing, such as CUB200/test/1.png" in result.output
    assert f"{checks.UNKNOWN_FORMAT}: STL10/test/0.png" in result.output
    assert "README of fomo_in_flux" in result.output


def test_a_run_refuses_wrong_counts_and_names_what_is_absent(root):
    with pytest.raises(CmpError, match="63 of 63 datasets of 'fomo' are absent"):
        load_data("fomo")
    small(root, "DTD")
    with pytest.raises(CmpError, match="DTD: counts: found classes 2, not 47"):
        load_data("fomo")


def test_manifests_beside_the_data_are_read_too(root):
    pool = {"name": "web", "title": "Web", "role": "pool", "licence": "own",
            "reader": {"kind": "tars", "path": "web/*.tar"}}  # fmt: skip
    (root / "pool.yaml").write_text(json.dumps(pool))
    tar(root / "web/0.tar", [("1.jpg", picture(kind="JPEG")), ("1.txt", b"a thing")])
    with pytest.warns(UserWarning, match="63 of 64 datasets of 'fomo' are absent"):
        corpus = load_data("fomo")
    assert corpus.by_role("pool") == ["web"] and len(corpus.rows("train")) == 1


@pytest.mark.defect
def test_a_process_reads_a_dataset_that_was_downloaded_after_a_warning(root):
    for name in ("web", "later"):
        pool = {"name": name, "title": "Web", "role": "pool", "licence": "own",
                "reader": {"kind": "fomo", "folder": name}}  # fmt: skip
        (root / f"{name}.yaml").write_text(json.dumps(pool))
    small(root, "web")
    with pytest.warns(UserWarning, match="64 of 65 datasets of 'fomo' are absent"):
        assert load_data("fomo").by_role("pool") == ["web"]
    small(root, "later")
    with pytest.warns(UserWarning, match="63 of 65 datasets of 'fomo' are absent"):
        assert load_data("fomo").by_role("pool") == ["later", "web"]
