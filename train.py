"""Training: the recipes, the losses of fine-tuning, both loops, the run folder.

Fine-tuning for ReID. P identities x K images -> backbone -> feature f -> BNNeck -> classifier

    L = cross-entropy(classifier(BN(f)), identity) + triplet(f)               weights 1 : 1

The identity loss knows only training identities; the triplet loss shapes distances, which is what
ranks new people. Three steps equal the reference code's (tests/golden/finetune_3steps).

Pre-training. Unlabelled crops -> views -> `PersonViT` (personvit.py) -> optimiser -> teacher.

A run lives in its folder under runs/: recipe.json, log.jsonl, checkpoint.pth, and at the end its
weights. The same command goes on where the folder stopped: all random draws of a step depend on
(seed, step) alone, so a resumed run is the uninterrupted one. Read `fine_tune`, `pretrain`, `loop`.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import signal
import sys
import time
import typing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from augment import (IMAGENET_MEAN, IMAGENET_STD, FineTuneTransform, MultiCrop, step_generator)
from data import (NAMES, Images, InputError, PKSampler, ShuffleSampler, closest, command_line,
                  load_dataset, write_atomic)
from evaluate import (ARCHS, ReIDModel, build_backbone, colour_histograms, device_name, draw_ranks,
                      evaluate, load_weights, quiet_worker, rank_features, read_checkpoint)
from personvit import PersonViT, draw_masks

# ---------------------------------------------------------------------------------------------
# Recipes: every hyper-parameter in one table, each with its source
# ---------------------------------------------------------------------------------------------


def option(default, help: str, low: float = -math.inf, high: float = math.inf, choices=None):
    """A recipe's field: a default, what it is, the values it may have. It becomes a flag."""
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high,
                                                        "choices": choices})


VITS, RESNETS = (tuple(a for a in ARCHS if a.startswith(kind)) for kind in ("vit", "resnet"))


