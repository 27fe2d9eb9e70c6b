"""CLIP through open_clip: the embedded models and any other open_clip name, attention split."""

import functools
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from cmp.config import STARTS, Model, RunConfig
from cmp.errors import CmpError
from cmp.models import foreign, quantization, towers, vocabulary
from cmp.models.attention import fused_weights, split_attention
from cmp.paths import MODEL_CONFIGS, WEIGHTS, build_folder

assert towers  # imported for the names it registers with timm
open_clip.add_model_config(MODEL_CONFIGS)

SHIPPED = ("annealed", "unannealed")
"""Starts whose bases come with the package."""

EMBEDDED = tuple(sorted(path.stem for path in MODEL_CONFIGS.glob("*.json")))
MAX_LOGIT_SCALE = math.log(100)
TEXTS_ROUNDED = 16


def create(name: str, seed: int = 0) -> nn.Module:
    """A network with random weights that depend on (name, seed) alone, attention split.

    name: an embedded model or any open_clip architecture; else `CmpError`.
    """
    return split_attention(create_fused(name, seed))


def create_fused(name: str, seed: int = 0) -> nn.Module:
    """What `create` makes, with the same weights, as open_clip leaves it: attention fused."""
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(seed)
        return _open_clip(name)


def blank(name: str) -> nn.Module:
    """A network of this architecture on the meta device: shapes without values, of any size."""
    with torch.device("meta"):
        return split_attention(_open_clip(name, device="meta"))


def _open_clip(name: str, **where) -> nn.Module:
    if name not in open_clip.list_models() and not foreign.is_hub(name):
        raise CmpError(
            f"model.name: open_clip knows no {name!r}; embedded are {', '.join(EMBEDDED)}"
        )
    try:
        with foreign.quiet():
            return open_clip.create_model(name, load_weights=False, output_dict=True, **where)
    except (ImportError, RuntimeError, ValueError, OSError) as error:
        # some want packages that are not here, or a hub
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CmpError(f"model.name: {name!r} cannot be made here ({reason:.300})") from error


@functools.cache
def tokenizer(name: str):
    """The tokenizer of a model: texts -> int64 [N, context_length]."""
    if name in EMBEDDED:
        length = open_clip.get_model_config(name)["text_cfg"]["context_length"]
        return SimpleTokenizer(bpe_path=str(vocabulary.MERGES), context_length=length)
    return open_clip.get_tokenizer(name)


def _unit(x: Tensor) -> Tensor:
    """Features [N, E] -> the same of length one, in fp32 at least."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


def tokens(name: str, texts: Sequence[str]) -> Tensor:
    """Texts as a model's tokens, int64 [N, context_length]; not to be changed, as they are kept."""
    return _tokens(name, tuple(texts))


@functools.lru_cache(maxsize=256)
def _tokens(name: str, texts: tuple[str, ...]) -> Tensor:
    return tokenizer(name)(list(texts))


def encode_image(model: nn.Module, x: Tensor) -> Tensor:
    """Normalised network input [B, 3, H, W] -> unit image features [B, E], in fp32 at least."""
    return _unit(model.visual(x))


def encode_text(model: nn.Module, tokens: Tensor) -> Tensor:
    """Tokens [N, L], best on the CPU, -> unit text features [N, E], in fp32 at least.

    Texts go through the tower in pairs, which changes no feature and saves most of the padding.
    Only for CLIP's own text tower with split attention; others go through open_clip.
    """
    device = model.logit_scale.device
    own = isinstance(model, open_clip.CLIP) and model.text_pool_type == "argmax"
    if not own or device.type == "meta":  # where tokens have no values there are no pairs
        return encode_one_by_one(model, tokens)
    rows, position, mask, ends = (x.to(device, non_blocking=True) for x in in_pairs(tokens.cpu()))
    x = model.token_embedding(rows) + model.positional_embedding[position]
    x = model.transformer(x, attn_mask=mask).flatten(0, 1)[ends]  # [N, width]
    return _unit(model.ln_final(x) @ model.text_projection)


def encode_one_by_one(model: nn.Module, tokens: Tensor) -> Tensor:
    """What `encode_text` gives, through open_clip: a row a text, padding and all."""
    return _unit(model.encode_text(tokens.to(model.logit_scale.device)))


def context_length(model: nn.Module) -> int:
    """Tokens of the longest text that a network reads."""
    return getattr(model, "context_length", None) or model.text.context_length


