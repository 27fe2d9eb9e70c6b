"""A network as a folder of `transformers`, a `CLIPModel` with its preprocessing and its tokenizer.

Both libraries compute the same from the same tensors under different names, so an export is little
more than a table of names. A tensor without a counterpart is an error that names it.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from cmp import models, starts
from cmp.data import Preprocessing
from cmp.errors import CmpError
from cmp.files import save_tensors
from cmp.models import Network
from cmp.releases.exports import (
    TEXTS,
    Export,
    Probe,
    compare_features,
    export_folder,
    make_probe,
    text_tower,
    write_json,
)

TOKENIZER_FILES = {
    "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
}  # fmt: skip
"""The files that tokenizers of `transformers` may have."""
FILES = {"config.json", "model.safetensors", "preprocessor_config.json", *TOKENIZER_FILES}
"""All files that an export may have, besides the record of their hashes."""

TENSORS = {
    "logit_scale": "logit_scale",
    # the text tower: in the network itself for CLIP, and otherwise in its part `text`
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "transformer.resblocks": "text_model.encoder.layers",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
    # open_clip's image tower
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",  # sic
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.proj": "visual_projection.weight",
}
"""A tensor or layer of open_clip -> its name in `transformers`."""
BLOCKS = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2",
    "attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
"""The same within a block of a transformer."""
TRANSPOSED = {"visual.proj", "text_projection"}
"""Matrices that open_clip multiplies features with, where `transformers` has a linear layer."""
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
"""Activations by their names in `transformers`."""
FILTERS = {"bicubic": 3, "random": 3, "bilinear": 2}
"""Interpolations as Pillow numbers them; `random` is bicubic in evaluation."""
SPECIAL_TOKENS = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
"""The tokens around a text in open_clip -> in `transformers`."""
LOADING = """model = transformers.CLIPModel.from_pretrained("{folder}")
processor = transformers.AutoProcessor.from_pretrained("{folder}")"""
PIXELS = (
    "a prepared image may differ from open_clip's by one level in 255: `transformers` "
    'resizes with torchvision; AutoImageProcessor.from_pretrained(..., backend="pil") avoids it'
)
OTHERWISE = (
    "texts with curly quotes, HTML entities or a broken encoding get other tokens: open_clip "
    "repairs them first, `transformers` does not"
)


def export_transformers(name: str, model: Network, folder: Path) -> Export:
    """Write a network as `transformers` loads it, and check it.

    Args:
        name: The model's name, which determines its tokenizer.
        model: Its network, on the CPU; it is put into evaluation mode.
        folder: The folder; an earlier export in it is replaced, if nothing in it has changed.

    Returns:
        The result of the export.

    Raises:
        CmpError: `transformers` has no such network or gives other features, or the folder cannot
            be written. Nothing is written then.
        ModuleNotFoundError: The extra `transformers` is not installed.
    """
    model.eval()
    if not isinstance(tower := model.visual, VisionTransformer):
        tower = getattr(tower, "trunk", tower)  # a network of timm
        raise unsupported_error(name, f"its image tower is a {type(tower).__name__}")
    tensors = rename_tensors(name, model)
    settings = describe_preprocessing(name, models.preprocessing(model))
    # an extra that takes seconds to import, so unsupported networks are refused before
    import transformers

    probe, tokenizer = make_probe(name, model), models.tokenizer(name)
    with export_folder(folder, FILES) as partial, starts.quiet_logging():
        save_tensors(tensors, partial / "model.safetensors", {"format": "pt"})
        write_json(partial / "preprocessor_config.json", settings)
        write_json(partial / "config.json", describe_network(model, probe))
        notes = [PIXELS, *write_tokenizer(name, tokenizer, probe, partial)]
        load: Any = transformers.CLIPModel.from_pretrained
        network, report = load(partial, local_files_only=True, output_loading_info=True)
        if wrong := sorted(map(str, (*report["missing_keys"], *report["unexpected_keys"]))):
            raise unsupported_error(name, f"{wrong[0]} has no counterpart")
        with torch.no_grad():
            image = network.get_image_features(pixel_values=probe.pixels).pooler_output
            text = network.get_text_features(input_ids=probe.tokens).pooler_output
        unit = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
        differences = compare_features(probe, *unit, str(folder))
    return Export(differences, LOADING.format(folder=folder), notes)


def unsupported_error(name: str, reason: str) -> CmpError:
    """Return the error for a network that `transformers` does not have.

    Args:
        name: The model.
        reason: The part without a counterpart.
    """
    return CmpError(
        f"--to transformers: {name!r}: {reason}; only CLIP (open_clip's own vision transformer "
        "and its causal text tower) can be exported; --to onnx takes any network"
    )


def rename_tensors(name: str, model: Network) -> dict[str, Tensor]:
    """Return the tensors of a network under their names in `transformers`.

    Args:
        name: The model, for the error.
        model: Its network, its attention split.

    Raises:
        CmpError: A tensor has no counterpart there.
    """
    renamed = {}
    for old, x in model.state_dict().items():
        if (new := rename(old.removeprefix("text."))) is None:
            raise unsupported_error(name, f"{old!r} has no counterpart")
        renamed[new] = (x.T if old.removeprefix("text.") in TRANSPOSED else x).clone().contiguous()
    renamed["logit_scale"] = renamed["logit_scale"].reshape(())
    return renamed


def rename(name: str) -> str | None:
    """Return the name of a tensor of open_clip in `transformers`, or None without a counterpart."""
    if found := re.fullmatch(r"(.*blocks)\.(\d+)\.(.*)", name):
        place, number, rest = found.groups()
        stack, part = _replace_start(place, TENSORS), _replace_start(rest, BLOCKS)
        return f"{stack}.{number}.{part}" if stack and part else None
    return _replace_start(name, TENSORS)


def _replace_start(name: str, table: dict[str, str]) -> str | None:
    """Return a name with its longest start in a table replaced, or None if there is none."""
    start = name
    while start and start not in table:
        start = start.rpartition(".")[0]
    return table[start] + name.removeprefix(start) if start else None


def describe_network(model: Network, probe: Probe) -> dict[str, Any]:
    """Return the config of a network in `transformers`.

    Args:
        model: The network.
        probe: Texts, whose tokens show those for the start and the end.
    """
    visual, text = model.visual, text_tower(model)
    width = text.ln_final.normalized_shape[0]
    size, patches = probe.image_features.shape[1], visual.conv1
    text_config = _describe_blocks(text.transformer.resblocks, text.ln_final) | {
        "vocab_size": text.vocab_size,
        "max_position_embeddings": model.context_length,
        "hidden_size": width,
        "projection_dim": size,
        "bos_token_id": int(probe.tokens[0, 0]),
        "eos_token_id": int(probe.tokens[0].max()),
    }
    vision_config = _describe_blocks(visual.transformer.resblocks, visual.ln_post) | {
        "projection_dim": size,
        "hidden_size": patches.out_channels,
        "image_size": models.preprocessing(model).size,
        "patch_size": patches.kernel_size[0],
    }
    about = {"architectures": ["CLIPModel"], "model_type": "clip", "dtype": "float32"}
    towers = {"text_config": text_config, "vision_config": vision_config}
    return about | {"projection_dim": size} | towers


def _describe_blocks(blocks: Any, norm: nn.LayerNorm) -> dict[str, Any]:
    """Return the part of a tower's config that describes its blocks and norms."""
    block = blocks[0]
    return {
        "num_hidden_layers": len(blocks),
        "num_attention_heads": getattr(block.attn, "heads", None) or block.attn.num_heads,
        "intermediate_size": block.mlp.c_fc.out_features,
        "hidden_act": name_activation(block.mlp.gelu),
        "layer_norm_eps": norm.eps,
    }


