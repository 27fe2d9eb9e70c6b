"""Count the kernels that a training step launches on a GPU, without one, and predict their time.

A whole step of a run is traced on the meta device: both towers, the loss and the backward pass in
bf16 as with CUDA's autocast, then clipping and AdamW. Each operation that launches a kernel is
recorded with the bytes that it reads and writes and its FLOPs according to torch's counter. The
compiled step is estimated from the same operations: within a tower, and in the backward pass,
operations between two products are fused into one kernel, which reads its external inputs and
writes the outputs used elsewhere. Nothing is measured, and kernels are assumed to reach the rates
below. `cmpt bench trace` shows the result, and `cmpt bench gpu` measures.
"""

import functools
import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.flop_counter import flop_registry

from cmp import models
from cmp.data import NOISE, augment, normalise
from cmp.losses import model_loss
from cmp.models import Network

PEAK = 989e12
"""FLOP/s of dense bf16 products of an H100, as stated by its maker."""
PRODUCT_RATE = 0.8 * 798e12
"""Assumed FLOP/s of a step's products on an H100: most of an assumed 798 TFLOP/s for one large
product."""
BANDWIDTH = 3.0e12
"""Assumed bytes/s that kernels of an H100 read and write: 90% of its maker's 3.35 TB/s."""
LAUNCH, HOST = 2e-6, 6e-6
"""Assumed minimum seconds per kernel, and seconds that the host needs to launch one."""
CAPTION = 24
"""Tokens of an average caption."""
CHUNK = 320 * 65536
"""Entries of tensors that one launch of a fused optimiser processes."""
aten = torch.ops.aten
ALLOCATIONS = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.lift_fresh}
LOW = {F.linear, F.conv2d, torch.matmul, Tensor.matmul, Tensor.__matmul__}
FULL = {F.layer_norm, F.softmax, F.log_softmax, F.cross_entropy, F.group_norm, torch.exp}
"""Operations that CUDA's autocast computes in bf16 and in fp32; others keep their input types."""

OPERATIONS = {
    "attention": "scaled_dot_product",
    "norms": "layer_norm",
    "GELU": "gelu",
    "casts": "_to_copy",
    "residuals": "add",
}
"""Kind of a kernel -> a part of the name of its operation."""
KINDS = ("products", *OPERATIONS, "optimiser", "other")
"""Kinds of kernels. A fused kernel is of the first one of its operations."""

Value = tuple[int, int]
"""A tensor's content: its storage, and how often it was written."""


@dataclass
class Kernel:
    """An operation that launches a kernel, or several operations fused into one.

    Attributes:
        reads: The bytes of each input value.
        writes: The bytes of each output value.
        flops: The FLOPs of products; 0 for other operations.
        is_fusible: Whether a compiler may fuse it with others.
        region: The compiled part of the step that it belongs to, or "".
        kind: One of `KINDS`.
    """

    reads: dict[Value, int]
    writes: dict[Value, int]
    flops: int = 0
    is_fusible: bool = False
    region: str = ""
    kind: str = "other"

    @property
    def bytes(self) -> int:
        """The bytes read and written."""
        return sum(self.reads.values()) + sum(self.writes.values())

    @property
    def seconds(self) -> float:
        """The assumed duration on an H100, in seconds."""
        return self.seconds_at(PRODUCT_RATE, BANDWIDTH)

    def seconds_at(self, product_rate: float, bandwidth: float) -> float:
        """Return the duration in seconds for a rate of products, in FLOP/s, and a bandwidth, in
        bytes/s."""
        return max(self.flops / product_rate, self.bytes / bandwidth, LAUNCH)

    def joins(self, other: "Kernel") -> bool:
        """Return whether a compiler may fuse both into one kernel."""
        return self.is_fusible and other.is_fusible and self.region == other.region != ""


class CudaAutocast(TorchFunctionMode):
    """CUDA's bf16 autocast and attention for meta tensors, which have no autocast."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function with its arguments cast as autocast would."""
        kwargs = kwargs or {}
        is_attention = func is F.scaled_dot_product_attention
        dtype = torch.bfloat16 if func in LOW or is_attention else torch.float32
        if func in LOW or func in FULL or is_attention:
            args, kwargs = tree_map_only(
                Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, (args, kwargs)
            )
        if not is_attention:
            return func(*args, **kwargs)
        q, k, v, mask = *args[:3], kwargs.get("attn_mask")
        if mask is None:
            return aten._scaled_dot_product_flash_attention(q, k, v)[0]
        mask = mask.expand(len(q), q.shape[1], q.shape[2], k.shape[2])
        return aten._scaled_dot_product_efficient_attention(q, k, v, mask, True)[0]


