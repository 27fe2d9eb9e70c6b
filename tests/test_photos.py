"""Debian packages as sources: .deb and Qt resource files, made here by hand in their layouts."""

import io
import random
import struct
import tarfile
import zlib

import pytest
from PIL import Image

from cmp.embedded import photos
from cmp.embedded.manifest import PhotoRecipe
from cmp.embedded.packages import archive_member, archive_members
from cmp.errors import CmpError

SVG = (
    b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8">'
    b'<circle cx="4" cy="4" r="3" fill="red"/></svg>'
)


def picture(colour="red", kind="PNG", alpha=255) -> bytes:
    image = Image.new("RGBA", (40, 20), colour)
    image.putalpha(alpha)
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def ar(*entries: tuple[str, bytes]) -> bytes:
    out = b"!<arch>\n"
    for name, content in entries:
        head = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        out += head + content + b"\n" * (len(content) % 2)
    return out


def deb(files: dict[str, bytes], packing="xz") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=f"w:{packing}") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    suffix = packing and f".{packing}"
    control = ("control.tar.xz", b"odd")
    return ar(("debian-binary", b"2.0\n"), control, (f"data.tar{suffix}", file.getvalue()))


def rcc(files: dict[str, bytes], packed=(), zstd=(), version=2) -> bytes:
    """A resource file as Qt writes it: header, data, names, and the tree in order of breadth."""
    root: dict = {}
    for path, content in files.items():
        *folders, name = path.split("/")
        where = root
        for folder in folders:
            where = where.setdefault(folder, {})
        where[name] = (path, content)
    data, names, tree = b"", b"", b""
    level, following = [("", root)], 1
    stamp = b"" if version == 1 else bytes(8)
    while level:
        name, node = level.pop(0)
        place = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
        if isinstance(node, dict):
            tree += struct.pack(">IHII", place, 2, len(node), following) + stamp
            following += len(node)
            level.extend(node.items())
            continue
        path, content = node
        flags = 1 if path in packed else 4 if path in zstd else 0
        if flags == 1:
            content = struct.pack(">I", len(content)) + zlib.compress(content)
        tree += struct.pack(">IHHHI", place, flags, 0, 0, len(data)) + stamp
        data += struct.pack(">I", len(content)) + content
    head = 24 if version == 3 else 20
    starts = (head + len(data) + len(names), head, head + len(data))
    header = struct.pack(">4s4I", b"qres", version, *starts) + bytes(head - 20)
    return header + data + names + tree


@pytest.mark.parametrize("packing", ["", "xz", "gz", "bz2"])
def test_members_of_a_deb(tmp_path, packing):
    path = tmp_path / "a.deb"
    path.write_bytes(deb({"./usr/a": b"one", "./usr/b": b"two", "./etc/c": b""}, packing))
    assert dict(archive_members(path)) == {"./usr/a": b"one", "./usr/b": b"two", "./etc/c": b""}
    assert list(archive_members(path, "./usr/")) == [("./usr/a", b"one"), ("./usr/b", b"two")]
    assert archive_member(path, "./usr/b") == b"two"


def test_a_damaged_deb_is_an_error(tmp_path):
    path = tmp_path / "a.deb"
    whole = deb({f"./usr/{name}": random.Random(name).randbytes(999) for name in "abc"})
    for length in range(1, len(whole) - 2, 97):
        path.write_bytes(whole[:length])
        with pytest.raises(CmpError, match=r"a\.deb"):
            list(archive_members(path))
    path.write_bytes(whole[:600] + bytes(100) + whole[700:])
    with pytest.raises(CmpError, match="damaged"):
        list(archive_members(path))
    for content in (ar(("debian-binary", b"2.0\n")), whole.replace(b"`\n", b"??")):
        path.write_bytes(content)
        with pytest.raises(CmpError, match=r"no whole data\.tar"):
            list(archive_members(path))


def test_a_deb_packed_by_zstd_is_refused_where_python_cannot_read_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tarfile.TarFile, "OPEN_METH", {"tar": "taropen"})
    path = tmp_path / "a.deb"
    path.write_bytes(ar(("debian-binary", b"2.0\n"), ("data.tar.zst", b"\x28\xb5\x2f\xfd")))
    with pytest.raises(CmpError, match="zstd"):
        list(archive_members(path))


@pytest.mark.parametrize("version", [1, 2, 3])
def test_files_of_a_resource_file(version):
    files = {"a/b/one.txt": b"1" * 500, "a/two.txt": b"", "ärger/three": b"3", "a/four": b"4"}
    content = rcc(files, packed={"a/b/one.txt", "a/two.txt"}, zstd={"a/four"}, version=version)
    del files["a/four"]
    assert dict(photos.resource_files(content, "x.rcc")) == files


def test_a_truncated_resource_file_is_an_error():
    whole = rcc({"a/one": b"1" * 90, "a/b/two": b"22"}, packed={"a/one"})
    for length in range(len(whole) - 8):  # The last 8 bytes are a date that nobody reads.
        with pytest.raises(CmpError, match=r"x\.rcc: damaged"):
            list(photos.resource_files(whole[:length], "x.rcc"))


