"""A ReID set, and what the networks see of it: datasets, images, sampling, views.

A ReID set is three lists of `Record(path, pid, camid)`:

    train     images whose identities (pid, relabelled 0, 1, 2 ...) the network may learn
    query     images of other people; each asks "where else was this person seen?"
    gallery   the images to search; some belong to nobody of interest

An image's name says who and where: 0002_c1s1_000451_03.jpg is identity 2, camera 1, sequence 1,
frame 451, third box of the frame. Two identities of Market-1501's gallery are special: **-1 is
junk** (boxes that overlap a person only partly; dropped when the set is read), **0 is a
distractor** (a false alarm of the detector; kept: it can only lower the score). camid is the
camera's number minus one, never relabelled, because the protocol compares cameras between query and
gallery.

A training's dataset maps a step to its batch, batches[step], so that a run that continues at step n
sees what the uninterrupted one saw, and 8 processes see what one alone would:

    sampler    which images make up the batches of an epoch        depends on (seed, epoch)
    workers    read them (uint8), and sample the parameters of     depends on (seed, step, place
               their views: which crop, which colours ...          in the batch of all processes)
    device     computes the views: crop, colour, blur, erasing     the same code on CPU and GPU

Tags in brackets name sources: [iBOT] and [DINO] their code, [LUP] LUPerson's, [PersonViT code] its
fine-tuning, [BoT] reid-strong-baseline's, [ours] a choice of this project, [from memory] and
[secondary] that the source itself was not read (docs/paper-to-code.md).

Read `Batches`, `PKSampler`, then `MultiCrop`; `load_dataset`, at the end, reads a set from disk.
Your own folders are read by extra/folders.py, image files by extra/files.py.
"""

import argparse
import contextlib
import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from extra import files, folders, workers
from extra.files import InputError, read_image
from extra.people import make_synthetic

Size = tuple[int, int]       # height, width
Range = tuple[float, float]  # from, to

# ---------------------------------------------------------------------------------------------
# What a ReID set is
# ---------------------------------------------------------------------------------------------


class Record(NamedTuple):
    """One image. pid: identity, -1 when unlabelled (junk is never a Record). camid: camera, counted
    from 0. If cameras are unknown it is the image's own number; in lists of unlabelled crops, -1.
    """

    path: str
    pid: int
    camid: int


@dataclass
class Dataset:
    """Three lists of records. has_cameras: False when each image counts as its own camera. people:
    who query and gallery show. published: whose counts are published, if not the name's."""

    name: str
    root: Path
    train: Sequence[Record]
    query: Sequence[Record]
    gallery: Sequence[Record]
    has_cameras: bool = True
    note: str = ""
    people: str = "the test set"
    published: str = ""

    def fingerprint(self) -> str:
        """Changes with the images' names and identities, not with the place of the folder."""
        return files.fingerprint(self.root, self.train, self.query, self.gallery)


class Unlabelled(files.PathList):
    """Millions of crops, as records that are made when they are asked for."""

    def __getitem__(self, i: int) -> Record:
        return Record(super().__getitem__(i), -1, -1)


# ---------------------------------------------------------------------------------------------
# Batches of images, and the processes that decode them
# ---------------------------------------------------------------------------------------------


class Batches(torch.utils.data.Dataset):
    """The batches of a training: batches[step] is what this process sees in a step.

    A dictionary: "images" uint8 (B, 3, H, W), resized to transform.size; "params" (B, ...), numbers
    from which the loop lets `transform` make views; "pids" (B,); "replaced", the indices of broken
    files, in whose place stands the next readable image of the same identity, or else of the list.

    sampler: says which images make up the batches of an epoch, by .shuffle(epoch); a batch is of
    all processes, of which the rank-th of `world` takes the rank-th part. transform: samples the
    params of one image, by .draw(rng). draw_more(generator): what else a method wants sampled for
    an image, as PersonViT's recipe "masks": (2, rows, columns) of an image become (2, B, rows,
    columns). Raises InputError if the processes cannot share a batch evenly.
    """

    def __init__(self, records: Sequence[Record], sampler, transform, seed: int = 0,
                 draw_more=None, rank: int = 0, world: int = 1):
        self.records = records
        self.sampler = sampler
        self.transform = transform
        self.seed = seed
        self.draw_more = draw_more
        if sampler.batch % world:
            raise InputError(f"a batch of {sampler.batch} images cannot be shared evenly by "
                             f"{world} processes; see --batch, --ids, --images")
        self.count = sampler.batch // world       # images of this process
        self.first = rank * self.count
        self.epoch = None

    def __getitem__(self, step: int) -> dict:
        epoch, i = divmod(step, len(self.sampler))
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = self.sampler.shuffle(epoch)         # (batches of an epoch, batch)
        images = []
        params = []
        pids = []
        replaced = []
        more = {}  # name -> a tensor of each image
        for place in range(self.first, self.first + self.count):
            index = int(self.order[i, place])
            image, used = self.read_or_replace(index)
            images.append(image)
            pids.append(self.records[used].pid)
            if used != index:
                replaced.append(index)
            # not a function of the image: one that a batch holds twice gets different views
            rng = random.Random(f"{self.seed} {step} {place}")
            params.append(torch.tensor(self.transform.draw(rng)))
            if self.draw_more:
                generator = torch.Generator().manual_seed(rng.getrandbits(63))
                for name, value in self.draw_more(generator).items():
                    more.setdefault(name, []).append(value)
        batch = {"images": torch.stack(images),
                 "params": torch.stack(params),
                 "pids": torch.tensor(pids),
                 "replaced": replaced}
        for name, values in more.items():
            batch[name] = torch.stack(values, dim=1)
        return batch

    def read(self, index: int) -> Tensor:
        path = self.records[index].path
        return read_image(path, self.transform.size, Image.Resampling.BICUBIC)

    def read_or_replace(self, index: int) -> tuple[Tensor, int]:
        """The image, or another one that can be read, and its index."""
        try:
            return self.read(index), index
        except InputError as error:
            broken = error
        pid = self.records[index].pid
        same = []  # indices; the nearest in the list come first
        others = []
        for distance in range(1, min(len(self.records), 1000)):  # it need not be far away
            other = (index + distance) % len(self.records)
            if self.records[other].pid == pid:
                same.append(other)
            else:
                others.append(other)
        for other in same + others:
            with contextlib.suppress(InputError):
                return self.read(other), other
        raise InputError(f"{broken}; no readable image was found near it")