@dataclass
class Recorder(TorchDispatchMode):
    """A mode that records each kernel computed within it.

    Attributes:
        kernels: The kernels in launch order.
        casts: For each value that is a cast to a wider type, the original value.
        region: The compiled part of the step being computed, or "".
    """

    kernels: list[Kernel] = field(default_factory=list)
    casts: dict[Value, Value] = field(default_factory=dict)
    region: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self._versions: dict[int, int] = defaultdict(int)
        self._alive: list[Any] = []  # storages, so that addresses are not reused

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute an operation on shapes, and record it if it launches a kernel."""
        kwargs = kwargs or {}
        inputs = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        reads = {self._value(x): touched_bytes(x) for x in inputs}
        result = func(*args, **kwargs)
        outputs = [x for x in tree_flatten(result)[0] if isinstance(x, Tensor)]
        packet, storages = func.overloadpacket, {storage for storage, _ in reads}
        is_view = {self._value(x)[0] for x in outputs} <= storages and not func._schema.is_mutable
        if is_view or packet in ALLOCATIONS:
            return result
        if func._schema.is_mutable:
            self._versions[self._value(outputs[0])[0]] += 1
        flops = 0
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=result)
        writes = {self._value(x): touched_bytes(x) for x in outputs}
        if packet is aten._to_copy and sum(reads.values()) <= sum(writes.values()):
            self.casts[next(iter(writes))] = next(iter(reads))
        columns = packet is aten.sum and outputs[0].shape[-1:] == inputs[0].shape[-1:]
        is_fusible = not (flops or columns or packet is aten.embedding_dense_backward)
        kind = kind_of(packet.__name__, flops)
        kernels = [Kernel(reads, writes, flops, is_fusible, self.region, kind)]
        if packet is aten.native_layer_norm_backward:  # sums over rows take their own kernel
            of_rows, *of_columns = writes.items()
            kernels = [
                Kernel(reads, dict([of_rows]), 0, True, self.region, kind),
                Kernel(reads, dict(of_columns), 0, False, self.region, kind),
            ]
        self.kernels += kernels
        return result

    def _value(self, x: Tensor) -> Value:
        storage = x.untyped_storage()
        self._alive.append(storage)
        return storage._cdata, self._versions[storage._cdata]


def kind_of(name: str, flops: int) -> str:
    """Return the kind of the kernel of an operation, one of `KINDS`."""
    found = next((kind for kind, part in OPERATIONS.items() if part in name), "other")
    return "products" if flops and found != "attention" else found


def touched_bytes(x: Tensor) -> int:
    """Return the bytes of a tensor's entries, counting those repeated with stride 0 once."""
    sizes = [size for size, stride in zip(x.shape, x.stride(), strict=True) if stride]
    return math.prod(sizes) * x.element_size()


def group_kernels(kernels: list[Kernel]) -> list[int]:
    """Return the group number of each kernel. Fusible kernels of a region that are connected
    without a product in between form a group."""
    level, group, made = [0] * len(kernels), list(range(len(kernels))), {}
    for number, kernel in enumerate(kernels):
        sources = [made[value] for value in kernel.reads if value in made]
        near = [s for s in sources if kernel.joins(kernels[s])]
        steps = [level[s] + (s not in near) for s in sources]
        level[number] = max(steps, default=0)  # a product starts the next level
        same = {group[s] for s in near if level[s] == level[number]}
        group = [number if other in same else other for other in group]
        made |= dict.fromkeys(kernel.writes, number)
    return group


def fuse(kernels: list[Kernel], casts: dict[Value, Value]) -> list[Kernel]:
    """Return the fused kernels that a compiler may make, one for each group of `group_kernels`.

    Args:
        kernels: The kernels in launch order.
        casts: See `Recorder`. A fused kernel reads the narrower type and casts it itself.
    """
    group = group_kernels(kernels)
    made = {value: number for number, kernel in enumerate(kernels) for value in kernel.writes}
    fused = {number: Kernel({}, {}) for number in group}
    for number, kernel in zip(group, kernels, strict=True):
        fused[number].flops += kernel.flops
        fused[number].region = kernel.region
        fused[number].kind = min(fused[number].kind, kernel.kind, key=KINDS.index)
        for value, size in kernel.reads.items():
            if value in made and group[made[value]] == number:
                continue
            if kernel.region and not kernel.flops and value in casts:
                size = kernels[made[value]].reads[casts[value]]
                value = casts[value]
            fused[number].reads[value] = size
    wanted = {value for kernel in fused.values() for value in kernel.reads}
    inner = {value for kernel in kernels for value in kernel.reads} - wanted
    for number, kernel in zip(group, kernels, strict=True):
        kept = {v: size for v, size in kernel.writes.items() if kernel.flops or v not in inner}
        fused[number].writes |= kept
    return [kernel for kernel in fused.values() if kernel.writes]