def test_a_damaged_resource_file_is_read_or_refused():
    rng = random.Random(0)
    whole = rcc({f"a/{n}/b{n}": b"1" * 40 * n for n in range(9)}, packed={"a/3/b3", "a/4/b4"})
    for _ in range(2000):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            damaged[rng.randrange(4, len(whole))] = rng.choice([0, 1, 2, 3, 127, 255])
        try:
            read = list(photos.resource_files(bytes(damaged), "x.rcc"))
        except CmpError:
            continue
        assert sum(len(content) for _, content in read) < 9 * len(whole)


def node(name: int, flags: int, first: int, second: int) -> bytes:
    return struct.pack(">IHII", name, flags, first, second) + bytes(8)


@pytest.mark.parametrize(
    "tree",
    [
        node(0, 2, 1, 0),
        node(0, 2, 1, 1) + node(0, 2, 1, 0),
        node(0, 2, 2**32 - 1, 1),
        b"".join(node(0, 2, 50, place + 1) for place in range(100)),
        node(0, 2, 1, 1) + node(0, 1, 0, 2**32 - 1),
    ],
    ids=["itself", "loop", "too many", "overlapping", "far away"],
)
def test_a_hostile_tree_ends(tree):
    content = struct.pack(">4s4I", b"qres", 2, 26, 20, 20) + bytes(6) + tree
    with pytest.raises(CmpError, match=r"x\.rcc"):
        list(photos.resource_files(content, "x.rcc"))


def test_an_entry_that_unpacks_to_another_size_is_an_error():
    tree = node(0, 2, 1, 1) + node(0, 1, 0, 0)
    for size in (10**6 - 1, 10**6 + 1, 2**32 - 1):
        entry = struct.pack(">I", size) + zlib.compress(bytes(10**6))
        data = bytes(6) + struct.pack(">I", len(entry)) + entry
        content = struct.pack(">4s4I", b"qres", 2, 20 + len(data), 26, 20) + data + tree
        with pytest.raises(CmpError, match=r"another size|cap"):
            list(photos.resource_files(content, "x.rcc"))


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("A wombat.", "wombat"),
        ("An “Otter”.", "otter"),
        ("The Sun. The center of our solar system!", "sun"),
        ("Jupiter—the largest planet.", "jupiter"),
        ("A US 50 cent piece ($.50).", "us 50 cent piece"),
        ("Antenna", "antenna"),
        ("", ""),
    ],
)
def test_caption(line, name):
    assert photos.caption(line) == name


def test_file_name():
    found = [photos.file_name(f"a/{name}") for name in ("07_polarBear2.webp", "fusee.svg", "1.svg")]
    assert found == ["polar bear", "rocket", ""]


def recipe(kind) -> PhotoRecipe:
    return PhotoRecipe(kind=kind, splits={"validation": (0.0, 0.5), "test": (0.5, 1.0)})


def test_tuxpaint(tmp_path):
    stamps = {
        "b/wombat": ("A wombat.\nde.utf8=Ein Wombat.", picture()),
        "b/wombat2": ("A wombat.", picture("blue")),
        "a/ghost": ("A ghost.", picture(alpha=0)),
        "a/long": ("Remember to wash your hands with soap!", picture()),
        "symbols/money/one": ("A coin.", picture()),
        "c/otter": ("An otter.", picture("green")),
    }
    files = {"./usr/share/doc/x.png": b"", f"{photos.STAMPS}c/alone.png": picture()}
    for stem, (text, png) in stamps.items():
        files[f"{photos.STAMPS}{stem}.png"] = png
        files[f"{photos.STAMPS}{stem}.txt"] = text.encode()
    path = tmp_path / "t.deb"
    path.write_bytes(deb(files))
    table = photos.make_tuxpaint(recipe("tuxpaint"), {"tuxpaint": path}).table
    assert list(table["source"]) == ["tuxpaint/b/wombat", "tuxpaint/c/otter"]
    assert list(table["captions"]) == [["wombat"], ["otter"]]
    assert set(table["split"]) <= {"validation", "test"}


def test_gcompris(tmp_path):
    base = photos.ACTIVITIES
    animals = {
        f"{base}erase/resource/red_panda2.webp": picture(kind="WEBP"),
        f"{base}erase/resource/background.webp": picture(kind="WEBP"),
        f"{base}erase/resource/erase.qml": b"import",
        f"{base}elsewhere/lion.svg": SVG,
    }
    files = {"a.rcc": rcc(animals), "b.rcc": rcc({f"{base}memory/resource/03_redPanda.svg": SVG})}
    path = tmp_path / "g.deb"
    path.write_bytes(deb({photos.RESOURCES + name: content for name, content in files.items()}))
    samples = photos.make_gcompris(recipe("gcompris"), {"gcompris": path})
    assert samples.images.shape == (2, 4, 32, 32)
    assert list(samples.table["label"]) == ["red panda"] * 2
    assert samples.table["split"].nunique() == 1, "one thing is on one side"
    files = {f"{photos.RESOURCES}a.rcc": rcc(animals)[:-30]}
    path.write_bytes(deb(files))
    with pytest.raises(CmpError, match=r"a\.rcc: damaged"):
        photos.make_gcompris(recipe("gcompris"), {"gcompris": path})


def test_a_package_without_pictures_is_an_error(tmp_path):
    path = tmp_path / "t.deb"
    path.write_bytes(deb({"./usr/share/other": b""}))
    with pytest.raises(CmpError, match="no pictures"):
        photos.make_tuxpaint(recipe("tuxpaint"), {"tuxpaint": path})