def make_loader(dataset, indices: range, num_workers: int) -> torch.utils.data.DataLoader:
    """A DataLoader that yields dataset[i], a whole batch, for each of `indices` in their order.
    Worker processes make the batches (0: this one does)."""
    workers.end_workers_at_exit()
    return torch.utils.data.DataLoader(
        dataset, batch_size=None, sampler=indices, num_workers=num_workers,
        collate_fn=workers.hand_over, worker_init_fn=workers.quiet_worker,  # errors, Ctrl-C
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator())  # else it would take a number from PyTorch's own generator


# ---------------------------------------------------------------------------------------------
# Sampling: P identities x K images, or all images shuffled
# ---------------------------------------------------------------------------------------------


class PKSampler:
    """Batches of P distinct identities x K images each, for the batch-hard triplet loss.

    An epoch cuts each identity's shuffled images into groups of K (a short group is filled up with
    images of the same identity; an identity with fewer than K repeats them), and every group is
    used once: **every image is seen in every epoch**. An epoch has all groups / P batches, but at
    least as many as the largest identity has groups; places left over go to identities sampled at
    random. Raises InputError for fewer than P identities.

    Differs from TransReID's sampler, which drops an identity's images that fill no group, and the
    last identities of an epoch.
    """

    def __init__(self, pids: Sequence[int], num_ids: int = 16, num_images: int = 4, seed: int = 0):
        self.P = num_ids
        self.K = num_images
        self.batch = num_ids * num_images
        self.seed = seed
        self.members = {}  # identity -> indices of its images
        for index, pid in enumerate(pids):
            self.members.setdefault(int(pid), []).append(index)
        if num_ids < 2 or num_images < 1:
            raise InputError(f"--ids {num_ids} --images {num_images}: the triplet loss needs two "
                             f"identities, and an image of each")
        if len(self.members) < num_ids:
            raise InputError(f"a batch needs {num_ids} identities, the training set has "
                             f"{len(self.members)}; see --ids, --labelled, --held-out")
        counts = [math.ceil(len(images) / num_images) for images in self.members.values()]
        enough = math.ceil(sum(counts) / num_ids)
        self.length = max(enough, max(counts))

    def __len__(self) -> int:
        """Batches of an epoch, the same in each."""
        return self.length

    def shuffle(self, epoch: int) -> np.ndarray:
        """Indices of the images of an epoch, (batches, P K): a function of the seed and `epoch`."""
        rng = np.random.default_rng([self.seed, epoch])
        groups = {pid: self.shuffled_groups(pid, rng) for pid in self.members}
        batches = []
        for batches_left in range(self.length, 0, -1):
            batch = []
            for pid in self.choose(groups, batches_left, rng):
                if not groups[pid]:  # all its images were seen; some come again
                    groups[pid] = self.shuffled_groups(pid, rng)[:1]
                batch += groups[pid].pop()
            batches.append(batch)
        return np.array(batches)

    def shuffled_groups(self, pid: int, rng) -> list[list[int]]:
        """An identity's images, shuffled and cut into groups of K; the last one is filled up from
        the start."""
        images = rng.permutation(self.members[pid])
        n = math.ceil(len(images) / self.K)
        return np.resize(images, (n, self.K)).tolist()

    def choose(self, groups: dict, batches_left: int, rng) -> list[int]:
        """P different identities, sampled in proportion to the groups that they have left. An
        identity with as many groups left as there are batches left must be in every one of them."""
        urgent = [pid for pid in groups if len(groups[pid]) == batches_left]
        waiting = [pid for pid in groups if 0 < len(groups[pid]) < batches_left]
        places = self.P - len(urgent)
        if len(waiting) <= places:  # the last batches: some identities come again
            done = [pid for pid in groups if not groups[pid]]
            again = rng.permutation(done)[:places - len(waiting)]
            return urgent + waiting + again.tolist()
        left = np.array([len(groups[pid]) for pid in waiting])
        chosen = rng.choice(waiting, places, replace=False, p=left / left.sum())
        return urgent + chosen.tolist()


