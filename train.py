"""Training: fine-tuning for ReID, the two training loops, and the command line of all training.

    pretrain      crops -> views -> losses of a paper's objective -> optimiser -> teacher
    fine_tune     P identities x K images -> backbone -> feature f -> BNNeck -> classifier

        L = cross-entropy(classifier(BN(f)), identity) + triplet(f)           weights 1 : 1

The identity loss knows only training identities; the triplet loss shapes distances, which is what
ranks new people. Three steps equal the reference code's (tests/golden/finetune_3steps).

A run lives in its folder under runs/: recipe.json, log.jsonl, checkpoint_<step>.pth, and at the end
its weights. The same command goes on where the folder stopped. Under torchrun several processes
share each batch, and the first alone writes. In a step the main process only launches: what is
random in views and masks was drawn by the workers (data.py; `make_loader`, in evaluate.py, starts
them), and it looks at what the device has computed when a line of the log, a checkpoint or a look
at the mAP is due, and at no other time.

Read `pretrain`, then `fine_tune`, then `Run`.
"""

import argparse
import atexit
import contextlib
import hashlib
import inspect
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import sysconfig
import time
import warnings
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import ClassVar, Literal, get_args, get_origin, get_type_hints

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data import (IMAGENET_MEAN, IMAGENET_STD, LUPERSON, NAMES, ContrastViews, FineTuneTransform,
                  Images, InputError, MultiCrop, PKSampler, ShuffleSampler, command_line, cores,
                  erasing_noise, from_step, limit_of, load_dataset, some_identities,
                  step_generator, write_atomic)
from evaluate import (ARCHS, ReIDModel, bfloat16_is_right, build_backbone, device_name, evaluate,
                      everyones, load_weights, make_loader, read_checkpoint, similarity_ranges)
from personvit import PersonViTRecipe, cosine
from upreid import UPReIDRecipe

# ---------------------------------------------------------------------------------------------
# Fine-tuning: recipe, losses, schedule
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Fine-tuning, a line per value; PersonViT's published recipe for ViT-S [PersonViT code],
    unless another source is named."""

    arch: Literal[tuple(ARCHS)] = "vit_small"  # backbone
    size: tuple[int, int] = (256, 128)  # image height x width
    epochs: int = 120                   # passes over the training images; 0 only evaluates
    ids: int = 16                       # P, identities per batch
    images: int = 4                     # K, images per identity
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"  # sgd has momentum 0.9
    lr: float = 4e-4                    # peak learning rate, for batch 64 and pre-trained weights
    bias_lr: float = 2.0                # factor on the learning rate of biases
    weight_decay: float = 1e-4          # on every parameter
    schedule: Literal["cosine", "steps"] = "cosine"  # steps: x 0.1 after 1/3, 7/12 of epochs [BoT]
    warmup: int = 20                    # epochs of warm-up from 1 %; shorter runs miss the peak
    smoothing: float = 0.0              # label smoothing of the cross-entropy
    margin: float | None = None         # of the triplet; none: log(1 + exp(d_ap - d_an))
    labelled: float = 1.0               # share of the identities that are trained on [ours]
    drop_path: float = 0.1              # stochastic depth of the last ViT block
    last_stride: Literal[1, 2] = 1      # stride of the last ResNet stage [BoT]
    erase: Literal["noise", "mean"] = "noise"        # what random erasing leaves
    norm: Literal["half", "imagenet"] = "half"       # mean and std: all 0.5, or ImageNet's
    neck_feat: Literal["before", "after"] = "before"  # feature that ranks: before or after BNNeck
    seed: int = 1234                    # of everything random
    bf16: bool = False                  # bfloat16 in the network; on by default on a GPU

    # "Bag of Tricks" for ResNet-50 (reid-strong-baseline): network, neck and last stride are its
    # paper's, and the losses but for its centre loss; the numbers are from memory, to be checked
    # against its configuration files. [BoT]
    BAG_OF_TRICKS: ClassVar = dict(optimizer="adam", lr=3.5e-4, bias_lr=1.0, weight_decay=5e-4,
                                   schedule="steps", warmup=10, smoothing=0.1, margin=0.3,
                                   erase="mean", norm="imagenet", neck_feat="after")
    # Small nets from random weights on a CPU in minutes. With a margin of 0.3 a ViT's features stay
    # nearly parallel (cosines above 0.999); the BNNeck subtracts their mean, hence "after". [ours]
    LAPTOP: ClassVar = dict(size=(128, 64), epochs=24, optimizer="adamw", lr=1e-3, bias_lr=1.0,
                            weight_decay=0.05, schedule="cosine", warmup=3, smoothing=0.1,
                            margin=0.3, neck_feat="after")

    @classmethod
    def preset(cls, dataset: str, arch: str | None = None) -> "Recipe":
        """The recipe for a dataset's name and a backbone; arch=None: the usual one."""
        arch = arch or ("resnet_tiny" if dataset == "synthetic" else "vit_small")
        values = cls.BAG_OF_TRICKS if arch.startswith("resnet") else {}
        if dataset == "synthetic" or arch in ("vit_mini", "resnet_tiny"):
            values = values | cls.LAPTOP
        elif (dataset, arch) == ("market1501", "vit_base"):
            values = dict(warmup=5)  # its configuration leaves the entry out [PersonViT code]
        return cls(arch=arch, **values)


NORMS = {"half": ((0.5,) * 3, (0.5,) * 3), "imagenet": (IMAGENET_MEAN, IMAGENET_STD)}  # mean, std


