"""Create, load and export open_clip networks, and compute their features.

Attention is split into one matrix per projection, so that adapters, freezing and merging can
address each one. Weights come from this package's files or any checkpoint that open_clip reads.
"""

import functools
import json
import math
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import open_clip
import torch
from open_clip import factory
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from cmp import parsing, starts
from cmp.config import Model
from cmp.data import Preprocessing, to_device
from cmp.errors import CmpError, explain_errors, explain_limit, first_line, weights_fault
from cmp.files import save_tensors, tensors_digest

MAX_LOGIT_SCALE = math.log(100)
MAX_PARAMETERS = 10**10
"""Most parameters of a network from a hub or folder, twice as many as open_clip's largest has."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
PREPROCESSING = "preprocess_cfg"
"""Key in the metadata of a file of weights: how images are prepared, as JSON."""
_TEXT_MULTIPLE = 16  # `pack_texts` pads to this, as a CPU compiles kernels for each shape


class Network(nn.Module):
    """The interface that the package expects of a network, for annotations. `open_clip.CLIP` and
    `open_clip.CustomTextCLIP` provide it once their attention is split.

    Attributes:
        visual: The image tower, with `image_size`, `image_mean`, `image_std` and `preprocess_cfg`.
        logit_scale: Logarithm of the inverse temperature, [].
        logit_bias: Added to the logits in networks with a sigmoid loss, []; None in others.
        context_length: The most tokens in a text.
        encode_text: Tokens [N, L] -> text features [N, E].
        set_grad_checkpointing: Turns recomputation of activations on or off.
    """

    visual: Any
    logit_scale: nn.Parameter
    logit_bias: nn.Parameter | None
    context_length: int
    encode_text: Callable[[Tensor], Tensor]
    set_grad_checkpointing: Callable[[bool], None]


def create_model(name: str, seed: int = 0) -> Network:
    """Return a network with random weights and split attention.

    Args:
        name: An embedded model, any open_clip architecture, or a model from a hub.
        seed: The weights depend only on the name and this seed.

    Raises:
        CmpError: There is no such model, or it cannot be created on this machine.

    Example:
        >>> model = cmp.create_model("small", seed=1)
        >>> sum(x.numel() for x in model.parameters())
        1204065
    """
    return split_attention(create_fused_model(name, seed))


def create_fused_model(name: str, seed: int = 0) -> nn.Module:
    """Return the network of `create_model` as open_clip builds it, with fused attention."""
    if starts.is_hub(name):  # whose config may name any width
        shapes = create_on_meta(name)
        count = sum(x.numel() for x in (*shapes.parameters(), *shapes.buffers()))
        if count > MAX_PARAMETERS:
            raise CmpError(
                f"model.name: {name:.200}: has {count:,} parameters by its config, but at most "
                f"{MAX_PARAMETERS:,} are allowed; check its widths, or choose another model"
            )
    number = operator.index(seed)  # torch does not take numpy's integers
    with starts.PROCESS_LOCK, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(number)  # not those of GPUs, which are not forked
        return _open_clip_model(name)


def create_on_meta(name: str) -> Network:
    """Return a network on the meta device: shapes without values, whatever the size."""
    with torch.device("meta"):
        return split_attention(_open_clip_model(name, device="meta"))


def _open_clip_model(name: str, **options: Any) -> nn.Module:
    starts.check_name(name)
    if starts.is_hub(name):
        starts.hub_config(name)  # which checks it
    try:
        with starts.quiet_logging():
            model = open_clip.create_model(name, load_weights=False, output_dict=True, **options)
    except Exception as error:  # a missing package or hub, or anything in a third-party config
        reason = first_line(error)
        raise CmpError(f"model.name: {name!r} cannot be created here ({reason:.300})") from error
    return model


def load_model(config: Model, seed: int) -> Network:
    """Return the network that a run starts from.

    Args:
        config: The config section.
        seed: The init seed, for random weights, or the number of a shipped base.

    Raises:
        CmpError: The network cannot be created, or its weights are missing or belong to another
            network.

    Example:
        >>> model = cmp.load_model(cmp.RunConfig().model, seed=0)  # a base of "small"
        >>> model.visual.image_size
        (32, 32)
    """
    path = starts.fetch_weights(config, seed)
    if path is None:
        return create_model(config.name, seed)
    model = load_from_file(config.name, path)
    _follow_preprocessing(model, starts.pretrained_tag(config.name, config.start))
    return model


def load_from_file(name: str, path: Path) -> Network:
    """Return a network with the weights of a file.

    Args:
        name: The model.
        path: A safetensors file with fused or split attention, or an open_clip checkpoint.

    Raises:
        CmpError: The file cannot be read, or belongs to another architecture.
    """
    network, names = create_fused_model(name), set()
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
        is_split = any(  # the names of this package's split attention
            isinstance(layer, nn.MultiheadAttention) and f"{n}.{PROJECTIONS[0]}.weight" in names
            for n, layer in network.named_modules()
        )
        if is_split:
            family = starts.family_of(name)
            read = family.read_weights if family else load_file
            split_attention(network).load_state_dict(read(path))
        else:
            factory.load_checkpoint(cast(Any, network), str(path))
        settings = saved_preprocessing(path)
        _follow_preprocessing(network, settings)
    except Exception as error:  # readers and converters raise all kinds of errors
        if isinstance(error, CmpError) or explain_limit(error):
            raise
        raise CmpError(
            f"{path}: the weights belong to another architecture than {name!r}, or the file is "
            f"damaged or contains more than tensors ({weights_fault(error):.300})"
        ) from error
    if settings:
        preprocessing(cast(Network, network), f"{path}: metadata")
    return split_attention(network)


def _follow_preprocessing(model: Any, settings: dict[str, Any]) -> None:
    """Change how images are prepared for a network, by some of open_clip's settings."""
    merged = open_clip.transform.merge_preprocess_dict(model.visual.preprocess_cfg, settings)
    open_clip.model.set_model_preprocess_cfg(model, merged)