class ShuffleSampler:
    """Batches of shuffled images without identities; the last, incomplete one is dropped. Raises
    InputError when there are fewer images than one batch."""

    def __init__(self, n: int, batch: int, seed: int = 0):
        if n < batch:
            raise InputError(f"a batch of {batch} needs that many images, the set has {n}; use a "
                             f"smaller --batch")
        self.n = n
        self.batch = batch
        self.seed = seed

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self.n // self.batch

    def shuffle(self, epoch: int) -> np.ndarray:
        """Indices of the images of an epoch, (batches, batch): a function of the seed and `epoch`.
        """
        order = np.random.default_rng([self.seed, epoch]).permutation(self.n)
        order = order.astype(np.int32)            # may be millions, in each worker
        return order[:len(self) * self.batch].reshape(-1, self.batch)


# ---------------------------------------------------------------------------------------------
# Parameters of views, sampled image by image in the workers. rng: Python's random.Random
# ---------------------------------------------------------------------------------------------


def chance(rng, p: float) -> float:
    """1.0 with probability p, else 0.0."""
    return float(rng.random() < p)


def random_box(rng, size: Size, area: Range, aspect: Range, log: bool = True):
    """top, left, height and width of a random part of an image; None if none of ten fits.

    area: as a share of the image's. aspect = height / width, as erasing has it, log-uniform or
    uniform.
    """
    H, W = size
    low, high = aspect
    for _ in range(10):
        pixels = rng.uniform(*area) * H * W
        if log:
            ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        else:
            ratio = rng.uniform(low, high)
        h = round(math.sqrt(pixels * ratio))
        w = round(math.sqrt(pixels / ratio))
        if 0 < h <= H and 0 < w <= W:
            top = rng.randint(0, H - h)
            left = rng.randint(0, W - w)
            return [top, left, h, w]
    return None


def random_crop(rng, size: Size, area: Range, aspect: Range) -> list[int]:
    """A random part of the image, or all of it where none fits. aspect = width / height, as
    torchvision has it."""
    narrow, wide = aspect
    box = random_box(rng, size, area, (1 / wide, 1 / narrow))
    if box is None:
        box = [0, 0, *size]
    return box


def random_erasure(rng, size: Size, area: Range, log: bool = True) -> list[int]:
    """With probability 0.5 a part of the image to erase, height / width 0.3 to 1/0.3; else an empty
    one (Zhong et al. 2020)."""
    box = None
    if rng.random() < 0.5:
        box = random_box(rng, size, area, (0.3, 1 / 0.3), log)
    if box is None:
        box = [0, 0, 0, 0]
    return box


def random_blur(rng, p: float) -> float:
    """The standard deviation of a Gaussian blur in pixels, with probability p; else 0, no blur."""
    if rng.random() < p:
        return rng.uniform(0.1, 2)
    return 0.0


def erasing_noise(images: Tensor, seed: int, step: int, rank: int = 0, world: int = 1) -> Tensor:
    """Normal noise for erased pixels of images (B, 3, H, W), sampled on their device. Each process
    samples that of the batch of all processes, from one seed, and keeps its own part."""
    B, _, H, W = images.shape
    key = random.Random(f"{seed} {step} erasing").getrandbits(63)
    rng = torch.Generator(images.device).manual_seed(key)
    noise = torch.randn(world * B, 3, H, W, device=images.device, generator=rng)
    return noise[rank * B:(rank + 1) * B]


