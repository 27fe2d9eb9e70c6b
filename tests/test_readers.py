"""Readers of image files: what good files give, and what hostile ones get."""

import dataclasses
import errno
import io
import itertools
import json
import os
import pickle
import re
import shutil
import tarfile
import time
import tracemalloc
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from open_clip.transform import image_transform
from pictures import classes, fileset, picture, tar, tree, write_manifest
from PIL import Image, ImageOps
from torchvision.transforms import RandomResizedCrop
from typer.testing import CliRunner

from cmp import cli, parsing
from cmp.data import Preprocessing, build_corpus, load_data, stored_images
from cmp.errors import CmpError
from cmp.project import build_folder
from cmp.readers import checks, collection, files, images, infer, notes, tables, tars
from cmp.readers.index import MAX_IMAGE_BYTES
from cmp.readers.manifest import SPLIT_SHARES, FolderReader, load_manifests
from cmp.releases import arrivals, ledger

DATA = (build_folder() / "data").resolve()


pytestmark = pytest.mark.usefixtures("build")


def kinds(index) -> list[str]:
    return [": ".join(fault) for fault in index.faults]


def contents(index) -> list[bytes]:
    return [index.read(position) for position in index.table["position"]]


def read_set(root, kind="folder", faults="refuse", **reader):
    """The index of a set; `reader`: the keys of its reader."""
    return collection.read_index(fileset(kind, faults=faults, reader=reader), root)


def check_set(root, *about, **reader):
    """The same once its pictures have been decoded."""
    return collection.check_images(read_set(root, *about, **reader))


def state_of(root, kind="folder", **reader):
    """What `cmpt data check` finds of the set."""
    return collection.dataset_state(fileset(kind, reader=reader), root)


def read_frame(frame, root, **reader):
    """The index of a table that is in memory."""
    return tables.read_frame(fileset("csv", reader=reader), frame, root)


def test_a_folder_a_class(tmp_path):
    root = tree(
        classes(tmp_path / "p"), {"manifest.yaml": b"", ".hidden/1.png": b"", "oak/.DS_Store": b""}
    )
    index = collection.read_index(fileset(prompt="a photo of a {}."), root)
    assert index.classes == ["oak", "red fox", "snow goose"] and not index.faults
    assert len(index.table) == 18 and set(index.table["split"]) <= {"train", "validation", "test"}
    assert index.table["captions"][0] == ["a photo of a oak."]
    assert contents(index)[0] == (root / index.table["source"][0]).read_bytes()
    assert index.dataset.task == "classification"


def test_splits_stay_when_images_come_and_go(tmp_path):
    root = classes(tmp_path / "p", each=30)
    before = read_set(root).table.set_index("source")["split"]
    for path in list((root / "oak").iterdir())[:10]:
        path.unlink()
    tree(root, {"elm/1.png": picture(7)})
    after = read_set(root).table.set_index("source")["split"]
    both = before.index.intersection(after.index)
    assert len(both) == 80 and (before[both] == after[both]).all()
    shares = before.value_counts(normalize=True)
    assert 0.5 < shares["train"] < 0.9 and shares["validation"] > 0 and shares["test"] > 0.05


def test_folders_of_splits(tmp_path):
    root = classes(tmp_path / "p", ["a", "b"], 2, "train/")
    classes(root, ["a", "b"], 1, "val/")
    index = read_set(root)
    assert index.counts() == {"classes": 2, "train": 4, "validation": 2, "test": 0}
    assert collection.read_index(fileset(role="pool"), root).counts()["train"] == 4
    assert "val" not in index.classes


def test_a_class_without_images_is_named(tmp_path):
    root = classes(tmp_path / "p")
    (root / "empty one").mkdir()
    index = read_set(root)
    assert kinds(index) == ["class without images: empty one"]
    with pytest.raises(CmpError, match=r"empty one.*faults: skip"):
        collection.check_images(index)
    assert len(check_set(root, faults="skip").table) == 18


@pytest.mark.parametrize(("name", "separator"), [("t.csv", ","), ("t.tsv", "\t")])
def test_csv_as_open_clip_takes_it(tmp_path, name, separator):
    names = ["oak/0.png", "oak/1.png", "oak/2.png"]
    frame = pd.DataFrame({"filepath": names, "title": ["an oak, old", "NA", "a tree"]})
    frame.to_csv(classes(tmp_path) / name, sep=separator, index=False)
    index = read_set(tmp_path, "csv", path=name)
    assert not index.faults and index.dataset.task == "retrieval"
    assert index.table["captions"].tolist() == [["an oak, old"], ["NA"], ["a tree"]]
    assert index.classes == ["mine"]


@pytest.mark.parametrize("name", ["t.csv", "t.TSV"])
def test_a_table_whose_rows_end_with_a_separator(tmp_path, name):
    root, cells = classes(tmp_path), [["filepath", "label"], ["oak/0.png", "7", ""]]
    lines = [("\t" if name == "t.TSV" else ",").join(row) for row in cells]
    (root / name).write_text("\n".join(lines))
    index = read_set(root, "csv", path=name, label="label", caption=None)
    assert index.table["source"].tolist() == ["oak/0.png"] and index.classes == ["7"]


