"""What `cmpt data check` notes of pictures that can be used."""

import io
import json
import struct
import warnings
import zlib

import numpy as np
import pandas as pd
import pytest
import torch
from pictures import classes, fileset, picture, tree
from PIL import Image
from typer.testing import CliRunner

from cmp import cli
from cmp.data import load_data
from cmp.evaluation import retrieval_hits
from cmp.readers import collection, notes, tables

pytestmark = pytest.mark.usefixtures("build")


@pytest.fixture
def folder(tmp_path):
    """A collection of two sets: what arrives, and what is scored alone."""
    classes(tmp_path / "p/new", ["a", "b"], 4, "train/")
    tree(tmp_path / "p/new", {"test/a/8.png": picture(8), "test/b/9.png": picture(9)})
    tree(
        tmp_path / "p/kept",
        {f"{name}/{n}.png": picture(ord(name) + 50 * n) for name in "cd" for n in (5, 6)},
    )
    for name, role in (("new", "adapt"), ("kept", "eval")):
        about = fileset(name=name, role=role, splits={"test": 1.0} if role == "eval" else {})
        write(tmp_path / "p" / name / "manifest.yaml", about)
    return tmp_path / "p"


def write(path, manifest):
    path.write_text(json.dumps(json.loads(manifest.model_dump_json(exclude_none=True))))


def check(folder, *options) -> str:
    said = CliRunner().invoke(cli.app, ["data", "check", str(folder), *options])
    assert said.exit_code == 0, said.output
    return " ".join(said.output.split())


def odd_pictures() -> dict[str, bytes]:
    """A picture of each kind that programs see in different ways, by trait."""
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    clear, exif = Image.new("RGBA", (16, 16), (9, 8, 7, 6)), Image.Exif()
    exif[0x112] = 6
    pictures = {
        "grey16": (Image.fromarray(grey), "PNG", {}),
        "values32": (Image.fromarray(grey.astype(np.float32)), "TIFF", {}),
        "transparent": (clear, "PNG", {}),
        "rotated": (Image.new("RGB", (16, 9), "red"), "JPEG", {"exif": exif}),
        "palette": (
            Image.linear_gradient("L").resize((16, 16)).convert("RGB").quantize(4),
            "PNG",
            {},
        ),
        "colours": (Image.new("CMYK", (16, 16), (9, 8, 7, 6)), "JPEG", {}),
        "opaque": (Image.new("RGBA", (16, 16), (9, 8, 7, 255)), "PNG", {}),  # none of these
    }
    files = {}
    for name, (image, kind, options) in pictures.items():
        file = io.BytesIO()
        image.save(file, kind, **options)
        files[name] = file.getvalue()
    rows = b"".join(b"\0" + bytes(16 * 6) for _ in range(16))
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0))]
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(x)) + n + x + struct.pack(">I", zlib.crc32(n + x)) for n, x in parts
    ]
    files["colour16"] = b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
    return files


@pytest.mark.defect
@pytest.mark.filterwarnings("ignore:kept. held-out images that are also training images")
def test_pictures_that_open_clip_sees_otherwise_are_counted_by_set(folder):
    odd = odd_pictures()
    tree(folder / "kept", {f"c/{name}.png": content for name, content in odd.items()})
    tree(folder / "new/train", {f"a/{n}.png": odd["rotated"] + bytes(n) for n in (20, 21)})
    said = check(folder)
    for trait, words in (
        ("grey16", "16-bit grey images: 1, such as c/grey16.png"),
        ("colour16", "16-bit colour images: 1, such as c/colour16.png"),
        ("values32", "images of 32 bits per value: 1, such as c/values32.png"),
        ("transparent", "transparent images: 1, such as c/transparent.png"),
        ("palette", "palette or one-bit images: 1, such as c/palette.png"),
        ("colours", "images in CMYK, YCbCr or Lab colours: 1, such as c/colours.png"),
        ("rotated", "images that their EXIF data rotate: 1, such as c/rotated.png"),
    ):
        assert f"note: kept: {words}" in said, trait
    assert "note: new: images that their EXIF data rotate: 2, such as train/a/20.png" in said
    assert "`exif: apply`" in said and "`transparency: as-open-clip`" in said
    assert said == check(folder)  # also from what was kept of the first check
    [usual, _] = [index.data_hash() for index in collection.load_collection(str(folder))[0]]
    keys = {"transparency": "as-open-clip", "exif": "apply"}
    about = fileset(name="kept", role="eval", splits={"test": 1.0}, reader=keys)
    write(folder / "kept/manifest.yaml", about)
    said = check(folder)
    assert "`exif: apply`" not in said.partition("new: images")[0]
    assert "exif_transpose" in said and "alpha channel is dropped" in said
    [now, _] = [index.data_hash() for index in collection.load_collection(str(folder))[0]]
    assert now != usual