@dataclass(frozen=True)
class Recipe:
    """Fine-tuning; the defaults are PersonViT's published recipe for ViT-S [PersonViT code]."""

    arch: str = option("vit_small", "backbone", choices=ARCHS)
    size: tuple[int, int] = option((256, 128), "image height x width", 8, 4096)
    epochs: int = option(120, "passes over the training images; 0 only evaluates", 0, 1e6)
    ids: int = option(16, "P, identities per batch", 2, 1e5)
    images: int = option(4, "K, images per identity", 1, 1e5)
    optimizer: str = option("sgd", "sgd has momentum 0.9", choices=("sgd", "adam", "adamw"))
    lr: float = option(4e-4, "peak learning rate, for batch 64 and pre-trained weights", 0, 1e3)
    bias_lr: float = option(2.0, "factor on the learning rate of biases", 0, 1e3)
    weight_decay: float = option(1e-4, "on every parameter", 0, 1e3)
    schedule: str = option("cosine", "steps: x 0.1 after 1/3 and 7/12 of the epochs",
                           choices=("cosine", "steps"))
    warmup: int = option(20, "epochs of linear warm-up from 1 %% of the rate", 0, 1e6)
    smoothing: float = option(0.0, "label smoothing of the cross-entropy", 0, 1)
    margin: float | None = option(None, "of the triplet; none: log(1 + exp(d_ap - d_an))", 0, 1e3)
    drop_path: float = option(0.1, "stochastic depth of the last ViT block", 0, 0.99)
    last_stride: int = option(1, "stride of the last ResNet stage", choices=(1, 2))
    erase: str = option("noise", "what random erasing leaves", choices=("noise", "mean"))
    norm: str = option("half", "mean and std: all 0.5, or ImageNet's", choices=("half", "imagenet"))
    neck_feat: str = option("before", "feature of the ranking: before or after the BNNeck",
                            choices=("before", "after"))
    seed: int = option(1234, "of everything random", 0, 2 ** 32 - 1)
    bf16: bool = option(False, "bfloat16 in the network; on by default on a GPU")

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std of the normalisation, per RGB channel in [0, 1]."""
        half = (0.5, 0.5, 0.5)
        return (half, half) if self.norm == "half" else (IMAGENET_MEAN, IMAGENET_STD)


# "Bag of Tricks" for ResNet-50 (reid-strong-baseline): network, losses, neck and last stride are
# its paper's; the numbers are from memory, to be checked against its configuration files. [BoT]
BAG_OF_TRICKS = dict(optimizer="adam", lr=3.5e-4, bias_lr=1.0, weight_decay=5e-4, schedule="steps",
                     warmup=10, smoothing=0.1, margin=0.3, erase="mean", norm="imagenet",
                     neck_feat="after")
# Small nets from random weights on a CPU in minutes. [ours]
LAPTOP = dict(size=(128, 64), epochs=24, optimizer="adamw", lr=1e-3, bias_lr=1.0, weight_decay=0.05,
              schedule="cosine", warmup=3, smoothing=0.1, margin=0.3)


def recipe_for(dataset: str, arch: str | None = None) -> Recipe:
    """The fine-tuning recipe of a dataset and a backbone; arch=None takes the usual one."""
    arch = arch or ("resnet_tiny" if dataset == "synthetic" else "vit_small")
    values = BAG_OF_TRICKS if arch.startswith("resnet") else {}
    if dataset == "synthetic":
        values = values | LAPTOP
    elif (dataset, arch) == ("market1501", "vit_base"):
        values = values | dict(warmup=5)  # its configuration leaves the entry out [PersonViT code]
    return Recipe(arch=arch, **values)


@dataclass(frozen=True)
class PersonViTRecipe:
    """PersonViT pre-training on LUPerson. The paper's true values lie in its released checkpoints
    (`args`). [iBOT] = its published ViT-S/16 command, for ViT-B too but for norm_last_layer;
    [inferred] = read into the checkpoint's name. Probabilities of augmentation and masks stand with
    their code."""

    arch: str = option("vit_small", "backbone [PersonViT]", choices=VITS)
    size: tuple[int, int] = option((256, 128), "global crops [PersonViT]; local: half", 16, 4096)
    epochs: int = option(300, "passes over the images [notes on the paper]", 1, 1e6)
    batch: int = option(512, "images per step [ours]", 1, 1e6)
    lr: float = option(5e-4, "peak learning rate, times batch / 256 [iBOT]", 0, 1e3)
    min_lr: float = option(1e-6, "learning rate at the end [iBOT]", 0, 1e3)
    warmup: int = option(10, "epochs of linear warm-up from 0 [iBOT]", 0, 1e6)
    weight_decay: float = option(0.04, "on matrices, at the start [iBOT]", 0, 1e3)
    weight_decay_end: float = option(0.4, "... and at the end of a cosine [iBOT]", 0, 1e3)
    momentum: float = option(0.996, "of the teacher, cosine to 1 [iBOT]", 0, 1)
    prototypes: int = option(8192, "K [iBOT]", 2, 1e7)
    hidden: int = option(2048, "width of the head's MLP [iBOT]", 1, 1e6)
    bottleneck: int = option(256, "width of its output [iBOT]", 1, 1e6)
    shared_head: bool = option(True, "the same prototypes for [CLS] and patches [iBOT]")
    norm_last_layer: bool = option(False, "prototypes of fixed gain; ViT-B: True [iBOT]")
    student_temp: float = option(0.1, "temperature of the student [iBOT]", 1e-3, 1e3)
    teacher_temp: float = option(0.04, "of the teacher at the start [iBOT]", 1e-3, 1e3)
    teacher_temp_end: float = option(0.07, "... and after temp_warmup [iBOT]", 1e-3, 1e3)
    temp_warmup: int = option(30, "epochs, linear [iBOT]", 0, 1e6)
    clip: float = option(3.0, "largest gradient norm of a tensor [iBOT]", 1e-9, 1e9)
    freeze_last_layer: int = option(1, "epochs in which prototypes stand still [iBOT]", 0, 1e6)
    drop_path: float = option(0.1, "stochastic depth of the student [iBOT]", 0, 0.99)
    local_crops: int = option(8, "local views [DINO for ReID; 'n8' may mean it: inferred]", 0, 64)
    global_scale: tuple[float, float] = option((0.4, 1.0), "share of the area [inferred]", 1e-3, 1)
    local_scale: tuple[float, float] = option((0.05, 0.8), "0.05 [DINO], 0.8 [inferred]", 1e-3, 1)
    aspect: tuple[float, float] = option((0.375, 0.667), "width / height [inferred]", 0.1, 10)
    seed: int = option(0, "of everything random", 0, 2 ** 32 - 1)
    bf16: bool = option(False, "bfloat16 in the networks; on by default on a GPU")


def pretrain_recipe_for(dataset: str, arch: str | None = None) -> PersonViTRecipe:
    """The pre-training recipe of a dataset and a backbone; arch=None takes the usual one."""
    arch = arch or ("vit_mini" if dataset == "synthetic" else "vit_small")
    values: dict = {"norm_last_layer": arch == "vit_base"}
    if dataset == "synthetic":  # a thousand small images on a CPU [ours]
        # warmer teachers (0.04 and more) go flat on so few images: the log flags COLLAPSE?
        values |= dict(size=(128, 64), epochs=20, batch=32, lr=8e-3, warmup=2, weight_decay_end=0.1,
                       prototypes=1024, hidden=512, bottleneck=128, norm_last_layer=True,
                       teacher_temp=0.02, teacher_temp_end=0.02, local_crops=4,
                       local_scale=(0.1, 0.6))
    elif dataset != "luperson":  # thousands of images, one machine [ours]
        values |= dict(epochs=200, batch=128, local_crops=6, temp_warmup=20)
    return PersonViTRecipe(arch=arch, **values)


def check_recipe(recipe) -> None:
    """Raise InputError, naming the flag, for a value that a field's `option` does not allow."""
    for field in dataclasses.fields(recipe):
        flag, value = "--" + field.name.replace("_", "-"), getattr(recipe, field.name)
        low, high, choices = (field.metadata[key] for key in ("low", "high", "choices"))
        if choices and value not in choices:
            names = [str(c) for c in choices]
            raise InputError(f"{flag} {value}: did you mean {closest(str(value), names)}?")
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(v, (int, float)) and not low <= v <= high for v in numbers):
            raise InputError(f"{flag} {value}: must lie between {low:g} and {high:g}")


# ---------------------------------------------------------------------------------------------
# Losses and schedule: pure functions
# ---------------------------------------------------------------------------------------------