def saved_preprocessing(path: Path) -> dict[str, Any]:
    """Return how images are prepared according to the metadata of a file of weights, as some of
    open_clip's settings. `export_weights` writes them."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(PREPROCESSING, "{}")
    with explain_errors(f"{path}: metadata: {PREPROCESSING}"):
        settings = parsing.parse_json(text)
        known = open_clip.transform.PreprocessCfg.__dataclass_fields__
        if not isinstance(settings, dict) or not settings.keys() <= known.keys():
            raise ValueError(f"{text:.80}: must be a mapping with keys of {', '.join(known)}")
        return settings


@functools.cache
def tokenizer(name: str) -> Callable[[list[str]], Tensor]:
    """Return the tokenizer of a model: n texts -> int64 [n, context_length].

    Raises:
        CmpError: There is no such model, or its tokenizer's files are missing or damaged.
    """
    starts.check_name(name)
    name = starts.known_name(name)
    if family := starts.family_of(name):
        return family.tokenizer(name)
    try:
        return open_clip.get_tokenizer(name)
    except ModuleNotFoundError:  # the message of `cmp.faults` names the extra
        raise
    except Exception as error:  # transformers raises all kinds of errors
        remedy = "check the name and the connection"
        if name.startswith("local-dir:"):
            remedy = "write its files into this folder with the tokenizer's `save_pretrained`"
        raise CmpError(
            f"model.name: {name:.200}: its tokenizer cannot be read ({first_line(error):.200}); "
            f"{remedy}"
        ) from error


@functools.lru_cache(maxsize=256)
def tokenize(name: str, texts: tuple[str, ...]) -> Tensor:
    """Return the tokens of n texts, int32 [n, context_length].

    This process caches them, so they must not be changed. They are not kept in a file, since 50,000
    texts take no longer than the imports.

    Args:
        name: The model.
        texts: The texts.
    """
    return tokenizer(name)(list(texts)).int()


def preprocessing(model: Network, source: str = "model.name") -> Preprocessing:
    """Return how images are prepared for a network.

    Args:
        model: The network.
        source: The beginning of error messages.

    Raises:
        CmpError: The images are not square, or open_clip's settings for the network are not
            supported.
    """
    side, width = np.broadcast_to(model.visual.image_size, 2).tolist()
    if side != width:
        raise CmpError(
            f"{source}: takes images of {side} x {width}, but only square images are supported; "
            "choose another model"
        )
    settings = model.visual.preprocess_cfg | {"size": side}
    with explain_errors(f"{source}: {PREPROCESSING}: not supported", "", TypeError):
        return parsing.parse_record(json.dumps(settings), Preprocessing)


def encode_image(model: Network, pixels: Tensor) -> Tensor:
    """Return unit image features, [B, E], in fp32 or fp64.

    Args:
        model: The network.
        pixels: Normalised images, [B, 3, H, W].
    """
    return _unit_length(model.visual(pixels))


def encode_text(model: Network, tokens: Tensor) -> Tensor:
    """Return unit text features, [N, E], in fp32 or fp64.

    CLIP's own text tower gets texts in pairs, which leaves features unchanged and saves most of the
    padding. Other towers, and those with fused attention, get them as in open_clip.

    Args:
        model: The network.
        tokens: [N, L], preferably on the CPU, where they are packed.
    """
    tokens = tokens.long()
    device = model.logit_scale.device
    clip: Any = model
    can_pack = (
        isinstance(model, open_clip.CLIP)
        and clip.text_pool_type == "argmax"
        and clip.attn_mask is not None  # causal
        and isinstance(clip.text_projection, Tensor)
        and not isinstance(clip.transformer.resblocks[0].attn, nn.MultiheadAttention)
    )
    if not can_pack or device.type == "meta":  # meta tensors have no values, so no lengths
        return encode_text_unpacked(model, tokens)
    return encode_packed(model, [to_device(each, device) for each in pack_texts(tokens.cpu())])


def encode_packed(model: Any, packed: Sequence[Tensor]) -> Tensor:
    """Return the features of texts that `pack_texts` has packed, on the network's device."""
    rows, position, starts, ends = packed
    x = model.token_embedding(rows) + F.embedding(position, model.positional_embedding)
    x = model.transformer(x, attn_mask=pair_mask(starts, rows.shape[1])).flatten(0, 1)[ends]
    return _unit_length(model.ln_final(x) @ model.text_projection)  # [N, width] -> [N, E]


