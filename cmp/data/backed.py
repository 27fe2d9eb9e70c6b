"""Images that stay in their files, decoded when they are asked for, at any side."""

import concurrent.futures
import dataclasses
import json
import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cmp.data import pictures
from cmp.data.readers.index import Fault, Index, Store
from cmp.data.samples import ALL
from cmp.errors import CmpError
from cmp.files import parse_json, write_whole
from cmp.paths import build_folder

BLOCK = 64
"""Images that are checked at a time."""


@dataclass(frozen=True)
class Files:
    """The images of some sets, in the order of a corpus. store: [N], which of `stores` an image is
    in, and place: [N], its number there; source: [N], its name. side: of `files[rows]`, which is
    what a tensor of all images would give."""

    stores: list[Store]
    store: np.ndarray
    place: np.ndarray
    source: np.ndarray
    side: int = 224

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, rows: np.ndarray | Tensor) -> Tensor:
        return self.centred(np.asarray(rows), self.side)

    def at(self, side: int) -> "Files":
        """The same images, of another side."""
        return dataclasses.replace(self, side=side)

    def read(self, row: int) -> bytes:
        """The file of one image."""
        return self.stores[self.store[row]].read(int(self.place[row]))

    def centred(self, rows: np.ndarray, side: int) -> Tensor:
        """The middle of each image: uint8 [B, 3, side, side]."""
        return self._stacked(rows, side, lambda content, _: pictures.centre(content, side))

    def parts(
        self, rows: np.ndarray, side: int, generator: np.random.Generator, own: slice = ALL
    ) -> Tensor:
        """A random part of each image: uint8 [B, 3, side, side], a function of the rows and of the
        generator's state. own: decode these of the batch only; they look as they do in it."""
        numbers = generator.random((len(rows), 4))[own]
        return self._stacked(
            rows[own], side, lambda content, at: pictures.part(content, side, numbers[at])
        )

    def _stacked(self, rows: np.ndarray, side: int, decode) -> Tensor:
        out = np.empty((len(rows), 3, side, side), np.uint8)
        for at, row in enumerate(rows):
            try:
                out[at] = decode(self.read(int(row)), at)
            except pictures.DAMAGED as error:
                raise CmpError(
                    f"{self.source[row]}: cannot be read ({error}), though its set was checked; "
                    "has it changed since?"
                ) from error
        return torch.from_numpy(out)


def files(indexes: list[Index]) -> Files:
    """The images of some sets, one after the other."""
    lengths = [len(each.table) for each in indexes]
    tables = [each.table for each in indexes]
    return Files(
        [each.store for each in indexes],
        np.repeat(np.arange(len(indexes)), lengths),
        np.concatenate([table["place"].to_numpy() for table in tables]),
        np.concatenate([table["source"].to_numpy(object) for table in tables]),
    )


def damaged(index: Index) -> list[Fault]:
    """The images of a set that cannot be decoded. Every file is decoded once; what was found is
    kept in the build folder, by the hash of the index, and looked up the next time."""
    path = build_folder() / "checked" / f"{index.data_hash()}.json"
    try:
        return [Fault(*pair) for pair in parse_json(path.read_text())]
    except (OSError, ValueError, TypeError):
        pass
    source, place = index.table["source"].tolist(), index.table["place"].tolist()

    def look(start: int) -> list[Fault]:
        found = []
        for at in range(start, min(start + BLOCK, len(place))):
            try:
                why = pictures.check(index.store.read(place[at]))
            except (OSError, ValueError) as error:
                why = str(error)
            if why:
                found.append(Fault("corrupt image", source[at]))
        return found

    starts = range(0, len(place), BLOCK)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow frees the lock
        each = tqdm(pool.map(look, starts), f"check {index.dataset.name}", len(starts), leave=False)
        found = [fault for faults in each for fault in faults]
    write_whole(path, json.dumps([[fault.kind, fault.where] for fault in found]))
    return found