def in_pairs(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Put texts two to a row, the longest with the shortest, so that all rows are about as long.

    tokens: [N, L], each text ended by its largest token. Returns the rows' tokens and positions in
    their texts, [R, M]; a mask to add to attention scores, [R, 1, M, M], under which a token sees
    its own text up to itself; and the place of each text's end in the flattened rows, [N].

    R and M are rounded up: a CPU compiles kernels for every new shape.
    """
    count = len(tokens)
    tokens = F.pad(tokens, (0, 0, 0, -count % TEXTS_ROUNDED))
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


def weights_path(name: str, start: str, seed: int) -> Path:
    """Where a base's weights are: `tiny-s0-annealed.safetensors` in the package; of a start that
    does not ship, where `cmp pretrain` puts them."""
    folder = WEIGHTS if start in SHIPPED else build_folder() / "models"
    return folder / f"{name}-s{seed}-{start}.safetensors"


def shipped(name: str) -> list[int]:
    """The base seeds that ship with the package."""
    paths = WEIGHTS.glob(f"{name}-s*-annealed.safetensors")
    return sorted(int(path.name.removeprefix(f"{name}-s").split("-")[0]) for path in paths)


def start_file(config: Model, seed: int) -> Path | None:
    """The file of the weights that a run starts from; none for random ones. `CmpError` where it is
    neither a base nor anything that `foreign.locate` finds; a base that is missing is no error."""
    if config.start == "random":
        return None
    if config.start in STARTS:
        return weights_path(config.name, config.start, seed)
    return foreign.locate(config.name, config.start)


def has_start(run_config: RunConfig) -> bool:
    """Whether the weights that a run starts from are here."""
    config, seed = run_config.model, run_config.seeds.init
    if config.start in STARTS:
        path = start_file(config, seed)
        return path is None or path.exists()
    return foreign.cached(config.name, config.start) is not None


def load(config: Model, seed: int) -> nn.Module:
    """The network that a run starts from: random, the shipped base number `seed`, or weights by
    open_clip's tag, from a file or from a hub."""
    path = start_file(config, seed)
    if path is None:
        return create(config.name, seed)
    if config.start in STARTS:
        if foreign.is_hub(config.name):
            raise CmpError(foreign.own_weights(config.name))
        model = create(config.name, seed)  # which refuses a name that is none
        _check_base(config, seed, path)
        load_weights(model, path)
        return model
    model, known = from_file(config.name, path), foreign.tag(config.name, config.start)
    if "mean" in known:
        model.visual.image_mean, model.visual.image_std = known["mean"], known["std"]
    return model


def _check_base(config: Model, seed: int, path: Path) -> None:
    """`CmpError` for a base that is not there."""
    if path.exists():
        return
    bases = ", ".join(map(str, shipped(config.name))) or "none"
    family = "" if config.start in SHIPPED else f" schedule.name={config.start}"
    raise CmpError(
        f"seeds.init: no {config.start} base {seed} of {config.name!r} is shipped (bases "
        f"that are: {bases}); `cmp pretrain {config.name}{family} --seed {seed}` makes one"
    )


def from_file(name: str, path: Path) -> nn.Module:
    """A network with the weights of a file: as open_clip has them, in safetensors or in a state
    dict of torch's, or as this package has, attention split; else `CmpError`."""
    fused = create_fused(name)
    if foreign.has_split_layout(fused, path):
        model = split_attention(fused)
        load_weights(model, path)
        return model
    foreign.load(fused, path)
    return split_attention(fused)


def load_weights(model: nn.Module, path: Path) -> None:
    """Read safetensors weights, of any float width or in 8 bits, into an fp32 model, exactly its
    tensors."""
    try:
        model.load_state_dict(quantization.dequantized(load_file(path)))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[:2][-1].strip()  # torch's first line is a headline
        raise CmpError(f"{path}: cannot be loaded into this model ({reason})") from error


def save_weights(model: nn.Module, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a model's tensors as safetensors; of `torch.int8`, matrices as rows with scales."""
    weights = model.state_dict()
    if dtype == torch.int8:
        save_file(quantization.quantized(weights), path)
        return
    save_file({name: x.detach().to(dtype).contiguous() for name, x in weights.items()}, path)


def export(model: nn.Module, path: Path) -> None:
    """Write a network as `open_clip.create_model_and_transforms(NAME, pretrained=FILE)` reads it:
    safetensors in fp32, attention fused."""
    weights = fused_weights(model)
    save_file({name: x.detach().cpu().contiguous() for name, x in weights.items()}, path)


def digest(model: nn.Module) -> str:
    """sha256 over a model's tensors, names and all, in the order of the names."""
    found = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        found.update(f"{name} {x.dtype} {list(x.shape)}\n".encode())
        found.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
