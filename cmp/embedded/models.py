"""Image towers of the embedded models, registered with timm so that open_clip builds them.

A config reaches one by `vision_cfg.timm_model_name`; nothing downstream knows the difference.
"""

import gzip
from pathlib import Path

import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer, get_pairs
from open_clip.transformer import Transformer
from timm.models import register_model
from torch import Tensor, nn
from torch.nn import functional as F

from cmp.errors import CmpError
from cmp.files import build_folder, project_folder

MODEL_CONFIGS = Path(__file__).resolve().parent / "model_configs"
WEIGHTS = Path(__file__).resolve().parent / "weights"
"""The base that comes with the package; the others lie in `weights` of a checkout."""
SHIPPED = ("annealed", "unannealed")
"""Starts whose bases come with the project."""
NAMES = tuple(sorted(path.stem for path in MODEL_CONFIGS.glob("*.json")))
open_clip.add_model_config(MODEL_CONFIGS)

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


MERGES_FILE = MODEL_CONFIGS / "vocabulary.bpe.gz"


def used_merges(texts: list[str]) -> list[tuple[str, str]]:
    """The merges, in the order of CLIP's list, that encoding `texts` performs."""
    full = SimpleTokenizer()
    words = {
        "".join(full.byte_encoder[byte] for byte in word.encode())
        for text in texts
        for word in full.pat.findall(full.clean_fn(text))
    }
    used = {merge for word in words for merge in _merges_of(word, full.bpe_ranks)}
    return sorted(used, key=full.bpe_ranks.__getitem__)


def _merges_of(word: str, ranks: dict[tuple[str, str], int]) -> list[tuple[str, str]]:
    pieces, merges = [*word[:-1], f"{word[-1]}</w>"], []
    while len(pieces) > 1:
        best = min(get_pairs(tuple(pieces)), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        merges.append(best)
        joined, index = [], 0
        while index < len(pieces):
            pair = tuple(pieces[index : index + 2])
            joined.append("".join(pair) if pair == best else pieces[index])
            index += 2 if pair == best else 1
        pieces = joined
    return merges


def write_vocabulary(texts: list[str], path: Path = MERGES_FILE) -> int:
    """Write the compact merge list of `texts` in CLIP's format; returns the vocabulary's size."""
    lines = ["# the merges of CLIP's vocabulary that the embedded benchmark uses"]
    lines += [" ".join(merge) for merge in used_merges(texts)]
    path.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
    return 2 * 256 + len(lines) - 1 + 2


def tokenizer(name: str) -> SimpleTokenizer:
    """The tokenizer of a model, CLIP's with the compact vocabulary."""
    length = open_clip.get_model_config(name)["text_cfg"]["context_length"]
    return SimpleTokenizer(bpe_path=str(MERGES_FILE), context_length=length)


def base_folders(start: str) -> list[Path]:
    """Where bases of a start may be: in the package, in the project, where `cmpt pretrain` puts
    them."""
    made = build_folder() / "models"
    return [WEIGHTS, project_folder() / "weights", made] if start in SHIPPED else [made]


def base_path(name: str, start: str, seed: int) -> Path:
    """Where a base's weights are, such as `tiny-s0-annealed.safetensors`, or would be."""
    file = f"{name}-s{seed}-{start}.safetensors"
    paths = [folder / file for folder in base_folders(start)]
    return next((path for path in paths if path.exists()), paths[-1])


def base_seeds(name: str) -> list[int]:
    """The seeds of the annealed bases that are here."""
    folders = base_folders("annealed")
    paths = [path for folder in folders for path in folder.glob(f"{name}-s*-annealed.safetensors")]
    return sorted({int(path.name.removeprefix(f"{name}-s").split("-")[0]) for path in paths})


def find_base(name: str, start: str, seed: int) -> Path:
    """The file of a base; `CmpError` names the bases that are here and how to make one."""
    path = base_path(name, start, seed)
    if path.exists():
        return path
    bases = ", ".join(map(str, base_seeds(name))) or "none"
    family = "" if start in SHIPPED else f" schedule.name={start}"
    raise CmpError(
        f"seeds.init: no {start} base {seed} of {name!r} in {project_folder() / 'weights'} (bases "
        f"that are here: {bases}); `cmpt pretrain {name}{family} --seed {seed}` makes one"
    )