# ---------------------------------------------------------------------------------------------
# Pixels of views, changed on the device
# ---------------------------------------------------------------------------------------------

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LUP_MEAN = (0.3525, 0.3106, 0.3140)  # of LUPerson [LUP]
LUP_STD = (0.2660, 0.2522, 0.2505)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8, or floats in [0, 1], (B, 3, H, W) -> float32 of about zero mean, unit variance."""
    if images.dtype == torch.uint8:
        images = images.float() / 255
    # channel by channel: tensors of mean and std would be copied to a GPU in every step
    channels = []
    for x, m, s in zip(images.unbind(1), mean, std):
        channels.append((x - m) / s)
    return torch.stack(channels, dim=1)


def inside(boxes: Tensor, H: int, W: int) -> Tensor:
    """(n, 4) top, left, height, width -> (n, 1, H, W), True inside the box."""
    top, left, h, w = boxes.T[:, :, None]                                    # (n, 1) each
    y = torch.arange(H, device=boxes.device)
    x = torch.arange(W, device=boxes.device)
    rows = (y >= top) & (y < top + h)                                        # (n, H)
    columns = (x >= left) & (x < left + w)                                   # (n, W)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def crop_resize(x: Tensor, boxes: Tensor, flip: Tensor, size: Size) -> Tensor:
    """Cut boxes (n, 4) out of images (n, 3, H, W), resize them to (n, 3, *size), mirror those with
    flip (n, 1, 1, 1) = 1.

    Bicubic and antialiased. Resizing is linear, and rows and columns are independent, so that two
    matrices crop and resize an image: rows @ image @ columns^T, for a whole batch at once. Row i of
    a matrix holds the weights of the old pixels in new pixel i. Source: Pillow's rule (the kernel
    widens as the image shrinks; nothing outside the crop is seen).
    """
    matrices = []
    for axis, new in enumerate(size):                             # height, then width
        old = x.shape[2 + axis]
        start = boxes[:, axis, None, None]                                   # (n, 1, 1)
        length = boxes[:, axis + 2, None, None]                              # (n, 1, 1)
        scale = length / new                                      # old pixels in a new one
        pixel = torch.arange(old, device=x.device) + 0.5          # their centres      (old,)
        target = torch.arange(new, device=x.device)[:, None] + 0.5           # (new, 1)
        centre = start + target * scale                                      # (n, new, 1)
        t = ((pixel - centre) / scale.clamp(min=1)).abs()                    # (n, new, old)
        # Keys' cubic kernel with a = -0.5
        near = (1.5 * t - 2.5) * t * t + 1                        # where t < 1
        far = ((-0.5 * t + 2.5) * t - 4) * t + 2                  # where 1 <= t < 2
        in_crop = (pixel > start) & (pixel < start + length)                 # (n, 1, old)
        weight = torch.where(t < 1, near, far) * (in_crop & (t < 2))
        matrices.append(weight / weight.sum(2, keepdim=True))
    rows, columns = matrices                                # (n, h, H) and (n, w, W)
    x = rows[:, None] @ x @ columns[:, None].mT                              # (n, 3, *size)
    x = torch.where(flip > 0, x.flip(3), x)
    return x.clamp(0, 1)                                          # a cubic overshoots at edges


def grey(images: Tensor) -> Tensor:
    """(n, 3, h, w) -> (n, 1, h, w), by the weights of ITU-R 601, as Pillow has it."""
    r, g, b = images.split(1, dim=1)
    return 0.299 * r + 0.587 * g + 0.114 * b


def colour_jitter(x: Tensor, brightness, contrast, saturation, turn) -> Tensor:
    """Images (n, 3, h, w) in [0, 1], changed in this order: three factors (n, 1, 1, 1), 1 = no
    change, and `turn` of the hue, in parts of the colour circle, 0 = none."""
    x = (x * brightness).clamp(0, 1)
    mean_grey = grey(x).mean((2, 3), keepdim=True)                           # (n, 1, 1, 1)
    x = torch.lerp(mean_grey, x, contrast).clamp(0, 1)
    x = torch.lerp(grey(x), x, saturation).clamp(0, 1)
    # the hue, in sixths of the circle: 0 red, 2 green, 4 blue (HSV)
    r, g, b = x.split(1, dim=1)                                              # (n, 1, h, w) each
    high = x.amax(1, keepdim=True)
    chroma = high - x.amin(1, keepdim=True)
    divisor = torch.where(chroma == 0, 1, chroma)                 # grey has no hue
    hue = torch.where(high == g, (b - r) / divisor + 2, (r - g) / divisor + 4)
    hue = torch.where(high == r, (g - b) / divisor, hue)
    hue = hue + 6 * turn
    # back to RGB: a channel is highest up to one sixth from its own hue, lowest from two on
    channels = []
    for end in (1, 3, 5):                                         # where red, green, blue fall
        k = (hue - end) % 6
        channels.append(high - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.cat(channels, dim=1)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of images (n, 3, h, w) by sigma (n, 1, 1, 1) in pixels, 0 = none.

    By two matrices, as in `crop_resize`: a row holds the weights of all pixels in a new one, which
    fall with their distance from it. At the border the weights of the pixels that exist sum to 1
    [ours].
    """
    matrices = []
    for size in x.shape[2:]:                                      # height, then width
        pixel = torch.arange(size, device=x.device)
        distance = (pixel[:, None] - pixel).abs()                            # (size, size)
        weight = torch.exp(-0.5 * (pixel / sigma.clamp(min=0.1)) ** 2)       # by distance
        matrix = weight[:, :, 0, distance]    # looked up for each pair      # (n, 1, size, size)
        matrices.append(matrix / matrix.sum(3, keepdim=True))
    rows, columns = matrices
    blurred = rows @ x @ columns.mT                                          # (n, 3, h, w)
    return torch.where(sigma > 0, blurred, x)


PAD = 10  # black pixels around an image that is fine-tuned on [PersonViT code]