def hardest_pairs(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean distance of each anchor to its farthest positive and nearest negative: (B,), (B,).

    features (B, D), not normalised (unit vectors are at most 2 apart, so that the soft margin could
    not fall below log(1 + e^-2) = 0.127); labels (B,). The anchor counts among its positives, at
    distance 0, so that a lone image is no special case; where all labels are equal, which
    `PKSampler` excludes, the nearest negative is infinitely far away.
    """
    x, exact = features.float(), "donot_use_mm_for_euclid_dist"  # |x|^2 - 2xy + |y|^2 cancels
    distance = torch.cdist(x, x, compute_mode=exact)                          # (B, B)
    same = labels[:, None] == labels[None, :]                                 # (B, B)
    return (distance.masked_fill(~same, -torch.inf).amax(1),                  # d_ap
            distance.masked_fill(same, torch.inf).amin(1))                    # d_an


def triplet_loss(features: Tensor, labels: Tensor, margin: float | None = None) -> Tensor:
    """Batch-hard triplet loss (Hermans et al. 2017) of features (B, D), labels (B,): a scalar.

    margin=None: soft margin, mean log(1 + exp(d_ap - d_an)); 0.693 = log 2 means positives are as
    far as negatives, where a collapsed network stays. Else mean max(0, d_ap - d_an + margin).
    """
    d_ap, d_an = hardest_pairs(features, labels)
    return F.softplus(d_ap - d_an).mean() if margin is None else F.relu(d_ap - d_an + margin).mean()


def learning_rate(recipe: Recipe, epoch: int, scale: float = 1.0) -> float:
    """Learning rate of a 0-based epoch; scale multiplies the peak (biases).

    The cosine runs over all epochs; warm-up replaces its first ones, so that the cosine takes over
    below the peak. Start and end are fractions of the unscaled rate, for biases too [PersonViT
    code].
    """
    peak, start, end = recipe.lr * scale, 0.01 * recipe.lr, 0.002 * recipe.lr
    if epoch < recipe.warmup:
        return start + (peak - start) * epoch / recipe.warmup
    t = epoch / recipe.epochs
    steps = peak * 0.1 ** ((t >= 1 / 3) + (t >= 7 / 12))
    return cosine(t, peak, end) if recipe.schedule == "cosine" else steps


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """Two groups, weights and biases; `scale` is the factor on the scheduled learning rate."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for n, p in named if not n.endswith("bias")], "scale": 1.0},
              {"params": [p for n, p in named if n.endswith("bias")], "scale": recipe.bias_lr}]
    kind = getattr(torch.optim, {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}[recipe.optimizer])
    more = {"momentum": 0.9} if recipe.optimizer == "sgd" else {}
    return kind(groups, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True, **more)


class FineTuning(nn.Module):
    """The losses of a `ReIDModel`: images (B, 3, H, W), identities (B,) -> scalars.

    Of several processes each computes the loss of all n = B x processes images, as the hardest pair
    may lie in two of them. `reference` and `warning` serve the log, as those of PersonViT and
    UPReID do.
    """

    def __init__(self, model: ReIDModel, recipe: Recipe):
        super().__init__()
        self.model, self.smoothing, self.margin = model, recipe.smoothing, recipe.margin
        self.reference = {"ln_ids": math.log(model.classifier.out_features)}

    def forward(self, x: Tensor, pids: Tensor) -> dict[str, Tensor]:
        feature, y = all_rows(self.model.base(x).float()), all_rows(pids)    # (n, D), (n,)
        scores, feature = self.model.head(feature)                           # (n, ids), (n, D)
        id_loss = F.cross_entropy(scores.float(), y, label_smoothing=self.smoothing)
        triplet = triplet_loss(feature, y, self.margin)
        return {"total": id_loss + triplet, "id": id_loss, "triplet": triplet,
                "accuracy": (scores.argmax(1) == y).float().mean()}

    # of a collapse the triplet loss tells, by staying at its margin or at log 2
    warning = staticmethod(lambda values: "")


def all_rows(x: Tensor) -> Tensor:
    """Rows of all processes, (B, ...) -> (n, ...), in their order, with gradient for one's own."""
    if not dist.is_initialized():
        return x
    rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, x.detach().contiguous())
    rows[dist.get_rank()] = x
    if x.requires_grad:
        # each process has the gradient of the whole loss by its own rows, all these gradients are
        # to be added; DistributedDataParallel takes their mean instead
        x.register_hook(lambda grad: grad * dist.get_world_size())
    return torch.cat(rows)


# ---------------------------------------------------------------------------------------------
# The loops
# ---------------------------------------------------------------------------------------------

# all that chooses between the papers: what is trained and how, and what it sees
METHODS = {
    "personvit": (PersonViTRecipe, lambda r: MultiCrop(r.size, r.local_crops, r.global_scale,
                                                       r.local_scale, r.aspect)),
    "upreid": (UPReIDRecipe, lambda r: ContrastViews(r.size, r.weight_global > 0,
                                                     r.stripes if r.weight_local else 0))}