def name_activation(activation: nn.Module) -> str:
    """Return the name of an activation in `transformers`, found by what it computes.

    Raises:
        CmpError: It is not one of `ACTIVATIONS`.
    """
    x = torch.linspace(-4, 4, 101)
    for name, function in ACTIVATIONS.items():
        if torch.allclose(activation(x), function(x), atol=1e-6):
            return name
    raise CmpError(
        f"--to transformers: the activation {type(activation).__name__} is not one of "
        f"{', '.join(ACTIVATIONS)}; --to onnx takes any network"
    )


def describe_preprocessing(name: str, how: Preprocessing) -> dict[str, Any]:
    """Return the preprocessing of images in the form of `transformers`.

    Args:
        name: The model, for the error.
        how: How open_clip prepares them.

    Raises:
        CmpError: Images are padded to a square, which `transformers` cannot do.
    """
    side = {"height": how.size, "width": how.size}
    if how.resize_mode == "longest":
        raise unsupported_error(name, "its resize_mode 'longest' has no counterpart")
    crops = how.resize_mode == "shortest"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": how.size} if crops else side,
        "resample": FILTERS[how.interpolation],
        "do_center_crop": crops,
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [*how.mean],
        "image_std": [*how.std],
        "do_convert_rgb": True,
    }


def write_tokenizer(name: str, tokenizer: Any, probe: Probe, folder: Path) -> list[str]:
    """Write a tokenizer, if it gives the same tokens as open_clip's.

    Args:
        name: The model.
        tokenizer: Its tokenizer.
        probe: Texts with their tokens.
        folder: The folder of the export.

    Returns:
        Sentences on what is missing or works differently.
    """
    from transformers import AutoTokenizer

    length, before = probe.tokens.shape[1], {*folder.iterdir()}
    if not isinstance(tokenizer, SimpleTokenizer):
        own = open_clip.get_model_config(name)["text_cfg"].get("hf_tokenizer_name")
        return [
            f"no tokenizer is written (it is a {type(tokenizer).__name__}): use "
            f"{own or 'the original tokenizer'}, and pad texts to {length} tokens"
        ]
    write_byte_pairs(tokenizer, length, folder)
    is_text = torch.arange(length) <= probe.tokens.argmax(dim=1, keepdim=True)
    expected = probe.tokens.where(is_text, probe.tokens.max())  # its padding is the last token
    again = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    encoded = again([*TEXTS], padding="max_length", truncation=True, return_tensors="pt")
    if torch.equal(encoded["input_ids"], expected):
        return [OTHERWISE]
    for path in {*folder.iterdir()} - before:
        path.unlink()
    return [
        "no tokenizer is written, since `transformers` would give other tokens: use "
        f"open_clip.get_tokenizer({name!r})"
    ]


def write_byte_pairs(tokenizer: SimpleTokenizer, length: int, folder: Path) -> None:
    """Write CLIP's vocabulary and merges.

    Args:
        tokenizer: open_clip's tokenizer.
        length: The most tokens of a text.
        folder: The folder of the export.
    """
    vocabulary = {SPECIAL_TOKENS.get(token, token): i for token, i in tokenizer.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    merges = [" ".join(pair) for pair in tokenizer.bpe_ranks if len(pair) == 2]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    start, end = SPECIAL_TOKENS.values()
    tokens = {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end}
    about = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length}
    write_json(folder / "tokenizer_config.json", about | tokens)
