"""A network as two ONNX files, one for images and one for texts, and the facts about their use.

This works for any network. onnxruntime, or any other program that reads ONNX, then needs neither
torch nor open_clip; only the tokens still come from the model's tokenizer.
"""

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cmp import models, starts
from cmp.models import Network
from cmp.releases.exports import (
    EXPORT_FILE,
    Export,
    compare_features,
    export_folder,
    make_probe,
    write_json,
)

OPSET = 18
"""The version of ONNX's operators that the files require."""
IMAGE_FILE, TEXT_FILE = "image.onnx", "text.onnx"
DATA_SUFFIX = ".data"
"""The suffix of a separate file of weights, added to the name of its ONNX file."""
FILES = {file + suffix for file in (IMAGE_FILE, TEXT_FILE) for suffix in ("", DATA_SUFFIX)}
"""All files that an export may have, besides the description of its inputs."""
MAX_INLINE_BYTES = 2_000_000_000
"""Larger weights go to a separate file, since a file of protocol buffers has at most 2 GiB."""
BATCHES = (1, 3, 4)
"""Batch sizes that the files are checked with; the exporter sees a different one."""


LOADING = f"""image = onnxruntime.InferenceSession("{{folder}}/{IMAGE_FILE}")
text = onnxruntime.InferenceSession("{{folder}}/{TEXT_FILE}")"""


class ImageTower(nn.Module):
    """A network's image tower: normalised images [B, 3, S, S] -> unit features [B, E]."""

    def __init__(self, model: Network):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return models.encode_image(self.model, pixels)


class TextTower(nn.Module):
    """A network's text tower: tokens [N, L] -> unit features [N, E]."""

    def __init__(self, model: Network):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return models.encode_text_unpacked(self.model, tokens)


def export_onnx(name: str, model: Network, folder: Path) -> Export:
    """Write both towers of a network as ONNX files of any batch size, and check them.

    Args:
        name: The model's name, which determines its tokenizer.
        model: Its network, on the CPU; it is put into evaluation mode.
        folder: The folder; an earlier export in it is replaced, if nothing in it has changed.

    Returns:
        The result of the export.

    Raises:
        CmpError: The features of onnxruntime differ from those of the network, or the folder cannot
            be written. Nothing is written then.
        ModuleNotFoundError: The extra `onnx` is not installed.
    """
    import onnxruntime  # both are in the extra `onnx`
    import onnxscript  # noqa: F401  torch's exporter needs it, but its own error is less clear

    model.eval()
    probe = make_probe(name, model)
    towers = {
        IMAGE_FILE: (ImageTower(model), "pixels", probe.pixels),
        TEXT_FILE: (TextTower(model), "tokens", probe.tokens),
    }
    with export_folder(folder, FILES) as partial:
        features = []
        for file, (tower, key, values) in towers.items():
            write_tower(tower.eval(), key, values, partial / file)
            session = onnxruntime.InferenceSession(partial / file)
            parts = [session.run(None, {key: x.numpy()})[0] for x in values.split(BATCHES)]
            features.append(torch.from_numpy(np.concatenate(parts)))
        differences = compare_features(probe, features[0], features[1], str(folder))
        write_json(partial / EXPORT_FILE, describe(name, model, differences))
    notes = [f"opset {OPSET}; {EXPORT_FILE} describes the inputs and how to prepare them"]
    return Export(differences, LOADING.format(folder=str(folder)), notes)


def write_tower(tower: nn.Module, key: str, values: Tensor, path: Path) -> None:
    """Write a tower as an ONNX file that takes batches of any size.

    Args:
        tower: The tower, in evaluation mode.
        key: The name of its input.
        values: A batch.
        path: The file.
    """
    size = sum(x.nbytes for x in tower.state_dict().values())
    with starts.quiet_logging(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, of its own functions
        torch.onnx.export(
            tower,
            (values,),
            path,
            input_names=[key],
            output_names=["features"],
            dynamic_shapes={key: {0: torch.export.Dim("batch")}},
            opset_version=OPSET,
            dynamo=True,
            external_data=size > MAX_INLINE_BYTES,
            verbose=False,
        )


def describe(name: str, model: Network, differences: tuple[float, float]) -> dict[str, Any]:
    """Return the facts that a program needs to use the two files.

    Args:
        name: The model.
        model: Its network.
        differences: The largest differences in features that the check found.
    """
    how, bias = models.preprocessing(model), model.logit_bias
    known = starts.known_name(name)
    tokenizer = "cmp.models.tokenizer" if starts.family_of(known) else "open_clip.get_tokenizer"
    return {
        "model": name,
        "opset": OPSET,
        "image": {
            "file": IMAGE_FILE,
            "input": "pixels",
            "type": "float32",
            "shape": ["batch", 3, how.size, how.size],
            "preprocessing": asdict(how),
            "note": "colours from 0 to 1, minus mean, divided by std",
        },
        "text": {
            "file": TEXT_FILE,
            "input": "tokens",
            "type": "int64",
            "shape": ["batch", model.context_length],
            "tokenizer": f"{tokenizer}({known!r})",
        },
        "output": "features",
        "note": "features have length one; logit = logit_scale * (image . text) + logit_bias",
        "logit_scale": model.logit_scale.exp().item(),
        "logit_bias": 0.0 if bias is None else bias.item(),
        "largest_difference": max(differences),
    }