def pretrain(method: str, recipe: PersonViTRecipe | UPReIDRecipe, dataset, run: "Run",
             machine: "Machine", weights: str | None = None, monitor=None) -> nn.Module:
    """Pre-train on dataset.train without labels, going on from the run's checkpoint. Returns the
    objective.

    weights: where both networks start, if not at random. monitor: a labelled dataset whose mAP by
    plain features is logged. Raises InputError for a recipe that does not fit together, too few
    images, too many broken ones, and a loss that is not finite.
    """
    # what is trained, by what, on what
    torch.manual_seed(recipe.seed)
    try:
        objective = recipe.build(machine.world * machine.accumulate)
    except ValueError as error:  # the method files know nothing of InputError
        raise InputError(str(error)) from None
    for net in networks(objective) if weights else ():
        print(load_weights(weights, net))
    objective.to(machine.device, memory_format=torch.channels_last).train()
    optimizer, transform = recipe.optimizer(objective), METHODS[method][1](recipe)
    make_views = compiled(objective, transform, machine)
    sampler = ShuffleSampler(len(dataset.train), recipe.batch, recipe.seed, machine.rank,
                             machine.world, machine.accumulate)
    losses_of, meter = distributed(objective, machine), Meter(machine, dataset.train)
    parts = {"model": objective, "optimizer": optimizer}  # of a checkpoint
    # from here on the folder is this run's
    with run.begin(), stop_requests() as stop:
        first, last = run.restore(parts), recipe.epochs * len(sampler)
        crops = Images(dataset.train, transform, recipe.seed, recipe.draw)
        recipe = checked(recipe, objective, crops, sampler, run, machine)
        loader = meter.waiting(make_loader(crops, from_step(sampler, first, last), machine.workers))
        for step in range(first, last):
            epoch = step // len(sampler)
            if step % len(sampler) == 0:
                keep_and_watch(objective, epoch, transform, recipe, monitor, run, machine)
                meter.reset()
            rates, now = recipe.schedule(step, len(sampler))      # of the optimiser, of the model
            for group in optimizer.param_groups:
                group.update(lr=rates["lr"], weight_decay=rates["weight_decay"] * group["decay"])
            begin_step(recipe.seed, step, machine)
            # a step may be cut into passes, whose gradients add up, for less memory
            for passes_left in reversed(range(machine.accumulate)):
                images, drawn = next(loader)
                # "others" stay on the CPU: masks, whose patches are counted there
                views = make_views(*on_device(machine, images, drawn["numbers"])) | drawn["others"]
                with network_pass(losses_of, machine, recipe.bf16, passes_left):
                    losses = losses_of(views, **now)
                (losses["total"] / machine.accumulate).backward()
                meter.add(losses, 1 / machine.accumulate)
            # clip or freeze, as the recipe says; the optimiser's step; then the teacher follows
            meter.add({"grad_norm": objective.finish_gradients(epoch)})
            optimizer.step()
            optimizer.zero_grad()
            objective.update_teacher(**now)                       # no gradient reaches the teacher
            log_save_stop(run, meter, parts, objective, stop, step, len(sampler), last, rates | now)
        keep_and_watch(objective, recipe.epochs, transform, recipe, monitor, run, machine)
        run.save("backbone.pth", exported(objective, recipe.epochs, transform, recipe))
    return objective


def exported(objective: nn.Module, epoch: int, transform, recipe) -> dict:
    """The backbone that is fine-tuned, with all that tells how to use it."""
    return {"format": "reid-backbone", "recipe": asdict(recipe), "epoch": epoch,
            "size": transform.size, "mean": transform.mean, "std": transform.std,
            "backbone": objective.backbone_for_export().state_dict()}


def keep_and_watch(objective, epoch: int, transform, recipe, monitor, run, machine) -> None:
    """Between two epochs: keep the backbone apart, and log the mAP of its plain features (losses
    say little of what is learnt), where one or the other is due after `epoch` epochs."""
    content = exported(objective, epoch, transform, recipe)
    if machine.keep_every and epoch and epoch % machine.keep_every == 0:
        run.save(f"backbone_e{epoch:04d}.pth", content)
    # by the first process alone: the batch norms of others have running statistics of their own
    due = epoch % machine.monitor_every == 0 or epoch == recipe.epochs
    if monitor and due and not machine.rank:
        result, _, _ = evaluate(objective.backbone_for_export(), monitor, content,
                                workers=machine.workers, device=machine.device)
        objective.train()  # what is exported may be what is trained
        run.log(epoch=epoch, monitor=monitor.name, mAP=result.mAP, rank1=float(result.cmc[0]))