def hardest(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean distance of each anchor to its farthest positive and nearest negative: (B,), (B,).

    features (B, D), not normalised (normalising would bound the distances and starve the soft
    margin); labels (B,). The anchor counts among its positives, at distance 0, so that a lone image
    is no special case. Raises ValueError when all labels are equal.
    """
    features = features.float()
    square = features.square().sum(1)
    dist = square[:, None] + square[None, :] - 2 * features @ features.T      # (B, B)
    dist = dist.clamp(min=1e-12).sqrt()        # the clamp keeps the root's gradient finite at 0
    same = labels[:, None] == labels[None, :]
    if same.all():
        raise ValueError("batch-hard triplet loss needs at least two identities in a batch")
    d_ap = dist.masked_fill(~same, -torch.inf).amax(1)
    d_an = dist.masked_fill(same, torch.inf).amin(1)
    return d_ap, d_an


def triplet_loss(features: Tensor, labels: Tensor, margin: float | None = None) -> Tensor:
    """Batch-hard triplet loss (Hermans et al. 2017) of features (B, D), labels (B,): a scalar.

    margin=None: soft margin, mean log(1 + exp(d_ap - d_an)); 0.693 = log 2 means positives are as
    far as negatives, where a collapsed network stays. Else mean max(0, d_ap - d_an + margin).
    """
    d_ap, d_an = hardest(features, labels)
    return F.softplus(d_ap - d_an).mean() if margin is None else F.relu(d_ap - d_an + margin).mean()


def cosine(t: float, start: float, end: float) -> float:
    """From start at t = 0 to end at t = 1 along half a cosine wave; constant outside.

    >>> cosine(0, 1.0, 0.0), cosine(0.5, 1.0, 0.0), cosine(2, 1.0, 0.0)
    (1.0, 0.5, 0.0)
    """
    return end + (start - end) * (1 + math.cos(math.pi * min(max(t, 0), 1))) / 2


def learning_rate(recipe: Recipe, epoch: int, scale: float = 1.0) -> float:
    """Learning rate of a 0-based epoch; scale multiplies the peak (biases).

    Warm-up does not delay the cosine, it hides the curve's beginning; start and end are fractions
    of the unscaled rate, for biases too [PersonViT code].
    """
    peak, start, end = recipe.lr * scale, 0.01 * recipe.lr, 0.002 * recipe.lr
    if epoch < recipe.warmup:
        return start + (peak - start) * epoch / recipe.warmup
    t = epoch / recipe.epochs
    if recipe.schedule == "cosine":
        return cosine(t, peak, end)
    return peak * 0.1 ** ((t >= 1 / 3) + (t >= 7 / 12))


def make_optimizer(recipe: Recipe, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Two groups, weights and biases; `scale` is the factor on the scheduled learning rate."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for n, p in named if not n.endswith("bias")], "scale": 1.0},
              {"params": [p for n, p in named if n.endswith("bias")], "scale": recipe.bias_lr}]
    kwargs = dict(lr=recipe.lr, weight_decay=recipe.weight_decay)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, **kwargs)
    adam = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer]
    return adam(groups, **kwargs)


# ---------------------------------------------------------------------------------------------
# The run folder
# ---------------------------------------------------------------------------------------------

RUN_FILES = ("recipe.json", "log.jsonl", "checkpoint.pth", "model.pth", "backbone.pth",
             "backbone_e*.pth", "results.json")


class Run:
    """A folder that holds one run. Opening it only looks; `begin` writes, once all is in order.

    Raises InputError for a folder that cannot be written, that holds another recipe, or files that
    are no run's, unless `overwrite` allows to start over.
    """

    def __init__(self, folder: str | Path, recipe: dict, overwrite: bool = False):
        self.folder, self.overwrite, self.seconds = Path(folder), overwrite, 0.0
        self.recipe = json.loads(json.dumps(recipe))  # tuples become lists, as when read back
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder}: cannot be used for the results ({error.strerror}); "
                             f"choose another folder with --out") from None
        if not os.access(self.folder, os.W_OK):
            raise InputError(f"{folder}: is read-only; choose another folder with --out")
        present = [path.name for path in self.files()]
        if "recipe.json" in present and not overwrite:
            self.compare()
        elif present and not overwrite:
            raise InputError(f"{folder} holds {', '.join(present)} of something else; choose "
                             f"another folder with --out, or --overwrite to delete them")

    def files(self) -> list[Path]:
        """What a run may have left here, and --overwrite deletes."""
        return [p for pattern in RUN_FILES for p in sorted(self.folder.glob(pattern))]

    def compare(self) -> None:
        try:
            old = json.loads((self.folder / "recipe.json").read_text())
            changed = [f"{k}: {old.get(k)} there, {self.recipe.get(k)} now"
                       for k in sorted({*old, *self.recipe}) if old.get(k) != self.recipe.get(k)]
        except (ValueError, AttributeError, OSError):
            changed = ["its recipe.json is damaged"]
        if changed:
            raise InputError(f"{self.folder} holds a run with another recipe "
                             f"({'; '.join(changed)}); choose another folder with --out, or start "
                             f"over with --overwrite")

    @contextlib.contextmanager
    def begin(self):
        """Hold the folder for this process; delete what `overwrite` allows, write recipe.json."""
        with open(self.folder / "lock", "w") as handle:
            if fcntl:  # not on Windows
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    raise InputError(f"another process is training in {self.folder}; wait for "
                                     f"it, or choose another folder with --out") from None
            if self.overwrite:
                for path in self.files():
                    path.unlink()
                self.overwrite = False
            self.write("recipe.json", json.dumps(self.recipe, indent=1).encode())
            yield

    def write(self, name: str, content: bytes) -> None:
        write_atomic(self.folder / name, lambda handle: handle.write(content))

    def save(self, name: str, content: dict) -> None:
        write_atomic(self.folder / name, lambda handle: torch.save(content, handle))

    def restore(self, parts: dict) -> tuple[int, set[int]]:
        """Fill parts from the checkpoint, if there is one; (steps done, broken images seen)."""
        path = self.folder / "checkpoint.pth"
        if not path.exists():
            self.cut_log(0)
            return 0, set()
        try:
            state = read_checkpoint(path)
            for name, part in parts.items():
                part.load_state_dict(state[name])
            self.cut_log(state["log_size"])
            self.seconds = state["seconds"]  # of training, over all starts
            print(f"going on at step {state['step']:,} from {path}", flush=True)
            return int(state["step"]), set(state["bad"])
        except (InputError, KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise InputError(f"{path} is damaged ({str(error)[:150]}); delete it to start from "
                             f"the first step") from None

    def log(self, **values) -> None:
        """One JSON object per line, to the screen and to log.jsonl."""
        line = json.dumps({k: float(f"{v:.5g}") if isinstance(v, float) else v
                           for k, v in values.items()})
        print(line, flush=True)
        with open(self.folder / "log.jsonl", "a") as handle:
            handle.write(line + "\n")

    def log_size(self) -> int:
        path = self.folder / "log.jsonl"
        return path.stat().st_size if path.exists() else 0

    def cut_log(self, size: int) -> None:
        """Forget lines written after the checkpoint: those steps are about to be run again."""
        if self.log_size() > size:
            os.truncate(self.folder / "log.jsonl", size)


@contextlib.contextmanager
def stop_requests():
    """Ctrl-C or SIGTERM asks the loop to stop between two steps; a second Ctrl-C kills at once."""
    asked: list[int] = []

    def handler(number, _):
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    old = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for s, previous in old.items():
            signal.signal(s, previous)


# ---------------------------------------------------------------------------------------------
# The loop that both kinds of training share
# ---------------------------------------------------------------------------------------------


def batches(images: Images, sampler, first_step: int, epochs: int, workers: int):
    """uint8 batches (images, asked, used) from a global step to the end of the last epoch."""
    def indices():
        for epoch in range(first_step // len(sampler), epochs):
            sampler.set_epoch(epoch)
            skip = max(first_step - epoch * len(sampler), 0)
            yield from itertools.islice(sampler, skip, None)

    # one loader for all epochs: workers live as long as the run, none starts over at an epoch's end
    return torch.utils.data.DataLoader(images, batch_sampler=indices(), num_workers=workers,
                                       collate_fn=keep, worker_init_fn=quiet_worker,
                                       pin_memory=torch.cuda.is_available())


def keep(batch):
    return batch


@dataclass
class Machine:
    """Where and how a run computes; nothing here changes its result on one kind of device."""

    device: str = "cpu"
    workers: int = 2
    save_every: int = 500     # steps between checkpoints
    log_every: int = 20       # steps between log lines


def loop(run: Run, images: Images, sampler, recipe, parts: dict, take_step, machine: Machine,
         after_epoch=None, collapsed=None) -> None:
    """Run take_step over all batches of all epochs, logging, saving, going on from a checkpoint.

    take_step(step, x, used) -> scalars to log; x is the uint8 batch, used the indices of its
    images. parts: whatever has a state_dict and belongs into the checkpoint. after_epoch(epoch),
    1-based. collapsed(values) -> bool judges each log line. Raises InputError for too many broken
    images; take_step does for a loss that is not finite (`check_finite`).
    """
    last, meter = recipe.epochs * len(sampler), Meter()
    with run.begin(), stop_requests() as stop:
        (first, bad), start = run.restore(parts), time.perf_counter()
        loader = batches(images, sampler, first, recipe.epochs, machine.workers)
        for step, (x, asked, used) in enumerate(meter.waiting(loader), first):
            bad.update(asked[asked != used].tolist())
            check_broken(bad, images.records)
            x = x.to(machine.device, non_blocking=True)
            # stochastic depth draws from the global generator; a key of its own, as equal keys
            # would tie it to the augmentation's draws
            torch.manual_seed(step_generator(recipe.seed, step, 3).initial_seed())
            meter.add(len(x), **take_step(step, x, used))
            done = step + 1
            logs, saves = (done % n == 0 or done == last for n in (machine.log_every,
                                                                   machine.save_every))
            if logs or saves or machine.device == "cpu":  # on a GPU, looking costs time
                check_finite(meter.sums["loss"] + meter.sums.get("grad_norm", 0), step, run)
            if logs:
                values = meter.read(last - done)
                flag = {"warning": "COLLAPSE?"} if collapsed and collapsed(values) else {}
                run.log(epoch=step // len(sampler) + 1, step=done, steps=last, **values,
                        broken_images=len(bad), **flag)
            if after_epoch and done % len(sampler) == 0:
                after_epoch(done // len(sampler))
            if saves or stop:
                run.seconds, start = run.seconds + time.perf_counter() - start, time.perf_counter()
                run.save("checkpoint.pth", {"format": "reid-checkpoint", "step": done,
                                            "bad": sorted(bad), "log_size": run.log_size(),
                                            "seconds": run.seconds,
                                            **{n: p.state_dict() for n, p in parts.items()}})
            if stop:
                sys.exit(f"stopped after step {done:,} of {last:,}; {run.folder}/checkpoint.pth "
                         f"holds it, the same command goes on from there")


def check_finite(value: Tensor | float, step: int, run: Run) -> None:
    """Stop a run whose loss or gradient is NaN or infinite, its weights being as they were."""
    if not math.isfinite(value):
        saved = run.folder / "checkpoint.pth"
        last = f"the last good state is in {saved}" if saved.exists() else "nothing was saved yet"
        raise InputError(f"the loss or its gradient is {float(value)} at step {step}; {last}; "
                         f"start anew with a lower --lr or --no-bf16, and another --out")


def check_broken(bad: set[int], records) -> None:
    if len(bad) > 0.01 * len(records):
        names = ", ".join(records[i].path for i in sorted(bad)[:3])
        raise InputError(f"{len(bad)} of {len(records)} training images cannot be read, more than "
                         f"1 %: {names}; the copy of the dataset is damaged")


class Meter:
    """Means between two log lines, images per second, and the share of time spent waiting."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.sums, self.steps, self.images, self.waited = {}, 0, 0, 0.0
        self.since = time.perf_counter()

    def waiting(self, loader):
        """Pass batches through, counting the time the loop stands still for each."""
        iterator, end = iter(loader), object()
        while True:
            start = time.perf_counter()
            batch = next(iterator, end)
            self.waited += time.perf_counter() - start
            if batch is end:
                return
            yield batch

    def add(self, images: int, **values: Tensor | float) -> None:
        for name, value in values.items():  # summed on the device: reading would wait for the GPU
            value = value.detach() if isinstance(value, Tensor) else value
            self.sums[name] = self.sums.get(name, 0) + value
        self.steps, self.images = self.steps + 1, self.images + images

    def read(self, steps_left: int) -> dict[str, float | str]:
        values = {name: float(total) / self.steps for name, total in self.sums.items()}
        seconds = time.perf_counter() - self.since
        left = seconds / self.steps * steps_left
        values |= {"img_s": round(self.images / seconds, 1),
                   "wait": round(self.waited / seconds, 3),
                   "left": f"{int(left // 3600)}:{int(left % 3600 // 60):02d}:{int(left % 60):02d}"}
        self.reset()
        return values


# ---------------------------------------------------------------------------------------------
# Fine-tuning
# ---------------------------------------------------------------------------------------------


def fine_tune(recipe: Recipe, dataset, run: Run, weights: str | None,
              machine: Machine) -> ReIDModel:
    """Fine-tune on dataset.train, going on from the run's checkpoint; the model, ready to evaluate.

    Raises InputError for too few identities, weights that do not fit, and as `loop` does.
    """
    torch.manual_seed(recipe.seed)
    labels = torch.tensor([r.pid for r in dataset.train])
    sampler = PKSampler(labels, recipe.ids, recipe.images, recipe.seed)
    backbone = build_backbone(recipe.arch, recipe.size, recipe.drop_path, recipe.last_stride)
    model = ReIDModel(backbone, int(labels.max()) + 1, recipe.neck_feat)
    print(load_weights(weights, backbone) if weights else
          "WARNING: random weights (no --weights): the published recipes assume pre-trained ones")
    model.to(machine.device, memory_format=torch.channels_last).train()
    optimizer = make_optimizer(recipe, model)
    transform = FineTuneTransform(*recipe.statistics, noise=recipe.erase == "noise",
                                  erase_area=1 / 3 if recipe.erase == "noise" else 0.4)

    def take_step(step: int, x: Tensor, used: Tensor) -> dict[str, Tensor | float]:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step // len(sampler), group["scale"])
        y = labels[used].to(x.device)                                       # (B,)
        x = transform(x, recipe.seed, step)                                 # (B, 3, H, W) float
        with torch.autocast(x.device.type, torch.bfloat16, enabled=recipe.bf16):
            scores, feature = model(x)                                      # (B, ids), (B, D)
        id_loss = F.cross_entropy(scores.float(), y, label_smoothing=recipe.smoothing)
        triplet = triplet_loss(feature, y, recipe.margin)
        loss = id_loss + triplet
        check_finite(loss.detach(), step, run)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"loss": loss, "id": id_loss, "triplet": triplet,
                "accuracy": (scores.argmax(1) == y).float().mean(),
                "lr": optimizer.param_groups[0]["lr"]}

    loop(run, Images(dataset.train, recipe.size), sampler, recipe,
         {"model": model, "optimizer": optimizer}, take_step, machine)
    return model.eval()


