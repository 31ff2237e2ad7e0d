"""From uint8 batches to what the networks see: augmentation, batched, on the device that trains.

    fine-tuning    flip, pad + crop, normalise, random erasing             `FineTuneTransform`
    PersonViT      2 global and L local crops, colour, blur, solarise      `MultiCrop`

Every parameter is drawn per sample, on the CPU, from a generator set by (seed, step); the pixels
are changed by tensor operations that are the same on CPU and GPU. So augmentation costs no worker
processes, a run that resumes at step n draws what the uninterrupted run drew, and 8 processes draw
what one would. Read `Draws`, then `MultiCrop`.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# ---------------------------------------------------------------------------------------------
# Random numbers, and the transform of fine-tuning
# ---------------------------------------------------------------------------------------------


def step_generator(*key: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator set by the key alone, e.g. (seed, step): resuming needs no stored state."""
    state = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(state)


class Draws:
    """Random numbers for B samples of one step, the same on every device and number of processes.

    Numbers are drawn on the CPU for the global batch of `world` processes; `rank` keeps its own.
    """

    def __init__(self, B: int, seed: int, step: int, rank: int = 0, world: int = 1):
        self.generator, self.n = step_generator(seed, step), B * world
        self.mine = slice(rank * B, (rank + 1) * B)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """(B, *shape) from U(low, high)."""
        u = torch.rand((self.n, *shape), generator=self.generator)[self.mine]
        return low + (high - low) * u

    def chance(self, p: float) -> Tensor:
        """(B,) booleans, True with probability p."""
        return self.uniform(0, 1) < p

    def rectangles(self, H: int, W: int, area: tuple[float, float], aspect: tuple[float, float],
                   whole: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """top, left, height, width (B,) and whether one was found (B,); area as a share of H W.

        aspect = height / width, log-uniform. A rectangle that does not fit is drawn again, ten
        times; `whole` allows sides as long as the image's.
        """
        areas = self.uniform(*area, 10) * H * W
        aspects = self.uniform(math.log(aspect[0]), math.log(aspect[1]), 10).exp()
        h, w = (areas * aspects).sqrt().round(), (areas / aspects).sqrt().round()    # (B, 10)
        fits = (h < H + whole) & (w < W + whole) & (h > 0) & (w > 0)
        first = fits.int().argmax(1, keepdim=True)
        h, w = h.gather(1, first)[:, 0], w.gather(1, first)[:, 0]
        top, left = self.uniform(0, 1, 2).unbind(1)
        return (top * (H - h + 1)).floor(), (left * (W - w + 1)).floor(), h, w, fits.any(1)


@functools.lru_cache
def per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(3, 1, 1), made once per device: a copy from Python to a GPU in every step would stall it."""
    return torch.tensor(values, device=device).view(3, 1, 1)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 of about zero mean and unit variance."""
    mean, std = (per_channel(tuple(v), images.device) for v in (mean, std))
    return (images.float() / 255 - mean) / std


class FineTuneTransform:
    """Flip, pad + random crop, normalise, random erasing: uint8 -> float32, both (B, 3, H, W).

    In the order of the reference pipeline (PersonViT's fine-tuning; images come resized):
    flip with probability 0.5; pad 10 black pixels, crop back at a random place; normalise; with
    probability 0.5 erase a rectangle of 2 % to `erase_area` of the image, of aspect 0.3 to 1/0.3
    (timm's defaults [from memory]). noise: fill with normal noise per pixel [PersonViT code], else
    with the mean colour, which is 0 after normalisation [ours].
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], erase_area: float = 1 / 3,
                 noise: bool = True, pad: int = 10, rank: int = 0, world: int = 1):
        self.mean, self.std, self.pad = mean, std, pad
        self.erase_area, self.noise = erase_area, noise
        self.rank, self.world = rank, world

    def __call__(self, images: Tensor, seed: int, step: int) -> Tensor:
        B, _, H, W = images.shape
        draws, device = Draws(B, seed, step, self.rank, self.world), images.device
        flip, (top, left) = draws.chance(0.5), draws.uniform(0, 2 * self.pad + 1, 2).long().T
        images = normalize(self.flip_and_crop(images, flip, top, left), self.mean, self.std)
        erased = self.erase_mask(draws, H, W).to(device, non_blocking=True)
        if not self.noise:
            return images.masked_fill(erased, 0)
        noise = torch.randn((draws.n, 3, H, W), device=device,
                            generator=step_generator(seed, step, 1, device=device))
        return torch.where(erased, noise[draws.mine], images)

    def flip_and_crop(self, images: Tensor, flip: Tensor, top: Tensor, left: Tensor) -> Tensor:
        B, _, H, W = images.shape
        flip, top, left = (t.to(images.device, non_blocking=True) for t in (flip, top, left))
        images = F.pad(images, [self.pad] * 4)                               # (B, 3, H+20, W+20)
        rows = top[:, None] + torch.arange(H, device=images.device)          # (B, H)
        columns = left[:, None] + torch.arange(W, device=images.device)      # (B, W)
        last = images.shape[-1] - 1
        columns = torch.where(flip[:, None], last - columns, columns)        # flip first, then crop
        sample = torch.arange(B, device=images.device)[:, None, None]
        images = images[sample, :, rows[:, :, None], columns[:, None, :]]    # (B, H, W, 3)
        return images.permute(0, 3, 1, 2)

    def erase_mask(self, draws: Draws, H: int, W: int) -> Tensor:
        """(B, 1, H, W), True inside the rectangle of each sample that is erased."""
        area, aspect = (0.02, self.erase_area), (0.3, 1 / 0.3)
        top, left, h, w, found = (t[:, None] for t in draws.rectangles(H, W, area, aspect, False))
        erase = draws.chance(0.5)[:, None] & found
        y, x = torch.arange(H), torch.arange(W)
        rows = (y >= top) & (y < top + h) & erase                            # (B, H)
        columns = (x >= left) & (x < left + w)                               # (B, W)
        return (rows[:, :, None] & columns[:, None, :])[:, None]


# ---------------------------------------------------------------------------------------------
# Views for pre-training: random resized crops, colour, blur; every parameter drawn per sample
# ---------------------------------------------------------------------------------------------


def resize_matrix(start: Tensor, length: Tensor, n: int, out: int,
                  flip: Tensor | None = None) -> Tensor:
    """Bicubic, antialiased resampling of [start, start + length) of n pixels to `out`, as matrices.

    start, length (B,) -> (B, out, n), rows summing to 1; flip (B,) reverses the result. A resize is
    linear and separable: rows @ image @ columns^T crops, resizes and flips a whole batch at once.
    Source: Pillow's rule (support grows with the scale, nothing outside the crop is seen).
    """
    start, length = start[:, None, None], length[:, None, None]
    scale = length / out
    wide = scale.clamp(min=1)                                                # shrinking: antialias
    centre = start + (torch.arange(out, device=start.device)[None, :, None] + 0.5) * scale
    pixel = torch.arange(n, device=start.device)[None, None, :] + 0.5
    x = ((pixel - centre) / wide).abs()                                      # (B, out, n)
    # Keys' cubic with a = -0.5, the sharpest that reproduces straight lines
    weight = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)
    weight = weight * ((x < 2) & (pixel > start) & (pixel < start + length))
    weight = weight / weight.sum(2, keepdim=True)
    return weight if flip is None else torch.where(flip[:, None, None], weight.flip(1), weight)


def blur_matrix(sigma: Tensor, n: int, radius: int = 6) -> Tensor:
    """Gaussian blur along n pixels, mirrored at the ends: sigma (B,) in pixels -> (B, n, n)."""
    offset = torch.arange(-radius, radius + 1, device=sigma.device)
    weight = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)                # (B, 2 radius + 1)
    weight = weight / weight.sum(1, keepdim=True)
    source = torch.arange(n, device=sigma.device)[:, None] + offset          # (n, 2 radius + 1)
    source = (n - 1 - (n - 1 - source.abs()).abs()).clamp(0, n - 1)
    matrix = torch.zeros(len(sigma), n, n, device=sigma.device)
    return matrix.scatter_add_(2, source.expand(len(sigma), -1, -1),
                               weight[:, None, :].expand(-1, n, -1).contiguous())


LUMA = (0.299, 0.587, 0.114)  # of ITU-R 601, as Pillow and torchvision have it


def grey(images: Tensor) -> Tensor:
    """(B, 3, h, w) -> (B, 1, h, w)."""
    return (images * per_channel(LUMA, images.device)).sum(1, keepdim=True)


def shift_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Rotate the hue of RGB in [0, 1] by `turn` (B, 1, 1, 1) of the colour circle, through HSV."""
    high, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = high - low
    r, g, b = images.split(1, dim=1)
    safe = torch.where(chroma == 0, 1, chroma)
    hue = torch.where(high == r, (g - b) / safe, torch.where(high == g, 2 + (b - r) / safe,
                                                             4 + (r - g) / safe))  # in sixths
    hue = hue + 6 * turn
    sixth = (hue + per_channel((5.0, 3.0, 1.0), images.device)) % 6
    return high - chroma * torch.minimum(sixth, 4 - sixth).clamp(0, 1)       # (B, 3, h, w)


def colour_jitter(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor,
                  hue: Tensor, order: Sequence[int]) -> Tensor:
    """Each (B, 1, 1, 1); 1, 1, 1, 0 changes nothing. Images in [0, 1], `order` of the four."""
    def blend(other, factor):
        return (other + factor * (images - other)).clamp(0, 1)

    for which in order:
        if which == 0:
            images = blend(0, brightness)
        elif which == 1:
            images = blend(grey(images).mean((2, 3), keepdim=True), contrast)
        elif which == 2:
            images = blend(grey(images), saturation)
        else:
            images = shift_hue(images, hue)
    return images


class MultiCrop:
    """Two global and L local views for self-distillation: uint8 (B, 3, H, W) -> dict of float32.

    "globals" (2, B, 3, *size) and "locals" (L, B, 3, size / 2). Each view: random resized crop
    (scales are shares of the image's area, aspects width / height), flip 0.5, colour jitter
    (0.4, 0.4, 0.2, 0.1) with probability 0.8, greyscale 0.2, Gaussian blur of radius U(0.1, 2) with
    probability 1, 0.1, 0.5 (first global, second, local), solarisation 0.2 on the second global,
    ImageNet statistics [iBOT, DINO]. Scales and aspects: see `PersonViTRecipe`. Ours: images come
    resized to `size`, where iBOT crops the original file; a crop that fits nowhere is the whole
    image; the order of the colour changes is drawn per step and kind of view, not per image.
    """

    def __init__(self, size: tuple[int, int] = (256, 128), num_local: int = 8,
                 global_scale: tuple[float, float] = (0.4, 1.0),
                 local_scale: tuple[float, float] = (0.05, 0.8),
                 aspect: tuple[float, float] = (0.375, 0.667), rank: int = 0, world: int = 1):
        self.size, self.local_size, self.num_local = size, (size[0] // 2, size[1] // 2), num_local
        self.global_scale, self.local_scale, self.aspect = global_scale, local_scale, aspect
        self.rank, self.world = rank, world

    def __call__(self, images: Tensor, seed: int, step: int) -> dict[str, Tensor]:
        x, (B, _, H, W) = images.float() / 255, images.shape
        draws = Draws(B, seed, step, self.rank, self.world)
        first = self.draw(draws, H, W, self.global_scale, blur=1.0, solarize=0.0)
        second = self.draw(draws, H, W, self.global_scale, blur=0.1, solarize=0.2)
        views = self.render(x.repeat(2, 1, 1, 1), torch.cat([first, second]), self.size, draws)
        views = {"globals": views.unflatten(0, (2, B)), "locals": x.new_zeros(0, *x.shape)}
        if self.num_local:
            local = torch.cat([self.draw(draws, H, W, self.local_scale, blur=0.5, solarize=0.0)
                               for _ in range(self.num_local)])
            local = self.render(x.repeat(self.num_local, 1, 1, 1), local, self.local_size, draws)
            views["locals"] = local.unflatten(0, (self.num_local, B))
        return views

    def draw(self, draws: Draws, H: int, W: int, scale: tuple[float, float], blur: float,
             solarize: float) -> Tensor:
        """All numbers of one view of each image, (B, 12), in the order `render` takes them."""
        aspect = (1 / self.aspect[1], 1 / self.aspect[0])                    # height / width
        top, left, h, w, found = draws.rectangles(H, W, scale, aspect, whole=True)
        h, w = torch.where(found, h, H), torch.where(found, w, W)
        flip, jitter, colourless, blurred, inverted = (
            draws.chance(p) for p in (0.5, 0.8, 0.2, blur, solarize))
        change = draws.uniform(-1, 1, 4) * torch.tensor([0.4, 0.4, 0.2, 0.1]) * jitter[:, None]
        sigma = torch.where(blurred, draws.uniform(0.1, 2), 0.01)            # 0.01 blurs nothing
        numbers = (top * found, left * found, h, w, flip, colourless, inverted, sigma, *change.T)
        return torch.stack([n.float() for n in numbers], dim=1)

    def render(self, x: Tensor, numbers: Tensor, size: tuple[int, int], draws: Draws) -> Tensor:
        """Images (n, 3, H, W) in [0, 1] and their numbers (n, 12) -> normalised (n, 3, *size)."""
        H, W = x.shape[2:]
        order = torch.randperm(4, generator=draws.generator).tolist()
        numbers = numbers.to(x.device, non_blocking=True)
        top, left, h, w, flip, colourless, inverted, sigma = numbers[:, :8].unbind(1)   # (n,) each
        rows = resize_matrix(top, h, H, size[0])                             # (n, size[0], H)
        columns = resize_matrix(left, w, W, size[1], flip > 0)               # (n, size[1], W)
        x = (rows[:, None] @ x @ columns[:, None].mT).clamp(0, 1)            # (n, 3, *size)
        change = numbers[:, 8:].T[..., None, None, None]                     # (4, n, 1, 1, 1)
        x = colour_jitter(x, 1 + change[0], 1 + change[1], 1 + change[2], change[3], order)
        x = torch.where(colourless.view(-1, 1, 1, 1) > 0, grey(x), x)
        x = blur_matrix(sigma, size[0])[:, None] @ x @ blur_matrix(sigma, size[1])[:, None].mT
        x = torch.where((inverted.view(-1, 1, 1, 1) > 0) & (x >= 0.5), 1 - x, x)
        return (x - per_channel(IMAGENET_MEAN, x.device)) / per_channel(IMAGENET_STD, x.device)