def fine_tune(recipe: Recipe, dataset, run: "Run", weights: str | None,
              machine: "Machine") -> ReIDModel:
    """Fine-tune on dataset.train, going on from the run's checkpoint. Returns the model, ready to
    evaluate.

    Raises InputError for too few identities, weights that do not fit, too many broken images, and a
    loss that is not finite.
    """
    # what is trained, by what, on what
    torch.manual_seed(recipe.seed)
    sampler = PKSampler([r.pid for r in dataset.train], recipe.ids, recipe.images, recipe.seed,
                        machine.rank, machine.world)
    backbone = build_backbone(recipe.arch, recipe.size, recipe.drop_path, recipe.last_stride)
    model = ReIDModel(backbone, len(sampler.members), recipe.neck_feat)
    print(load_weights(weights, backbone) if weights else
          "WARNING: random weights (no --weights): the published recipes assume pre-trained ones")
    if machine.world > 1 and machine.device == "cpu" and recipe.arch.startswith("resnet"):
        raise InputError("batch norm over several processes needs GPUs: fine-tune a ResNet on a "
                         "CPU in one process, without torchrun or GPUS=")
    if machine.world > 1:
        nn.SyncBatchNorm.convert_sync_batchnorm(backbone)  # the neck sees all rows as it is
    model.to(machine.device, memory_format=torch.channels_last).train()
    optimizer, objective = make_optimizer(recipe, model), FineTuning(model, recipe)
    transform = FineTuneTransform(recipe.size, *NORMS[recipe.norm], recipe.erase == "noise")
    augment = compiled(model, transform, machine)
    losses_of, meter = distributed(objective, machine), Meter(machine, dataset.train)
    parts = {"model": model, "optimizer": optimizer}  # of a checkpoint
    # from here on the folder is this run's
    with run.begin(), stop_requests() as stop:
        first, last = run.restore(parts), recipe.epochs * len(sampler)
        crops = Images(dataset.train, transform, recipe.seed)
        recipe = checked(recipe, model, crops, sampler, run, machine)
        loader = meter.waiting(make_loader(crops, from_step(sampler, first, last), machine.workers))
        for step in range(first, last):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, step // len(sampler), group["scale"])
            begin_step(recipe.seed, step, machine)
            images, drawn = next(loader)
            images, numbers, pids = on_device(machine, images, drawn["numbers"], drawn["pids"])
            noise = None if recipe.erase == "mean" else erasing_noise(
                images, recipe.seed, step, machine.rank, machine.world)
            x = augment(images, numbers, noise)                              # (B, 3, H, W) float
            with network_pass(losses_of, machine, recipe.bf16):
                losses = losses_of(x, pids)
            losses["total"].backward()
            meter.add(losses | {"grad_norm": nn.utils.get_total_norm(
                [p.grad for p in model.parameters() if p.grad is not None])})
            optimizer.step()
            optimizer.zero_grad()
            log_save_stop(run, meter, parts, objective, stop, step, len(sampler), last,
                          {"lr": optimizer.param_groups[0]["lr"]})
        run.save("model.pth", {"format": "reid-model", "recipe": stored(recipe, dataset),
                               "model": model.state_dict()})
    return model.eval()


def fine_tune_and_evaluate(recipe: Recipe, dataset, out, overwrite: bool, weights: str | None,
                           machine: "Machine"):
    """One whole run: train, save model.pth, evaluate, save results.json; what that file holds, or
    None without queries. A run that was finished before is not run again."""
    if any(r.pid < 0 for r in dataset.train):
        raise InputError(f"{dataset.root} has images without identity; fine-tuning needs names "
                         f"like 0002_c1 or a folder for each person; else they serve --pretrain")
    dataset = replace(dataset, train=some_identities(dataset.train, recipe.labelled, recipe.seed))
    run = open_run(out, recipe, dataset, overwrite, machine, weights=weights)
    # if damaged, evaluate again
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        numbers = json.loads((run.folder / "results.json").read_text())
        if 0 <= numbers["mAP"] <= 1 and not overwrite:
            print(f"{run.folder} is finished; --overwrite starts over")
            return numbers
    model = fine_tune(recipe, dataset, run, weights, machine)
    print(f"saved {run.folder}/model.pth; training took {run.seconds / 60:.1f} minutes")
    if not (dataset.query and dataset.gallery):
        return print(f"{dataset.name} has no queries, or no gallery, to evaluate it with")
    result, q, g = evaluate(model, dataset, stored(recipe, dataset), workers=machine.workers,
                            device=machine.device, rank=machine.rank, world=machine.world,
                            bf16=recipe.bf16 and machine.device != "cpu")
    numbers = result.numbers() | {"similarity": similarity_ranges(q, g),
                                  "minutes": round(run.seconds / 60, 1)}
    run.compare()  # the folder may have been taken over meanwhile ...
    (run.folder / "model.pth").stat()  # ... by the same recipe with --overwrite
    run.save("results.json", json.dumps(numbers, indent=1).encode())
    print(result)
    return numbers


def stored(recipe: Recipe, dataset) -> dict:
    """What model.pth says of itself."""
    return asdict(recipe) | dict(zip(("mean", "std"), NORMS[recipe.norm]), dataset=dataset.name)


# ---------------------------------------------------------------------------------------------
# What both loops call
# ---------------------------------------------------------------------------------------------


def on_device(machine: "Machine", *tensors: Tensor) -> list[Tensor]:
    """Copies that are under way while Python goes on, as the workers' memory is pinned."""
    return [x.to(machine.device, non_blocking=True) for x in tensors]


def compiled(module: nn.Module, make_views, machine: "Machine"):
    """`make_views` as one compiled graph, and in place each network of the module, one for each
    shape of its input: a GPU would else wait for Python to launch operation after operation. Heads,
    losses and networks whose batch norms share statistics among processes stay as they are: how
    many patches are hidden differs from step to step."""
    if not machine.backend:
        return make_views
    how = {"backend": machine.backend, "fullgraph": True, "dynamic": False}
    for net in networks(module):
        # SyncBatchNorm makes no graph (PyTorch's issue 156680)
        if not any(isinstance(m, nn.SyncBatchNorm) for m in net.modules()):
            net.forward_features = torch.compile(net.forward_features, **how)
    return torch.compile(make_views.__call__, **how)


def networks(module: nn.Module) -> list[nn.Module]:
    """Its backbones: both of a pre-training, the one of a fine-tuning."""
    return [m for m in module.modules() if hasattr(m, "forward_features")]


def checked(recipe, module: nn.Module, crops: Images, sampler, run: "Run", machine: "Machine"):
    """The recipe, in float32 where this machine's bfloat16 is wrong for what the networks will see.
    The run's machine.json says what was used: it does not decide whether a run may go on."""
    if recipe.bf16 and machine.device == "cpu":
        images, drawn = crops.__getitems__(next(iter(sampler)))
        seen = crops.views(images, drawn["numbers"])
        seen = seen.values() if isinstance(seen, dict) else [seen]
        recipe = replace(recipe, bf16=bfloat16_is_right(networks(module), seen))
        module.train()
        if not recipe.bf16:
            print("WARNING: bfloat16 is wrong on this processor: for a shape of this run features "
                  "differ from float32's by far more than rounding; going on in float32")
    used = {"torch": torch.__version__, "device": machine.device, "bf16": recipe.bf16}
    run.save("machine.json", json.dumps(used).encode())
    return recipe