def fine_tune_and_evaluate(recipe: Recipe, dataset, out, overwrite: bool = False,
                           weights: str | None = None, machine: Machine = Machine()):
    """One whole run: train, save model.pth, evaluate, save results.json; evaluate's triple."""
    nameless = [r.path for r in dataset.train[:1_000_000] if r.pid < 0]
    if nameless:
        raise InputError(f"{dataset.name} has training images without identity, first "
                         f"{nameless[0]}; fine-tuning needs names like 0002_c1, unlabelled crops "
                         f"serve --pretrain")
    if weights and overwrite and Path(weights).resolve().parent == Path(out).resolve():
        raise InputError(f"--overwrite would delete {weights}; choose another folder with --out")
    ids = len({r.pid for r in dataset.train})
    run = open_run(out, recipe, dataset, overwrite, machine, weights=weights)
    print(f"  id loss of a network that knows nothing: ln({ids}) = {math.log(max(ids, 1)):.2f}")
    model = fine_tune(recipe, dataset, run, weights, machine)
    mean, std = recipe.statistics
    stored = dataclasses.asdict(recipe) | {"mean": list(mean), "std": list(std),
                                           "dataset": dataset.name}
    run.save("model.pth", {"format": "reid-model", "recipe": stored,
                           "num_ids": model.classifier.out_features, "model": model.state_dict()})
    if not dataset.query:
        print(f"saved {run.folder}/model.pth; {dataset.name} has no queries to evaluate it with")
        return None
    result, q, g = evaluate(model, dataset, stored, workers=machine.workers, device=machine.device,
                            bf16=recipe.bf16)
    numbers = {"mAP": result.mAP, "mAP_market": result.mAPs["market"],
               **{f"rank{k}": float(result.cmc[k - 1]) for k in (1, 5, 10)},
               "valid": result.valid, "queries": result.total,
               "minutes": round(run.seconds / 60, 1)}
    run.write("results.json", json.dumps(numbers, indent=1).encode())
    print(f"{result}\nsaved {run.folder}/model.pth; training took {numbers['minutes']} minutes")
    return result, q, g


