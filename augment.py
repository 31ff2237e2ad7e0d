"""From uint8 batches to what the networks see: augmentation, batched, on the device that trains.

    fine-tuning    flip, pad + crop, normalise, random erasing             `FineTuneTransform`
    PersonViT      2 global and L local crops, colour, blur, solarise      `MultiCrop`
    UP-ReID        2 views of the image and of its stripes, erasing        `ContrastViews`

Every parameter (but the order of colour changes) is drawn per sample, on the CPU, from a generator
set by (seed, step); the pixels are changed by tensor operations that are the same on CPU and GPU,
but for the noise that fills an erased rectangle, which each device draws itself. So augmentation
costs no worker processes, a run that resumes at step n draws what the uninterrupted run drew, and 8
processes draw what one would. Read `Draws`, then `MultiCrop`.

Exercises (answers: README). 1. How much of a person does random erasing hide on average, in
fine-tuning and in UP-ReID's views? 2. Take the colour changes out of `MultiCrop.draw` (chances 0.8,
0.2 and `solarize` become 0): PersonViT's `information` rises manyfold. What has it learnt?
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LUP_MEAN, LUP_STD = (0.3525, 0.3106, 0.3140), (0.2660, 0.2522, 0.2505)  # of LUPerson [LUP]

# ---------------------------------------------------------------------------------------------
# Random numbers, and the transform of fine-tuning
# ---------------------------------------------------------------------------------------------


def step_generator(*key: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator set by the key alone: resuming needs no stored state. Keys in use, so that none
    shares another's numbers: (seed, step) views; (seed, step, 1) noise of erasing; (seed, step, 2,
    image) masks; (seed, step, 3, process) stochastic depth."""
    state = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(state)


class Draws:
    """Random numbers for B samples of one step, the same on every device, for any number of
    processes.

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
                   whole: bool, log: bool = True) -> tuple[Tensor, Tensor]:
        """(B, 4) top, left, height, width, and whether one was found (B,); area as a share of H W.

        aspect = height / width, log-uniform or uniform. One that does not fit is drawn again, ten
        draws at most; `whole` allows sides as long as the image's.
        """
        areas = self.uniform(*area, 10) * H * W
        aspects = (self.uniform(math.log(aspect[0]), math.log(aspect[1]), 10).exp() if log else
                   self.uniform(*aspect, 10))
        h, w = (areas * aspects).sqrt().round(), (areas / aspects).sqrt().round()    # (B, 10)
        # True is 1: a side may equal the image's if `whole`
        fits = (h < H + whole) & (w < W + whole) & (h > 0) & (w > 0)
        first = fits.int().argmax(1, keepdim=True)
        h, w = h.gather(1, first)[:, 0], w.gather(1, first)[:, 0]
        top, left = self.uniform(0, 1, 2).unbind(1)
        top, left = (top * (H - h + 1)).floor(), (left * (W - w + 1)).floor()
        return torch.stack([top, left, h, w], dim=1), fits.any(1)

    def crops(self, H: int, W: int, area: tuple[float, float],
              aspect: tuple[float, float]) -> Tensor:
        """(B, 4) top, left, height, width of random crops; aspect = width / height, and the whole
        image where no crop fits."""
        boxes, found = self.rectangles(H, W, area, (1 / aspect[1], 1 / aspect[0]), whole=True)
        return torch.where(found[:, None], boxes, torch.tensor([0.0, 0.0, H, W]))

    def erasures(self, H: int, W: int, area: tuple[float, float], log: bool = True) -> Tensor:
        """(B, 4) top, left, height, width to erase, with probability 0.5, else all 0."""
        boxes, found = self.rectangles(H, W, area, (0.3, 1 / 0.3), whole=False, log=log)
        return boxes * (self.chance(0.5) & found)[:, None]


def inside(boxes: Tensor, H: int, W: int) -> Tensor:
    """(n, 4) top, left, height, width -> (n, 1, H, W), True inside the box."""
    top, left, h, w = boxes.T[:, :, None]                                    # (n, 1) each
    y, x = torch.arange(H, device=boxes.device), torch.arange(W, device=boxes.device)
    rows, columns = (y >= top) & (y < top + h), (x >= left) & (x < left + w)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


@functools.lru_cache
def per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(3, 1, 1), made once per device: a copy from Python to a GPU in every step would stall it."""
    return torch.tensor(values, device=device).view(3, 1, 1)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 of about zero mean and unit variance."""
    return standardize(images.float() / 255, mean, std)


def standardize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images in [0, 1] -> about zero mean and unit variance."""
    mean, std = (per_channel(tuple(v), images.device) for v in (mean, std))
    return (images - mean) / std


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
        erased = draws.erasures(H, W, (0.02, self.erase_area)).to(device, non_blocking=True)
        erased = inside(erased, H, W)                                        # (B, 1, H, W)
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
    # Keys' cubic with a = -0.5, the only one of them that reproduces straight lines
    weight = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)
    weight = weight * ((x < 2) & (pixel > start) & (pixel < start + length))
    weight = weight / weight.sum(2, keepdim=True)
    return weight if flip is None else torch.where(flip[:, None, None], weight.flip(1), weight)