def begin_step(seed: int, step: int, machine: "Machine") -> None:
    """Set the device's own generator, from which stochastic depth draws; and tell CUDA graphs, if
    they are wanted (docs/long-runs.md), that they may write over what the last step computed."""
    torch.manual_seed(step_generator(seed, step, machine.rank, 2).initial_seed())
    if machine.backend:
        torch.compiler.cudagraph_mark_step_begin()


def distributed(module: nn.Module, machine: "Machine") -> nn.Module:
    """The module itself, or one that averages its gradients over all processes."""
    # PyTorch 2.14 has another name for it, 2.6 only this one
    warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
    # inputs stay where they are (masks on the CPU); buffers stay each process's own
    return module if machine.world == 1 else nn.parallel.DistributedDataParallel(
        module, broadcast_buffers=False)


@contextlib.contextmanager
def network_pass(model: nn.Module, machine: "Machine", bf16: bool, passes_left: int = 0):
    """A forward in bfloat16 if wanted, whose gradients stay here while more passes are to come."""
    stay = model.no_sync() if machine.world > 1 and passes_left else contextlib.nullcontext()
    with stay, torch.autocast(machine.device.split(":")[0], torch.bfloat16, enabled=bf16):
        yield


def log_save_stop(run: "Run", meter: "Meter", parts: dict, objective: nn.Module, stop: list,
                  step: int, epoch_steps: int, last: int, more: dict) -> None:
    """The end of a step: write what is due, a line of the log (at the end of each epoch, too) or a
    checkpoint, never without a line before it; and end the process if it was asked to. Looks at the
    device at no other time."""
    done, machine = step + 1, meter.machine
    stopping = any(everyones(bool(stop)))  # all after the same step; a GPU is not kept waiting
    saves = stopping or done % machine.save_every == 0 or done == last
    if saves or done % machine.log_every == 0 or done % epoch_steps == 0:
        values = meter.read(done, last, run)
        run.log(epoch=step // epoch_steps + 1, **values, **objective.reference, **more,
                warning=objective.warning(values) or None)
        meter.reset()
    if saves:
        run.save_checkpoint(done, parts)
    if stopping and everyones(None):  # torchrun ends all soon after one has gone
        sys.exit(f"stopped after step {done:,} of {last:,}; {run.checkpoints()[0]} has it; the "
                 f"same command, without --overwrite, goes on from there" if run.writes else 1)


class Meter:
    """Means since the last line of the log or the start, broken images, and what a clock measures.
    Sums stay on the device: reading them in every step would keep the GPU waiting."""

    def __init__(self, machine: "Machine", records):
        self.machine, self.records, self.broken = machine, records, set()
        self.reset()

    def reset(self) -> None:
        self.sums: dict[tuple[str, ...], Tensor] = {}
        self.steps, self.images, self.waited, self.since = 0, 0, 0.0, time.perf_counter()

    def waiting(self, loader):
        """Pass batches through, counting images and the time that the loop stands still."""
        start = time.perf_counter()
        for images, drawn in loader:
            self.waited += time.perf_counter() - start
            self.images += len(images) * self.machine.world
            self.broken.update(drawn["replaced"])
            yield images, drawn
            start = time.perf_counter()

    def add(self, values: dict[str, Tensor], share: float = 1.0) -> None:
        """Scalars of a step, or of a share of it; those with "total" count the steps."""
        vector = share * torch.stack([v.detach().float() for v in values.values()])
        self.sums[tuple(values)] = self.sums.get(tuple(values), 0) + vector
        self.steps += share * ("total" in values)

    def read(self, done: int, last: int, run: "Run") -> dict:
        """Means over steps and processes; images per second, share of the time spent waiting for
        data, h:mm:ss to the end. Raises InputError for a loss or gradient that is not finite, and
        where more than 1 % of the training images are broken."""
        sums = torch.cat(list(self.sums.values())) / (self.steps * self.machine.world)
        if self.machine.world > 1:
            dist.all_reduce(sums)
        values = dict(zip((n for names in self.sums for n in names), sums.tolist()))
        if not math.isfinite(values["total"] + values["grad_norm"]):
            good = (run.checkpoints() or ["nowhere"])[0]
            raise InputError(f"the loss or its gradient is not finite at step {done} or just "
                             f"before; the last good state is in {good}; start anew with a lower "
                             f"--lr or --no-bf16, and another --out")
        self.broken = set().union(*everyones(self.broken))
        if len(self.broken) > 0.01 * len(self.records):
            names = ", ".join(self.records[i].path for i in sorted(self.broken)[:3])
            raise InputError(f"{len(self.broken)} of {len(self.records)} training images cannot be "
                             f"read, more than 1 %: {names}; a damaged copy, or of no known kind")
        seconds = time.perf_counter() - self.since
        return {"step": done, "steps": last, **values, "broken_images": len(self.broken),
                "img_s": round(self.images / seconds, 1), "wait": round(self.waited / seconds, 3),
                "left": str(timedelta(seconds=round(seconds / self.steps * (last - done))))}


# ---------------------------------------------------------------------------------------------
# The run folder
# ---------------------------------------------------------------------------------------------

