"""Attention with separate projections, in place of open_clip's fused one, and the way back."""

import contextlib
import functools
import hashlib
import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip import factory, pretrained
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from cmp.config import STARTS, Model, RunConfig
from cmp.errors import CmpError
from cmp.registry import plugins


def image_side(model: nn.Module) -> int:
    """The side of the square images that a network takes; `CmpError` if they are not square."""
    sides = np.broadcast_to(model.visual.image_size, 2)
    if sides[0] != sides[1]:
        raise CmpError(f"model.name: takes images of {sides[0]} x {sides[1]}, which are not square")
    return int(sides[0])


PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class SplitAttention(nn.Module):
    """Self-attention with separate q, k, v and out projections, in place of a fused
    `nn.MultiheadAttention`, whose weights it takes over.

    Adapters, freezing and merging can then name each matrix; the outputs are the same.
    """

    def __init__(self, fused: nn.MultiheadAttention):
        super().__init__()
        width, self.heads = fused.embed_dim, fused.num_heads
        self.batch_first = fused.batch_first
        for name, weight, bias in zip(
            PROJECTIONS, fused.in_proj_weight.chunk(3), fused.in_proj_bias.chunk(3), strict=True
        ):
            linear = nn.Linear(width, width)
            linear.weight = nn.Parameter(weight.detach().clone())
            linear.bias = nn.Parameter(bias.detach().clone())
            self.add_module(name, linear)
        self.out_proj = nn.Linear(width, width).to(fused.out_proj.weight)
        self.out_proj.load_state_dict(fused.out_proj.state_dict())

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights=False, attn_mask=None
    ) -> tuple[Tensor, None]:  # three times [B, L, width] -> [B, L, width]
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, L, width/heads]
            for linear, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        x = self.out_proj(attention(q, k, v, attn_mask).transpose(1, 2).flatten(2))
        return (x if self.batch_first else x.transpose(0, 1)), None


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention, [B, heads, L, E] -> same; `mask` [L, L] is added to scores.

    On a CPU two plain products beat the fused kernel, whose backward is slow in bf16.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return (scores if mask is None else scores + mask).softmax(-1) @ v


def split_attention(model: nn.Module) -> nn.Module:
    """Replace every fused attention in place; `CmpError` for CoCa's, over widths of others."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.MultiheadAttention):
                if child.in_proj_weight is None:
                    raise CmpError("model.name: CoCa's networks are not supported; choose another")
                setattr(module, name, SplitAttention(child))
    return model


def fused_weights(model: nn.Module) -> dict[str, Tensor]:
    """A network's tensors as open_clip names them: what a fused attention would hold, q above k
    above v, wherever `split_attention` put a split one."""
    found = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, SplitAttention):
            for kind in ("weight", "bias"):
                parts = [found.pop(f"{name}.{part}.{kind}") for part in PROJECTIONS]
                found[f"{name}.in_proj_{kind}"] = torch.cat(parts)
    return found


def has_split_names(weights: dict[str, Tensor], fused: nn.Module) -> bool:
    """Whether tensors are named as those of this network after `split_attention`."""
    names = [name for name, x in fused.named_modules() if isinstance(x, nn.MultiheadAttention)]
    return any(f"{name}.{PROJECTIONS[0]}.weight" in weights for name in names)


HUB_PREFIXES = ("hf-hub:", "local-dir:")
"""Where a model's name may lead that is not open_clip's own: its config and weights lie there."""
HUB = "hub"
"""The start of a run whose model comes with weights of its own."""
_SHOWN_TENSORS = 3  # tensors that an error names


def is_hub(name: str) -> bool:
    """Whether a model's name says where its config and its weights lie."""
    return name.startswith(HUB_PREFIXES)


def pretrained_tag(name: str, start: str) -> dict:
    """What open_clip knows of a pretrained tag of a model; empty where that has no such tag."""
    return {} if is_hub(name) else open_clip.get_pretrained_cfg(name, start)