def trace_step(model: Network, batch: int, caption: int) -> Recorder:
    """Record the kernels of one training step of a network on the meta device.

    Args:
        model: The network.
        batch: The number of samples, each with its own caption.
        caption: The average number of tokens per caption. Lengths are spread evenly between half
            and one and a half times the average, up to the context length.
    """
    clip, side = cast(Any, model), models.preprocessing(model).size
    spread = min(caption // 2, model.context_length - caption)
    lengths = torch.linspace(caption - spread, caption + spread, batch).round().long()
    tokens = torch.where(torch.arange(model.context_length) == lengths[:, None] - 1, 2, 1)
    recorder = Recorder()
    for tower, name in ((clip.visual, "image"), (clip.transformer, "text")):
        tower.register_forward_pre_hook(lambda *_, name=name: setattr(recorder, "region", name))
        tower.register_forward_hook(lambda *_: setattr(recorder, "region", ""))
    packed = [x.to("meta") for x in models.pack_texts(tokens)]
    images = torch.empty(batch, 3, side, side, dtype=torch.uint8, device="meta")
    noise = torch.zeros(len(images), NOISE)
    with recorder:
        pixels = augment(images, noise)
        pixels = normalise(pixels, clip.visual.image_mean, clip.visual.image_std)
        with CudaAutocast():
            image, text = models.encode_image(model, pixels), models.encode_packed(model, packed)
        loss = model_loss(model, image, text)
        recorder.region = "backward"
        loss.backward()
    recorder.kernels += update_kernels(model)
    return recorder


def update_kernels(model: nn.Module) -> list[Kernel]:
    """Return the kernels that clip gradients and take a step of fused AdamW."""
    entries = sum(x.numel() for x in model.parameters())
    launches = math.ceil(entries / CHUNK)
    size = 4 * entries // launches
    # tensors read and written; AdamW also divides the gradients, which clips them
    passes = {"norm": (1, 0), "AdamW": (4, 4)}
    return [
        Kernel({(0, 0): reads * size}, {(0, 1): writes * size}, kind="optimiser")
        for reads, writes in passes.values()
        for _ in range(launches)
    ]


@functools.cache
def traced_share(
    name: str,
    batch: int,
    compiled: bool,
    peak: float = PEAK,
    faster: float = 1.0,
    parts: int = 1,
) -> float | None:
    """Return the share of a GPU's peak that a training step is predicted to reach, or None if the
    network cannot be traced.

    Args:
        name: The name of a network, all of which is trained.
        batch: Samples that are encoded at a time, with captions of `CAPTION` tokens on average.
        compiled: Whether the towers are compiled.
        peak: FLOP/s of dense bf16 products of the GPU. Its products are assumed to reach the same
            share of it as an H100's.
        faster: The bandwidth of the GPU, as a multiple of an H100's.
        parts: How many times that many samples are encoded before each step of the optimiser.
    """
    if (recorder := _cached_trace(name, batch)) is None:
        return None
    kernels = fuse(recorder.kernels, recorder.casts) if compiled else recorder.kernels
    rates = PRODUCT_RATE * peak / PEAK, BANDWIDTH * faster
    seconds = sum(
        kernel.seconds_at(*rates) * (1 if kernel.kind == "optimiser" else parts)
        for kernel in kernels
    )
    return parts * sum(kernel.flops for kernel in kernels) / seconds / peak


@functools.lru_cache(maxsize=4)
def _cached_trace(name: str, batch: int) -> Recorder | None:
    model = models.create_on_meta(name)
    parts = {name for name, _ in model.named_children()}
    if not hasattr(model.visual, "transformer") or not {"transformer", "token_embedding"} <= parts:
        return None  # a tower is not open_clip's own transformer
    return trace_step(model, batch, min(CAPTION, model.context_length))