CHECKPOINT = "checkpoint_" + 9 * "[0-9]" + ".pth"  # the number of steps done
RUN_FILES = ("recipe.json", "machine.json", "log.jsonl", CHECKPOINT, "model.pth", "backbone.pth",
             "backbone_e[0-9][0-9][0-9][0-9].pth", "results.json")


class Run:
    """A folder that holds one run. Opening makes the folder and only looks; `begin` writes, once
    all is in order.

    Raises InputError for a folder that cannot be made, that holds another recipe, or files that
    are no run's, unless `overwrite` allows to start over. Of several processes the first writes.
    """

    def __init__(self, folder: str | Path, recipe: dict, overwrite: bool = False, rank: int = 0):
        self.folder, self.overwrite, self.writes = Path(folder), overwrite, rank == 0
        self.recipe = json.loads(json.dumps(recipe))  # tuples become lists, as when read back
        self.log_file = self.folder / "log.jsonl"
        self.seconds, self.since = 0.0, time.perf_counter()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.compare()

    def files(self, suffix: str = "") -> list[Path]:
        """What a run may have left here, and --overwrite deletes."""
        return [p for pattern in RUN_FILES for p in sorted(self.folder.glob(pattern + suffix))]

    def checkpoints(self) -> list[Path]:
        """States of this run, the latest first."""
        return sorted(self.folder.glob(CHECKPOINT), reverse=True)

    def compare(self) -> None:
        """Raise InputError unless the folder is empty, this run's, or may be overwritten."""
        present = [path.name for path in self.files()]
        if not present or self.overwrite:
            return
        changed = [f"recipe.json absent or damaged beside {', '.join(present)}"]
        with contextlib.suppress(ValueError, AttributeError, TypeError, OSError, RecursionError):
            old = json.loads((self.folder / "recipe.json").read_text())
            changed = [f"{k}: {old.get(k)} there, {self.recipe.get(k)} now"
                       for k in sorted({*old, *self.recipe}) if old.get(k) != self.recipe.get(k)]
        if changed:
            raise InputError(f"{self.folder} holds a run with another recipe ({'; '.join(changed)}"
                             f"); take another folder by --out, or start over with --overwrite")

    @contextlib.contextmanager
    def begin(self):
        """Hold the folder for this run; delete what `overwrite` allows, write recipe.json."""
        everyones(None)  # all have looked at the folder before the first process changes it
        with open(self.folder / "lock" if self.writes else os.devnull, "a") as handle:
            if self.writes:
                self.lock(handle)
                self.compare()  # another process may have trained here while this one waited
                # with overwrite everything; else the half-written files of one that was killed
                for path in self.files("" if self.overwrite else ".*.partial"):
                    path.unlink()
                self.overwrite = False
                self.save("recipe.json", json.dumps(self.recipe, indent=1).encode())
            everyones(None)  # the others may read the folder now
            yield

    def lock(self, handle) -> None:
        """Keep other processes out until this one ends. A record lock: data workers, which may
        outlive a process that is killed by seconds, do not inherit it."""
        try:
            import fcntl  # not on Windows
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise InputError(f"another process is training in {self.folder}; wait for it, or take "
                             f"another folder by --out") from None
        except (ImportError, OSError) as error:
            print(f"WARNING: no locks in {self.folder} ({error}): let no other process train there")

    def save(self, name: str, content: dict | bytes) -> None:
        """A file that is there as a whole, or as it was before."""
        if self.writes:
            write_atomic(self.folder / name, lambda handle: handle.write(content) if isinstance(
                content, bytes) else torch.save(content, handle))

    def save_checkpoint(self, step: int, parts: dict) -> None:
        """Write the state after `step` steps; the one before it stays, too."""
        self.seconds += time.perf_counter() - self.since
        self.since = time.perf_counter()
        size = self.log_file.stat().st_size if self.log_file.exists() else 0
        self.save(f"checkpoint_{step:09d}.pth", {
            "format": "reid-checkpoint", "step": step, "seconds": self.seconds, "log_size": size,
            **{name: part.state_dict() for name, part in parts.items()}})
        for path in self.checkpoints()[2:] if self.writes else []:
            path.unlink()

    def restore(self, parts: dict) -> int:
        """Fill parts from the last checkpoint that is whole; the number of steps done."""
        found, step, size = self.checkpoints(), 0, 0
        for path in found:
            try:
                # PyTorch checks no checksum, and overlooks some flipped bits of the file's table
                with zipfile.ZipFile(path) as content:
                    if content.testzip() or any(entry.external_attr or entry.compress_type
                                                for entry in content.infolist()):
                        raise InputError("a checksum does not match")
                state = read_checkpoint(path)
                for name, part in parts.items():
                    part.load_state_dict(state[name])
                step, size, self.seconds = state["step"], state["log_size"], state["seconds"]
                print(f"going on at step {step:,} from {path}", flush=True)
                break
            except Exception as error:  # damaged bytes make readers raise anything at all
                if type(error) is PermissionError or limit_of(error) and type(error) != EOFError:
                    raise  # no fault of the file's
                print(f"WARNING: {path} is damaged ({str(error)[:150]})", flush=True)
        made = [*found, *self.folder.glob("backbone.pth"), *self.folder.glob("model.pth")]
        if made and not step and self.recipe.get("epochs", 1):
            raise InputError(f"{made[0]}: no checkpoint is whole from which the run could go on; "
                             f"--overwrite starts from the first step")
        if len(set(everyones(step))) > 1:
            raise InputError(f"{self.folder}: processes see other checkpoints; several machines "
                             f"need a folder that they share")
        if self.writes:
            # those before `path`, at which the search ended, are damaged and count no more
            for path in found[:found.index(path)] if found else []:
                path.unlink()
            with open(self.log_file, "ab") as handle:  # steps after the checkpoint come again
                handle.truncate(min(size, handle.tell()))
        return step

    def log(self, **values) -> None:
        """One JSON object per line, to the screen and to log.jsonl; None is left out."""
        if self.writes:
            line = json.dumps({k: float(f"{v:.5g}") if isinstance(v, float) else v
                               for k, v in values.items() if v is not None})
            print(line, flush=True)
            with open(self.log_file, "a") as handle:
                handle.write(line + "\n")