def locate_weights(name: str, start: str) -> Path:
    """The file of the weights that a run starts from, fetched where it is a tag or a hub's.

    `CmpError` where it cannot be had: no such tag and no such file, or no network.
    """
    if is_hub(name) and start != HUB:
        raise CmpError(_hub_start_message(name))
    if start == HUB and not is_hub(name):
        raise CmpError(
            f"model.start: {HUB!r}: {name!r} is none of a hub's, which begin {HUB_PREFIXES}"
        )
    try:
        with quiet_logging():
            return _locate_weights(name, start)
    except (OSError, RuntimeError, ValueError) as error:  # urllib's and the hub's are among them
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CmpError(
            f"model.start: the weights {start!r} of {name!r} are not here and cannot be fetched "
            f"({reason:.200}); fetch them where there is a network, or give a file's path"
        ) from error


def _hub_start_message(name: str) -> str:
    """The sentence for a hub's model that is asked to start from anything but its weights."""
    return f"model.name: {name!r} comes with its own weights: set model.start={HUB}"


def _locate_weights(name: str, start: str) -> Path:
    """As `locate`, with whatever errors the network has."""
    known = pretrained_tag(name, start)
    if known:
        check_activation(name, start, known)
    if start == HUB or known.get("hf_hub"):
        if here := cached_weights(name, start):
            return here
        if name.startswith("local-dir:"):
            raise CmpError(f"model.name: {name!r}: there are no weights in that folder")
        if is_hub(name):
            return Path(pretrained.download_pretrained_from_hf(name.partition(":")[2]))
    return Path(pretrained.download_pretrained(known)) if known else find_weights_file(name, start)


def find_weights_file(name: str, start: str) -> Path:
    """The file that a start names; `CmpError` where it is none, with the model's tags."""
    if path := cached_weights(name, start):
        return path
    tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
    raise CmpError(
        f"model.start: {start!r}: neither a file nor a pretrained tag of {name!r}; open_clip has "
        f"for it: {tags}"
    )


def check_activation(name: str, start: str, known: dict) -> None:
    """`CmpError` where a tag's weights were trained with another activation than the model has."""
    quick = (open_clip.get_model_config(name) or {}).get("quick_gelu", False)
    if known.get("quick_gelu", False) != quick:
        other = name.removesuffix("-quickgelu") + ("" if quick else "-quickgelu")
        raise CmpError(
            f"model.name: the weights {start!r} are of the other kind of GELU than {name!r}; use "
            f"model.name={other}"
        )


def cached_weights(name: str, start: str) -> Path | None:
    """The file of these weights if it is on this machine already; nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache

    if name.startswith("local-dir:"):
        found = factory._find_checkpoint_in_dir(Path(name.partition(":")[2]))
        return Path(found) if found else None
    known = pretrained_tag(name, start)
    if not known and start != HUB:
        path = Path(start).expanduser()
        return path if path.is_file() else None
    if not (known.get("hf_hub") or is_hub(name)):  # by its address, in open_clip's folder
        path = Path("~/.cache/clip").expanduser() / Path(known["url"]).name
        return path if path.is_file() else None
    repository, last = name.partition(":")[2], ""
    if known:
        repository, _, last = known["hf_hub"].rpartition("/")
    name = last or pretrained.HF_WEIGHTS_NAME
    files = [*pretrained._get_safe_alternatives(name), name]
    found = (try_to_load_from_cache(repository, each) for each in files)
    return next((Path(each) for each in found if isinstance(each, str)), None)


@contextlib.contextmanager
def quiet_logging():
    """open_clip warns at each creation that weights are random, which is meant; and the hub of
    every attempt to reach it."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)


def load_checkpoint(fused: nn.Module, path: Path) -> None:
    """Read a checkpoint into a network as open_clip makes it, by open_clip's own reader, with its
    conversions of others' layouts: safetensors, or a state dict of torch's, read as tensors alone.

    `CmpError` names the file and the first tensors that are not this network's.
    """
    try:
        factory.load_checkpoint(fused, str(path))
    except Exception as error:  # whatever readers and converters raise on what is no checkpoint
        raise CmpError(f"{path}: {_explain_mismatch(fused, path, error)}") from error