class FineTuneTransform:
    """What fine-tuning sees, uint8 -> float32, both (B, 3, H, W), images come resized to `size`.
    The order is that of PersonViT's fine-tuning code:

        flip            with probability 0.5
        pad and crop    10 black pixels around, then cut back at a random place
        normalise
        erase           with probability 0.5 a rectangle of at least 2 % of the image, of aspect 0.3
                        to 1/0.3 (timm's defaults [from memory])

    noise=True: the rectangle has up to a third of the image, and __call__ is to be given the normal
    noise that fills it, pixel by pixel [PersonViT code]. noise=False: up to 40 %, filled with 0,
    the mean colour after normalisation; after [BoT], whose code fills in the mean as it is before
    normalisation [secondary].
    """

    def __init__(self, size: Size, mean, std, noise: bool = True):
        self.size = size
        self.mean = mean
        self.std = std
        self.noise = noise

    def draw(self, rng) -> list[float]:
        """7 numbers: flip, top and left of the crop; top, left, height, width to erase."""
        flip = chance(rng, 0.5)
        top = rng.randint(0, 2 * PAD)
        left = rng.randint(0, 2 * PAD)
        most = 0.4
        if self.noise:
            most = 1 / 3
        erased = random_erasure(rng, self.size, (0.02, most))
        return [flip, top, left, *erased]

    def __call__(self, images: Tensor, params: Tensor, noise: Tensor | None = None) -> Tensor:
        """params (B, 7); noise (B, 3, H, W): what erasing leaves, None: the mean colour."""
        _, _, H, W = images.shape
        flip, top, left = params[:, :3, None, None, None].long().unbind(1)   # (B, 1, 1, 1) each
        x = torch.where(flip > 0, images.flip(3), images)
        x = F.pad(x, [PAD] * 4)                                              # (B, 3, H+20, W+20)
        rows = top + torch.arange(H, device=x.device)[:, None]               # (B, 1, H, 1)
        columns = left + torch.arange(W, device=x.device)                    # (B, 1, 1, W)
        x = x.gather(2, rows.expand(-1, 3, -1, W + 2 * PAD))                 # (B, 3, H, W+20)
        x = x.gather(3, columns.expand(-1, 3, H, -1))                        # (B, 3, H, W)
        x = normalize(x, self.mean, self.std)
        erased = inside(params[:, 3:], H, W)                                 # (B, 1, H, W)
        if noise is None:
            return x.masked_fill(erased, 0)
        return torch.where(erased, noise, x)