def test_a_picture_that_is_trained_on_and_scored_is_named(folder):
    assert "note" not in check(folder)
    (folder / "kept/c/leak.png").write_bytes((folder / "new/train/a/1.png").read_bytes())
    (folder / "kept/d/leak.png").write_bytes((folder / "new/train/b/1.png").read_bytes())
    words = "kept: held-out images that are also training images of new: 2, such as c/leak.png"
    assert f"note: {words} and train/a/1.png" in check(folder)
    assert "note" not in check(folder, "--no-decode")  # which reads no picture
    with pytest.warns(UserWarning, match="also training images of new: 2"):
        load_data(str(folder))


def test_a_picture_that_was_written_again_with_the_same_pixels_is_named_too(folder):
    def written_again(path) -> bytes:
        file = io.BytesIO()
        Image.open(path).save(file, "PNG", compress_level=1)
        assert file.getvalue() != path.read_bytes()
        return file.getvalue()

    trained = folder / "new/train/a/1.png"
    tree(folder, {"kept/c/leak.png": written_again(trained)})
    words = (
        "note: kept: held-out images that are also training images of new: 1, such as c/leak.png"
    )
    assert words in check(folder)
    with pytest.warns(UserWarning, match="also training images of new: 1"):
        load_data(str(folder))
    tree(folder, {"new/train/b/again.png": written_again(trained)})
    said = check(folder)
    assert "note: new: training images with several file names: 1, such as" in said
    assert "note: new: images in several classes: 1, such as" in said


def test_what_was_checked_is_compared_without_reading_it_again(folder, monkeypatch):
    (folder / "kept/c/leak.png").write_bytes((folder / "new/train/a/1.png").read_bytes())
    with pytest.warns(UserWarning, match="also training images of new: 1"):
        collection.load_collection(str(folder))
    monkeypatch.setattr("cmp.readers.checks._check_image", None)
    with pytest.warns(UserWarning, match="also training images of new: 1"):
        collection.load_collection(str(folder))


def test_equal_pictures_whose_names_fall_into_two_splits_are_named(tmp_path):
    """They stay where they are: which picture is in the test is decided by its name alone."""
    root = classes(tmp_path / "p", ["a", "b"], 30)
    for number in range(0, 30, 2):
        (root / f"a/{number + 1}.png").write_bytes((root / f"a/{number}.png").read_bytes())
    index = collection.check_images(collection.read_index(fileset(), root))
    assert len(index.table) == 60
    [sentence] = notes.leaked_pictures([index])
    held = index.table[index.table["split"] != "train"]
    contents = {
        (root / n).read_bytes() for n in index.table["source"][index.table.split == "train"]
    }
    count = sum((root / name).read_bytes() in contents for name in held["source"])
    assert count > 0 and f"also training images of mine: {count}, such" in sentence


def test_training_pictures_with_several_names_are_named(tmp_path):
    root = classes(tmp_path / "p", ["a", "b"], 3)
    tree(root, {"a/again.png": (root / "a/0.png").read_bytes()})
    tree(root, {"b/again.png": (root / "b/0.png").read_bytes()})
    tree(root, {"b/other.png": (root / "a/0.png").read_bytes()})
    index = collection.check_images(collection.read_index(fileset(role="pool"), root))
    [sentence] = notes.repeated_pictures(index)
    assert sentence.startswith("mine: training images with several file names: 2, such as ")
    frame = pd.DataFrame({"filepath": ["a/0.png"] * 2, "title": ["one text", "another text"]})
    named = tables.read_frame(fileset("csv", role="pool"), frame, root)
    assert notes.repeated_pictures(collection.check_images(named)) == []  # a row a caption is fine


def test_rows_that_differ_only_in_the_caption_are_one_image(tmp_path):
    """As in the caption files of Flickr30k; retrieval would find only one of several rows."""
    tree(tmp_path, {f"{n}.png": picture(n) for n in range(30)})
    texts = [(n, f"text {k} of {n}") for k in (0, 1, 1) for n in range(30)]
    rows = [{"filepath": f"{n}.png", "title": text, "klass": "oak"} for n, text in texts]
    rows.append({"filepath": "0.png", "title": "a beech", "klass": "beech"})
    frame = pd.DataFrame(rows)
    index = tables.read_frame(fileset("csv"), frame[:-1], tmp_path)
    assert index.table["source"].tolist() == [f"{n}.png" for n in range(30)]
    assert index.table["captions"][3] == ["text 0 of 3", "text 1 of 3"]
    assert index.read(index.table["position"][3]) == picture(3)
    assert "mine: images of several rows, whose captions were joined: 30" in notes.notes_on([index])
    named = tables.read_frame(fileset("csv", reader={"label": "klass"}), frame, tmp_path)
    assert len(named.table) == 31 and named.classes == ["beech", "oak"]