def _explain_mismatch(fused: nn.Module, path: Path, error: Exception) -> str:
    """What is wrong with a checkpoint, in one sentence."""
    try:
        there = read_tensors(path)
        apart = tensor_differences(fused.state_dict(), there)
    except Exception:  # it cannot be read at all, as the first error says
        there, apart = {}, []
    if apart and there:
        more = f" and {len(apart) - _SHOWN_TENSORS} more" if len(apart) > _SHOWN_TENSORS else ""
        return f"the weights of another architecture: {'; '.join(apart[:_SHOWN_TENSORS])}{more}"
    reason = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
    return f"no checkpoint that could be read as tensors alone ({reason:.160})"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors by name, without the prefix "module." of a parallel training's."""
    return factory.load_state_dict(str(path), weights_only=True)


def has_split_layout(fused: nn.Module, path: Path) -> bool:
    """Whether a safetensors file holds attention as this package splits it."""
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        return False
    try:
        with safe_open(path, framework="pt") as opened:
            return has_split_names(dict.fromkeys(opened.keys()), fused)
    except (OSError, SafetensorError):
        return False  # whoever reads it next says why


def tensor_differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Where two sets of tensors differ in names or shapes, in the order of ours."""
    found = []
    for name, x in ours.items():
        there = theirs.get(name)
        if there is None:
            found.append(f"{name} {list(x.shape)} is missing there")
        elif there.shape != x.shape:
            found.append(f"{name} is {list(there.shape)} there, {list(x.shape)} in the model")
    return found + [f"{name} is there only" for name in theirs if name not in ours]


MAX_LOGIT_SCALE = math.log(100)
_TEXT_MULTIPLE = 16


def create_model(name: str, seed: int = 0) -> nn.Module:
    """A network with random weights that depend on (name, seed) alone, attention split.

    name: an embedded model or any open_clip architecture; else `CmpError`.
    """
    return split_attention(create_fused_model(name, seed))


def create_fused_model(name: str, seed: int = 0) -> nn.Module:
    """What `create` makes, with the same weights, as open_clip leaves it: attention fused."""
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(seed)
        return _open_clip(name)


def create_on_meta(name: str) -> nn.Module:
    """A network of this architecture on the meta device: shapes without values, of any size."""
    with torch.device("meta"):
        return split_attention(_open_clip(name, device="meta"))


def family_of(name: str) -> Any:
    """The family that a model belongs to, none for open_clip's own.

    Families are the entry points of the group "cmp.models": modules with `NAMES`, `tokenizer(name)`,
    `base_path(name, start, seed)`, and `find_base`, which refuses one that is not there. Importing
    a family registers its networks with open_clip.
    """
    return next((each for each in plugins("cmp.models").values() if name in each.NAMES), None)


def family_names() -> list[str]:
    """The models of all families."""
    return [name for family in plugins("cmp.models").values() for name in family.NAMES]


def _open_clip(name: str, **where) -> nn.Module:
    known = family_names()  # which registers them
    if name not in open_clip.list_models() and not is_hub(name):
        raise CmpError(f"model.name: open_clip knows no {name!r}; embedded are {', '.join(known)}")
    try:
        with quiet_logging():
            return open_clip.create_model(name, load_weights=False, output_dict=True, **where)
    except (ImportError, RuntimeError, ValueError, OSError) as error:
        # some want packages that are not here, or a hub
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CmpError(f"model.name: {name!r} cannot be made here ({reason:.300})") from error


@functools.cache
def tokenizer(name: str):
    """The tokenizer of a model: texts -> int64 [N, context_length]."""
    family = family_of(name)
    return family.tokenizer(name) if family else open_clip.get_tokenizer(name)


def _normalise(x: Tensor) -> Tensor:
    """Features [N, E] -> the same of length one, in fp32 at least."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