class MultiCrop:
    """Two global and L local views for self-distillation: uint8 (B, 3, H, W) -> dict of float32.

    "globals" (2, B, 3, *size) and, for L > 0, "locals" (L, B, 3, size / 2). Each view [iBOT, DINO]:

        random resized crop   scales are shares of the image's area, aspects width / height; see
                              `PersonViTRecipe`
        colour jitter         with probability 0.8: brightness 0.4, contrast 0.4, saturation 0.2,
                              hue 0.1
        flip, greyscale       with probability 0.5, 0.2
        Gaussian blur         sigma U(0.1, 2), with probability 1 in the first global view, 0.1 in
                              the second, 0.5 in local ones
        solarisation          with probability 0.2 in the second global view
        normalisation         by ImageNet's statistics

    Ours: images come resized to `size`, where iBOT crops the original file; a crop that fits
    nowhere is the whole image; the order of the colour changes is fixed.
    """

    mean = IMAGENET_MEAN
    std = IMAGENET_STD

    def __init__(self, size: Size = (256, 128), num_local: int = 8,
                 global_scale: Range = (0.4, 1.0), local_scale: Range = (0.05, 0.8),
                 aspect: Range = (0.375, 0.667)):
        self.size = size
        self.local_size = (size[0] // 2, size[1] // 2)
        self.num_local = num_local
        self.global_scale = global_scale
        self.local_scale = local_scale
        self.aspect = aspect

    def draw(self, rng) -> list[list[float]]:
        """2 + L views of 12 numbers each."""
        first = self.draw_view(rng, self.global_scale, blur=1.0)
        second = self.draw_view(rng, self.global_scale, blur=0.1, solarize=0.2)
        views = [first, second]
        for _ in range(self.num_local):
            views.append(self.draw_view(rng, self.local_scale, blur=0.5))
        return views

    def draw_view(self, rng, scale: Range, blur: float, solarize: float = 0.0) -> list[float]:
        """Probabilities of blur and solarisation -> 12 numbers: crop (4), colours (4), flip,
        greyscale, sigma of the blur, solarisation."""
        colours = [1, 1, 1, 0]
        if rng.random() < 0.8:
            colours = [
                rng.uniform(0.6, 1.4),   # brightness
                rng.uniform(0.6, 1.4),   # contrast
                rng.uniform(0.8, 1.2),   # saturation
                rng.uniform(-0.1, 0.1)]  # hue
        return [
            *random_crop(rng, self.size, scale, self.aspect),
            *colours,
            chance(rng, 0.5),            # flip
            chance(rng, 0.2),            # greyscale
            random_blur(rng, blur),
            chance(rng, solarize)]

    def __call__(self, images: Tensor, params: Tensor) -> dict[str, Tensor]:
        """params (B, 2 + L, 12), on the images' device."""
        kinds = [("globals", params[:, :2], self.size)]
        if self.num_local:
            kinds.append(("locals", params[:, 2:], self.local_size))
        views = {}
        for name, of_kind, size in kinds:
            B, V, _ = of_kind.shape
            of_view = of_kind.transpose(0, 1).flatten(0, 1)                  # (V B, 12)
            numbers = of_view[:, 4:, None, None, None].unbind(1)             # 8 of (V B, 1, 1, 1)
            flip, colourless, sigma, solarize = numbers[4:]
            x = (images.float() / 255).repeat(V, 1, 1, 1)                    # (V B, 3, H, W)
            x = crop_resize(x, of_view[:, :4], flip, size)                   # (V B, 3, *size)
            x = colour_jitter(x, *numbers[:4])
            x = torch.where(colourless > 0, grey(x), x)
            x = blur(x, sigma)
            inverted = (solarize > 0) & (x >= 0.5)
            x = torch.where(inverted, 1 - x, x)
            x = normalize(x, self.mean, self.std)
            views[name] = x.unflatten(0, (V, B))                             # (V, B, 3, *size)
        return views


class ContrastViews:
    """UP-ReID's views: uint8 (B, 3, H, W) -> dict of float32.

    "first", "second" (B, 3, H, W): the image, augmented twice. "original": the image as it is, if
    wanted. "stripes1", "stripes2" (B, M, 3, H / M, W), for M > 0: its M horizontal stripes, each
    augmented twice like an image of its own. They are cut before the augmentation, as stripe m of
    one crop might else show a head and of another one a knee [ours U3].

    Augmentation as LUPerson's ori-cj+sre [LUP]: random resized crop of 20 % to all of the area,
    width / height 3/4 to 4/3, greyscale 0.2, blur 0.5 with sigma U(0.1, 2), flip 0.5, normalisation
    with LUPerson's statistics, with probability 0.5 a rectangle of 2 to 60 % of the area set to the
    mean colour. No colour jitter: colours of clothes tell people apart. The range of width / height
    is torchvision's default and not adapted to people: no crop of more than two thirds of a 2:1
    image fits, and each is stretched about twofold. Ours: images come resized, where LUPerson crops
    the file; bicubic (torchvision's default is bilinear); a crop that fits nowhere is the whole
    image; an erasure is tried 10 times, not 100.
    """

    mean = LUP_MEAN
    std = LUP_STD

    def __init__(self, size: Size = (256, 128), original: bool = True, stripes: int = 4):
        self.size = size
        self.original = original
        self.stripes = stripes

    def draw(self, rng) -> list[list[float]]:
        """2 + 2 M views of 11 numbers each: two of the image, then the first ones of its stripes,
        then the second ones."""
        H, W = self.size
        first = self.draw_view(rng, self.size)
        second = self.draw_view(rng, self.size)
        views = [first, second]
        for _ in range(2 * self.stripes):
            stripe = (H // self.stripes, W)       # in the loop, as M may be 0
            views.append(self.draw_view(rng, stripe))
        return views

    def draw_view(self, rng, size: Size) -> list[float]:
        """11 numbers of an image or stripe: crop (4), erased box (4), flip, greyscale, sigma of the
        blur."""
        return [
            *random_crop(rng, size, (0.2, 1.0), (3 / 4, 4 / 3)),
            *random_erasure(rng, size, (0.02, 0.6), log=False),
            chance(rng, 0.5),            # flip
            chance(rng, 0.2),            # greyscale
            random_blur(rng, 0.5)]

    def __call__(self, images: Tensor, params: Tensor) -> dict[str, Tensor]:
        """params (B, 2 + 2 M, 11), on the images' device."""
        x = images.float() / 255
        views = {"first": self.augment(x, params[:, 0]),                     # (B, 3, H, W)
                 "second": self.augment(x, params[:, 1])}
        if self.original:
            views["original"] = normalize(x, self.mean, self.std)
        if self.stripes:
            B = len(x)
            M = self.stripes
            stripes = x.unflatten(2, (M, -1)).transpose(1, 2)                # (B, M, 3, H/M, W)
            stripes = stripes.flatten(0, 1)                                  # (B M, 3, H/M, W)
            first, second = params[:, 2:].split(M, dim=1)                    # (B, M, 11) each
            first = self.augment(stripes, first.flatten(0, 1))
            second = self.augment(stripes, second.flatten(0, 1))
            views["stripes1"] = first.unflatten(0, (B, M))                   # (B, M, 3, H/M, W)
            views["stripes2"] = second.unflatten(0, (B, M))
        return views

    def augment(self, x: Tensor, params: Tensor) -> Tensor:
        """Images or stripes (n, 3, h, w) in [0, 1], params (n, 11) -> the same shape."""
        h, w = x.shape[2:]
        flip, colourless, sigma = params[:, 8:, None, None, None].unbind(1)  # (n, 1, 1, 1) each
        x = crop_resize(x, params[:, :4], flip, (h, w))
        x = torch.where(colourless > 0, grey(x), x)
        x = blur(x, sigma)
        x = normalize(x, self.mean, self.std)
        return x.masked_fill(inside(params[:, 4:8], h, w), 0)


# ---------------------------------------------------------------------------------------------
# Reading a ReID set from disk; holding people out
# ---------------------------------------------------------------------------------------------

# Usual folders of public sets below --data-root
PLACES = {
    "market1501": ("Market-1501-v15.09.15", "market1501", "Market-1501"),
    "msmt17": ("MSMT17_V1", "MSMT17_V2", "MSMT17", "msmt17"),
    "cuhk03-np-labeled": ("cuhk03-np/labeled", "cuhk03_np/labeled", "labeled"),
    "cuhk03-np-detected": ("cuhk03-np/detected", "cuhk03_np/detected", "detected"),
    "dukemtmc-reid": ("DukeMTMC-reID", "dukemtmc-reid"),
    "occluded-duke": ("Occluded_Duke", "occluded-duke"),
    "personx": ("PersonX", "personx", "personx/subset1"),
    "synthetic": ("synthetic",)}

# (identities, images) of train, query and gallery as published: by the sets' own files or readmes,
# DukeMTMC-reID's by loaders of it; PersonX's split is from memory, its identities are derived:
# 5,136 queries / 6 cameras = 856 of 1,266 people.
PUBLISHED = {
    "market1501": ((751, 12_936), (750, 3_368), (751, 15_913)),
    "msmt17": ((1_041, 32_621), (3_060, 11_659), (3_060, 82_161)),
    "msmt17, train only": ((1_041, 30_248), (3_060, 11_659), (3_060, 82_161)),
    "cuhk03-np-labeled": ((767, 7_368), (700, 1_400), (700, 5_328)),
    "cuhk03-np-detected": ((767, 7_365), (700, 1_400), (700, 5_332)),
    "dukemtmc-reid": ((702, 16_522), (702, 2_228), (1_110, 17_661)),
    "occluded-duke": ((702, 15_618), (519, 2_210), (1_110, 17_661)),
    "personx": ((410, 9_840), (856, 5_136), (856, 30_816))}
NAMES = sorted([*PLACES, "cuhk03-np", "folder", "luperson"])


def load_dataset(name: str, root: str | Path = "data", train_only: bool = False) -> Dataset:
    """Read one ReID set below `root` (data folder or the set's own), print and check its counts.

    name: one of NAMES, or the path of any folder of crops. "cuhk03-np" is its labeled half,
    "synthetic" is rendered on first use, "folder" is the tree at `root` itself, "luperson"
    unlabelled crops: a folder, or a text list of paths. train_only: MSMT17 without the val list.
    Raises InputError when the set is missing, empty, or its names do not parse.
    """
    root = Path(root)
    if name and name not in NAMES and Path(name).exists():
        root = Path(name)
        name = "folder"
        # a list, or a folder called LUPerson: millions of crops, which are listed and never sorted
        if root.is_file() or folders.LUPERSON.fullmatch(root.name.lower()):
            name = "luperson"
    if name == "cuhk03-np":
        name = "cuhk03-np-labeled"
    if name not in NAMES:
        raise InputError(f"no dataset or folder is called {name!r}; did you mean "
                         f"{folders.closest(name, NAMES)}?")
    if name == "luperson":
        dataset = load_unlabelled(root)
    elif name == "msmt17":
        root = folders.find(name, root, PLACES[name], "list_train.txt")
        dataset = load_msmt17(root, train_only)
    elif name == "folder":
        dataset = load_splits(name, root)
    else:
        if name == "synthetic":
            root = render_once(root)
        root = folders.find(name, root, PLACES[name], "bounding_box_train", "bounding_box_test")
        dataset = load_splits(name, root)
    print(describe(dataset), flush=True)
    return dataset


def load_splits(name: str, root: Path) -> Dataset:
    """Market-1501, the many sets that copied its three folders, and any tree of images.

    In a folder of your own identity 0 is a person like any other, unlike Market's distractors.
    """
    must_have_cameras = name != "folder"
    splits, has_cameras, note = folders.read_splits(root, must_have_cameras)
    train, query, gallery = map(records_of, splits)
    identified = any(record.pid >= 0 for record in train + query + gallery)
    if identified:
        train = relabel(train)
    else:  # nobody to search for
        query, gallery = [], []
    return Dataset(name, root, train, query, gallery, has_cameras, note)


def records_of(images: list[tuple[str, int, int]]) -> list[Record]:
    """Records of (path, identity, camera), where cameras count from 1."""
    return [Record(path, pid, camera - 1) for path, pid, camera in images]


def render_once(root: Path) -> Path:
    """<root>/synthetic, where synthetic people are rendered if it is absent or empty."""
    if root.name != "synthetic":
        root = root / "synthetic"
    if not root.exists() or not any(root.iterdir()):
        print(f"rendering synthetic people into {root}")
        make_synthetic(root)
    return root


def load_msmt17(root: Path, train_only: bool) -> Dataset:
    """MSMT17: four lists of "path identity" lines; folders tell V1 from V2 (faces masked).

    Test identities start again at 0, yet they are other people than the training identities.
    """
    version = "V1"
    train_images = root / "train"
    test_images = root / "test"
    if (root / "mask_train_v2").is_dir():
        version = "V2 (faces masked)"
        train_images = root / "mask_train_v2"
        test_images = root / "mask_test_v2"
    train = folders.read_msmt17_list(root / "list_train.txt", train_images)
    note = f"{version}, trained on train only"
    published = "msmt17, train only"
    if not train_only:  # PersonViT and TransReID train on train + val, torchreid and fast-reid not
        train += folders.read_msmt17_list(root / "list_val.txt", train_images)
        note = f"{version}, trained on train + val"
        published = "msmt17"
    query = folders.read_msmt17_list(root / "list_query.txt", test_images)
    gallery = folders.read_msmt17_list(root / "list_gallery.txt", test_images)
    return Dataset("msmt17", root, relabel(records_of(train)), records_of(query),
                   records_of(gallery), note=note, published=published)


def load_unlabelled(root: Path) -> Dataset:
    """LUPerson, or any folder or list of crops: images to pre-train on."""
    source, file, folder, note = folders.find_unlabelled(root)
    return Dataset("luperson", source, Unlabelled(file, folder), [], [], note=note)


def relabel(records: list[Record]) -> list[Record]:
    """Identities become 0, 1, 2 ... in sorted order: the classifier has one output for each."""
    pids = sorted({record.pid for record in records})
    label = {pid: i for i, pid in enumerate(pids)}
    return [record._replace(pid=label[record.pid]) for record in records]


def some_identities(records: list[Record], share: float, seed: int) -> list[Record]:
    """The images of a share of the identities, sampled by the seed and relabelled; all for 1.

    A smaller share of the same seed is a part of a larger one.
    """
    if share == 1:
        return records
    pids = sorted({record.pid for record in records})
    shuffled = np.random.default_rng(seed).permutation(pids).tolist()
    kept = set(shuffled[:round(share * len(pids))])
    return relabel([record for record in records if record.pid in kept])


def hold_out(dataset: Dataset, n: int) -> Dataset:
    """The dataset with n people taken out of training, who become its query and gallery: to choose
    settings without looking at the test set.

    They are sampled, by a seed that is always the same, from the people with images from two
    cameras. Queries are one image from each of their cameras (cameras unknown: one image), the
    gallery is the rest. Raises InputError for fewer than n such people.
    """
    cameras = {}  # identity -> camera -> images
    for record in dataset.train:
        if record.pid >= 0:  # else nobody knows whom it shows
            cameras.setdefault(record.pid, {}).setdefault(record.camid, []).append(record)
    eligible = [pid for pid in sorted(cameras) if len(cameras[pid]) > 1]
    if len(eligible) < n:
        raise InputError(f"--held-out {n}: of the people to train on {len(eligible)} have images "
                         f"from two cameras")
    random.Random(0).shuffle(eligible)  # so that a smaller n is a part of a larger one
    held = set(eligible[:n])
    rng = random.Random(1)
    query = []
    for pid in sorted(held):
        shots = list(cameras[pid].values())
        if not dataset.has_cameras:  # each image counts as its own camera
            shots = shots[:1]
        query += [rng.choice(images) for images in shots]
    train = []
    gallery = []
    for record in dataset.train:
        if record.pid not in held:
            train.append(record)
        elif record not in query:
            gallery.append(record)
    people = f"{n} held-out training people of {dataset.root.name}"
    return replace(dataset, train=relabel(train), query=query, gallery=gallery, people=people)


def describe(dataset: Dataset) -> str:
    """Counts of each split beside the published ones, a loud line for every difference, and how one
    name was read."""
    lines = [f"{dataset.name} in {dataset.root}"]
    if dataset.note:
        lines[0] += f" - {dataset.note}"
    if isinstance(dataset.train, Unlabelled):
        return f"{lines[0]}\n  {len(dataset.train):,} unlabelled images"
    published = PUBLISHED.get(dataset.published or dataset.name, (None, None, None))
    for split, expected in zip(("train", "query", "gallery"), published):
        records = getattr(dataset, split)
        ids = {record.pid for record in records if record.pid >= 0}
        counts = (len(ids), len(records))
        cameras = "no"
        if dataset.has_cameras:
            cameras = len({record.camid for record in records})
        line = f"  {split:<8}{counts[0]:>6,} ids {counts[1]:>7,} images {cameras:>3} cameras"
        if expected:
            line += f"   expected {expected[0]:,} / {expected[1]:,}"
        if expected and counts != expected:
            line += "   DIFFERENT: do not compare with the papers"
        lines.append(line)
    examples = [*dataset.query, *dataset.train]
    if examples:
        record = examples[0]
        path = os.path.relpath(record.path, dataset.root)
        person = f"identity {record.pid}"
        camera = f"camera {record.camid + 1}"
        if not dataset.has_cameras:
            person = " ".join(["identity", *folders.people_folders(path)[-1:]])
            camera = "no camera"
        if record.pid < 0:
            person = "no identity"
        lines.append(f"  for example {path}: {person}, {camera}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Count a dataset, or render synthetic people.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--dataset", help="a known set or any folder: counts beside published ones")
    what.add_argument("--synthetic", metavar="DIR", help="render the synthetic people to a folder")
    parser.add_argument("--data-root", default="data", help="folder that holds the datasets")
    parser.add_argument("--train-only", action="store_true", help="MSMT17 without its val list")
    args = parser.parse_args(argv)
    if args.synthetic is not None:
        print(f"wrote {make_synthetic(args.synthetic)}")
    else:
        load_dataset(args.dataset, args.data_root, args.train_only)


if __name__ == "__main__":
    files.command_line(main)