def test_the_same_picture_in_two_classes_is_named_wherever_it_is(tmp_path):
    """In training, in the test or in both, and in another file with the same pixels."""
    root = classes(tmp_path / "p", ["a", "b"], 8)
    index = collection.check_images(collection.read_index(fileset(), root))
    assert notes.contradictory_classes(index) == []
    Image.open(root / "a/0.png").save(root / "b/oops.bmp")
    for name in index.table["source"][index.table["split"] == "test"]:
        (root / "b" / f"of-{name.replace('/', '-')}").write_bytes((root / name).read_bytes())
    index = collection.check_images(collection.read_index(fileset(), root))
    wrong = {n for n in index.table["source"] if n.startswith("b/of-a-")} | {"b/oops.bmp"}
    assert f"note: mine: images in several classes: {len(wrong)}, such as a/0.png (a) and " in (
        f"note: {notes.notes_on([index])[0]}"
    )
    assert len(wrong) > 1


def test_classes_that_are_numbers_are_named_with_a_way_to_name_them(tmp_path):
    tree(tmp_path, {f"{n}.png": picture(n) for n in range(4)})
    frame = pd.DataFrame({"filepath": [f"{n}.png" for n in range(4)], "klass": list("0123")})

    def noted(**labels) -> list[str]:
        about = fileset("csv", reader={"label": "klass", "caption": None})
        return notes.notes_on([tables.read_frame(about, frame.assign(**labels), tmp_path)])

    [sentence] = noted()
    assert "'a photo of a 0'; unless" in sentence and sentence.endswith("as `reader.label`")
    assert noted(klass=["0", "1", "2", "oak"]) == []


def test_names_that_are_spelled_in_several_ways_are_told(tmp_path):
    tree(tmp_path, {f"{n}.png": picture(n) for n in range(4)})
    klass = ["running_shoe", "Running  shoe", "oak", "elm"]
    frame = pd.DataFrame({"filepath": [f"{n}.png" for n in range(4)], "klass": klass})
    about = fileset("csv", reader={"label": "klass", "caption": None})
    twins, lines = notes.notes_on([tables.read_frame(about, frame, tmp_path)])
    assert "in several spellings: 1, such as Running  shoe and running_shoe; if" in twins
    assert "with underscores: 1, such as running_shoe; write spaces" in lines
    folder = classes(tmp_path / "p", ["running_shoe", "oak"], 2)
    assert notes.notes_on([collection.read_index(fileset(), folder)]) == []


def captioned(root, captions, pictures) -> list[str]:
    files = {f"{row}.png": picture(n) for row, n in enumerate(pictures)}
    tree(root, files)
    frame = pd.DataFrame({"filepath": [*files], "title": captions})
    chosen = fileset("csv", role="eval", splits={"test": 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return notes.limits_of_recall(
            collection.check_images(tables.read_frame(chosen, frame, root))
        )


def test_retrieval_that_is_right_by_chance_is_told(tmp_path):
    assert (
        "R@5 of 5 test images is 100% by chance" in captioned(tmp_path, list("abcde"), range(5))[0]
    )
    assert captioned(tmp_path, [f"text {n}" for n in range(60)], range(60)) == []


@pytest.mark.parametrize("what", ["captions", "pictures"])
def test_retrieval_that_cannot_be_right_is_told(tmp_path, what):
    """The ceiling is what a perfect model reaches, which ranks equal ones at random."""
    group = np.minimum(np.arange(60) // 12, 3)  # three of 12, one of 24
    random, none = np.random.default_rng(0), np.arange(60)
    texts, pictures = (group, none) if what == "captions" else (none, group)
    [sentence] = captioned(tmp_path, [f"text {n}" for n in texts], pictures)
    hits = []
    for _ in range(50):
        feature = torch.eye(64)[torch.from_numpy(group)]
        image, text = (feature + 1e-3 * torch.from_numpy(random.random((60, 64))) for _ in "ab")
        hits += map(np.mean, retrieval_hits(image.float(), text.float(), torch.arange(60)))
    expected = 100 * (36 * 5 / 12 + 24 * 5 / 24) / 60
    assert abs(100 * np.mean(hits) - expected) < 3
    assert f"is about {expected:.0f}% at best" in sentence