def tokenize(name: str, texts: Sequence[str]) -> Tensor:
    """Texts as a model's tokens, int64 [N, context_length]; not to be changed, as they are kept."""
    return _tokenize(name, tuple(texts))


@functools.lru_cache(maxsize=256)
def _tokenize(name: str, texts: tuple[str, ...]) -> Tensor:
    return tokenizer(name)(list(texts))


def encode_image(model: nn.Module, x: Tensor) -> Tensor:
    """Normalised network input [B, 3, H, W] -> unit image features [B, E], in fp32 at least."""
    return _normalise(model.visual(x))


def encode_text(model: nn.Module, tokens: Tensor) -> Tensor:
    """Tokens [N, L], best on the CPU, -> unit text features [N, E], in fp32 at least.

    Texts go through the tower in pairs, which changes no feature and saves most of the padding.
    Only for CLIP's own text tower with split attention; others go through open_clip.
    """
    device = model.logit_scale.device
    own = isinstance(model, open_clip.CLIP) and model.text_pool_type == "argmax"
    if not own or device.type == "meta":  # where tokens have no values there are no pairs
        return encode_text_unpacked(model, tokens)
    rows, position, mask, ends = (x.to(device, non_blocking=True) for x in pack_texts(tokens.cpu()))
    x = model.token_embedding(rows) + model.positional_embedding[position]
    x = model.transformer(x, attn_mask=mask).flatten(0, 1)[ends]  # [N, width]
    return _normalise(model.ln_final(x) @ model.text_projection)


def encode_text_unpacked(model: nn.Module, tokens: Tensor) -> Tensor:
    """What `encode_text` gives, through open_clip: a row a text, padding and all."""
    return _normalise(model.encode_text(tokens.to(model.logit_scale.device)))


def context_length(model: nn.Module) -> int:
    """Tokens of the longest text that a network reads."""
    return getattr(model, "context_length", None) or model.text.context_length


