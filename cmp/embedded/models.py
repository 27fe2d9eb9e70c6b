"""The embedded models: image towers, vocabulary, and where pretrained weights are.

The towers are registered with timm, so that open_clip builds them from `model_configs`, by
`vision_cfg.timm_model_name`; nothing downstream knows the difference.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import Transformer
from safetensors.torch import load_file
from timm.models import register_model
from torch import Tensor, nn
from torch.nn import functional as F

from cmp.data import IMAGE_SIZE
from cmp.errors import CmpError
from cmp.files import check_digest
from cmp.project import build_folder, project_folder

MODEL_CONFIGS = Path(__file__).resolve().parent / "model_configs"
WEIGHTS = Path(__file__).resolve().parent / "weights"
"""The base that comes with the package; others are in `weights` of a checkout."""
MERGES_FILE = MODEL_CONFIGS / "vocabulary.bpe.gz"
"""The merges of CLIP's vocabulary that the benchmark uses; `tests/test_models.py` makes them."""
SHIPPED = ("annealed", "unannealed")
"""Starts whose bases come with the project."""
NAMES = tuple(sorted(path.stem for path in MODEL_CONFIGS.glob("*.json")))
"""The embedded models."""
GROUP_CHANNELS = 16
SCALE_SUFFIX = ".scale"
LARGEST_INT8 = 127

open_clip.add_model_config(MODEL_CONFIGS)


def group_norm(width: int) -> nn.GroupNorm:
    """Return a norm over groups of 16 channels and all positions.

    It has no running statistics, so weights can be averaged. In bf16 and channels_last a CPU takes
    seven times as long for groups of 8, and twelve times for groups of 4.

    Args:
        width: Number of channels.
    """
    return nn.GroupNorm(width // GROUP_CHANNELS, width)


class Tower(nn.Module):
    """What timm's interface asks of an image tower: maps [B, 3, H, W] to [B, num_features].

    Attributes:
        num_features: Size of the output.
        default_cfg: timm's description of pretrained weights, empty.
    """

    num_features: int
    default_cfg: ClassVar[dict] = {}

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Do nothing, as the tower has no classifier.

        Args:
            num_classes: Not used.
            global_pool: Not used.
        """


class ResidualBlock(nn.Module):
    """(GroupNorm, SiLU, 3x3 convolution) twice, added to the input.

    Args:
        width: Number of channels.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm_1 = group_norm(width)
        self.conv_1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm_2 = group_norm(width)
        self.conv_2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # [B, width, H, W] -> same
        y = self.conv_1(F.silu(self.norm_1(x)))
        return x + self.conv_2(F.silu(self.norm_2(y)))


class ConvTower(Tower):
    """A small residual network: a strided stem, stages at 1/4 and 1/8, mean and max pooling.

    A stage at 1/2 as well gave the same zero-shot scores for a quarter more time per step, measured
    with norms over fewer channels, which cost more at that size.

    Args:
        stem: Channels of the stem.
        widths: Channels of each stage.
        depth: Residual blocks per stage.
    """

    def __init__(self, stem: int, widths: tuple[int, ...], depth: int):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, stem, 3, stride=2, padding=1), group_norm(stem), nn.SiLU()
        )
        self.stages = nn.Sequential()
        for before, width in itertools.pairwise((stem, *widths)):
            stage = nn.Sequential(nn.Conv2d(before, width, 2, stride=2))
            self.stages.append(stage.extend(ResidualBlock(width) for _ in range(depth)))
        self.num_features = 2 * widths[-1]
        self.norm = nn.LayerNorm(self.num_features)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, num_features]
        x = self.stages(self.stem(x.contiguous(memory_format=torch.channels_last)))
        return self.norm(torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1))