def open_run(out, recipe, dataset, overwrite: bool, machine: Machine, **more) -> Run:
    """The run folder for a recipe and the data it is about to see; prints both."""
    check_recipe(recipe)
    described = dataclasses.asdict(recipe) | {"dataset": dataset.name, **more,
                                              "data": dataset.fingerprint()}
    run = Run(out, described, overwrite)
    print(f"run {run.folder}: " + " ".join(f"{k}={v}" for k, v in described.items()))
    print(f"  torch {torch.__version__}, {machine.device}, {torch.get_num_threads()} threads")
    if 0 < recipe.epochs <= recipe.warmup:
        print(f"WARNING: warm-up takes all {recipe.epochs} epochs; --warmup shortens it")
    return run


# ---------------------------------------------------------------------------------------------
# Pre-training
# ---------------------------------------------------------------------------------------------


def pretrain_schedule(recipe: PersonViTRecipe, step: int, epoch_steps: int) -> dict[str, float]:
    """lr, weight_decay, momentum, teacher_temp of a 0-based step [iBOT: per step, not epoch]."""
    steps, warmup = recipe.epochs * epoch_steps, recipe.warmup * epoch_steps
    peak = recipe.lr * recipe.batch / 256
    if step < warmup:  # iBOT's ramp reaches the peak on its last step
        lr = peak * step / max(warmup - 1, 1)
    else:
        lr = cosine((step - warmup) / max(steps - warmup, 1), peak, recipe.min_lr)
    epoch, t = step // epoch_steps, step / steps
    warm = 1.0 if epoch >= recipe.temp_warmup else epoch / max(recipe.temp_warmup - 1, 1)  # [iBOT]
    return {"lr": lr, "weight_decay": cosine(t, recipe.weight_decay, recipe.weight_decay_end),
            "momentum": cosine(t, recipe.momentum, 1.0),
            "teacher_temp": (1 - warm) * recipe.teacher_temp + warm * recipe.teacher_temp_end}