@pytest.mark.parametrize(("name", "separator"), [("t.csv", ","), ("t.tsv", "\t")])
def test_a_quotation_mark_that_is_not_closed_swallows_no_rows(tmp_path, name, separator):
    texts = ["an oak", '"5 inch phone', "a beech", '"quoted start', "an elm"]
    rows = [f"oak/{n}.png{separator}{text}\n" for n, text in enumerate(texts)]
    path = classes(tmp_path) / name
    path.write_text(f"filepath{separator}title\n{''.join(rows)}")
    with pytest.raises(CmpError, match=rf"t\.{name[2:]}: cannot be read .*'5 inch phone.*double"):
        read_set(tmp_path, "csv", path=name)
    frame = pd.DataFrame({"filepath": ["oak/0.png"], "title": ['two lines,\nor ten 5" disks']})
    frame.to_csv(path, sep=separator, index=False)
    assert read_set(tmp_path, "csv", path=name).table["captions"][0] == [frame["title"][0]]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["filepath,title,title", "oak/0.png,x,y"], "several columns are called 'title'"),
        (["filepath,title", "oak/0.png,a cat, a dog"], "more cells than the 2 .*quotes"),
        (["filepath,title", "oak/0.png,x,", "oak/1.png,a cat, a dog"], "more cells than the 2"),
        (["filepath,title", "a," * 50_000], "has 50,001 columns"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_the_header_are_refused(tmp_path, lines, words):
    (classes(tmp_path) / "t.csv").write_text("\n".join([*lines, ""]))
    with pytest.raises(CmpError, match=rf"t\.csv: .*{words}"):
        read_set(tmp_path, "csv", path="t.csv")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_of_two_tables_the_faulty_one_is_named(tmp_path, kind):
    classes(tmp_path)
    frame = pd.DataFrame({"filepath": ["oak/0.png"], "title": ["x"]})
    getattr(frame, f"to_{kind}")(tmp_path / f"a.{kind}", index=False)
    (tmp_path / f"b.{kind}").write_text("filepath,title\noak/1.png,x,y\n")
    with pytest.raises(CmpError, match=rf"b\.{kind}: cannot be read") as error:
        read_set(tmp_path, kind, path=f"*.{kind}")
    assert f"a.{kind}" not in str(error.value)


@pytest.mark.parametrize(
    "content", [b"licence: \xfc\nrole: adapt\nreader: {}", b"", b"rolle: adapt\nreader: {}"]
)
def test_a_manifest_that_cannot_be_read_is_not_passed_over(tmp_path, content):
    """Its splits would be ignored, and test images trained on."""
    classes(tmp_path)
    (tmp_path / "manifest.yaml").write_bytes(content)
    with pytest.raises(CmpError, match=r"manifest\.yaml: "):
        CliRunner().invoke(cli.app, ["data", "check", str(tmp_path)], catch_exceptions=False)


def test_the_name_of_an_update_is_one_line(tmp_path):
    classes(tmp_path)
    table = pd.DataFrame({"filepath": ["oak/0.png"], "title": ["x"], "month": ["a\nb"]})
    table.to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(CmpError, match=r"reader\.update .*one line"):
        read_set(tmp_path, "csv", path="t.csv", update="month")


@pytest.mark.parametrize("value", [b"x", ["x"], {"x": 1}])
def test_updates_have_names_and_no_other_values(tmp_path, value):
    classes(tmp_path)
    table = pa.table({"filepath": ["oak/0.png"], "title": ["x"], "month": [value]})
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(CmpError, match=r"reader\.update: .* in the column 'month' must be a text"):
        read_set(tmp_path, "parquet", path="t.parquet", update="month")


def test_a_set_has_either_paths_or_images_in_its_files(tmp_path):
    classes(tmp_path)
    content = (tmp_path / "oak" / "0.png").read_bytes()
    for name, value in {"a": content, "b": "oak/0.png"}.items():
        table = pa.table({"filepath": [value], "title": ["x"]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    with pytest.raises(CmpError, match=r"'filepath' has paths in some files and images in others"):
        read_set(tmp_path, "parquet", path="*.parquet")
    pd.DataFrame(columns=["filepath", "title"]).to_parquet(tmp_path / "a.parquet")
    assert len(read_set(tmp_path, "parquet", path="*.parquet").table) == 1  # an empty one is fine


def test_a_folder_of_images_beside_described_ones_needs_a_manifest(tmp_path):
    """An update left its images out, and nobody was told."""
    for name in ("acme", "bolt"):
        classes(tmp_path / name)
    CliRunner().invoke(cli.app, ["data", "init", str(tmp_path / "acme")])

    def checked():
        return CliRunner().invoke(cli.app, ["data", "check", str(tmp_path)])

    note = f"note: {tmp_path / 'bolt'} has images but no manifest"
    assert checked().exit_code == 0 and note in checked().output
    command = ["update", "-o", "x", "--start", "small", "--data", str(tmp_path)]
    with pytest.raises(CmpError, match=r"--data: .*bolt: has images but no manifest"):
        CliRunner().invoke(cli.app, command, catch_exceptions=False)
    text = (tmp_path / "acme" / "manifest.yaml").read_text().replace("name: acme", "name: bolt")
    (tmp_path / "about").mkdir()  # a manifest may also describe the folder from another one
    away = text.replace('"path": "."', '"path": "../bolt"')
    assert away != text
    (tmp_path / "about" / "bolt.yaml").write_text(away)
    (tmp_path / "notes").mkdir()
    assert checked().exit_code == 0 and note not in checked().output


def test_numbers_beside_a_blank_are_labels(tmp_path):
    table = pa.table({"image": [picture(n) for n in range(3)], "label": [3, 4, None]})
    pq.write_table(table, tmp_path / "t.parquet")
    index = read_set(
        tmp_path, "parquet", path="t.parquet", image="image", label="label", caption=None
    )
    assert index.classes == ["3", "4"] and kinds(index) == ["label is missing: t.parquet row 2"]


@pytest.mark.parametrize(
    ("updates", "names"),
    [
        (pd.array([None, "may", None], "string"), ["", "may", ""]),
        (pd.to_datetime(["", "2026-05-01", ""]), ["", "2026-05-01 00:00:00", ""]),
        ([202601, 202602, None], ["202601", "202602", ""]),
        ([202601, 202602, 202603], ["202601", "202602", "202603"]),
    ],
)
def test_updates_of_a_table_have_the_same_names_beside_a_blank(tmp_path, updates, names):
    frame = pd.DataFrame({"image": [picture(n) for n in range(3)], "title": "a", "update": updates})
    frame.to_parquet(tmp_path / "t.parquet")
    index = read_set(tmp_path, "parquet", path="t.parquet", image="image", update="update")
    assert index.table["update"].tolist() == names


def test_hostile_rows(tmp_path):
    classes(tmp_path)
    (tmp_path / "empty.png").touch()
    names = ["oak/0.png", "nowhere.png", "empty.png", "oak/1.png", "", "oak/2.png", "a\0b"]
    names += ["oak/3.png", "oak/4.png"]
    texts = ["good", "x", "x", "  ", "x", "x", "x", "x" * 65_537, "x"]
    labels = ["oak", "oak", "oak", "oak", "oak", "", "oak", "oak", "x" * 65_537]
    frame = pd.DataFrame({"filepath": names, "title": texts, "label": labels})
    index = read_frame(frame, tmp_path, label="label")
    assert sorted(kinds(index)) == [
        "caption is empty: oak/1.png",
        "caption or label of more than 65,536 characters: oak/3.png",
        "caption or label of more than 65,536 characters: oak/4.png",
        "empty file: empty.png", "label is missing: oak/2.png",
        "missing file: a\0b", "missing file: nowhere.png", "missing file: row 4",
    ]  # fmt: skip
    assert index.table["source"].tolist() == ["oak/0.png"]


def test_captions_that_are_no_text(tmp_path):
    root, content = tree(tmp_path, {"1.png": picture()}), picture()
    captions = ["good", 7, None, ["one", "two"], [], ["fine", 3], float("nan"), b"bytes"]
    frame = pd.DataFrame({"filepath": ["1.png"] * 8, "title": pd.Series(captions, dtype=object)})
    index = read_frame(frame, root)
    assert index.table["captions"].tolist() == [["good", "one", "two"]]
    assert len(index.faults) == 6
    assert contents(index) == [content]


def test_a_column_that_is_missing_is_named(tmp_path):
    frame = pd.DataFrame({"path": ["a.png"], "title": ["a"]})
    near = r"no column 'filepath'; did you mean 'path'\? The columns are path, title"
    with pytest.raises(CmpError, match=rf"reader\.image: {near}"):
        read_frame(frame, tmp_path)
    frame.to_parquet(tmp_path / "t.parquet")
    with pytest.raises(CmpError, match=rf"reader\.image: {near}"):
        read_set(tmp_path, "parquet", path="t.parquet")
    with pytest.raises(CmpError, match=r"reader\.label: no column 'klass'; the columns are path,"):
        read_frame(frame, tmp_path, image="path", label="klass")
    with pytest.raises(CmpError, match=r"captions as .* labels as .*; the columns are path, title"):
        read_frame(frame, tmp_path, image="path", caption=None)


@pytest.mark.parametrize("form", ["paths", "categories", "bytes", "structs"])
def test_parquet(tmp_path, form):
    classes(tmp_path)
    names = [f"oak/{n}.png" for n in range(5)]
    held = [(tmp_path / name).read_bytes() for name in names]
    structs = [{"bytes": content, "path": None} for content in held]
    categories = pa.array(names).dictionary_encode()  # as pandas writes them
    images = {"paths": names, "categories": categories, "bytes": held, "structs": structs}[form]
    splits = ["train", "test"] * 2 + [""]
    table = pa.table({"image": images, "title": list("abcde"), "split": splits})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    index = read_set(tmp_path, "parquet", path="*.parquet", image="image", split="split")
    assert not index.faults and len(index.table) == 5
    assert index.table["split"].tolist()[:4] == ["train", "test"] * 2
    assert contents(index) == held


@pytest.mark.parametrize("kept", ["names", "nothing", "nonsense"])
def test_integers_of_hugging_face_are_the_names_in_the_metadata(tmp_path, kept):
    """Each file has its own; -1 is an image without a class."""
    for name, names in (("1", ["oak", "elm"]), ("2", ["elm", "oak"])):
        about = {"info": {"features": {"kind": {"names": names, "_type": "ClassLabel"}}}}
        text = {"names": json.dumps(about), "nothing": "{}", "nonsense": '{"info": [}'}[kept]
        table = pa.table({"image": [picture(n) for n in range(3)], "kind": [0, 1, -1]})
        table = table.replace_schema_metadata({"huggingface": text})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    about = {"path": "*.parquet", "image": "image", "label": "kind", "caption": None}
    index = read_set(tmp_path, "parquet", **about)
    if kept == "names":
        assert index.table["label"].tolist() == ["oak", "elm", "elm", "oak"]
        assert index.table["captions"].str[0].tolist()[:2] == [
            "a photo of a oak",
            "a photo of a elm",
        ]
        assert [where[:9] for kind, where in index.faults] == ["1.parquet", "2.parquet"]
    else:
        assert index.classes == ["-1", "0", "1"]


def test_a_batch_reads_each_row_group_once(tmp_path, monkeypatch):
    """Whatever the order of its rows, which its images are in."""
    held = [picture(seed) for seed in range(27)]
    frame = pa.table({"image": held, "title": ["a"] * 27})
    pq.write_table(frame, tmp_path / "t.parquet", row_group_size=3)
    index = read_set(tmp_path, "parquet", path="*.parquet", image="image")
    tables._cached_row_group.cache_clear()
    rows = np.random.default_rng(0).permutation(27)[:16]
    numbers = np.random.default_rng(1).random((16, 4))
    crops = images.image_files([index]).random_crops(rows, 32, numbers)
    assert tables._cached_row_group.cache_info().misses == len({*(rows // 3).tolist()}) > 5
    for crop, row, four in zip(crops, rows, numbers, strict=True):
        assert (crop.numpy() == images.random_crop(held[row], four, 32)).all()


def test_images_of_a_parquet_file_that_is_written_again_are_the_new_ones(tmp_path):
    found = []
    for seed in range(2):
        table = pa.table({"image": [picture(seed)], "title": ["a"]})
        pq.write_table(table, tmp_path / "t.parquet")
        index = read_set(tmp_path, "parquet", path="t.parquet", image="image")
        assert index.read(0) == picture(seed)
        found.append(collection.check_images(index).content)
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("kind", "path", "words"),
    [
        ("parquet", "damaged.parquet", r"damaged\.parquet: cannot be read"),
        ("csv", "pipe", "no file matches"), ("parquet", "pipe", "no file matches"),
        ("tars", "pipe", "no file matches"), ("tars", "pipe:cat t.tar", "no file matches"),
        ("tars", "t.tar.gz", "uncompressed tar"), ("tars", "*.none", "no file matches"),
        ("csv", "/**/*.csv", r"reader\.path.*\*\* works only within"),  # not the whole disk
        ("csv", "../**/*.csv", r"reader\.path.*\*\* works only within"),
        ("folder", "a" * 300, "too long"),
    ],
)  # fmt: skip
def test_a_path_at_which_nothing_can_be_read_is_refused(tmp_path, kind, path, words):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and then nothing")
    tar(tmp_path / "t.tar.gz", [("a.png", picture()), ("a.txt", b"a")], "w:gz")
    with pytest.raises(CmpError, match=words):
        read_set(tmp_path, kind, path=path)


def test_tars(tmp_path):
    a, b = picture(1, kind="JPEG"), picture(2)
    first = [("x/1.jpg", a), ("x/._1.jpg", b"hidden, as macOS writes them"), ("x/1.txt", b"a fox"),
             ("x/1.cls", b"fox"), ("LICENCE", b"x"), ("x/2_stats.json", b"{}"), ("x/3.seg.png", b),
             ("x/3.json", json.dumps({"caption": "an owl", "label": "owl"}).encode())]  # fmt: skip
    tar(tmp_path / "s/0.tar", first)
    tar(tmp_path / "s/1.tar", [("x/1.png", b), ("x/1.txt", b"a wren"), ("x/1.cls", b"wren")])
    index = read_set(tmp_path, "tars", path="s/*.tar")
    assert not index.faults and index.classes == ["fox", "owl", "wren"]
    assert index.table["captions"].tolist() == [["a fox"], ["an owl"], ["a wren"]]
    assert contents(index) == [a, b, b]
    assert index.table["source"].tolist() == ["0.tar/x/1", "0.tar/x/3", "1.tar/x/1"]


@pytest.mark.parametrize("kind", ["tars", "pairs"])
def test_an_image_with_another_ending_is_named(tmp_path, kind):
    files = {"1.jfif": picture(1, kind="JPEG"), "2.heic": b"x", "3.avif": b"x"}
    files |= {f"{n}.txt": b"a fox" for n in (1, 2, 3)} | {"stats.json": b"{}", "notes.md": b"x"}
    tar(tree(tmp_path, files) / "0.tar", sorted(files.items()))
    index = read_set(tmp_path, kind, path="*.tar" if kind == "tars" else ".")
    assert contents(index) == [files["1.jfif"]] and len(index.faults) == 2
    prefix = "0.tar: " if kind == "tars" else ""
    assert kinds(index)[0] == f"not an image file name: {prefix}2.heic"


def test_texts_apart_from_their_images_in_a_tar_are_named(tmp_path):
    members = [
        ("1.jpg", picture(1, kind="JPEG")),
        ("1.cls", b"fox"),
        ("2.txt", b"x"),
        ("1.txt", b"y"),
    ]
    tar(tmp_path / "t.tar", members)
    index = read_set(tmp_path, "tars", path="t.tar")
    assert kinds(index) == ["text without an image: t.tar/2", "text without an image: t.tar/1"]


def test_files_that_a_mac_writes_beside_others_are_passed_over(tmp_path):
    one = [("1.png", picture(1)), ("1.txt", b"a fox"), ("1.cls", b"fox")]
    tar(tmp_path / "tars/000.tar", one)
    (tmp_path / "tars/._000.tar").write_bytes(b"\x00\x05\x16\x07")
    assert len(read_set(tmp_path, "tars", path="tars/*.tar").table) == 1
    assert "1 tars" in " ".join(infer.infer_manifest(tmp_path / "tars")[1:])
    write_manifest(tmp_path / "mine.yaml", "tars", reader={"path": "tars/*.tar"})
    (tmp_path / "._mine.yaml").write_bytes(b"\x00\x05\x16\x07\xff role: reader:")
    assert [*load_data(str(tmp_path)).datasets] == ["mine"]


def test_of_a_photo_and_its_masks_a_tar_gives_the_photo_in_any_order(tmp_path):
    photo = picture(1, kind="JPEG")
    members = [("1.jpg", photo), ("1.seg.png", picture(2)), ("1.depth.png", picture(3)),
               ("1.txt", b"a fox")]  # fmt: skip
    for number, order in enumerate(itertools.permutations(members)):
        tar(tmp_path / f"{number}.tar", list(order))
        index = read_set(tmp_path, "tars", path=f"{number}.tar")
        assert contents(index) == [photo] and not index.faults
    rivals = [("2.jpg", photo), ("2.png", picture(2)), ("2.txt", b"a fox"), *members]
    tar(tmp_path / "t.tar", rivals)
    index = read_set(tmp_path, "tars", path="t.tar")
    assert kinds(index) == ["sample has several images: t.tar/2"] and contents(index) == [photo]


@pytest.mark.parametrize("label", [0, 12])
def test_a_number_is_the_same_label_in_each_member_of_a_tar(tmp_path, label):
    texts = {"cls": str(label).encode(), "json": json.dumps({"label": label}).encode()}
    for suffix, text in texts.items():
        tar(tmp_path / f"{suffix}.tar", [("1.png", picture()), (f"1.{suffix}", text)])
        index = read_set(tmp_path, "tars", path=f"{suffix}.tar")
        assert index.classes == [str(label)] and not index.faults


@pytest.mark.parametrize("kind", ["csv", "tars"])
def test_a_pattern_may_be_absolute_and_folders_may_be_called_like_patterns(tmp_path, kind):
    root = classes(tmp_path / "a [b]")
    pd.DataFrame({"filepath": ["oak/0.png"], "title": ["an oak"]}).to_csv(root / "0.csv")
    tar(root / "0.tars", [("0.png", picture()), ("0.txt", b"an oak")])
    absolute = f"{tmp_path}/a*/*.{kind}"
    for path, where in ((absolute, root), (f"*.{kind}", root)):
        index = read_set(where, kind, path=path)
        assert index.table["captions"].tolist() == [["an oak"]]


def test_hostile_tars(tmp_path):
    link, device = tarfile.TarInfo("l.jpg"), tarfile.TarInfo("d.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device.type = tarfile.CHRTYPE
    members = [("../up.jpg", picture()), ("/root.jpg", picture()), ("a/../../b.jpg", picture()),
               ("w.pkl", pickle.dumps("evil")), ("v.pth", b"x"), link, device,
               ("ok.png", picture()), ("ok.txt", b"fine"),
               ("mute.png", picture()), ("odd.png", picture()), ("odd.txt", b"\xff\xfe"),
               ("bad.png", picture()), ("bad.json", b"[" * 5000)]  # fmt: skip
    tar(tmp_path / "t.tar", members)
    index = read_set(tmp_path, "tars", path="t.tar")
    assert index.table["source"].tolist() == ["t.tar/ok"]
    assert sorted(kinds(index)) == [
        "caption is empty: t.tar/bad", "caption is empty: t.tar/odd",
        "caption is missing: t.tar/mute",
        "member is a link or a device: t.tar: d.jpg", "member is a link or a device: t.tar: l.jpg",
        "member is a pickle: t.tar: v.pth", "member is a pickle: t.tar: w.pkl",
        "member outside the tar: t.tar: ../up.jpg", "member outside the tar: t.tar: /root.jpg",
        "member outside the tar: t.tar: a/../../b.jpg",
    ]  # fmt: skip
    with pytest.raises(CmpError, match="10 faults"):
        collection.check_images(index)


def test_a_tar_that_lies_about_its_sizes(tmp_path):
    huge = tarfile.TarInfo("huge.jpg")
    huge.size = MAX_IMAGE_BYTES + 1
    (tmp_path / "t.tar").write_bytes(huge.tobuf())
    os.truncate(tmp_path / "t.tar", MAX_IMAGE_BYTES + 4096)  # takes no room on the disk
    assert kinds(read_set(tmp_path, "tars", path="t.tar")) == ["file is too large: t.tar/huge"]
    cut = tarfile.TarInfo("cut.jpg")
    for cut.size, content in ((1_000_000, 512), (600, 512), (600, 1023)):
        (tmp_path / "t.tar").write_bytes(cut.tobuf() + bytes(content))
        with pytest.raises(CmpError, match=r"t\.tar: cannot be read"):
            read_set(tmp_path, "tars", path="t.tar")


def test_a_tar_without_an_end_of_its_own_is_refused(tmp_path):
    path = tar(tmp_path / "t.tar", [(f"{n}.{x}", b"a") for n in range(4) for x in ("cls", "txt")])
    whole, second = path.read_bytes(), 4 * tarfile.BLOCKSIZE  # where sample 1 begins
    assert len(list(tars.tar_members(path, []))) == 8
    flipped = bytearray(whole)
    flipped[second + 148] ^= 1  # in its header's checksum
    for content, words in (
        (flipped, f"the header at byte {second} is damaged"),
        (whole[:second], "has no end"),
        (whole + whole, "another tar follows its end"),
    ):
        path.write_bytes(content)
        with pytest.raises(CmpError, match=rf"t\.tar: {words}"):
            list(tars.tar_members(path, []))


def test_corrupt_images_are_named_and_looked_for_once(tmp_path, monkeypatch):
    root = classes(tmp_path / "p")
    good = (root / "oak/0.png").read_bytes()
    tree(root, {"oak/1.png": good[: len(good) // 2], "oak/2.png": b"<svg/>", "oak/3.png": b"%!PS"})
    with pytest.raises(CmpError, match=r"3 faults \(corrupt image: oak/1\.png; not an") as error:
        check_set(root)
    assert "not an image of a known format (JPEG, PNG, " in str(error.value)
    kept = check_set(root, faults="skip")
    assert len(kept.table) == 15 and len(kept.faults) == 3
    monkeypatch.setattr(images, "open_image", lambda content: pytest.fail("decoded again"))
    again = check_set(root, faults="skip")
    assert again.data_hash() == kept.data_hash()


@pytest.mark.parametrize(
    "error",
    [MemoryError("failed"),
     *(OSError(number, "failed") for number in (errno.EIO, errno.ESTALE, errno.EMFILE))],
)  # fmt: skip
def test_an_image_on_a_disk_that_fails_is_not_called_corrupt(tmp_path, error):
    """Nor is it left out for ever, as what is checked is kept."""
    root = classes(tmp_path / "p")
    index = read_set(root, faults="skip")

    def fail(*_):
        raise error

    with pytest.raises(CmpError, match=r"cannot be read .*failed.*; try again"):
        collection.check_images(dataclasses.replace(index, read=fail))
    assert len(collection.check_images(index).table) == 18


def test_a_damaged_record_of_a_check_is_made_again(tmp_path):
    root = classes(tmp_path / "p")
    (root / "oak/1.png").write_bytes(b"<svg/>")

    def check():
        index = check_set(root, faults="skip")
        return index.data_hash(), index.table["source"].tolist()

    checked = check()
    [kept] = (tmp_path / "build" / "checked").iterdir()
    written = kept.read_text()
    digest, _, content = written.partition("\n")
    other = content.replace('[[1, "not an', '[[2, "not an')
    assert other != content
    for damaged in (f"{digest}\n{other}", content, '["", [], []]', "[]", ""):
        kept.write_text(damaged)
        assert check() == checked
        assert kept.read_text() == written


def test_images_are_not_examined_where_damage_would_not_be_seen(monkeypatch):
    monkeypatch.setattr(images.ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(CmpError, match="LOAD_TRUNCATED_IMAGES hides damage; set it to False"):
        images.open_image(picture())


def png_bomb(width, height) -> bytes:
    """A PNG of a kilobyte that says it has this many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        end = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + end

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(bytes(10**5))), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


@pytest.mark.parametrize(("form", "path"), [("folder", "."), ("tars", "*.tar")])
@pytest.mark.parametrize(
    ("side", "words"), [(30_000, "pixels"), (11_000, "pixels"), (9_000, "corrupt image")]
)
def test_a_decompression_bomb_is_a_fault_that_may_be_skipped(tmp_path, form, path, side, words):
    root = classes(tmp_path / "p", ["oak", "elm"], 8)
    (root / "oak/bomb.png").write_bytes(png_bomb(side, side))
    if form == "tars":
        held = [(path.name, path.read_bytes()) for path in sorted(root.glob("oak/*"))]
        members = [pair for name, content in held
                   for pair in ((name, content), (f"{name[:-4]}.txt", b"a tree"))]  # fmt: skip
        tar(root / "t.tar", members)
    with pytest.raises(CmpError, match=rf"1 fault \(.*{words}: .*bomb"):
        check_set(root, form, path=path)
    assert "bomb" in state_of(root, form, path=path).reason
    skipping = read_set(root, form, "skip", path=path)
    for _ in range(2):  # the second time from what is kept
        kept = collection.check_images(skipping)
        assert len(kept.table) == len(skipping.table) - 1
        assert not kept.table["source"].str.contains("bomb").any()


def test_a_picture_that_is_written_over_is_looked_at_again(tmp_path):
    root = classes(tmp_path / "p")
    before = check_set(root)
    victim = root / "oak/0.png"
    found, content = victim.stat(), victim.read_bytes()
    victim.write_bytes(content[:60] + bytes(len(content) - 60))
    os.utime(victim, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert state_of(root).reason == "corrupt image: oak/0.png"
    with pytest.raises(CmpError, match=r"corrupt image: oak/0\.png"):
        check_set(root)
    victim.write_bytes(content)
    assert check_set(root).data_hash() == before.data_hash()  # content counts, not its time
    victim.write_bytes(picture(77))
    assert check_set(root).data_hash() != before.data_hash()


def test_check_decodes_however_often(tmp_path, monkeypatch):
    root, decoded = classes(tmp_path / "p"), []
    real = images.open_image
    monkeypatch.setattr(images, "open_image", lambda content: decoded.append(1) or real(content))
    for times in (1, 2):
        assert state_of(root).state == "present"
        assert len(decoded) == 18 * times


@pytest.mark.parametrize("beside", ["embedded", None])
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_picture_that_breaks_after_the_check_is_named(tmp_path, monkeypatch, beside, workers):
    """Neither a traceback of Pillow's, nor one of torch's processes."""
    (tmp_path / "build").mkdir()
    (tmp_path / "build/data").symlink_to(DATA)
    monkeypatch.setenv("CMP_WORKERS", workers)
    root = classes(tmp_path / "p")
    index = collection.check_images(collection.read_index(fileset(beside=beside), root))
    (root / index.table["source"][0]).write_bytes(b"damaged")
    with pytest.raises(CmpError, match=r"^oak/0\.png: cannot be read.*may have changed") as e:
        corpus = collection.corpus_from_indexes([index], bool(beside))
        list(stored_images(corpus, np.arange(4), 2, Preprocessing(8), torch.device("cpu")))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("splits", "unknown"),
    [(["train", "holdout", "", "Test"], {1: "holdout"}), ([0.0, None, np.nan, 1], {0: 0, 3: 1})],
)
def test_unknown_splits_are_faults(tmp_path, splits, unknown):
    classes(tmp_path, ["oak"], 4)
    names = [f"oak/{n}.png" for n in range(4)]
    frame = pd.DataFrame({"filepath": names, "label": "oak", "split": splits})
    index = read_frame(frame, tmp_path, label="label", split="split")
    assert kinds(index) == [f"unknown split {x}: {names[n]}" for n, x in unknown.items()]
    assert len(index.table) == 4 - len(unknown)


def test_a_folder_beside_those_of_splits_is_an_unknown_one(tmp_path):
    root = classes(tmp_path / "p", ["a", "b"], 2, "train/")
    classes(root, ["a"], 1, "holdout/")
    index = read_set(root)  # one is a class: a train of the railway
    assert index.classes == ["holdout", "train"]
    classes(root, ["a", "b"], 1, "test/")
    index = read_set(root)
    assert kinds(index) == ["unknown split holdout: holdout/a/0.png"]
    assert "holdout" in infer.infer_manifest(root)[2]


def test_an_image_of_training_and_test_is_a_fault(tmp_path):
    root = classes(tmp_path / "p", ["a", "b"], 3, "train/")
    tree(root, {"test/a/8.png": picture(8), "test/a/9.png": (root / "train/a/0.png").read_bytes()})
    tree(root, {"test/b/8.png": picture(9), "val/b/1.png": picture(8)})
    with pytest.raises(CmpError, match=r"split: test/a/8\.png, test/a/9\.png\)"):
        check_set(root)
    kept = check_set(root, faults="skip")
    assert [fault.where for fault in kept.faults] == ["test/a/8.png", "test/a/9.png"]
    frame = pd.DataFrame({"filepath": "train/a/0.png", "title": "x", "split": ["train", "test"]})
    frame.to_csv(root / "t.csv")
    assert "also in another split" in state_of(root, "csv", path="t.csv", split="split").reason


def test_what_is_no_picture_is_counted_and_named(tmp_path):
    strangers = {"oak/a.heic": b"x", "oak/notes.txt": b"x", "oak/none": b"x"}
    root = tree(classes(tmp_path / "p"), strangers | {"loose.png": picture()})
    os.mkfifo(root / "oak/pipe.png")
    (root / "oak/gone.png").symlink_to("nowhere")
    (root / "oak/zero.png").symlink_to("/dev/zero")
    (root / "oak/more").symlink_to(root / "red fox")
    (root / "oak/good.png").symlink_to(root / "oak/0.png")
    with open(os.fsencode(root) + b"/oak/\xff.png", "wb") as file:
        file.write(picture())
    index = read_set(root)
    assert sorted(kind.encode(errors="replace").decode() for kind in kinds(index)) == [
        "image outside a class folder: loose.png",
        f"{files.LINK.problem}: oak/zero.png",
        "missing file: oak/gone.png", "name is not UTF-8: oak/?.png",
        "not a regular file: oak/pipe.png",
        "not an image file name: oak/a.heic", "not an image file name: oak/more",
        "not an image file name: oak/none", "not an image file name: oak/notes.txt",
    ]  # fmt: skip
    reason = state_of(root).reason
    assert "a.heic" in reason and "pipe.png" in reason and "?.png" in reason
    assert len(check_set(root, faults="skip").table) == 19


def secret_place(tmp_path) -> Path:
    """A folder that no manifest has business with."""
    names = ["passwd", "shadow", "keys/id_rsa", "keys/agent.conf", "empty.d/.x"]
    return tree(tmp_path / "secret", dict.fromkeys(names, b"root:x:0:0:/root:/bin/sh\n"))


def run_check(root, **about):
    """The result of `cmpt data check` for a set."""
    write_manifest(root / "m.yaml", **about)
    return CliRunner().invoke(cli.app, ["data", "check", str(root)])


def check_manifest(root, **about) -> str:
    """What it says, in one line."""
    return " ".join(run_check(root, **about).output.split())


@pytest.mark.defect
@pytest.mark.parametrize("kind", ["folder", "csv", "fomo"])
def test_links_to_pictures_outside_of_the_set_are_refused_by_their_own_names(tmp_path, kind):
    prefix = "oaks/" if kind == "fomo" else ""
    root = classes(tmp_path / "p" / prefix)
    tree(tmp_path / "foreign", {"diary.png": picture(5)})
    (root / "oak/link.png").symlink_to(tmp_path / "foreign/diary.png")
    (root / "oak/inside.png").symlink_to(root / "red fox/0.png")
    (root / "elm").symlink_to(tmp_path / "foreign")
    names = ["oak/0.png", "oak/link.png", "oak/inside.png", "elm/diary.png"]
    if kind == "csv":
        pd.DataFrame({"filepath": names, "title": names}).to_csv(root / "t.csv", index=False)
    elif kind == "fomo":
        listed = {name: {"target": 0, "default_caption": "x"} for name in names}
        info = {"train": listed, "test": {}, "classnames": ["oak"]}
        info = {f"00_info/oaks_{key}.json": json.dumps(x).encode() for key, x in info.items()}
        tree(tmp_path / "p", info)
    reader = {"folder": {}, "csv": {"path": "t.csv"}, "fomo": {"folder": "oaks"}}[kind]
    index = read_set(tmp_path / "p", kind, "skip", **reader)
    refused = [fault.where for fault in index.faults if fault.kind == files.LINK.problem]
    through_folder = [] if kind == "folder" else [f"{prefix}elm/diary.png"]
    assert refused == [f"{prefix}oak/link.png", *through_folder]
    sources = set(index.table["source"])
    assert f"{prefix}oak/inside.png" in sources and not sources & set(refused)
    if kind != "fomo":
        with pytest.raises(CmpError, match=r"link to a file outside.*oak/link\.png") as error:
            load_data(str(write_manifest(root / "m.yaml", kind, reader=reader)))
        assert "foreign" not in str(error.value)


@pytest.mark.defect
@pytest.mark.parametrize("behind", ["an absolute path", "the folder above", "a link"])
def test_a_foreign_folder_is_not_read_and_none_of_its_names_told(tmp_path, behind):
    secret, root = secret_place(tmp_path), tmp_path / "p"
    root.mkdir()
    (root / "link").symlink_to(secret)
    path = {"an absolute path": str(secret), "the folder above": "../secret", "a link": "link"}
    for faults in ("refuse", "skip"):
        said = check_manifest(root, faults=faults, reader={"path": path[behind]})
        assert "names of images" in said and "reader.path" in said
        assert not any(name in said for name in ("passwd", "shadow", "keys", "empty.d", "agent"))


@pytest.mark.defect
def test_of_a_foreign_folder_only_pictures_are_named(tmp_path):
    pictures = classes(tmp_path / "data/pictures")
    tree(pictures, {"oak/my letters.doc": b"x", "taxes/.2026": b"x", "oak/bad.png": b"no picture"})
    said = check_manifest(tmp_path / "p", faults="skip", reader={"path": str(pictures)})
    assert "usable, 3 skipped" in said and "oak/bad.png" in said
    assert "letters" not in said and "taxes" not in said
    assert f"points outside the manifest's folder, to {pictures}" in said
    corpus = load_data(str(tmp_path / "p"))  # pictures that lie elsewhere can be used
    assert len(corpus.table) == 18


@pytest.mark.defect
@pytest.mark.parametrize("kind", ["csv", "parquet", "tars"])
def test_foreign_files_that_are_no_tables_are_not_opened(tmp_path, kind):
    secret, root = secret_place(tmp_path), classes(tmp_path / "p")
    ending = {"csv": "csv", "parquet": "parquet", "tars": "tar"}[kind]
    (root / f"t.{ending}").symlink_to(secret / "passwd")
    for path in (f"{secret}/*", f"{secret}/passwd", "../secret/pass*"):
        said = check_manifest(root, kind=kind, reader={"path": path})
        assert f"do not match *.{ending}" in said
        assert "shadow" not in said and "/bin/sh" not in said
    said = check_manifest(root, kind=kind, reader={"path": f"t.{ending}"})
    assert "link out of the manifest's folder" in said and "/bin/sh" not in said


@pytest.mark.parametrize("faults", ["refuse", "skip"])
@pytest.mark.parametrize("what", ["nothing", "damaged", "no table"])
def test_a_set_without_a_picture_cannot_be_used(tmp_path, faults, what):
    if what == "damaged":
        tree(tmp_path / "p", {"oak/0.png": b"damaged", "elm/0.png": b"damaged"})
    about = {"kind": "csv", "reader": {"path": "none.csv"}} if what == "no table" else {}
    said = run_check(tmp_path / "p", faults=faults, **about)
    assert said.exit_code == 1 and "0 of 1 datasets can be used" in said.output
    if what == "no table":
        assert "faulty" in said.output and "fix them" not in said.output
    else:
        assert "empty" in said.output and "no usable image is left" in said.output


def test_a_struct_without_bytes_and_a_column_twice_are_refused(tmp_path):
    about = {"kind": "parquet", "path": "t.parquet", "image": "image", "caption": "text"}
    other = pa.array([{"path": "x", "checksum": b"y"}])
    pq.write_table(pa.table({"image": other, "text": ["a"]}), tmp_path / "t.parquet")
    with pytest.raises(CmpError, match=r"t\.parquet.*'image' have no field 'bytes'"):
        read_set(tmp_path, **about)
    columns = {"names": ["image", "text", "text"]}
    twice = pa.Table.from_arrays([pa.array([b"x"]), pa.array(["a"]), pa.array(["b"])], **columns)
    pq.write_table(twice, tmp_path / "t.parquet")
    words = r"reader\.caption: several columns are called 'text'"
    with pytest.raises(CmpError, match=words):
        read_set(tmp_path, **about)
    frame = pd.DataFrame([["x", "a", "b"]], columns=columns["names"])
    with pytest.raises(CmpError, match=words):
        read_frame(frame, tmp_path, image="image", caption="text")


def test_empty_class_names_are_faults_and_no_class(tmp_path):
    root = classes(tmp_path / "p", ["_", "__", "oak"], 2)
    assert {fault.kind for fault in read_set(root).faults} == {"label is missing"}
    frame = pd.DataFrame({"filepath": ["oak/0.png", "oak/1.png"], "title": "x", "label": ["", " "]})
    index = read_frame(frame, root, label="label")
    assert kinds(index) == ["label is missing: oak/0.png", "label is missing: oak/1.png"]


def test_rows_of_a_table_stay_in_its_folder(tmp_path):
    root = classes(tmp_path / "p")
    classes(tmp_path / "secret", ["oak"], 1)
    outside = tmp_path / "secret/oak/0.png"
    names = ["oak/0.png", "../secret/oak/0.png", str(outside), str(root / "oak/1.png")]
    pd.DataFrame({"filepath": names, "title": "x"}).to_csv(root / "t.csv")
    index = read_set(root, "csv", path="t.csv")
    assert [fault.kind for fault in index.faults] == [files.OUTSIDE.problem] * 2
    assert len(index.table) == 2
    pd.DataFrame({"filepath": ["~/0.png", "oak/1.png"], "title": "x"}).to_csv(root / "t.csv")
    state = state_of(root, "csv", path="t.csv")
    assert state.state == "partial" and "1 of 2 images are missing, such as ~/0.png" in state.reason


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_paths_start_from_the_folder_of_their_table(tmp_path, form):
    root = classes(tmp_path / "p")
    names = {"lists": ["../oak/0.png", "../oak/1.png"], "red fox": ["0.png", "../../p/oak/2.png"]}
    for folder, paths in names.items():
        (root / folder).mkdir(exist_ok=True)
        frame = pd.DataFrame({"filepath": paths, "title": "x"})
        if form == "csv":
            frame.to_csv(root / folder / "t.csv")
        else:
            frame.to_parquet(root / folder / "t.parquet")
    index = read_set(root, form, path=f"*/t.{form}")
    assert index.table["source"].tolist() == ["oak/0.png", "oak/1.png", "red fox/0.png"]
    assert contents(index) == [(root / name).read_bytes() for name in index.table["source"]]
    [fault] = index.faults
    assert (fault.kind, fault.where) == (files.OUTSIDE.problem, "../p/oak/2.png")


@pytest.mark.parametrize("form", ["csv", "parquet"])
@pytest.mark.parametrize("folder", [".", "lists"])
def test_a_relative_folder_of_a_table_is_read_like_an_absolute_one(
    tmp_path, monkeypatch, form, folder
):
    root = classes(tmp_path / "p")
    (root / "lists").mkdir()
    within = [os.path.relpath(root / f"oak/{n}.png", root / folder) for n in range(3)]
    paths = [*within, str(root / "oak/3.png"), f"{root}s/0.png", "p/oak/4.png", "../../0.png"]
    frame = pd.DataFrame({"filepath": paths, "title": "x"})
    frame.to_csv(root / folder / "t.csv")
    frame.to_parquet(root / folder / "t.parquet")
    read = partial(tables.read_table_files, fileset(form, reader={"path": f"{folder}/t.{form}"}))
    absolute = read(root)
    monkeypatch.chdir(tmp_path)
    for name in ("p", "./p/", f"../{tmp_path.name}/p"):
        relative = read(Path(name))
        pd.testing.assert_frame_equal(relative.table, absolute.table)
        assert relative.faults == absolute.faults and contents(relative) == contents(absolute)
        assert "oak/3.png" in absolute.table["source"].tolist()  # a name, whatever the mount point


def test_a_table_whose_files_are_all_missing_says_where_they_were_looked_for(tmp_path):
    root = classes(tmp_path / "p")
    names = [f"images/oak/{n}.png" for n in range(5)]
    pd.DataFrame({"filepath": names, "title": "x"}).to_csv(root / "t.csv")
    words = rf"none of the 5 files .*such as {', '.join(names[:3])}; .*table's folder.* {root}"
    with pytest.raises(CmpError, match=words):
        read_set(root, "csv", path="t.csv")
    (root / "images/oak").mkdir(parents=True)
    (root / names[4]).write_bytes(picture())
    state = state_of(root, "csv", path="t.csv")
    assert state.reason == f"4 of 5 images are missing, such as {', '.join(names[:3])}"


def test_keys_that_stand_there_twice_are_refused():
    with pytest.raises(ValueError, match="'a' is given twice"):
        parsing.parse_json('{"b": {"a": 1, "c": 2, "a": 3}}')


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    root, scan = classes(tmp_path / "p"), os.scandir

    def refuse(path):
        if str(path).endswith("oak"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(CmpError, match=r"mine: cannot be read .*Permission denied.*oak"):
        read_set(root)
    assert "Permission denied" in state_of(root).reason


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize(
    ("kind", "call"),
    [("folder", "stat"), ("csv", "stat"), ("csv", "lstat"), ("tars", "stat"), ("tars", "scandir"),
     ("pairs", "scandir"), ("pairs", "lstat")],
)  # fmt: skip
def test_files_on_a_disk_that_fails_are_not_called_missing(
    tmp_path, monkeypatch, kind, call, number
):
    root, real = tree(tmp_path / "p", {"a/1.png": picture(1), "a/1.txt": b"one"}), getattr(os, call)
    (root / "t.csv").write_text("filepath,title\na/1.png,one\n")
    tar(root / "t.tar", [("1.png", picture(1)), ("1.txt", b"one")])
    reader = {"csv": {"path": "t.csv"}, "tars": {"path": "*.tar"}}.get(kind, {})
    assert len(read_set(root, kind, **reader).table) == 1

    def fail(path=".", **other):
        if str(path).startswith(f"{root}/a" if call == "lstat" else str(root)):
            raise OSError(number, "failed", str(path))
        return real(path, **other)

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(CmpError, match=r"mine: .*cannot be read \(.*failed") as error:
        read_set(root, kind, **reader)
    assert not isinstance(error.value, files.NoFilesError)


def test_each_part_of_a_collection_may_lie_beside_its_own_manifest(tmp_path):
    for name, role in (("updates", "adapt"), ("kept", "eval")):
        write_manifest(tmp_path / name / "manifest.yaml", name=name, role=role)
    roots = {each.name: root for each, root in load_manifests(str(tmp_path))}
    assert roots == {name: tmp_path / name for name in ("updates", "kept")}


@pytest.mark.defect
@pytest.mark.parametrize(
    ("kind", "pattern", "there", "name"),
    [
        ("tars", "*/x.tar", ["a/x.tar"], "b/x.tar"),
        ("tars", "*/x.tar", ["a/x.tar", "b/readme"], "b/x.tar"),
        ("tars", "*/in/*.tar", ["a/in/x.tar", "b/readme"], "b/in/x.tar"),
        ("tars", "**/x.tar", ["a/x.tar", "b/c/readme"], "b/c/x.tar"),
        ("tars", "in/**", ["in/a/x.tar"], "in/a/y.tar"),
        ("csv", "list.csv", ["1.png"], "2.png"),
        ("csv", "list.csv", ["1.png"], "in/3.png"),
        ("folder", ".", ["train/oak/1.png", "test/oak/2.png"], "validation/oak/3.png"),
        ("folder", ".", ["oak/1.png"], "oak/2.png"),
        ("tars", "*.tar", ["x.tar"], "y.tar"),
    ],
)
def test_a_process_reads_a_collection_again_once_files_arrive(tmp_path, kind, pattern, there, name):
    """In a folder in which a pattern looks, or where a file was missing before."""
    root = write_manifest(tmp_path / "p/m.yaml", kind, reader={"path": pattern}, faults="skip")
    tree(root, {"list.csv": b"filepath,title\n1.png,one\n2.png,two\nin/3.png,three\n"})

    def add(path: str) -> None:
        if path.endswith(".tar"):
            tar(root / path, [("1.png", picture(zlib.crc32(path.encode()))), ("1.txt", b"one")])
        else:
            tree(root, {path: picture(zlib.crc32(path.encode()))})

    for path in there:
        add(path)
    before = load_data(str(root))
    assert load_data(str(root)) is before
    add(name)
    assert len(load_data(str(root)).table) == len(before.table) + 1


def test_a_folder_with_a_very_long_name_gets_a_valid_manifest(tmp_path):
    init(classes(tmp_path / f"{'long ' * 40}folder"))
    [(dataset, _)] = load_manifests(str(tmp_path / f"{'long ' * 40}folder"))
    assert len(dataset.name) == 100


LEVELS = r"manifest\.yaml and (\S+/)?manifest\.yaml: .*its own folder beside the others"


def init(folder, **kwargs) -> None:
    path, text, _ = infer.infer_manifest(folder, **kwargs)
    infer.write_manifest(path, text)


def test_manifests_at_two_levels_are_refused(tmp_path):
    root = classes(tmp_path / "pictures")
    classes(root, ["a", "b"], prefix="kept/")
    init(root)
    with pytest.raises(CmpError, match=f"{root}/{LEVELS}"):
        infer.infer_manifest(root / "kept", "eval")
    text = (root / "manifest.yaml").read_text()
    for inside in (text, f"{text}\nfaulty: ["):  # what is meant for one counts, too
        (root / "kept/manifest.yaml").write_text(inside)
        with pytest.raises(CmpError, match=f"{root}/{LEVELS}"):
            load_manifests(str(root))


def test_a_manifest_above_those_of_a_collection_is_refused(tmp_path, monkeypatch):
    for name in ("updates", "kept"):
        init(classes(tmp_path / name))
    for folder in (tmp_path, tmp_path / "updates/.."):
        with pytest.raises(CmpError, match=LEVELS):
            infer.infer_manifest(folder)
    init(classes(tmp_path / "pool"))  # beside the others
    assert len(load_manifests(str(tmp_path))) == 3
    monkeypatch.chdir(classes(tmp_path / "pool/more"))
    with pytest.raises(CmpError, match=LEVELS):
        infer.infer_manifest(files.Path())


def test_yaml_that_is_no_manifest_is_no_level(tmp_path):
    root = tree(classes(tmp_path / "p"), {"data.yaml": b"train: images\nnames: [oak]"})
    tree(tmp_path, {"compose.yaml": b"services: {role: web}", "binary.yaml": b"role: reader: \xff"})
    tree(root, {"oak/about.yaml": b"name: oak\nlicence: ours", "oak/list.yaml": b"- role: reader"})
    init(root)
    (root / "data.yaml").unlink()  # which a collection would take for a manifest of its own
    assert len(load_manifests(str(root))) == 1


def fill_up(path) -> None:
    """Write a file of two megabytes, which would take a minute; they take no room on the disk."""
    path.touch()
    os.truncate(path, 2**21)


@pytest.mark.parametrize(
    "make",
    [lambda path: path.symlink_to("/dev/zero"), os.mkfifo, fill_up],
    ids=["device", "pipe", "megabytes"],
)
def test_a_manifest_that_would_not_end_is_refused(tmp_path, make):
    make(tmp_path / "m.yaml")
    with pytest.raises(CmpError, match=r"m\.yaml.*not a regular file of at most"):
        load_manifests(str(tmp_path))


def test_the_hash_is_of_names_sizes_and_texts(tmp_path):
    root = classes(tmp_path / "p")
    first = read_set(root)
    moved = classes(tmp_path / "q")
    assert read_set(moved).data_hash() == first.data_hash()
    assert collection.read_index(fileset(prompt="{}!"), root).data_hash() != first.data_hash()
    (root / "oak/0.png").write_bytes(picture(3, size=(99, 99)))
    assert read_set(root).data_hash() != first.data_hash()


def test_a_row_of_a_table_costs_one_look_at_the_disk(tmp_path, monkeypatch):
    tree(tmp_path, {f"i/{n}.png": picture(n) for n in range(50)})
    names = [f"i/{n % 50}.png" for n in range(2000)]
    frame = pd.DataFrame({"filepath": names, "title": [f"a thing, {n}" for n in range(2000)]})
    frame.to_csv(tmp_path / "t.csv", index=False)
    looks = []
    for look in ("lstat", "stat", "open"):
        real = getattr(os, look)
        monkeypatch.setattr(os, look, lambda *a, real=real, **k: looks.append(a) or real(*a, **k))
    index = read_set(tmp_path, "csv", path="t.csv")
    assert index.table["captions"].map(len).tolist() == [40] * 50 and not index.faults
    assert len(looks) < 2050


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": "no place"}, "prompt"), ({"prompt": "a {:d}"}, "prompt"),
        ({"prompt": "a {!r}"}, "prompt"), ({"prompt": "a {:>9999999999}"}, "prompt"),
        ({"prompt": "a {}\n# b"}, "prompt: .* must be one line"),
        ({"title": "a\n# b"}, "title: .* must be one line"),
        ({"licence": "a\n# b"}, "licence: .* must be one line"),
        ({"update": "a\n# b"}, "update: .* must be one line"),
        ({"zero_shot": float("nan")}, "zero_shot"), ({"zero_shot": 101}, "zero_shot"),
        ({"splits": {"train": float("nan")}}, "splits"),
        ({"splits": {"train": 0.5}}, "splits: the shares must sum to 1, not 0.5$"),
        ({"role": "eval", "splits": {"train": 1.0}}, "splits: .*'train', only validation and test"),
        ({"splits": {"training": 1.0}}, r"splits\.training: Input should be 'train'"),
        ({"splits": 1}, r"splits: must have keys below it \(found 1\)$"),
        ({"reader": 5}, r"reader: must have keys below it \(found 5\)$"),
        ({"reader": {"kind": "pipe"}}, "reader: 'kind' is 'pipe'; it can be 'folder', "),
        ({"reader": {"kind": "cvs"}}, "reader: 'kind' is 'cvs'; it can be .* 'csv', "),
        ({"reader": {"path": "."}}, "reader: 'kind' is missing"),
        ({"reader": "folder"}, r"reader: .* \(found 'folder'\)$"),
        ({"name": "a+++b"}, r"name: 'a\+\+\+b' must be at most 100 letters, digits, - and _, the"),
        ({"licence": 1}, r"licence: Input should be a valid string \(found 1\)$"),
        ({"counts": {}}, "counts.classes: is missing$"), ({"faults": "ignore"}, "faults"),
        ({"typo": 1}, "typo: unknown key; the keys are title, role, .*, zero_shot$"),
        ({"licens": 1}, "licens: unknown key; did you mean 'licence'"),
        ({"reader": {"kind": "folder", "transparency": "black"}}, r"\.transparency: .* 'white'"),
        ({"reader": {"kind": "tars", "path": "x", "exif": True}}, r"\.exif: .* 'ignore' or"),
        ({"reader": {"kind": "csv", "lable": "x"}}, "lable: unknown key.* mean 'label'. The keys"),
        ({"reader": {"kind": "csv", "class": "x"}},
         "unknown key; the keys are kind, path, image, caption, label, split, update, trans.* res"),
    ],
)  # fmt: skip
def test_a_manifest_that_cannot_be(tmp_path, changes, words):
    about = fileset().model_dump(mode="json", exclude_none=True) | changes
    (tmp_path / "m.yaml").write_text(json.dumps(about))
    with pytest.raises(CmpError, match=rf"m\.yaml: .*{words}"):
        load_manifests(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1\nupdate: x\nday: 2026-01-02", "line 2: "),
        ("a: !!timestamp 2026-01-15", "line 1: aliases and tags are not allowed"),
        ("5: 1\n+5: 2", "line 1: two keys are the same number"),
        ("a: 1\ntitle: b: c", "line 2: mapping values are not allowed here)"),
        ("a: 1\na: 2", "line 1: 'a' is given twice)"),
        ("a: \0", "unacceptable character #x0000: special characters"),
    ],
)
def test_yaml_that_cannot_be_read(tmp_path, text, words):
    path = tmp_path / "m.yaml"
    with pytest.raises(CmpError, match=r"m\.yaml: no such file"):
        parsing.read_yaml(path)
    path.write_text(text)
    with pytest.raises(CmpError) as error:
        parsing.read_yaml(path)
    said = str(error.value)
    assert said.startswith(f"{path}: cannot be read as YAML ({words}") and "\n" not in said


@pytest.mark.defect
def test_a_manifest_of_very_many_keys_is_refused_at_once(tmp_path):
    text = "".join(f"key{number}: 1\n" for number in range(20_000))
    (tmp_path / "m.yaml").write_text(f"{text}role: adapt\nreader: {{}}\n")
    started = time.process_time()
    yaml.safe_load(text)
    usual, started = time.process_time() - started, time.process_time()
    with pytest.raises(CmpError, match=r"m\.yaml"):
        load_manifests(str(tmp_path))
    assert time.process_time() - started < 10 * usual  # each key was compared with all others


def test_a_pool_keeps_the_splits_of_an_earlier_update(tmp_path):
    root = classes(tmp_path / "p", each=20)
    init(root)
    [(adapt, _)] = load_manifests(str(root))
    text = (root / "manifest.yaml").read_text().replace("role: adapt", "role: pool")
    (root / "manifest.yaml").write_text(text)
    [(pool, _)] = load_manifests(str(root))
    table = collection.read_index(adapt, root).table
    trained = table.loc[table["split"] == "train", "source"].tolist()
    replayed = collection.read_index(pool, root).table
    assert replayed["source"].tolist() == trained and set(replayed["split"]) == {"train"}
    assert 0 < len(trained) < 60
    whole, explicit = (
        collection.read_index(pool.model_copy(update={"splits": splits}), root)
        for splits in ({}, {"train": 1.0})
    )
    assert len(whole.table) == 60 and explicit.data_hash() == whole.data_hash()


def test_data_init_writes_what_data_check_passes(tmp_path):
    root, path = classes(tmp_path / "My pictures", each=10), tmp_path / "My pictures/manifest.yaml"

    def invoke(*words):
        done = CliRunner().invoke(cli.app, ["data", *words, str(root)])
        return done.exit_code, done.output

    code, said = invoke("init")
    assert code == 0 and "30 images of 3 classes" in said
    assert f"check it with `cmpt data check '{root}'`" in said
    [(dataset, where)] = load_manifests(str(root))
    assert dataset.name == "my-pictures" and dataset.beside == "embedded" and where == root
    code, said = invoke("check")
    assert code == 0 and "1 of 1 datasets can be used" in said
    assert invoke("init")[0] == 1 and load_manifests(str(root)) == [(dataset, where)]
    good = (root / "oak/0.png").read_bytes()
    (root / "oak/0.png").write_bytes(good[: len(good) // 2])
    code, said = invoke("check")
    assert code == 1 and "corrupt image: oak/0.png; fix them, or" in said
    path.write_text(path.read_text().replace("faults: refuse", "faults: skip"))
    names = [f"oak/{n}.png" for n in range(5)]
    tree(root, dict.fromkeys(names, good[: len(good) // 2]))
    code, said = invoke("check", "--list", str(tmp_path / "faults.txt"))
    assert code == 0 and "usable, 5 skipped" in said and "oak/2.png and 2 more\n" in said
    lines = [f"my-pictures\tcorrupt image\t{name}\n" for name in names]
    assert (tmp_path / "faults.txt").read_text() == "".join(lines)


@pytest.mark.parametrize("role", list(SPLIT_SHARES))
def test_data_init_writes_a_manifest_of_each_role(tmp_path, role):
    root = classes(tmp_path / "p", each=20)
    shell = CliRunner().invoke(cli.app, ["data", "init", str(root), "--role", role])
    assert shell.exit_code == 0 and f"# {infer.ROLES[role]}" in shell.output
    assert "images of" in shell.output
    [(dataset, where)] = load_manifests(str(root))
    assert dataset.role == role and dataset.splits == SPLIT_SHARES[role]
    assert dataset.beside == ("embedded" if role == "adapt" else None)
    assert ("A_ZS measures what a model has not forgotten" in shell.output) == (role == "adapt")
    state = collection.dataset_state(dataset, where)
    assert state.state == "present" and len(state.index.table) == 60


@pytest.mark.parametrize("form", ["csv", "CSV", "jsonl", "tars", "parquet"])
def test_data_init_knows_tars_and_tables(tmp_path, form):
    frame = pd.DataFrame({"image": ["a.png"], "caption": ["an a"], "label": ["a"]})
    tree(tmp_path, {"a.png": picture()})
    with pytest.raises(CmpError, match="1 images are not in a class folder"):
        infer.infer_manifest(tmp_path)
    if form.lower() == "csv":
        frame.to_csv(tmp_path / f"t.{form}", index=False)
    elif form == "jsonl":
        frame.to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    elif form == "parquet":
        frame.to_parquet(tmp_path / "t.parquet")
    else:
        tar(tmp_path / "s.tar", [("a.png", picture()), ("a.txt", b"an a")])
    init(tmp_path)
    [(dataset, root)] = load_manifests(str(tmp_path))
    index = collection.read_index(dataset, root)
    assert index.table["captions"].tolist() == [["an a"]] and not index.faults


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ("file,product,month,caption",
         "file (image), caption (caption), month (update), product"
         "\nnot used: product; name the column of classes as `label:` in `reader`"),
        ("file,label,caption,shop,price",
         "file (image), caption (caption), label (label), shop, price\nnot used: shop, price"),
        ("file,what",
         "file (image), what"
         "\nnot used: what; name the column of classes as `label:` or the column of captions as "
         "`caption:` in `reader`"),
        ("file,label", "file (image), label (label)"),
    ],
)  # fmt: skip
def test_data_init_names_the_columns_that_are_not_used(tmp_path, columns, words):
    (tmp_path / "t.csv").write_text(f"{columns}\n")
    _, text, found = infer.infer_manifest(tmp_path)
    assert found == f"found: t.csv with the columns {words}"
    assert "not used" not in text


@pytest.mark.defect
@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_table_of_very_many_columns_is_refused_at_once(tmp_path, form):
    columns = [f"column {number}" for number in range(11_000)]
    if form == "csv":
        (tmp_path / "t.csv").write_text(f"{','.join(columns)}\n{','.join('x' for _ in columns)}\n")
    else:
        pq.write_table(pa.table({name: ["x"] for name in columns}), tmp_path / "t.parquet")
    for read in (partial(read_set, kind=form, path=f"t.{form}"), infer.infer_manifest):
        with pytest.raises(CmpError, match=rf"t\.{form}.*11,000 columns") as error:
            read(tmp_path)
        assert len(str(error.value)) < 500


@pytest.mark.defect
def test_of_many_columns_a_message_names_the_first(tmp_path):
    columns = ["image", *(f"column {number}" for number in range(500))]
    (tmp_path / "t.csv").write_text(f"{','.join(columns)}\n")
    _, _, found = infer.infer_manifest(tmp_path)
    assert "column 5" in found and len(found) < 1000
    with pytest.raises(CmpError, match="did you mean 'image'") as error:
        read_set(tmp_path, "csv", path="t.csv", image="imag")
    assert "column 5" in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.defect
@pytest.mark.parametrize(
    ("separator", "encoding", "why"),
    [
        (",", "latin-1", "cannot be read"),
        (",", "utf-16", "cannot be read"),
        (";", "utf-8", "none of its columns has images (filepath;label;caption)"),
    ],
)
def test_a_table_that_is_passed_over_is_named_with_the_reason(tmp_path, separator, encoding, why):
    rows = [("filepath", "label", "caption")]
    rows += [(f"i/{n}.png", "ab"[n % 2], f"café {n}") for n in range(4)]
    tree(tmp_path / "t", {f"i/{n}.png": picture(n) for n in range(4)})
    path = tmp_path / "t" / "t.csv"
    path.write_bytes("\n".join(map(separator.join, rows)).encode(encoding))
    with pytest.warns(UserWarning) as said:
        assert "4 images of 1 classes" in infer.infer_manifest(path.parent)[2]
    [sentence] = [str(each.message) for each in said]
    assert sentence.startswith(f"{path}: not used: {why}")
    assert "save it as UTF-8 with commas" in sentence
    for role in ("adapt", "pool"):  # nothing is trained on "a photo of a i"
        with pytest.raises(CmpError, match="save it as UTF-8 with commas") as error:
            arrivals.arrive(ledger.Ledger(), str(path.parent), role)
        ways = "move it elsewhere", "cmpt data init", f"name: {ledger.SET_NAMES[role]}"
        assert all(way in str(error.value) for way in (f"{path}: not used: {why}", *ways))
    path.write_bytes("\n".join(map(",".join, rows)).encode("utf-8"))
    assert "t.csv with the columns" in infer.infer_manifest(path.parent)[2]


def described(folder, *lines, **extra):
    """Pictures in a folder `images`, and `metadata.jsonl` with lines about them."""
    tree(folder, {f"images/{n}.png": picture(n) for n in range(len(lines))})
    rows = [{"file_name": f"images/{n}.png"} | line for n, line in enumerate(lines)]
    (folder / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    return folder


@pytest.mark.parametrize("role", ["adapt", "pool"])
def test_an_image_folder_of_hugging_face_has_its_captions(tmp_path, role):
    """All its images were of one class, `images`."""
    texts = [*(f"a café, {n}" for n in range(6)), ["a cup", "a mug"]]
    root = described(tmp_path / "month", *({"text": text, "price": 3} for text in texts))
    arrived, _ = arrivals.arrive(ledger.Ledger(), str(root), role)
    captions = arrived.pictures.set_index("source")["captions"].map(list).to_dict()
    expected = [[text] if isinstance(text, str) else text for text in texts]
    assert captions == {f"images/{n}.png": text for n, text in enumerate(expected)}
    assert "not used: price" in infer.infer_manifest(root)[2]


def test_json_lines_are_read_as_any_table(tmp_path):
    labels, splits = (3, "oak", None, 2.5), ("train", "test", None, "dev")
    lines = [{"label": x, "split": y} for x, y in zip(labels, splits, strict=True)]
    keys = {"path": "metadata.jsonl", "image": "file_name", "label": "label", "split": "split"}
    index = read_set(described(tmp_path / "p", *lines), "jsonl", **keys)
    assert index.classes == ["3", "oak"] and contents(index) == [picture(0), picture(1)]
    assert [fault.where for fault in index.faults] == ["images/2.png", "images/3.png"]
    assert index.table["split"].tolist() == ["train", "test"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"file_name": "a.png", "text": "a"}\n{"file_name": "b.png"}', "line 2: must .* the keys"),
        ('{"file_name": "a.png", "text": "a"}\n\n[1]', "line 3: must be a JSON object"),
        ('["a.png"]', "line 1: must be a JSON object"),
        ('{"text": "a", "text": "b"}', "'text' is given twice"), ("[" * 100_000, "recursion"),
        ("{", "Expecting property name"), ("\xff", "codec can't decode"), ("", "no column 'filepa"),
        (json.dumps(dict.fromkeys(map(str, range(11_000)))), "11,000 columns"),
    ],
)  # fmt: skip
def test_json_lines_that_are_no_table_are_refused(tmp_path, text, words):
    (tmp_path / "t.jsonl").write_text(text, encoding="latin-1")
    with pytest.raises(CmpError, match=rf"(t\.jsonl|reader\.image).*{words}"):
        read_set(tmp_path, "jsonl", path="t.jsonl", image="filepath")


@pytest.mark.parametrize(
    "name", ["captions.json", "train/metadata.jsonl", "test/metadata.csv", "train/x.JSON"]
)
def test_a_list_beside_a_single_class_may_have_captions(tmp_path, name):
    """A folder per class has several; of these, none is called images."""
    tops = ("train", "test") if "/" in name else (".",)
    root = tree(
        tmp_path / "p", {f"{top}/images/{n}.png": picture(n) for top in tops for n in (1, 2)}
    )
    (root / name).write_text("[]")
    with pytest.warns(UserWarning, match="not used"):
        assert "images of 1 classes" in infer.infer_manifest(root)[2]
    with pytest.raises(CmpError, match=rf"--data: {root}/{name}: .*'images'") as error:
        arrivals.read_sets(root, "adapt", "{}")
    line = json.loads(re.search(r"{.*?}", str(error.value))[0])
    assert f"{root}/metadata.jsonl" in str(error.value) and (root / line["file_name"]).exists()
    assert line.get("split", ".") in tops
    tree(root, {f"{top}/more/3.png": picture(3) for top in tops})
    assert arrivals.read_sets(root, "adapt", "{}")


SHAPES = [(64, 48), (48, 64), (640, 480), (37, 37), (20, 33), (23, 20), (20, 20), (9, 7), (40, 3)]


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("side", [20, 33])
def test_pixels_are_those_of_open_clip(mode, interpolation, side):
    """Also where a JPEG could be decoded at a part of its size."""
    how = Preprocessing(side, interpolation=interpolation, resize_mode=mode, fill_color=90)
    for size in SHAPES[: -1 if mode == "longest" else None]:  # theirs divides by zero there
        for kind in ("PNG", "JPEG"):
            content = picture(5, size, kind)
            got, expected = images.prepare_image(content, how), as_open_clip(content, how=how)
            assert got.shape == (3, side, side) and got.dtype == np.uint8
            assert np.abs(got - expected).max() < 0.01, (size, kind)


def test_a_very_long_picture_takes_little_memory():
    content = picture(1, (60_000, 2))
    tracemalloc.start()
    for mode in ("shortest", "squash", "longest"):
        images.prepare_image(content, Preprocessing(resize_mode=mode))
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


def test_boxes_of_crops_are_like_those_of_torchvision():
    draw = np.random.default_rng(3)
    for width, height in ((400, 400), (400, 300), (300, 410), (420, 300), (500, 333), (30, 900)):
        boxes = np.array([images.crop_box(width, height, draw.random(4)) for _ in range(4000)])
        assert (boxes >= 0).all() and (boxes[:, 2:] <= [width + 1e-9, height + 1e-9]).all()
        sides = boxes[:, 2:] - boxes[:, :2]
        theirs = RandomResizedCrop(1, scale=images.CROP_AREA, ratio=images.CROP_RATIO)
        picture = torch.zeros(1, height, width)
        found = [theirs.get_params(picture, theirs.scale, theirs.ratio) for _ in range(4000)]
        expected = np.array([[w, h] for _, _, h, w in found])
        for measure in (lambda x: x.prod(1), lambda x: x[:, 0] / x[:, 1]):
            ours, reference = np.sort(measure(sides)), np.sort(measure(expected))
            ours, reference = ours / reference.mean(), reference / reference.mean()
            assert ours.min() >= reference.min() * 0.98 and ours.max() <= reference.max() * 1.02
            assert abs(ours - reference).mean() < 0.02
        if width == 500:  # no crop fits: always the same box in the middle
            np.testing.assert_allclose(boxes, [[28, 0, 472, 333]] * 4000, atol=1e-9)


def test_parts_and_middles():
    content = picture(5, size=(60, 48), kind="JPEG")
    left = images.random_crop(content, np.array([0.0, 0.0, 0.0, 0.0]), 20)
    right = images.random_crop(content, np.array([0.0, 0.0, 0.999, 0.999]), 20)
    assert left.shape == right.shape == (3, 20, 20) and (left != right).any()
    assert (images.random_crop(content, np.array([0.0] * 4), 20) == left).all()


AS_STORED = np.arange(0, 256, 4, dtype=np.uint8)[None].repeat(64, 0)
"""A grey ramp of 8 bits, 64 pixels square."""


def saved(image, kind="PNG", **options) -> bytes:
    """An image as a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def reader(**keys) -> FolderReader:
    return FolderReader(kind="folder", **keys)


def as_open_clip(content, upright=False, how=None) -> np.ndarray:
    """What open_clip's own transform makes of a file."""
    image, how = Image.open(io.BytesIO(content)), how or Preprocessing(64)
    keys = how.resize_mode, how.interpolation
    theirs = image_transform(how.size, False, (0, 0, 0), (1, 1, 1), *keys, how.fill_color)
    return theirs(ImageOps.exif_transpose(image) if upright else image).numpy() * 255


OF_16_BITS = AS_STORED.astype(np.uint16) * 257
BIG_ENDIAN = OF_16_BITS.astype(">u2").tobytes()
DEEP = {
    "PNG": saved(Image.fromarray(OF_16_BITS)),
    "TIFF": saved(Image.fromarray(OF_16_BITS), "TIFF"),
    "big-endian TIFF": saved(Image.frombytes("I;16B", (64, 64), BIG_ENDIAN), "TIFF"),
    "PGM": b"P5 64 64 65535\n" + BIG_ENDIAN,
    "PGM of 10 bits": b"P5 64 64 1023\n" + (AS_STORED.astype(int) * 4).astype(">u2").tobytes(),
}


@pytest.mark.defect
@pytest.mark.parametrize("kind", DEEP)
def test_grey_values_of_16_bits_are_scaled(kind):
    both = DEEP[kind], saved(Image.fromarray(AS_STORED))
    near = partial(np.testing.assert_allclose, atol=1 if "10 bits" in kind else 0)
    near(*(images.prepare_image(x, Preprocessing(64)).astype(int) for x in both))
    near(*(images.random_crop(x, np.array([0.5] * 4), 20).astype(int) for x in both))
    near(*(images.decode_rgba(x).astype(int) for x in both))
    assert as_open_clip(DEEP[kind]).mean() > 240  # which is why it is counted


@pytest.mark.defect
def test_the_transparent_value_of_a_deep_grey_picture_is_transparent():
    content = saved(Image.fromarray(OF_16_BITS), transparency=257 * 4)
    got = images.prepare_image(content, Preprocessing(64))
    assert (got[:, :, 1] == 255).all() and (got[:, :, 0] == 0).all() and (got[:, :, 2] == 8).all()
    beneath = reader(transparency="as-open-clip")
    assert (images.prepare_image(content, Preprocessing(64), beneath)[:, :, 1] == 4).all()


WIDE = np.linspace(-50, 400, 64 * 64, dtype=np.float32).reshape(64, 64)
INKS = np.random.default_rng(0).integers(0, 256, (4, 8, 8), np.uint8).repeat(8, 1).repeat(8, 2)
SEEN_ALIKE = {
    "L": saved(Image.fromarray(AS_STORED)),
    "1": saved(Image.fromarray(AS_STORED).convert("1")),
    "P": saved(Image.open(io.BytesIO(picture(3, (64, 64)))).quantize(16)),
    "PA": saved(Image.open(io.BytesIO(picture(3, (64, 64)))).quantize(16).convert("PA"), "TIFF"),
    "CMYK": saved(Image.merge("CMYK", [Image.fromarray(x) for x in INKS]), "JPEG"),
    "LAB": saved(Image.merge("LAB", [Image.fromarray(x) for x in INKS[:3]]), "TIFF"),
    "F": saved(Image.fromarray(WIDE), "TIFF"),
    "I": saved(Image.fromarray(WIDE.astype(np.int32)), "TIFF"),
}


SMALL = [
    Preprocessing(24, interpolation=interpolation, resize_mode=mode, fill_color=fill)
    for interpolation in ("bicubic", "bilinear")
    for mode, fill in (("shortest", 0), ("squash", 0), ("longest", 0), ("longest", 90))
]


@pytest.mark.defect
@pytest.mark.parametrize("mode", SEEN_ALIKE)
def test_pictures_of_these_modes_are_those_of_open_clip_or_are_counted(mode):
    content = SEEN_ALIKE[mode]
    assert Image.open(io.BytesIO(content)).mode == mode
    got = images.prepare_image(content, Preprocessing(64))
    assert np.abs(got - as_open_clip(content)).max() < 0.01
    has_trait = bool(checks.picture_traits(images.open_image(content)))
    for how in SMALL:
        theirs = as_open_clip(content, how=how)
        alike = np.abs(images.prepare_image(content, how) - theirs).max() < 0.01
        assert alike or has_trait, how
        got = images.prepare_image(content, how, reader(transparency="as-open-clip"))
        assert np.abs(got - theirs).max() < 0.01, how


def clear_picture(mode) -> bytes:
    """A picture of which a part is transparent, with a colour below."""
    image = Image.open(io.BytesIO(picture(3, (64, 64)))).convert("RGBA")
    image.putalpha(Image.fromarray(AS_STORED))
    if mode == "P":
        return saved(image.convert("RGB").quantize(16), transparency=bytes([0, 99, *[255] * 14]))
    return saved(image.convert(mode))


@pytest.mark.defect
@pytest.mark.filterwarnings("ignore:Palette images")
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_as_the_manifest_says(mode):
    content, numbers = clear_picture(mode), np.array([0.5] * 4)
    white, theirs = reader(), reader(transparency="as-open-clip")
    usual = images.prepare_image(content, Preprocessing(64))
    assert (images.prepare_image(content, Preprocessing(64), white) == usual).all()
    for how in (Preprocessing(64), *SMALL):
        got = images.prepare_image(content, how, theirs)
        assert np.abs(got - as_open_clip(content, how=how)).max() < 0.01, how
        assert np.abs(got - images.prepare_image(content, how).astype(int)).max() > 50, how
    crops = [images.random_crop(content, numbers, 20, each) for each in (white, theirs)]
    assert (crops[0] != crops[1]).any()
    alpha = [images.decode_rgba(content, each)[3].min() for each in (theirs, white)]
    assert alpha[0] == 255 > alpha[1]


@pytest.mark.defect
@pytest.mark.parametrize("turn", [*range(1, 9), 0, 77])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_exif_data_turn_a_picture_where_the_manifest_says_so(turn, kind):
    exif = Image.Exif()
    exif[0x112] = turn
    content = saved(Image.open(io.BytesIO(picture(3, (96, 64)))), kind, exif=exif)
    for key, upright in (("ignore", False), ("apply", True)):
        got = images.prepare_image(content, Preprocessing(64), reader(exif=key))
        assert np.abs(got - as_open_clip(content, upright)).max() < 0.01
    expected = saved(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    crop = partial(images.random_crop, numbers=np.array([0.3] * 4), side=40)
    assert (crop(content, reader=reader(exif="apply")) == crop(expected)).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MMxyz"])
def test_damaged_exif_data_turn_nothing(exif):
    content = saved(Image.open(io.BytesIO(picture(3))), "JPEG", exif=exif)
    assert checks.picture_traits(images.open_image(content)) == 0
    turned = images.prepare_image(content, Preprocessing(64), reader(exif="apply"))
    assert (turned == images.prepare_image(content, Preprocessing(64))).all()


def img2dataset(root, each=6, extra=True) -> Path:
    """A folder as img2dataset writes it: shards of pictures with captions, and its own tables."""
    for shard in ("00000", "00001"):
        for number in range(each):
            key = f"{shard}/{shard}{number:04}"
            about = {"caption": f"a picture {key}", "url": "http://x", "key": key}
            beside = {f"{key}.jpg": picture(zlib.crc32(key.encode()), kind="JPEG")}
            beside |= {f"{key}.txt": f"a picture {key}".encode()}
            beside |= {f"{key}.json": json.dumps(about).encode()} if extra else {}
            tree(root, beside)
        pd.DataFrame({"url": ["http://x"], "caption": ["x"]}).to_parquet(root / f"{shard}.parquet")
        tree(root, {f"{shard}_stats.json": b"{}"})
    return root


@pytest.mark.defect
@pytest.mark.parametrize("extra", [True, False])
def test_a_folder_of_img2dataset_is_read_with_its_captions(tmp_path, extra):
    root = img2dataset(tmp_path / "p", extra=extra)
    assert "kind: pairs" in check_manifest(root)  # as one folder per class
    (root / "m.yaml").unlink()
    path, text, found = infer.infer_manifest(root)
    assert "12 images" in found and "img2dataset" in found
    infer.write_manifest(path, text.replace("beside: embedded", ""))
    said = CliRunner().invoke(cli.app, ["data", "check", str(root)])
    assert said.exit_code == 0 and "present" in said.output, said.output
    [(dataset, where)] = load_manifests(str(root))
    index = collection.check_images(collection.read_index(dataset, where))
    assert dataset.prompt == "{}" and index.dataset.task == "retrieval" and not index.faults
    assert index.table["captions"][3] == ["a picture 00000/000000003"]
    assert contents(index)[3] == (root / "00000/000000003.jpg").read_bytes()


def test_hostile_pairs(tmp_path):
    root = tree(
        tmp_path / "p",
        {f"0/{n}.png": picture(n) for n in range(8)}
        | {"0/0.txt": b"zero", "0/1.json": b'{"caption": "one"}', "0/2.txt": b""}
        | {"0/3.json": b"[" * 9999, "0/4.txt": b"\xff\xfe", "0/5.txt": b"x" * (2**20 + 1)}
        | {"0/6.heic": b"x", "0/lonely.txt": b"x", "top.bin": b"x"},
    )
    tree(tmp_path / "secret", {"letter": b"to nobody"})
    (root / "0/7.txt").symlink_to(tmp_path / "secret/letter")
    index = read_set(root, "pairs", faults="skip")
    assert sorted(kinds(index)) == [
        "caption is empty: 0/2.png", "caption is empty: 0/3.png", "caption is empty: 0/4.png",
        "caption is empty: 0/5.png", "caption is missing: 0/6.png",
        f"{files.LINK.problem}: 0/7.png", "not an image file name: 0/6.heic",
    ]  # fmt: skip
    assert index.table["captions"].tolist() == [["zero"], ["one"]]
    assert "nobody" not in str(index.table.to_dict())


def test_a_tar_is_read_again_only_once_it_has_changed(tmp_path, monkeypatch):
    members = [("1.png", picture(1)), ("1.txt", b"one"), ("bad.pkl", b"x"), ("2.png", b"no")]
    path = tar(tmp_path / "a.tar", members)
    first = tars.tar_samples(path)
    assert [sample[0] for sample in first[0]] == ["1", "2"]
    assert first[1] == [["member is a pickle", "a.tar: bad.pkl"]]
    with monkeypatch.context() as patch:
        patch.setattr(tars, "tar_members", lambda *_: pytest.fail("the tar was read again"))
        assert tars.tar_samples(path) == first
    tar(path, [("3.png", picture(3)), ("3.txt", b"three")])
    assert [sample[0] for sample in tars.tar_samples(path)[0]] == ["3"]


@pytest.mark.defect
@pytest.mark.parametrize("is_folder", [True, False])
def test_what_cannot_be_kept_stops_nothing(tmp_path, is_folder):
    """Where the folder of kept files is a file, and where a folder has a kept file's name."""
    folder = classes(tmp_path / "pictures", each=2)
    path = tar(tmp_path / "a.tar", [("1.png", picture(1)), ("1.txt", b"one")])
    reads = [
        lambda: len(checks.usable_images(read_set(folder))[0].table),
        lambda: len(checks.usable_images(read_set(folder), True)[0].table),
        lambda: tars.tar_samples(path),
    ]
    expected = [read() for read in reads]
    kept = [x for x in (tmp_path / "build").rglob("*.*") if x.is_file()]
    assert len(kept) == 2
    for each in kept if is_folder else [tmp_path / "build/checked"]:
        shutil.rmtree(each) if each.is_dir() else each.unlink()
        each.mkdir() if is_folder else each.write_text("x")
    for read, before in zip(reads, expected, strict=True):
        with pytest.warns(UserWarning, match=r"not cached: .*build"):
            assert read() == before


def test_one_long_caption_takes_no_memory_for_the_others():
    """Every caption once took as much memory as the longest: 160 MB here."""
    texts = [*(f"a shoe {n}" for n in range(400)), "word " * 20_000, "ends in\0", "ends in"]
    table = pd.DataFrame({"captions": [[text] for text in texts]})
    tracemalloc.start()
    corpus = build_corpus(torch.zeros(len(texts), 3, 1, 1), [table], [])
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    assert [corpus.captions(row) for row in range(len(texts))] == [[text] for text in texts]


# what a folder without a manifest is taken for


def found(root: Path) -> pd.DataFrame:
    """The images of a folder as `cmpt update` and `cmpt data init` read it, by their names."""
    init(root)
    [(dataset, place)] = load_manifests(str(root))
    return collection.read_index(dataset, place).table.set_index("source")


def test_columns_that_pandas_wrote_as_an_index_are_read(tmp_path):
    names = ["train", "test", "test"]
    frame = pd.DataFrame({"image": [picture(n) for n in range(3)], "split": names, "label": "oak"})
    frame.set_index(["split", "label"]).to_parquet(tmp_path / "t.parquet")
    table = found(tmp_path)
    assert table["split"].tolist() == names and set(table["label"]) == {"oak"}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            {"test.csv": "", "train.csv": ""},
            r"several tables list images \(test\.csv, train\.csv\)",
        ),
        ({"a.csv": "", "b.parquet": ""}, r"several tables list images \(a\.csv, b\.parquet\)"),
        ({"photos.tar": ""}, "contains tars, such as photos.tar, and beside them 18 images of 3"),
    ],
)
def test_what_could_be_meant_in_two_ways_is_refused(tmp_path, files, words):
    root = classes(tmp_path / "p")
    frame = pd.DataFrame({"filepath": ["oak/0.png"], "label": "oak"})
    for name in files:
        if name.endswith(".csv"):
            frame.to_csv(root / name)
        elif name.endswith(".parquet"):
            frame.to_parquet(root / name)
        else:
            tar(root / name, [("0.png", picture()), ("0.cls", b"oak")])
    with pytest.raises(CmpError, match=words):
        infer.describe_folder(root, "adapt")


def test_names_are_taken_before_numbers_and_any_file_name_is_found(tmp_path):
    root = classes(tmp_path / "2026")
    rows = "filepath,label,label_name\noak/0.png,3,holm oak\noak/1.png,3,holm oak\n"
    (root / "export [2026].csv").write_text(rows)
    assert set(found(root)["label"]) == {"holm oak"}


def test_tars_in_folders_of_splits_have_these_splits(tmp_path):
    for split in ("train", "test"):
        members = [(f"{split}{n}.{end}", text) for n in range(4)
                   for end, text in (("png", picture(n)), ("cls", b"\xef\xbb\xbfoak"))]  # fmt: skip
        tar(tmp_path / split / "0.tar", members)
    table = found(tmp_path)
    assert all(split == name.split("/")[1][:-1] for name, split in table["split"].items())
    assert set(table["label"]) == {"oak"} and table["split"].value_counts().to_dict() == {
        "train": 4, "test": 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    "path",
    ["t.csv", "*/t.csv", "*.jsonl", "*/t.parquet", "*.parquet", "*.tar"],
)
def test_folders_and_files_that_are_called_like_splits_give_them(tmp_path, path):
    """Otherwise, published test images would be trained on."""
    known, listed = {}, []
    for split, numbers in (("train", range(20)), ("test", range(20, 30))):
        files = {f"{n}.png": picture(n) for n in numbers}
        tree(tmp_path / split, files)
        known |= dict.fromkeys(files.values(), split)
        frame = pd.DataFrame({"filepath": [*files], "title": "a text"})
        listed.append(frame.assign(filepath=[f"{split}/{name}" for name in files]))
        if path == "*/t.csv":
            frame.to_csv(tmp_path / split / "t.csv")
        elif path == "*.jsonl":
            listed[-1].to_json(tmp_path / f"{split}.jsonl", orient="records", lines=True)
        elif path.endswith(".parquet"):
            name = path.replace("*/", f"{split}/").replace("*", f"{split}-00000-of-00001")
            frame.assign(filepath=[*files.values()]).to_parquet(tmp_path / name)
        elif path == "*.tar":
            texts = [(name.replace("png", "txt"), b"a text") for name in files]
            tar(tmp_path / f"{split}-0.tar", sorted([*files.items(), *texts]))
    if path == "t.csv":
        pd.concat(listed).to_csv(tmp_path / "t.csv")
    kind = infer.TABLE_KINDS.get(Path(path).suffix, "tars")
    index = read_set(tmp_path, kind, path=path)
    assert [known[content] for content in contents(index)] == index.table["split"].tolist()
    assert len(index.table) == 30 and not index.faults
    [sentence] = notes.splits_of_names(index)
    assert sentence.endswith("names of folders or files give the splits: train, test")


def test_a_single_name_of_a_split_in_paths_is_a_class(tmp_path):
    root = classes(tmp_path, ["train", "bus"], 20)
    names = [f"{name}/{n}.png" for name in ("train", "bus") for n in range(20)]
    pd.DataFrame({"filepath": names, "title": "x"}).to_csv(root / "train.csv")
    assert not read_set(root, "csv", path="train.csv").table["given"].any()


def test_a_class_may_have_the_name_of_its_folder(tmp_path, monkeypatch):
    classes(tmp_path / "shoes", ["shoes", "boots"])
    monkeypatch.chdir(tmp_path)
    index = collection.read_index(fileset(), Path("shoes"))
    assert len(index.table) == 12 and not index.faults


def test_a_link_to_a_class_is_named_as_one(tmp_path):
    root = classes(tmp_path / "p")
    (root / "cats").symlink_to(classes(tmp_path / "q") / "oak", target_is_directory=True)
    [fault] = collection.read_index(fileset(faults="skip"), root).faults
    assert fault.where == "cats" and "link to a folder, which is not followed" in fault.kind
