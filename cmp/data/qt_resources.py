"""Reading Qt's binary resources (`.rcc`): a tree of nodes, a heap of names, a heap of data.

All numbers are big-endian. Every offset and every length is checked against the file, a node is
entered once, and sizes are capped, so that a damaged file is a `CmpError` and never a hang.
"""

import struct
import zlib
from collections.abc import Iterator

from cmp.data.fetch import ARCHIVE_CAP, MEMBER_CAP
from cmp.errors import CmpError

ZLIB, FOLDER, ZSTD = 1, 2, 4
LONGEST_PATH = 4096


def files(content: bytes, where: str) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of every file of an .rcc; those packed by zstd are left out.

    `where` names the file in errors.
    """
    try:
        yield from _walk(content)
    except (ValueError, struct.error, UnicodeDecodeError, zlib.error) as error:
        raise CmpError(f"{where}: damaged Qt resource file ({error})") from error


def _walk(content: bytes) -> Iterator[tuple[str, bytes]]:
    magic, version, tree, data, names = struct.unpack_from(">4s4I", content)
    if magic != b"qres" or version not in (1, 2, 3):
        raise ValueError("not a resource file of version 1 to 3")
    node_size = 14 if version == 1 else 22
    entered, total = set(), 0
    waiting = [(0, None)]
    while waiting:
        index, parent = waiting.pop()
        if index in entered:
            raise ValueError(f"node {index} is reached twice")
        entered.add(index)
        name, flags, first, second = struct.unpack_from(">IHII", content, tree + index * node_size)
        # The root has no name.
        path = "" if parent is None else f"{parent}/{_name(content, names + name)}".lstrip("/")
        if len(path) > LONGEST_PATH:
            raise ValueError("a path is too long")
        if flags & FOLDER:
            if (len(entered) + len(waiting) + first) * node_size > len(content):
                raise ValueError(f"{path}: more entries than the file can hold")
            waiting.extend((second + place, path) for place in reversed(range(first)))
        elif not flags & ZSTD:
            found = _data(content, data + second, flags)
            total += len(found)
            if total > ARCHIVE_CAP:
                raise ValueError(f"{path}: unpacks to more than the cap")
            yield path, found


def _name(content: bytes, offset: int) -> str:
    """A name of the heap: its length in characters, a hash, UTF-16."""
    (length,) = struct.unpack_from(">H", content, offset)
    return _slice(content, offset + 6, 2 * length).decode("utf-16-be")


def _data(content: bytes, offset: int, flags: int) -> bytes:
    """An entry of the heap: its length, then the bytes, or for zlib their size and a stream."""
    (length,) = struct.unpack_from(">I", content, offset)
    packed = _slice(content, offset + 4, length)
    if not flags & ZLIB:
        return packed
    (size,) = struct.unpack_from(">I", packed)
    if size > MEMBER_CAP:
        raise ValueError("an entry unpacks to more than the cap")
    found = zlib.decompressobj().decompress(packed[4:], size + 1)
    if len(found) != size:
        raise ValueError(f"an entry has another size than {size}")
    return found


def _slice(content: bytes, offset: int, length: int) -> bytes:
    if offset + length > len(content):
        raise ValueError("it ends too early")
    return content[offset : offset + length]