def matrix_groups(model: torch.nn.Module) -> list[dict]:
    """Two groups for AdamW: decay acts on tensors of two or more dimensions, so not on biases and
    norms, yet on [CLS], positions and a trained gain of prototypes [iBOT]."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in trained if p.ndim > 1], "decay": 1.0},
            {"params": [p for p in trained if p.ndim <= 1], "decay": 0.0, "weight_decay": 0.0}]


def clip_each(parameters, limit: float) -> Tensor:
    """Scale the gradient of each tensor to a norm of at most `limit`; their global norm before.

    Per tensor, as iBOT does: one exploding layer does not silence all others.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    torch._foreach_mul_(grads, (limit / (norms + 1e-6)).clamp(max=1).unbind())
    return norms.norm()


def pretrain(recipe: PersonViTRecipe, dataset, run: Run, machine: Machine, keep_every: int = 0,
             monitor=None, monitor_every: int = 10) -> PersonViT:
    """Pre-train on dataset.train without labels, going on from the run's checkpoint.

    keep_every: epochs between backbones kept apart. monitor: a labelled dataset whose mAP by plain
    features is logged every `monitor_every` epochs. Raises InputError as `loop` does.
    """
    torch.manual_seed(recipe.seed)
    if torch.device(machine.device).type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for the prototypes' float32 products
    sampler = ShuffleSampler(len(dataset.train), recipe.batch, recipe.seed)
    backbone = build_backbone(recipe.arch, recipe.size, recipe.drop_path)
    if monitor and not (monitor.query and monitor.gallery):
        raise InputError(f"--monitor {monitor.name} has no query or no gallery images")
    smallest = backbone.patch_size * (2 if recipe.local_crops or min(backbone.grid) < 2 else 1)
    if min(recipe.size) < smallest:
        raise InputError(f"--size {recipe.size[0]}x{recipe.size[1]} is too small: masks and local "
                         f"crops, half as large, need {smallest} pixels at least")
    model = PersonViT(backbone, recipe.prototypes, recipe.hidden, recipe.bottleneck,
                      recipe.shared_head, recipe.norm_last_layer).to(machine.device).train()
    optimizer = torch.optim.AdamW(matrix_groups(model), fused=True)
    multi_crop = MultiCrop(recipe.size, recipe.local_crops, recipe.global_scale, recipe.local_scale,
                           recipe.aspect)

    def take_step(step: int, x: Tensor, used: Tensor) -> dict[str, Tensor | float]:
        now = pretrain_schedule(recipe, step, len(sampler))
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = now["lr"], now["weight_decay"] * group["decay"]
        views = multi_crop(x, recipe.seed, step)
        masks = [draw_masks(2, *backbone.grid, step_generator(recipe.seed, step, 2, i))
                 for i in range(len(x))]
        views["masks"] = torch.stack(masks, dim=1)                          # (2, B, rows, columns)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=recipe.bf16):
            losses = model(views, now["teacher_temp"], now["teacher_temp"], recipe.student_temp)
        optimizer.zero_grad()
        losses["total"].backward()
        norm = clip_each(model.parameters(), recipe.clip)
        # fused AdamW skips a step whose gradient is not finite, without the host having to look;
        # `loop` looks before it logs or saves, and stops the run
        optimizer.found_inf = 1 - (losses["total"] + norm).isfinite().float()
        if step // len(sampler) < recipe.freeze_last_layer:
            for name, p in model.named_parameters():
                if "last_layer" in name:
                    p.grad = None
        optimizer.step()
        model.update_teacher(now["momentum"])
        return {"loss": losses.pop("total"), **losses, "ln_K": math.log(recipe.prototypes),
                "grad_norm": norm, **now}

    def after_epoch(epoch: int) -> None:
        if keep_every and epoch % keep_every == 0:
            save_backbone(run, f"backbone_e{epoch:04d}.pth", recipe, model, epoch)
        if monitor and epoch % monitor_every == 0:
            result, _, _ = evaluate(model.backbone_for_export(), monitor, backbone_io(recipe),
                                    workers=machine.workers, device=machine.device)
            run.log(epoch=epoch, monitor=monitor.name, mAP=result.mAP, rank1=float(result.cmc[0]))

    loop(run, Images(dataset.train, recipe.size), sampler, recipe,
         {"model": model, "optimizer": optimizer}, take_step, machine, after_epoch, model.collapsed)
    save_backbone(run, "backbone.pth", recipe, model, recipe.epochs)
    return model


