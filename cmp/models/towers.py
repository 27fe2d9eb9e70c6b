"""Image towers of the embedded models, registered with timm so that open_clip builds them.

A config reaches one by `vision_cfg.timm_model_name`; nothing downstream knows the difference.
"""

import torch
from open_clip.transformer import Transformer
from timm.models import register_model
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS_IN_GROUP = 16


def group_norm(width: int) -> nn.GroupNorm:
    """A norm over groups of 16 channels and all positions.

    It has no running statistics, so weights can be averaged without spoiling any. In bf16 and
    channels_last a CPU takes seven times as long for groups of 8, twelve times for groups of 4.
    """
    return nn.GroupNorm(width // CHANNELS_IN_GROUP, width)


class ResidualBlock(nn.Module):
    """Pre-activation block: (GroupNorm, SiLU, 3x3 convolution) twice, added to the input."""

    def __init__(self, width: int):
        super().__init__()
        self.norm_1 = group_norm(width)
        self.conv_1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm_2 = group_norm(width)
        self.conv_2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # [B, width, H, W] -> same
        y = self.conv_1(F.silu(self.norm_1(x)))
        return x + self.conv_2(F.silu(self.norm_2(y)))


class ConvTower(nn.Module):
    """A small residual network: a strided stem, stages at 1/4 and 1/8 of the image, mean and max
    pooling.

    A stage at 1/2 as well gave the same zero-shot scores for a quarter more time a step (measured
    with norms over fewer channels, which cost more at that size).
    """

    def __init__(self, stem: int, widths: tuple[int, ...], depth: int):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, stem, 3, stride=2, padding=1), group_norm(stem), nn.SiLU()
        )
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(before, width, 2, stride=2),
                    *(ResidualBlock(width) for _ in range(depth)),
                )
                for before, width in zip((stem, *widths), widths, strict=False)
            )
        )
        self.num_features = 2 * widths[-1]
        self.norm = nn.LayerNorm(self.num_features)
        self.default_cfg = {}

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """timm's interface; the tower has no classifier."""

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, num_features]
        x = self.stages(self.stem(x.contiguous(memory_format=torch.channels_last)))
        return self.norm(torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1))


class StemTransformer(nn.Module):
    """A vision transformer that sees the image through three strided convolutions.

    The stem replaces the linear patch embedding: at this scale of data a transformer on raw patches
    learns far slower. Blocks are open_clip's, tokens are mean pooled.
    """

    def __init__(self, width: int, layers: int, heads: int, image_size: int = 32):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width // 4, 3, stride=2, padding=1),
            group_norm(width // 4),
            nn.GELU(),
            nn.Conv2d(width // 4, width // 2, 3, stride=2, padding=1),
            group_norm(width // 2),
            nn.GELU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
        )
        tokens = (image_size // 8) ** 2
        self.positional_embedding = nn.Parameter(torch.randn(tokens, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = nn.LayerNorm(width)
        self.num_features = width
        self.default_cfg = {}

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """timm's interface; the tower has no classifier."""

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, width]
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        x = x.flatten(2).transpose(1, 2)  # [B, tokens, width]
        x = self.transformer(self.ln_pre(x + self.positional_embedding))
        return self.ln_post(x.mean(dim=1))


@register_model
def cmp_conv_half(pretrained: bool = False, **_) -> ConvTower:
    """Half of the default tower's FLOPs."""
    return ConvTower(stem=16, widths=(48, 80), depth=1)


@register_model
def cmp_conv_tiny(pretrained: bool = False, **_) -> ConvTower:
    """The default tower: 0.4 M parameters."""
    return ConvTower(stem=32, widths=(64, 128), depth=1)


@register_model
def cmp_conv_double(pretrained: bool = False, **_) -> ConvTower:
    """Twice the default tower's FLOPs."""
    return ConvTower(stem=48, widths=(112, 128), depth=1)


@register_model
def cmp_conv_quad(pretrained: bool = False, **_) -> ConvTower:
    """Four times the default tower's FLOPs."""
    return ConvTower(stem=64, widths=(112, 144), depth=2)


@register_model
def cmp_vit_tiny(pretrained: bool = False, **_) -> StemTransformer:
    """The attention sibling of `cmp_conv_tiny`: 0.9 M parameters."""
    return StemTransformer(width=128, layers=4, heads=4)
