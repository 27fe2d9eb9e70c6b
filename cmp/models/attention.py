"""Attention with separate projections, in place of open_clip's fused one, and the way back."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmp.errors import CmpError

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


def is_split(weights: dict[str, Tensor], fused: nn.Module) -> bool:
    """Whether tensors are named as those of this network after `split_attention`."""
    names = [name for name, x in fused.named_modules() if isinstance(x, nn.MultiheadAttention)]
    return any(f"{name}.{PROJECTIONS[0]}.weight" in weights for name in names)