class StemTransformer(Tower):
    """A vision transformer that sees the image through three strided convolutions.

    The stem replaces the linear patch embedding: with so few data a transformer on raw patches
    learns far slower. Blocks are open_clip's, tokens are mean pooled.

    Args:
        width: Size of a token.
        layers: Number of blocks.
        heads: Attention heads per block.
    """

    def __init__(self, width: int, layers: int, heads: int):
        super().__init__()
        stem: list[nn.Module] = []
        for before, after in itertools.pairwise((3, width // 4, width // 2, width)):
            stem += [nn.Conv2d(before, after, 3, stride=2, padding=1), group_norm(after), nn.GELU()]
        self.stem = nn.Sequential(*stem[:-2])  # what follows has a norm of its own
        tokens = (IMAGE_SIZE // 8) ** 2
        self.positional_embedding = nn.Parameter(torch.randn(tokens, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = nn.LayerNorm(width)
        self.num_features = width

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, width]
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        x = x.flatten(2).transpose(1, 2)  # [B, tokens, width]
        x = self.transformer(self.ln_pre(x + self.positional_embedding))
        return self.ln_post(x.mean(dim=1))


def _register_tower(name: str, make: Callable[[], Tower]) -> None:
    """Have timm make a tower when it is asked for its name."""

    def create(pretrained: bool = False, **_: Any) -> Tower:
        return make()

    create.__name__ = name
    register_model(create)


_register_tower("cmp_conv_small", lambda: ConvTower(16, (64, 64), 1))  # the default
_register_tower("cmp_conv_tiny", lambda: ConvTower(32, (64, 128), 1))  # the first edition's
_register_tower("cmp_conv_half", lambda: ConvTower(16, (48, 80), 1))  # half of its FLOPs
_register_tower("cmp_conv_double", lambda: ConvTower(48, (112, 128), 1))  # twice
_register_tower("cmp_conv_quad", lambda: ConvTower(64, (112, 144), 2))  # four times
_register_tower("cmp_vit_tiny", lambda: StemTransformer(128, 4, 4))  # with attention


def tokenizer(name: str) -> SimpleTokenizer:
    """Return the tokenizer of an embedded model: CLIP's with the compact vocabulary.

    Args:
        name: The model.
    """
    length = open_clip.get_model_config(name)["text_cfg"]["context_length"]
    return SimpleTokenizer(bpe_path=str(MERGES_FILE), context_length=length)


def base_folders(start: str) -> list[Path]:
    """Return where bases may be: in the package, in the project, where `cmpt pretrain` puts them.

    Args:
        start: The bases' start, such as "annealed".
    """
    made = build_folder() / "models"
    return [WEIGHTS, project_folder() / "weights", made] if start in SHIPPED else [made]


def base_path(name: str, start: str, seed: int) -> Path:
    """Return where a base's weights are, or would be.

    Args:
        name: The model.
        start: The base's start, such as "annealed".
        seed: Seed of its pretraining.

    Returns:
        A path such as `tiny-s0-annealed.safetensors` in one of `base_folders`.
    """
    paths = [folder / f"{name}-s{seed}-{start}.safetensors" for folder in base_folders(start)]
    return next((path for path in paths if path.exists()), paths[-1])


def base_seeds(name: str) -> list[int]:
    """Return the seeds of the annealed bases of a model that are on this machine.

    Args:
        name: The model.
    """
    folders, pattern = base_folders("annealed"), f"{name}-s*-annealed.safetensors"
    names = {path.name for folder in folders for path in folder.glob(pattern)}
    return sorted(int(file.removeprefix(f"{name}-s").split("-")[0]) for file in names)


def find_base(name: str, start: str, seed: int) -> Path:
    """Return the file of a base.

    Args:
        name: The model.
        start: The base's start, such as "annealed".
        seed: Seed of its pretraining.

    Raises:
        CmpError: If it is damaged, or not there; says which bases are, and how to make it.
    """
    path = base_path(name, start, seed)
    if path.exists():
        return check_base(path)
    bases = ", ".join(map(str, base_seeds(name))) or "none"
    family = "" if start in SHIPPED else f" schedule.name={start}"
    raise CmpError(
        f"seeds.init: no {start} base {seed} of {name!r} in {project_folder() / 'weights'} (bases "
        f"that are here: {bases}); `cmpt pretrain {name}{family} --seed {seed}` makes one"
    )


def check_base(path: Path) -> Path:
    """Return the file of a base; raise `CmpError` unless it is as it was written."""
    check_digest(path, "get it from the project again, or make it by `cmpt pretrain`")
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a base by name, in fp32, those stored in 8 bits too."""
    return dequantize(load_file(path))


def quantize(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights in 8 bits.

    An entry is off by at most half a scale, that is, by 1/254 of its row's largest entry.

    Args:
        weights: Tensors by name.

    Returns:
        Matrices and kernels as int8 [rows, ...] with `NAME.scale` [rows]; all else in fp16.
    """
    quantized: dict[str, Tensor] = {}
    for name, x in weights.items():
        if x.dim() < 2:
            quantized[name] = x.half()
            continue
        rows = x.flatten(1).float()
        scale = rows.abs().amax(dim=1) / LARGEST_INT8
        scale = scale.where(scale > 0, torch.ones_like(scale))
        quantized[name] = (rows / scale[:, None]).round().to(torch.int8).view_as(x)
        quantized[name + SCALE_SUFFIX] = scale
    return quantized


def dequantize(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the fp32 weights that `quantize` was given, up to rounding; any others in fp32."""
    restored = {}
    for name, x in weights.items():
        if name + SCALE_SUFFIX in weights:
            scale = weights[name + SCALE_SUFFIX]
            restored[name] = (x.flatten(1).float() * scale[:, None]).view_as(x)
        elif not name.endswith(SCALE_SUFFIX):
            restored[name] = x.float()
    return restored
