"""CLIP through open_clip: the embedded models and any other open_clip name, attention split."""

import contextlib
import functools
import hashlib
import logging
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

from cmp import quantization, towers, vocabulary
from cmp.config import Model, RunConfig
from cmp.errors import CmpError
from cmp.paths import MODEL_CONFIGS, WEIGHTS, build_folder

assert towers  # imported for the names it registers with timm
open_clip.add_model_config(MODEL_CONFIGS)

SHIPPED = ("annealed", "unannealed")
"""Starts whose bases come with the package."""

EMBEDDED = tuple(sorted(path.stem for path in MODEL_CONFIGS.glob("*.json")))
MAX_LOGIT_SCALE = math.log(100)
TEXTS_ROUNDED = 16


class SplitAttention(nn.Module):
    """Self-attention with separate q, k, v and out projections, in place of a fused
    `nn.MultiheadAttention`, whose weights it takes over.

    Adapters, freezing and merging can then name each matrix; the outputs are the same.
    """

    def __init__(self, fused: nn.MultiheadAttention):
        super().__init__()
        width, self.heads = fused.embed_dim, fused.num_heads
        self.batch_first = fused.batch_first
        names = ("q_proj", "k_proj", "v_proj")
        for name, weight, bias in zip(
            names, fused.in_proj_weight.chunk(3), fused.in_proj_bias.chunk(3), strict=True
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
    if name not in open_clip.list_models():
        raise CmpError(
            f"model.name: open_clip knows no {name!r}; embedded are {', '.join(EMBEDDED)}"
        )
    try:
        with _quiet():
            return open_clip.create_model(name, output_dict=True, **where)
    except (ImportError, RuntimeError) as error:  # some want packages that are not here
        raise CmpError(f"model.name: {name!r} cannot be made here ({error})") from error


@contextlib.contextmanager
def _quiet():
    """open_clip warns at each creation that weights are random; here that is meant."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)


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


def has_start(run_config: RunConfig) -> bool:
    """Whether the weights that a run starts from are here."""
    name, start = run_config.model.name, run_config.model.start
    return start == "random" or weights_path(name, start, run_config.seeds.init).exists()


def load(config: Model, seed: int) -> nn.Module:
    """The network that a run starts from: random, or the shipped base number `seed`."""
    model = create(config.name, seed)
    if config.start != "random":
        path = weights_path(config.name, config.start, seed)
        if not path.exists():
            bases = ", ".join(map(str, shipped(config.name))) or "none"
            family = "" if config.start in SHIPPED else f" schedule.name={config.start}"
            raise CmpError(
                f"seeds.init: no {config.start} base {seed} of {config.name!r} is shipped (bases "
                f"that are: {bases}); `cmp pretrain {config.name}{family} --seed {seed}` makes one"
            )
        load_weights(model, path)
    return model


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


def digest(model: nn.Module) -> str:
    """sha256 over a model's tensors, names and all, in the order of the names."""
    found = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        found.update(f"{name} {x.dtype} {list(x.shape)}\n".encode())
        found.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