@contextlib.contextmanager
def stop_requests():
    """Ctrl-C or SIGTERM asks the loop to stop between two steps; a second Ctrl-C kills at once."""
    asked: list[int] = []

    def handler(number, _):
        if not asked and os.environ.get("RANK", "0") == "0":  # print may not be called from here
            os.write(2, b"stopping after this step; Ctrl-C (again) stops at once\n")
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    old = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for s, previous in old.items():
            signal.signal(s, previous)


def open_run(out, recipe, dataset, overwrite: bool, machine: "Machine", weights=None, **more):
    """The run folder for a recipe and the data it is about to see; prints both."""
    if weights and overwrite and Path(weights).resolve().parent == Path(out).resolve():
        raise InputError(f"--overwrite would delete {weights}; choose another folder with --out")
    if weights and os.path.isfile(weights):  # else `load_weights` will say so
        content = hashlib.blake2b(Path(weights).read_bytes(), digest_size=6)
        weights = f"{Path(weights).name} {content.hexdigest()}"
    described = asdict(recipe) | {"dataset": dataset.name, **more, "weights": weights,
                                  "data": dataset.fingerprint()}
    run = Run(out, described, overwrite, machine.rank)
    print(f"run {run.folder}:", *(f"{k}={v}" for k, v in described.items()))
    print(f"  torch={torch.__version__} threads={torch.get_num_threads()} {machine}" + (
        "; the first step compiles, for minutes if the machine has not done so before" if
        machine.backend else "; nothing is compiled, which takes a GPU and a C compiler"))
    return run


# ---------------------------------------------------------------------------------------------
# The machine, and the processes that share the work
# ---------------------------------------------------------------------------------------------


@dataclass
class Machine:
    """Where and how a run computes. On one kind of device nothing here changes its result beyond
    rounding, with the exceptions of docs/choices.md."""

    device: str = "cpu"
    workers: int = 2          # decoding processes
    save_every: int = 500     # steps between checkpoints
    accumulate: int = 1       # passes that a step of pre-training is split into, for less memory
    keep_every: int = 0       # epochs of pre-training between backbones kept apart, 0: none
    monitor_every: int = 10   # ... and between looks at the mAP of plain features
    backend: str = ""         # of torch.compile; none: operations are launched one by one
    log_every: int = 20       # steps between log lines
    rank: int = 0             # this process among
    world: int = 1            # ... the processes that share each batch


def join_processes(machine: Machine) -> Machine:
    """The machine with rank and world as torchrun sets them; plain `python` is a world of one. Of
    several processes only the first prints."""
    if "WORLD_SIZE" not in os.environ:
        return machine
    given = [os.environ.get(k, "") for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")]
    if not (all(map(str.isdecimal, given)) and os.environ.get("MASTER_ADDR")):
        raise InputError("WORLD_SIZE is set, but not all of torchrun's variables: unset it")
    rank, world, local, _ = map(int, given)
    device, backend = machine.device, "gloo"
    if device == "cuda":
        device, backend = f"cuda:{local}", "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    # an hour: the others wait while the first evaluates
    dist.init_process_group(backend, timeout=timedelta(hours=1))
    atexit.register(dist.destroy_process_group)
    if rank:
        sys.stdout = open(os.devnull, "w")
    return replace(machine, device=device, rank=rank, world=world)


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def two_numbers(text: str) -> tuple:
    """Two numbers, written 256x128 or 0.4x1."""
    first, second = map(float, text.split("x"))
    return (int(first), int(second)) if first % 1 == second % 1 == 0 else (first, second)


PARSERS = {tuple[int, int]: two_numbers, tuple[float, float]: two_numbers,
           float | None: lambda text: None if text.lower() == "none" else float(text)}


# flags of numbers that are more than 0, and the most that others may be
POSITIVE = re.compile("threads|save_every|accum|monitor_every|batch|ids|images|prototypes|hidden|"
                      r"bottleneck|queue|dim|clip|aspect|labelled|\w+_temp.*|temperature.*")
MOST = {"threads": 1024, "workers": 1024, "drop_path": 0.99} | dict.fromkeys(
    ("smoothing", "labelled", "momentum", "global_scale", "local_scale"), 1)


def add_recipe_flags(parser: argparse.ArgumentParser, usual) -> None:
    """A flag for each field of a recipe: its value is the default, its comment the help."""
    comments = re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(type(usual)), re.M)
    comments, kinds = dict(comments), get_type_hints(type(usual))
    for field in fields(usual):
        kind, value = kinds[field.name], getattr(usual, field.name)
        choices = get_args(kind) if get_origin(kind) is Literal else None
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {
            "type": PARSERS.get(kind, type(value)), "choices": choices}
        shown = "x".join(map(str, value)) if isinstance(value, tuple) else value
        parser.add_argument(f"--{field.name.replace('_', '-')}", **how,
                            default="none" if value is None else shown,
                            help=comments[field.name].replace("%", "%%"))