def encode_text_unpacked(model: Network, tokens: Tensor) -> Tensor:
    """Return the same as `encode_text`, computed with one padded text per row."""
    return _unit_length(model.encode_text(to_device(tokens, model.logit_scale.device)))


def _unit_length(features: Tensor) -> Tensor:
    """Return features [N, E] scaled to length one, in fp32 or fp64."""
    return F.normalize(features if features.dtype == torch.float64 else features.float(), dim=-1)


def pack_texts(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pack two texts into each row, the longest with the shortest, so that rows have similar
    lengths.

    There are R rows of two texts. M, the length of the longest row, is rounded up to an even
    number, and N to a multiple of 16, since a CPU compiles kernels for every new shape.

    Args:
        tokens: [N, L]; each text ends with its largest token.

    Returns:
        The rows' tokens, [R, M].
        Their positions in their texts, [R, M].
        The column in which each row's second text starts, [R].
        The place of each text's end in the flattened rows, [N].
    """
    count = len(tokens)
    tokens = F.pad(tokens, (0, 0, 0, -count % _TEXT_MULTIPLE))
    length = tokens.argmax(dim=1) + 1
    order = length.argsort(stable=True)
    right, left = order[: len(order) // 2], order[len(order) // 2 :].flip(0)
    longest = int((length[left] + length[right]).max())
    column = torch.arange(longest + longest % 2)
    starts = length[left]  # of the right texts
    is_right = column >= starts[:, None]
    position = (column - starts[:, None] * is_right).clamp(max=tokens.shape[1] - 1)
    rows = tokens[torch.where(is_right, right[:, None], left[:, None]), position]
    ends = torch.empty_like(length)
    ends[left] = torch.arange(len(left)) * len(column) + length[left] - 1
    ends[right] = ends[left] + length[right]
    return rows, position, starts, ends[:count]


def pair_mask(starts: Tensor, length: int) -> Tensor:
    """Return a mask to add to attention scores, so that a token of packed texts sees only its own
    text up to itself, [R, 1, M, M].

    It is made on the device: on the host, it would take almost all the time of packing.

    Args:
        starts: The column in which each row's second text starts, [R].
        length: The length M of the rows.
    """
    column = torch.arange(length, device=starts.device)
    is_right = column >= starts[:, None]
    visible = (is_right[:, :, None] == is_right[:, None]) & (column[:, None] >= column)
    return torch.where(visible, 0.0, -torch.inf)[:, None]


class SplitAttention(nn.Module):
    """Self-attention with separate projections q, k, v and out. It takes over the weights of a
    fused `nn.MultiheadAttention` and gives the same outputs. What is frozen stays frozen."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear

    def __init__(self, fused: nn.MultiheadAttention):
        super().__init__()
        width, self.heads = fused.embed_dim, fused.num_heads
        self.batch_first = fused.batch_first
        weights, biases = fused.in_proj_weight.chunk(3), fused.in_proj_bias.chunk(3)
        for name, weight, bias in zip(PROJECTIONS, weights, biases, strict=True):
            linear = nn.Linear(width, width, device="meta")
            trains = fused.in_proj_weight.requires_grad, fused.in_proj_bias.requires_grad
            linear.weight = nn.Parameter(weight.detach().clone(), trains[0])
            linear.bias = nn.Parameter(bias.detach().clone(), trains[1])
            self.add_module(name, linear)
        self.out_proj = nn.Linear(width, width, device="meta")  # the layer that adapters know
        self.out_proj.weight, self.out_proj.bias = fused.out_proj.weight, fused.out_proj.bias

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights=False, attn_mask=None
    ) -> tuple[Tensor, None]:
        """Return the output, shaped like the inputs ([B, L, width], or [L, B, width] if not
        `batch_first`), and None in place of the attention weights of `nn.MultiheadAttention`."""
        if not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        size = (self.heads, -1)  # of the last dimension: heads, width / heads
        q = self.q_proj(query).unflatten(-1, size).transpose(1, 2)  # [B, heads, L, width / heads]
        k = self.k_proj(key).unflatten(-1, size).transpose(1, 2)
        v = self.v_proj(value).unflatten(-1, size).transpose(1, 2)
        x = self.out_proj(attention(q, k, v, attn_mask).transpose(1, 2).flatten(2))
        return (x if self.batch_first else x.transpose(0, 1)), None


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Return scaled dot-product attention, [B, heads, L, E].

    Args:
        q: Queries, [B, heads, L, E]; k: keys; v: values.
        mask: Added to the scores, [L, L] or [B, 1, L, L].
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # on a CPU, two plain products beat the fused kernel, whose backward pass is slow in bf16, and
    # softmax over rows as short as texts is three times as fast with queries as the last dimension
    scores = k @ (q * q.shape[-1] ** -0.5).mT  # [B, heads, keys, queries]
    return (scores if mask is None else scores + mask.mT).softmax(-2).mT @ v


