"""Stored RGBA images as network input, in batches on the device: augmented, or plain."""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

ROTATION = 0.3  # radians, either way
SCALE = (0.75, 1.25)
SHIFT = 0.15  # of half the image's side, either way
BRIGHTNESS, CONTRAST, SATURATION = 0.08, (0.85, 1.15), (0.3, 1.4)
TINTED, TINT = 0.6, 0.35  # share of tinted backgrounds, and how dark they may be


def plain(images: Tensor) -> Tensor:
    """uint8 RGBA [B, 4, H, W] over white, or RGB [B, 3, H, W] -> RGB in [0, 1], [B, 3, H, W]."""
    x = images.float() / 255
    if x.shape[1] == 3:
        return x
    return x[:, :3] * x[:, 3:] + 1 - x[:, 3:]


def augmented(
    images: Tensor, generator: torch.Generator, of: tuple[int, int] | None = None
) -> Tensor:
    """uint8 RGBA [B, 4, H, W] -> RGB in [0, 1]: one affine map, a background, contrast,
    brightness and saturation.

    All randomness comes from `generator` (CPU), so a batch is a function of its state. RGB images
    [B, 3, H, W] are random parts of photographs already, and stay as they are. of: (number of the
    first, number in all), where these are some of a batch; they look as they do in it.
    """
    if images.shape[1] == 3:
        return plain(images)
    first, count = of or (0, len(images))
    here = slice(first, first + len(images))

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        noise = torch.rand(count, *shape, generator=generator)[here]
        return (low + (high - low) * noise).to(images.device, non_blocking=True)

    angle, scale = uniform(-ROTATION, ROTATION), uniform(*SCALE)
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    right, down = uniform(-SHIFT, SHIFT), uniform(-SHIFT, SHIFT)
    rows = [torch.stack([cosine, -sine, right], 1), torch.stack([sine, cosine, down], 1)]
    grid = affine_grid(torch.stack(rows, 1), *images.shape[2:])
    x = images.float()
    x[:, :3] *= x[:, 3:] / 255  # premultiplied
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    tinted = uniform(0, 1, 1, 1) < TINTED
    background = 1 - TINT * uniform(0, 1, 3, 1) * tinted
    contrast, brightness = uniform(*CONTRAST, 1, 1), uniform(-BRIGHTNESS, BRIGHTNESS, 1, 1)
    mix, offset = colours(background, contrast, brightness, uniform(*SATURATION, 1, 1))
    return torch.baddbmm(offset, mix, x.flatten(2)).clamp_(0, 1).view_as(x[:, :3])


def colours(
    background: Tensor, contrast: Tensor, brightness: Tensor, saturation: Tensor
) -> tuple[Tensor, Tensor]:
    """All that happens to a pixel's colour as one affine map from premultiplied RGBA in [0, 255]
    to RGB: matrix [B, 3, 4] and offset [B, 3, 1]. background: [B, 3, 1], the others [B, 1, 1].

    In that order: what is transparent shows the background, times contrast, plus brightness, and
    saturation moves each channel away from their mean. A map of the pixels for each of these takes
    four times as long.
    """
    own = torch.eye(3, device=background.device)
    mix = saturation * own + (1 - saturation) / 3  # grey + saturation * (x - grey)
    over = torch.cat([own.expand(len(background), 3, 3), -background], 2) / 255
    return mix @ (contrast * over), mix @ (contrast * background + brightness)


def affine_grid(maps: Tensor, height: int, width: int) -> Tensor:
    """Where each pixel of the output looks in the input: maps [B, 2, 3] -> [B, height, width, 2].

    `F.affine_grid` without aligned corners, as one product: fourteen times as fast on a CPU.
    """
    y, x = ((2 * torch.arange(size, device=maps.device) + 1) / size - 1 for size in (height, width))
    ones = torch.ones(height, width, device=maps.device)
    places = torch.stack([x.expand(height, width), y[:, None].expand(height, width), ones], -1)
    grid = places.view(-1, 3) @ maps.reshape(-1, 3).T  # [height * width, B * 2]
    return grid.view(height, width, -1, 2).permute(2, 0, 1, 3)


def normalise(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(x - mean) / std by channel, [B, 3, H, W]."""
    mean, std = (_channels(tuple(values), x.device, x.dtype) for values in (mean, std))
    return (x - mean).div_(std)


@functools.lru_cache
def _channels(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Kept, since a copy of a list to a GPU waits for it."""
    return torch.tensor(values, device=device, dtype=dtype).view(1, -1, 1, 1)