def check_values(parser: argparse.ArgumentParser, args) -> None:
    """End with one line for a number that makes no sense."""
    for flag, value in vars(args).items():
        least, most = 1e-9 * bool(POSITIVE.fullmatch(flag)), MOST.get(flag, 1e9)
        for number in value if isinstance(value, (tuple, list)) else (value,):
            if value == "" or isinstance(number, (int, float)) and not least <= number <= most:
                parser.error(f"--{flag.replace('_', '-')} {value}: must be "
                             f"{'more than' if least else 'at least'} 0, at most {most:g}")
    if not all(n % 1 == 0 and 8 <= n <= 4096 for n in args.size or ()):
        parser.error(f"--size {args.size}: two whole numbers from 8 to 4096, as 256x128")


def can_compile(device: str) -> bool:
    """Is there a GPU, for which it pays, a C compiler, and what it needs of Python?"""
    compilers = map(shutil.which, (os.environ.get("CC") or "cc", "gcc"))
    return device != "cpu" and any(compilers) and os.path.exists(sysconfig.get_config_h_filename())


def parse_args(argv: list[str] | None = None):
    """The flags of a run, and its recipe. Values given are refused where they make no sense."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--pretrain", choices=tuple(METHODS),
                       help="pre-train without labels; ends in backbone.pth")
    first.add_argument("--dataset", default="synthetic", metavar="NAME",
                       help=f"{', '.join(NAMES)} or the path of any folder")
    first.add_argument("--device", type=device_name, help="cpu or cuda",
                       default="cuda" if torch.cuda.is_available() else "cpu")
    first.add_argument("--arch")  # the recipe's own flag, with its choices, takes its place
    known, _ = first.parse_known_args(argv)
    kind = METHODS[known.pretrain][0] if known.pretrain else Recipe
    # data/LUP and luperson.txt are LUPerson for `load_dataset`, too
    name = LUPERSON.sub("luperson", Path(known.dataset).name.lower().removesuffix(".txt"))
    usual = replace(kind.preset(name, known.arch), bf16=known.device != "cpu")
    parser = argparse.ArgumentParser(
        description="Fine-tune or pre-train; defaults depend on flags.", conflict_handler="resolve",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, parents=[first], allow_abbrev=False)
    add = parser.add_argument
    add("--data-root", default="data", help="folder that holds the datasets")
    add("--train-only", action="store_true", help="MSMT17 without its val list")
    add("--weights", metavar="FILE", help="pre-trained backbone; without it weights are random")
    add("--out", metavar="DIR", help="run folder; else runs/<dataset>_<method>_<arch>")
    add("--overwrite", action="store_true", help="start over in a used run folder")
    add("--workers", type=int, default=min(cores(), 8), help="decoding processes")
    # never left to OMP_NUM_THREADS, as each number of threads rounds sums in its own way
    add("--threads", type=int, default=min(cores(), 8), help="of each process, for a CPU's sums")
    add("--compile", action=argparse.BooleanOptionalAction, default=can_compile(known.device),
        help="networks and views as graphs, for which a C compiler is needed")
    add("--save-every", type=int, default=500, metavar="STEPS", help="checkpoint interval")
    add("--accum", type=int, default=1, metavar="N", help="pre-training: passes of a step")
    add("--keep-every", type=int, default=0, metavar="EPOCHS", help="pre-training: keep backbones")
    add("--monitor", metavar="NAME", help="pre-training: labelled dataset to watch mAP on")
    add("--monitor-every", type=int, default=10, metavar="N", help="at first, each N epochs, last")
    add_recipe_flags(parser.add_argument_group("recipe"), usual)
    args = parser.parse_args(argv)
    check_values(parser, args)
    if (args.accum > 1 or args.monitor or args.keep_every) and not args.pretrain:
        parser.error("--accum, --monitor and --keep-every are for --pretrain")
    return args, kind(**{field.name: getattr(args, field.name) for field in fields(kind)})


def main(argv: list[str] | None = None) -> None:
    """Read the flags, join the processes, load the data, train."""
    args, recipe = parse_args(argv)
    torch.set_num_threads(args.threads)
    machine = join_processes(Machine(
        args.device, args.workers, args.save_every, args.accum, args.keep_every,
        args.monitor_every, "inductor" if args.compile else ""))
    names = filter(None, (Path(args.dataset).name, args.pretrain, recipe.arch))
    out = args.out or "runs/" + "_".join(names)
    for turn in (True, False):  # of the first process, which may draw people, then of the others
        if turn == (machine.rank == 0):
            dataset, monitor = (name and load_dataset(name, args.data_root, args.train_only)
                                for name in (args.dataset, args.monitor))
        everyones(None)
    if monitor and not (monitor.query and monitor.gallery):
        raise InputError(f"--monitor {args.monitor}: it has no queries, or no gallery")
    if args.pretrain:
        run = open_run(out, recipe, dataset, args.overwrite, machine, args.weights,
                       pretrain=args.pretrain)
        pretrain(args.pretrain, recipe, dataset, run, machine, args.weights, monitor)
        labelled = args.dataset if dataset.query else "market1501"
        print(f"saved {run.folder}/backbone.pth; fine-tune it with: python train.py", *map(
            shlex.quote, ["--dataset", labelled, "--data-root", args.data_root, "--arch",
                          recipe.arch, "--weights", f"{run.folder}/backbone.pth"]))
    else:
        fine_tune_and_evaluate(recipe, dataset, out, args.overwrite, args.weights, machine)
    everyones(None)  # none hangs up on another that still speaks


if __name__ == "__main__":
    command_line(main)