def blur_matrix(sigma: Tensor, n: int, reach: int = 6) -> Tensor:
    """Gaussian blur along n pixels, mirrored at the ends: sigma (B,) in pixels -> (B, n, n).
    reach: pixels to either side, 3 times the largest sigma, which is 2 [ours]."""
    offset = torch.arange(-reach, reach + 1, device=sigma.device)
    weight = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)                # (B, 2 reach + 1)
    weight = weight / weight.sum(1, keepdim=True)
    source = torch.arange(n, device=sigma.device)[:, None] + offset          # (n, 2 reach + 1)
    source = (n - 1 - (n - 1 - source.abs()).abs()).clamp(0, n - 1)
    matrix = torch.zeros(len(sigma), n, n, device=sigma.device)
    return matrix.scatter_add_(2, source.expand(len(sigma), -1, -1),
                               weight[:, None, :].expand(-1, n, -1).contiguous())


def crop_resize(x: Tensor, boxes: Tensor, flip: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut out boxes (n, 4), resize, mirror where flip (n,): (n, 3, H, W) -> (n, 3, *size)."""
    (H, W), (top, left, h, w) = x.shape[2:], boxes.unbind(1)
    rows = resize_matrix(top, h, H, size[0])                                 # (n, size[0], H)
    columns = resize_matrix(left, w, W, size[1], flip > 0)                   # (n, size[1], W)
    return (rows[:, None] @ x @ columns[:, None].mT).clamp(0, 1)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of images (n, 3, h, w) by sigma (n,) in pixels."""
    vertical, horizontal = (blur_matrix(sigma, n)[:, None] for n in x.shape[2:])
    return vertical @ x @ horizontal.mT


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
    """Images (B, 3, h, w) in [0, 1]; factors of brightness, contrast and saturation, and a turn of
    the hue circle, (B, 1, 1, 1) each: 1, 1, 1, 0 changes nothing. order: of the four, 0 to 3."""
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
    (0.4, 0.4, 0.2, 0.1) with probability 0.8, greyscale 0.2, Gaussian blur of sigma U(0.1, 2) with
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
        boxes = draws.crops(H, W, scale, self.aspect)
        flip, jitter, colourless, blurred, inverted = (
            draws.chance(p) for p in (0.5, 0.8, 0.2, blur, solarize))
        change = draws.uniform(-1, 1, 4) * torch.tensor([0.4, 0.4, 0.2, 0.1]) * jitter[:, None]
        sigma = torch.where(blurred, draws.uniform(0.1, 2), 0.01)            # 0.01 blurs nothing
        numbers = (*boxes.T, flip, colourless, inverted, sigma, *change.T)
        return torch.stack([n.float() for n in numbers], dim=1)

    def render(self, x: Tensor, numbers: Tensor, size: tuple[int, int], draws: Draws) -> Tensor:
        """Images (n, 3, H, W) in [0, 1] and their numbers (n, 12) -> normalised (n, 3, *size)."""
        order = torch.randperm(4, generator=draws.generator).tolist()
        boxes, others, change = numbers.to(x.device, non_blocking=True).split(4, dim=1)
        flip, colourless, inverted, sigma = others.unbind(1)                 # (n,) each
        x = crop_resize(x, boxes, flip, size)                                # (n, 3, *size)
        change = change.T[..., None, None, None]                             # (4, n, 1, 1, 1)
        x = colour_jitter(x, 1 + change[0], 1 + change[1], 1 + change[2], change[3], order)
        x = torch.where(colourless.view(-1, 1, 1, 1) > 0, grey(x), x)
        x = blur(x, sigma)
        x = torch.where((inverted.view(-1, 1, 1, 1) > 0) & (x >= 0.5), 1 - x, x)
        return standardize(x, IMAGENET_MEAN, IMAGENET_STD)


class ContrastViews:
    """UP-ReID's views: uint8 (B, 3, H, W) -> dict of float32.

    "first", "second" (B, 3, H, W): the image, augmented twice. "original": the image as it is, if
    wanted. "stripes1", "stripes2" (B, M, 3, H / M, W), for M > 0: its M horizontal stripes, each
    augmented twice like an image of its own. Cut first: crops cut later would pair a head with a
    knee [ours U3].

    Augmentation as LUPerson's ori-cj+sre [LUP]: random resized crop of 20 % to all of the area,
    width / height 3/4 to 4/3 (torchvision's default, not adapted to people: those of more than two
    thirds of a 2:1 image never fit, and all are stretched about twofold), greyscale 0.2, blur 0.5
    with sigma U(0.1, 2), flip 0.5, normalisation with LUPerson's statistics, with probability 0.5 a
    rectangle of 2 to 60 % of the area set to the mean colour. No colour jitter: colours of clothes
    tell people apart. Ours: images come resized, where LUPerson crops the file; bicubic
    (torchvision's default is bilinear); a crop that fits nowhere is the whole image; an erasure is
    tried 10 times, not 100.
    """

    def __init__(self, original: bool = True, stripes: int = 4, rank: int = 0, world: int = 1):
        self.original, self.stripes, self.rank, self.world = original, stripes, rank, world

    def __call__(self, images: Tensor, seed: int, step: int) -> dict[str, Tensor]:
        x, draws = images.float() / 255, Draws(len(images), seed, step, self.rank, self.world)
        views = {name: self.augment(x[:, None], draws)[:, 0] for name in ("first", "second")}
        if self.original:
            views["original"] = standardize(x, LUP_MEAN, LUP_STD)
        if self.stripes:
            stripes = x.unflatten(2, (self.stripes, -1)).transpose(1, 2)     # (B, M, 3, H/M, W)
            views |= {name: self.augment(stripes, draws) for name in ("stripes1", "stripes2")}
        return views

    def augment(self, x: Tensor, draws: Draws) -> Tensor:
        """M images or stripes of B people, (B, M, 3, h, w) in [0, 1] -> the same shape."""
        B, M, _, h, w = x.shape
        numbers = torch.stack([self.draw(draws, h, w) for _ in range(M)], dim=1).flatten(0, 1)
        boxes, others, erased = numbers.to(x.device, non_blocking=True).split((4, 3, 4), dim=1)
        flip, colourless, sigma = others.unbind(1)                           # (B M,) each
        x = crop_resize(x.flatten(0, 1), boxes, flip, (h, w))
        x = torch.where(colourless.view(-1, 1, 1, 1) > 0, grey(x), x)
        x = standardize(blur(x, sigma), LUP_MEAN, LUP_STD)
        return x.masked_fill(inside(erased, h, w), 0).unflatten(0, (B, M))

    def draw(self, draws: Draws, h: int, w: int) -> Tensor:
        """All numbers of one augmentation of each person's image, (B, 11), as `augment` reads."""
        boxes = draws.crops(h, w, (0.2, 1.0), (3 / 4, 4 / 3))
        flip, colourless, blurred = (draws.chance(p) for p in (0.5, 0.2, 0.5))
        sigma = torch.where(blurred, draws.uniform(0.1, 2), 0.01)            # 0.01 blurs nothing
        erased = draws.erasures(h, w, (0.02, 0.6), log=False)
        numbers = (*boxes.T, flip, colourless, sigma, *erased.T)
        return torch.stack([n.float() for n in numbers], dim=1)