def backbone_io(recipe: PersonViTRecipe) -> dict:
    """How images enter a pre-trained backbone."""
    return {"size": recipe.size, "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}


def save_backbone(run: Run, name: str, recipe: PersonViTRecipe, model, epoch: int) -> None:
    run.save(name, {"format": "reid-backbone", "recipe": dataclasses.asdict(recipe), "epoch": epoch,
                    **backbone_io(recipe), "backbone": model.backbone_for_export().state_dict()})


# ---------------------------------------------------------------------------------------------
# The demo and the study
# ---------------------------------------------------------------------------------------------


def study(seeds: list[int], data_root: str, out: Path, overwrite: bool, machine: Machine) -> None:
    """Synthetic people, from nothing to a table and a picture; mean and spread over seeds.

    Every trained row has the same fine-tuning; rows differ in the network and in where it starts.
    """
    start, rows = time.perf_counter(), {}
    dataset = load_dataset("synthetic", data_root)
    labels = [([r.pid for r in part], [r.camid for r in part])
              for part in (dataset.query, dataset.gallery)]
    features = [colour_histograms(part) for part in (dataset.query, dataset.gallery)]
    rows["colour histogram"] = [rank_features(features[0], *labels[0], features[1], *labels[1])]
    for seed in seeds:
        torch.manual_seed(seed)
        plain = recipe_for("synthetic")
        reading = {"size": plain.size, "mean": plain.statistics[0], "std": plain.statistics[1]}
        # without BNNeck: a fresh one would change no ranking
        untrained, _, _ = evaluate(build_backbone(plain.arch, plain.size), dataset, reading,
                                   workers=machine.workers)
        rows.setdefault(f"{plain.arch}, untrained", []).append(untrained)
        before = dataclasses.replace(pretrain_recipe_for("synthetic"), seed=seed)
        run = open_run(out / f"personvit_{seed}", before, dataset, overwrite, machine)
        pretrain(before, dataset, run, machine)
        for arch, origin, weights in (
                (plain.arch, "random weights", None), (before.arch, "random weights", None),
                (before.arch, "PersonViT", str(run.folder / "backbone.pth"))):
            recipe = dataclasses.replace(recipe_for("synthetic", arch), seed=seed)
            name = f"{arch}, from {origin}"
            folder = out / f"{name.replace(', from ', '_').replace(' ', '_')}_{seed}"
            done = fine_tune_and_evaluate(recipe, dataset, folder, overwrite, weights, machine)
            rows.setdefault(name, []).append(done[0])
            if done[0].mAP == max(r.mAP for results in rows.values() for r in results):
                best, best_ranking = name, done
    draw_ranks(out / "ranks.png", dataset, *best_ranking)
    print_rows(rows, f"synthetic people, {len(dataset.query)} queries, seeds {seeds}")
    minutes = (time.perf_counter() - start) / 60
    print(f"rank list of {best} in {out / 'ranks.png'}; {minutes:.1f} minutes in all")


def print_rows(rows: dict, title: str) -> None:
    """One line per method: mean of mAP, rank-1, 5, 10, with the standard deviation over seeds."""
    heads = ("mAP", "rank-1", "rank-5", "rank-10")
    print(f"\n{title:<46}" + "".join(f"{head:>14}" for head in heads))
    for name, results in rows.items():
        values = np.array([[r.mAP, *(r.cmc[k - 1] for k in (1, 5, 10))] for r in results]) * 100
        spread = values.std(0, ddof=1) if len(values) > 1 else None
        cells = [f"{v:.1f} %" if spread is None else f"{v:.1f} +- {s:.1f}"
                 for v, s in zip(values.mean(0), values.mean(0) if spread is None else spread)]
        print(f"  {name:<44}" + "".join(f"{cell:>14}" for cell in cells))


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def pair(kind):
    """A parser of two numbers, written 256x128."""
    def parse(text: str):
        try:
            first, second = map(kind, text.split("x"))
            return first, second
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: write two numbers like 256x128") from None
    return parse


def number_or_none(text: str) -> float | None:
    try:
        return None if text.lower() == "none" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'none'") from None


PARSERS = {tuple[int, int]: pair(int), tuple[float, float]: pair(float),
           float | None: number_or_none}


def make_parser(recipe_class=Recipe) -> argparse.ArgumentParser:
    """All flags: those of every run, and a flag for each field of the recipe."""
    parser = argparse.ArgumentParser(
        description="Train on one dataset. Without --pretrain: fine-tune for ReID, evaluate, save.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--dataset", default="synthetic", metavar="NAME",
        help=f"{', '.join(NAMES)} or the path of any folder")
    add("--data-root", default="data", help="folder that holds the datasets")
    add("--train-only", action="store_true", help="MSMT17 without its val list")
    add("--weights", metavar="FILE", help="pre-trained backbone; without it weights are random",
        default=argparse.SUPPRESS)
    add("--out", metavar="DIR", help="run folder; usually runs/<dataset>_<arch>",
        default=argparse.SUPPRESS)
    add("--overwrite", action="store_true", help="start over in a used run folder")
    add("--device", type=device_name, default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda")
    add("--workers", type=int, default=min(os.cpu_count() or 1, 8), help="decoding processes")
    add("--save-every", type=int, default=500, metavar="STEPS", help="checkpoint interval")
    add("--demo", action="store_true", help="everything on synthetic people, one seed")
    add("--study", action="store_true", help="the demo's table over three seeds")
    add("--pretrain", choices=("personvit",), help="pre-train without labels; ends in backbone.pth")
    add("--keep-every", type=int, default=0, metavar="EPOCHS", help="pre-training: keep backbones")
    add("--monitor", metavar="NAME", help="pre-training: labelled dataset to watch mAP on")
    add("--monitor-every", type=int, default=10, metavar="EPOCHS", help="... this often")
    group = parser.add_argument_group("recipe", "defaults depend on dataset and arch")
    for name, kind in typing.get_type_hints(recipe_class).items():
        rule = recipe_class.__dataclass_fields__[name].metadata
        choices = f" ({', '.join(map(str, rule['choices']))})" if rule["choices"] else ""
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {
            "type": PARSERS.get(kind, kind), "metavar": name.upper()}
        group.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS,
                           help=rule["help"] + choices, **how)
    return parser


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict]:
    """The flags of a run, and those fields of its recipe that were given."""
    pretrain = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    pretrain.add_argument("--pretrain")
    kind = PersonViTRecipe if pretrain.parse_known_args(argv)[0].pretrain else Recipe
    parser = make_parser(kind)
    args = parser.parse_args(argv)
    given = {k: v for k, v in vars(args).items() if k in kind.__dataclass_fields__}
    if args.workers < 0 or args.save_every < 1 or args.monitor_every < 1:
        parser.error("--workers is at least 0, --save-every and --monitor-every at least 1")
    other = given or args.dataset != "synthetic" or args.pretrain or "weights" in args
    if (args.demo or args.study) and other:
        parser.error("--demo and --study have their own recipes; leave them out to choose one")
    if args.pretrain and "weights" in args:
        parser.error("--weights is for fine-tuning; pre-training starts from random weights")
    return args, given