def pack_texts(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Put texts two to a row, the longest with the shortest, so that all rows are about as long.

    tokens: [N, L], each text ended by its largest token. Returns the rows' tokens and positions in
    their texts, [R, M]; a mask to add to attention scores, [R, 1, M, M], under which a token sees
    its own text up to itself; and the place of each text's end in the flattened rows, [N].

    R and M are rounded up: a CPU compiles kernels for every new shape.
    """
    count = len(tokens)
    tokens = F.pad(tokens, (0, 0, 0, -count % _TEXT_MULTIPLE))
    length = tokens.argmax(dim=1) + 1
    order = length.argsort(stable=True)
    right, left = order[: len(order) // 2], order[len(order) // 2 :].flip(0)
    size = int((length[left] + length[right]).max())
    column = torch.arange(size + size % 2)
    start = length[left, None]  # of the right text
    is_right = column >= start
    position = (column - start * is_right).clamp(max=tokens.shape[1] - 1)
    rows = tokens[torch.where(is_right, right[:, None], left[:, None]), position]
    seen = (is_right[:, :, None] == is_right[:, None]) & (column[:, None] >= column)
    mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[:, None]
    ends = torch.empty_like(length)
    ends[left] = torch.arange(len(left)) * len(column) + length[left] - 1
    ends[right] = ends[left] + length[right]
    return rows, position, mask, ends[:count]


def start_file(config: Model, seed: int) -> Path | None:
    """The file of the weights that a run starts from; none for random ones. `CmpError` where it is
    neither a base nor anything that `foreign.locate` finds; a base that is missing is no error."""
    if config.start == "random":
        return None
    if config.start in STARTS:
        family = family_of(config.name)
        return family.base_path(config.name, config.start, seed) if family else None
    return locate_weights(config.name, config.start)


def has_start(run_config: RunConfig) -> bool:
    """Whether the weights that a run starts from are here."""
    config, seed = run_config.model, run_config.seeds.init
    if config.start in STARTS:
        path = start_file(config, seed)
        return config.start == "random" or bool(path and path.exists())
    return cached_weights(config.name, config.start) is not None


def load_model(config: Model, seed: int) -> nn.Module:
    """The network that a run starts from: random, the shipped base number `seed`, or weights by
    open_clip's tag, from a file or from a hub."""
    if config.start == "random":
        return create_model(config.name, seed)
    if config.start in STARTS:
        if is_hub(config.name):
            raise CmpError(_hub_start_message(config.name))
        model = create_model(config.name, seed)  # which refuses a name that is none
        family = family_of(config.name)
        if family is None:
            raise CmpError(
                f"model.start: {config.start!r}: {config.name!r} has no bases; give a pretrained "
                "tag, the path of a file, or random"
            )
        load_weights(model, family.find_base(config.name, config.start, seed))
        return model
    path = locate_weights(config.name, config.start)
    model, known = load_from_file(config.name, path), pretrained_tag(config.name, config.start)
    if "mean" in known:
        model.visual.image_mean, model.visual.image_std = known["mean"], known["std"]
    return model


def load_from_file(name: str, path: Path) -> nn.Module:
    """A network with the weights of a file: as open_clip has them, in safetensors or in a state
    dict of torch's, or as this package has, attention split; else `CmpError`."""
    fused = create_fused_model(name)
    if has_split_layout(fused, path):
        model = split_attention(fused)
        load_weights(model, path)
        return model
    load_checkpoint(fused, path)
    return split_attention(fused)


SCALE_SUFFIX = ".scale"
_LARGEST_INT8 = 127


def quantize(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices and kernels as int8 [rows, ...] and `NAME.scale` [rows], all else in 16 bits.

    The error of an entry is at most half a scale, that is, 1/254 of its row's largest entry.
    """
    found: dict[str, Tensor] = {}
    for name, x in weights.items():
        if x.dim() < 2:
            found[name] = x.half()
            continue
        scale = x.flatten(1).abs().amax(dim=1).float() / _LARGEST_INT8
        scale = scale.where(scale > 0, torch.ones_like(scale))
        found[name] = (x.float() / _row_scale(scale, x)).round().to(torch.int8)
        found[name + SCALE_SUFFIX] = scale
    return found


def dequantize(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """fp32 weights of what `quantized` made; of others the same in fp32."""
    return {
        name: x.float() * _row_scale(weights[name + SCALE_SUFFIX], x)
        if name + SCALE_SUFFIX in weights
        else x.float()
        for name, x in weights.items()
        if not name.endswith(SCALE_SUFFIX)
    }


def _row_scale(scale: Tensor, x: Tensor) -> Tensor:
    """A row's scale [rows], shaped to be multiplied with x [rows, ...]."""
    return scale.view(-1, *[1] * (x.dim() - 1))


def load_weights(model: nn.Module, path: Path) -> None:
    """Read safetensors weights, of any float width or in 8 bits, into an fp32 model, exactly its
    tensors."""
    try:
        model.load_state_dict(dequantize(load_file(path)))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[:2][-1].strip()  # torch's first line is a headline
        raise CmpError(f"{path}: cannot be loaded into this model ({reason})") from error


def save_weights(model: nn.Module, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a model's tensors as safetensors; of `torch.int8`, matrices as rows with scales."""
    weights = model.state_dict()
    if dtype == torch.int8:
        save_file(quantize(weights), path)
        return
    save_file({name: x.detach().to(dtype).contiguous() for name, x in weights.items()}, path)


def export_weights(model: nn.Module, path: Path) -> None:
    """Write a network as `open_clip.create_model_and_transforms(NAME, pretrained=FILE)` reads it:
    safetensors in fp32, attention fused."""
    weights = fused_weights(model)
    save_file({name: x.detach().cpu().contiguous() for name, x in weights.items()}, path)


def weights_digest(model: nn.Module) -> str:
    """sha256 over a model's tensors, names and all, in the order of the names."""
    found = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        found.update(f"{name} {x.dtype} {list(x.shape)}\n".encode())
        found.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