def split_attention(model: nn.Module) -> Network:
    """Split every fused attention of an open_clip network in place, and return the network.

    Raises:
        CmpError: The network is a CoCa, whose attention has keys of another width; or an attention
            layer has an unknown class, such as those of open_clip 4.
    """
    for name, module in model.named_modules():
        if hasattr(module, "in_proj_weight") and not isinstance(module, nn.MultiheadAttention):
            raise CmpError(  # adapters and merging would miss it
                f"model.name: {name} has a class of open_clip {open_clip.__version__} whose "
                "projections cannot be split; install 'open_clip_torch>=3,<4', or choose another "
                "model"
            )
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.MultiheadAttention):
                if child.in_proj_weight is None:
                    raise CmpError("model.name: CoCa's networks are not supported; choose another")
                setattr(module, name, SplitAttention(child))
    return cast(Network, model)


def set_train_mode(model: nn.Module) -> None:
    """Put a network into training mode, except batch norms that are not fully trainable, so that
    frozen layers keep their statistics. A norm without parameters follows the layer around it."""
    model.train()
    for layer, around in batch_norms(model).items():
        parameters = [*layer.parameters()] or [*around.parameters()]
        layer.train(all(p.requires_grad for p in parameters))


def batch_norms(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Return the layers of a network that keep running statistics, each with its parent module."""
    norms: dict[nn.Module, nn.Module] = {}
    for around in model.modules():
        for layer in around.children():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                norms[layer] = around
    return norms


_RANDOM_LAYERS = {"p": "Dropout", "drop_prob": "DropPath", "prob": "PatchDropout"}
"""Attributes with the rate of layers that are random in training."""


def is_random(layer: nn.Module) -> bool:
    """Return whether a layer, apart from those in it, is random in training."""
    kind = type(layer).__name__
    return any(getattr(layer, key, 0) for key, word in _RANDOM_LAYERS.items() if word in kind)


def has_random_layers(model: nn.Module) -> bool:
    """Return whether layers of a network are random in training."""
    return any(map(is_random, model.modules()))


def export_weights(model: Network, path: Path) -> None:
    """Write a network in a form that open_clip loads: fp32 safetensors with fused attention.

    `open_clip.create_model_and_transforms(NAME, pretrained=FILE)` reads the file. Its metadata
    record how images are prepared, which `load_from_file` reads and open_clip ignores.
    """
    weights = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, SplitAttention):
            for kind in ("weight", "bias"):
                parts = [weights.pop(f"{name}.{part}.{kind}") for part in PROJECTIONS]
                weights[f"{name}.in_proj_{kind}"] = torch.cat(parts)
    metadata = {PREPROCESSING: json.dumps(model.visual.preprocess_cfg)}
    own = {name: x.detach().cpu().contiguous() for name, x in weights.items()}
    save_tensors(own, path, metadata)


def weights_digest(model: nn.Module) -> str:
    """Return the sha256 of a network's tensors, see `tensors_digest`."""
    return tensors_digest(model.state_dict())