def main(argv: list[str] | None = None) -> None:
    args, given = parse_args(argv)
    machine = Machine(args.device, args.workers, args.save_every)
    if args.demo or args.study:
        # small images, kept in memory after the first epoch: worker processes would not pay
        machine.workers = 0
        seeds, name = ([0, 1, 2], "study") if args.study else ([0], "demo")
        out = Path(getattr(args, "out", f"runs/{name}"))
        study(seeds, args.data_root, out, args.overwrite, machine)
        return
    recipe_of = pretrain_recipe_for if args.pretrain else recipe_for
    recipe = recipe_of(args.dataset, given.pop("arch", None))
    recipe = dataclasses.replace(recipe, **({"bf16": args.device != "cpu"} | given))
    check_recipe(recipe)
    dataset = load_dataset(args.dataset, args.data_root, args.train_only)
    name = "_".join(filter(None, (Path(args.dataset).name, args.pretrain, recipe.arch)))
    out = getattr(args, "out", f"runs/{name}")
    if args.pretrain:
        monitor = load_dataset(args.monitor, args.data_root) if args.monitor else None
        run = open_run(out, recipe, dataset, args.overwrite, machine, pretrain=args.pretrain)
        pretrain(recipe, dataset, run, machine, args.keep_every, monitor, args.monitor_every)
        print(f"saved {run.folder}/backbone.pth; fine-tune it with: python train.py --dataset "
              f"market1501 --arch {recipe.arch} --weights {run.folder}/backbone.pth")
        return
    fine_tune_and_evaluate(recipe, dataset, out, args.overwrite, getattr(args, "weights", None),
                           machine)


if __name__ == "__main__":
    command_line(main)
