"""Pre-training without labels: the recipes of both papers, and the loop's step, the same for both.

    unlabelled crops -> views (augment.py) -> losses (personvit.py, upreid.py) -> optimiser, teacher

`personvit` and `upreid` put together what is particular to a paper: model, optimiser, views,
schedule. `pretrain` runs any such `Method`. Read `pretrain` first.

Exercises (answers: README). 1. Four times PersonViT's learning rate (--lr 8e-3): what becomes of
`information` in the log, and of the mAP after fine-tuning? 2. UP-ReID on the synthetic people with
a queue of half the images and four times the rate (--queue 512 --lr 0.12 --seed 1): by which values
of the log, beside COLLAPSE?, could one tell? Is all lost?
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from augment import (IMAGENET_MEAN, IMAGENET_STD, LUP_MEAN, LUP_STD, ContrastViews, MultiCrop,
                     step_generator)
from data import Images, InputError, ShuffleSampler
from evaluate import evaluate
from personvit import PersonViT, draw_masks, gathered_mean
from runs import Machine, Run, average_gradients, check_recipe, cosine, loop, option
from upreid import UPReID
from weights import ARCHS, build_backbone

# ---------------------------------------------------------------------------------------------
# Recipes
# ---------------------------------------------------------------------------------------------

VITS, RESNETS = (tuple(a for a in ARCHS if a.startswith(kind)) for kind in ("vit", "resnet"))


@dataclass(frozen=True)
class PersonViTRecipe:
    """PersonViT pre-training on LUPerson. The paper's true values lie in its released checkpoints
    (`args`), as notes on them say. [iBOT] = its published ViT-S/16 command, for ViT-B too but for
    norm_last_layer; [inferred] = read into the checkpoint's name. Probabilities of augmentation and
    masks stand with their code."""

    arch: str = option("vit_small", "backbone [PersonViT]", choices=VITS)
    size: tuple[int, int] = option((256, 128), "global crops [PersonViT]; local: half", 16, 4096)
    epochs: int = option(300, "passes over the images [notes on the paper]", 1, 9999)
    batch: int = option(512, "images per step, of all processes [DINO for ReID]", 2, 1e6)
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
    local_crops: int = option(8, "local views [DINO for ReID]", 0, 64)
    masks: bool = option(True, "hide patches from the student; without, only [CLS] is learnt, DINO")
    global_scale: tuple[float, float] = option((0.4, 1.0), "of the area [DINO for ReID]", 1e-3, 1)
    local_scale: tuple[float, float] = option((0.05, 0.8), "0.05 [DINO], 0.8 [inferred]", 1e-3, 1)
    aspect: tuple[float, float] = option((0.375, 0.667), "width / height [inferred]", 0.1, 10)
    seed: int = option(0, "of everything random", 0, 2 ** 32 - 1)
    bf16: bool = option(False, "bfloat16 in the networks; on by default on a GPU")


@dataclass(frozen=True)
class UPReIDRecipe:
    """UP-ReID pre-training on LUPerson: the published values of LUPerson's own MoCo v2 [LUP], on
    which this project builds its reading of UP-ReID, and what that adds [ours]."""

    arch: str = option("resnet50", "backbone [PLIP]", choices=RESNETS)
    size: tuple[int, int] = option((256, 128), "height x width of the views [LUP]", 16, 4096)
    epochs: int = option(200, "passes over the images [LUP]", 1, 9999)
    batch: int = option(2560, "images per step, of all processes [LUP]", 2, 1e6)
    lr: float = option(0.03, "times batch / 256 [ours]: 0.3 at 2560 [LUP]", 0, 1e3)
    weight_decay: float = option(1e-4, "on every parameter [LUP]", 0, 1e3)
    momentum: float = option(0.999, "of the momentum encoder [LUP]", 0, 1)
    dim: int = option(128, "d, of queries and keys [LUP]", 1, 1e6)
    queue: int = option(65536, "K, keys of past batches [LUP]", 1, 1e8)
    temperature: float = option(0.1, "of the instance contrast [LUP]", 1e-3, 1e3)
    temperature_global: float = option(0.05, "of the consistency [CO2, from memory]", 1e-3, 1e3)
    temperature_local: float = option(0.1, "of the contrast among stripes [ours U3]", 1e-3, 1e3)
    weight_global: float = option(1.0, "of the consistency; 0: without [ours U4]", 0, 1e3)
    weight_local: float = option(1.0, "of the stripes; 0: without [ours U4]", 0, 1e3)
    stripes: int = option(4, "M, horizontal stripes of an image [ours U3]", 2, 64)
    hardest: int = option(2, "most similar other stripes that count [ours U3]", 1, 63)
    groups: int = option(8, "parts of a batch with own batch norm [LUP: its GPUs]", 1, 1e4)
    last_stride: int = option(2, "stride of the last ResNet stage [LUP]", choices=(1, 2))
    seed: int = option(0, "of everything random", 0, 2 ** 32 - 1)
    bf16: bool = option(False, "bfloat16 in the networks; on by default on a GPU")


RECIPES = {"personvit": PersonViTRecipe, "upreid": UPReIDRecipe}
LAPTOP_ARCHS = {"personvit": "vit_mini", "upreid": "resnet_tiny"}
# small images and networks on a CPU [ours]
LAPTOP = {
    # warmer teachers (0.04 and more) go flat on so few images: the log flags COLLAPSE?; four times
    # this learning rate does no good to what is fine-tuned (README, exercises)
    "personvit": dict(size=(128, 64), epochs=16, batch=32, lr=2e-3, warmup=2, weight_decay_end=0.1,
                      momentum=0.98, prototypes=1024, hidden=512, bottleneck=128,
                      norm_last_layer=True, teacher_temp=0.02, teacher_temp_end=0.02,
                      local_crops=4, local_scale=(0.1, 0.6)),
    # with 512 keys and four times this learning rate one seed in three collapsed, all queries alike
    "upreid": dict(size=(128, 64), epochs=16, batch=64, momentum=0.99, queue=128, groups=4),
}
# thousands of images, one machine [ours]
ONE_GPU = {"personvit": dict(epochs=200, batch=128, local_crops=6, temp_warmup=20),
           "upreid": dict(batch=256, queue=4096)}


def pretrain_recipe_for(method: str, dataset: str, arch: str | None = None):
    """The recipe of a method, a dataset (name or path) and a backbone; arch=None: the usual one."""
    dataset = Path(dataset).stem.lower()               # data/luperson and luperson.txt are luperson
    kind, small = RECIPES[method], LAPTOP_ARCHS[method]
    arch = arch or (small if dataset == "synthetic" else kind.arch)
    values: dict = {"norm_last_layer": arch == "vit_base"} if method == "personvit" else {}
    if dataset == "synthetic" or arch == small:
        values |= LAPTOP[method]
    elif dataset != "luperson":
        values |= ONE_GPU[method]
    return kind(arch=arch, **values)


# ---------------------------------------------------------------------------------------------
# What is particular to each paper
# ---------------------------------------------------------------------------------------------


@dataclass
class Method:
    """What `pretrain` needs to know of a paper, beside the contract of its model."""

    model: torch.nn.Module           # losses, update_teacher, backbone_for_export, collapsed
    optimizer: torch.optim.Optimizer
    views: Callable                  # (uint8 images of this process, step) -> what forward takes
    schedule: Callable               # (step, steps per epoch) -> lr, weight_decay, momentum, ...
    losses: Callable                 # (views, schedule's values) -> total, its parts, diagnostics
    finish_gradients: Callable       # (epoch) -> their norm; clips or freezes where a paper does
    batch_dim: int                   # of the views
    reference: dict[str, float]      # what the losses are to be compared with in the log
    statistics: tuple                # mean and std of the views


def personvit(recipe: PersonViTRecipe, machine: Machine) -> Method:
    """PersonViT's model on the machine's device, AdamW, masked multi-crop views, its schedules."""
    backbone = build_backbone(recipe.arch, recipe.size, recipe.drop_path)
    smallest = backbone.patch_size * (2 if recipe.local_crops or min(backbone.grid) < 2 else 1)
    if min(recipe.size) < smallest:
        raise InputError(f"--size {recipe.size[0]}x{recipe.size[1]} is too small: masks and local "
                         f"crops, half as large, need {smallest} pixels at least")
    model = PersonViT(backbone, recipe.prototypes, recipe.hidden, recipe.bottleneck,
                      recipe.shared_head, recipe.norm_last_layer).to(machine.device).train()
    multi_crop = MultiCrop(recipe.size, recipe.local_crops, recipe.global_scale, recipe.local_scale,
                           recipe.aspect, machine.rank, machine.world)
    if machine.compile:
        for block in (*model.student["backbone"].blocks, *model.teacher["backbone"].blocks):
            block.compile()  # in place, so that names in the checkpoint stay

    def views(x: Tensor, step: int) -> dict[str, Tensor]:
        first = machine.rank * len(x)                  # this process's place in the whole batch
        masks = [draw_masks(2, *backbone.grid, step_generator(recipe.seed, step, 2, first + i))
                 for i in range(len(x))]
        masks = torch.stack(masks, dim=1) & recipe.masks
        return {**multi_crop(x, recipe.seed, step),
                "masks": masks}                        # (2, B, rows, columns), on the CPU

    def losses(views: dict[str, Tensor], now: dict[str, float]) -> dict[str, Tensor]:
        # iBOT has a schedule each for [CLS] and patches; in its ViT-S command they are the same
        out = model(views, now["teacher_temp"], now["teacher_temp"], recipe.student_temp)
        return out if recipe.masks else {k: v for k, v in out.items() if "patch" not in k}

    def finish_gradients(epoch: int) -> Tensor:
        norm = clip_each(model.parameters(), recipe.clip)
        if epoch < recipe.freeze_last_layer:
            for name, p in model.named_parameters():
                if "last_layer" in name:
                    p.grad = None
        return norm

    return Method(model, torch.optim.AdamW(matrix_groups(model), fused=True), views,
                  lambda step, epoch_steps: personvit_schedule(recipe, step, epoch_steps), losses,
                  finish_gradients, 1, {"ln_K": math.log(recipe.prototypes)},
                  (IMAGENET_MEAN, IMAGENET_STD))


def personvit_schedule(recipe: PersonViTRecipe, step: int, epoch_steps: int) -> dict[str, float]:
    """lr, weight_decay, momentum, teacher_temp of a 0-based step [iBOT: per step]."""
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
            {"params": [p for p in trained if p.ndim <= 1], "decay": 0.0}]


def clip_each(parameters, limit: float) -> Tensor:
    """Scale the gradient of each tensor to a norm of at most `limit`; their global norm before.

    Per tensor, as iBOT does: one exploding layer does not silence all others.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    torch._foreach_mul_(grads, (limit / (norms + 1e-6)).clamp(max=1).unbind())
    return norms.norm()


def upreid(recipe: UPReIDRecipe, machine: Machine) -> Method:
    """UP-ReID's model on the machine's device, SGD [LUP], contrastive views, cosine per epoch."""
    if recipe.weight_local and recipe.size[0] % recipe.stripes:
        raise InputError(f"--size {recipe.size[0]}x{recipe.size[1]}: the height cannot be cut into "
                         f"--stripes {recipe.stripes}")
    if recipe.weight_local and recipe.hardest >= recipe.stripes:
        raise InputError(f"--hardest {recipe.hardest}: an image has {recipe.stripes - 1} other "
                         f"stripes")
    parts = machine.world * machine.accumulate
    if recipe.groups % parts:
        raise InputError(f"--groups {recipe.groups} must be a multiple of {parts}: {machine.world} "
                         f"processes x --accum {machine.accumulate}")
    if recipe.batch % recipe.groups or recipe.batch < 2 * recipe.groups:
        raise InputError(f"--batch {recipe.batch} cannot be cut into --groups {recipe.groups} of "
                         f"at least 2 images")
    if recipe.groups == machine.accumulate:
        print(f"WARNING: with --groups {recipe.groups} --accum {machine.accumulate} queries and "
              f"keys share batch statistics, by which the network may recognise the batch instead "
              f"of the person")
    backbone = build_backbone(recipe.arch, last_stride=recipe.last_stride)
    model = UPReID(backbone, recipe.dim, recipe.queue, hardest=recipe.hardest,
                   temperature=recipe.temperature, temperature_global=recipe.temperature_global,
                   temperature_local=recipe.temperature_local, weight_global=recipe.weight_global,
                   weight_local=recipe.weight_local, groups=recipe.groups // parts)
    model = model.to(machine.device, memory_format=torch.channels_last).train()
    contrast_views = ContrastViews(recipe.weight_global > 0,
                                   recipe.stripes if recipe.weight_local else 0,
                                   machine.rank, machine.world)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([{"params": trained, "decay": 1.0}], momentum=0.9, fused=True)

    def schedule(step: int, epoch_steps: int) -> dict[str, float]:
        t = step // epoch_steps / recipe.epochs        # constant within an epoch, no warm-up [LUP]
        return {"lr": cosine(t, recipe.lr * recipe.batch / 256, 0.0),
                "weight_decay": recipe.weight_decay, "momentum": recipe.momentum}

    reference = {"ln_queue": math.log(1 + recipe.queue)}
    if recipe.weight_local:
        reference["ln_stripes"] = math.log(1 + recipe.hardest)

    def finish_gradients(epoch: int) -> Tensor:        # LUP clips nothing
        return torch.stack(torch._foreach_norm([p.grad for p in trained])).norm()

    return Method(model, optimizer, lambda x, step: contrast_views(x, recipe.seed, step), schedule,
                  lambda views, now: model(views), finish_gradients, 0, reference,
                  (LUP_MEAN, LUP_STD))


METHODS = {PersonViTRecipe: personvit, UPReIDRecipe: upreid}

# ---------------------------------------------------------------------------------------------
# Pre-training by either
# ---------------------------------------------------------------------------------------------


def pretrain(recipe: PersonViTRecipe | UPReIDRecipe, dataset, run: Run, machine: Machine,
             keep_every: int = 0, monitor=None, monitor_every: int = 10) -> torch.nn.Module:
    """Pre-train on dataset.train without labels, going on from the run's checkpoint.

    keep_every: epochs between backbones kept apart. monitor: a labelled dataset whose mAP by plain
    features is logged at the start and every `monitor_every` epochs. Raises InputError as `loop`
    does.
    """
    check_recipe(recipe)
    torch.manual_seed(recipe.seed)
    if recipe.batch % (machine.world * machine.accumulate):
        raise InputError(f"--batch {recipe.batch} cannot be shared evenly by {machine.world} "
                         f"processes x --accum {machine.accumulate}")
    if recipe.batch < 2 * machine.world * machine.accumulate:
        raise InputError(f"--batch {recipe.batch} leaves one image, and nothing to compare it "
                         f"with, for each of {machine.world} processes x --accum "
                         f"{machine.accumulate}")
    if monitor and not (monitor.query and monitor.gallery):
        raise InputError(f"--monitor {monitor.name} has no query or no gallery images")
    sampler = ShuffleSampler(len(dataset.train), recipe.batch // machine.world, recipe.seed,
                             machine.rank, machine.world)
    if getattr(recipe, "queue", 0) > len(dataset.train) / 2:
        print(f"WARNING: --queue {recipe.queue} remembers much of {len(dataset.train)} images: "
              f"many an image will meet its own older key as a negative")
    method = METHODS[type(recipe)](recipe, machine)
    model, optimizer = method.model, method.optimizer

    def take_step(step: int, x: Tensor, used: Tensor) -> dict[str, Tensor | float]:
        now = method.schedule(step, len(sampler))
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = now["lr"], now["weight_decay"] * group["decay"]
        views, n = method.views(x, step), machine.accumulate
        split = {name: v.chunk(n, method.batch_dim) for name, v in views.items()}
        optimizer.zero_grad()
        values = 0
        for i in range(n):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=recipe.bf16):
                losses = method.losses({name: parts[i] for name, parts in split.items()}, now)
            (losses["total"] / n).backward()  # the gradients add up to that of the whole batch
            values += torch.stack([v.detach().float() for v in losses.values()]) / n
        average_gradients(model.parameters())
        # the mean over processes is logged: all see the same value that is not finite, and stop
        logged = dict(zip(losses, gathered_mean(values)))
        norm = method.finish_gradients(step // len(sampler))
        # the flag by which a GradScaler makes a fused optimiser skip a step: the weights stay whole
        # and the CPU need not wait; `loop` looks before it logs or saves, and stops the run
        optimizer.found_inf = 1 - (logged["total"] + norm).isfinite().to(torch.float32)
        optimizer.step()
        model.update_teacher(now["momentum"])
        return {**logged, **method.reference, "grad_norm": norm, **now}

    def preprocessing() -> dict:
        """How images enter the backbone."""
        mean, std = method.statistics
        return {"size": recipe.size, "mean": list(mean), "std": list(std)}

    def save_backbone(name: str, epoch: int) -> None:
        run.save(name, {"format": "reid-backbone", "recipe": dataclasses.asdict(recipe),
                        "epoch": epoch, **preprocessing(),
                        "backbone": model.backbone_for_export().state_dict()})

    def after_epoch(epoch: int) -> None:
        if keep_every and epoch and epoch % keep_every == 0:
            save_backbone(f"backbone_e{epoch:04d}.pth", epoch)
        if monitor and epoch % monitor_every == 0 and machine.rank == 0:
            result, _, _ = evaluate(model.backbone_for_export(), monitor, preprocessing(),
                                    workers=machine.workers, device=machine.device,
                                    bf16=recipe.bf16)
            model.train()  # what is exported may be what is trained
            run.log(epoch=epoch, monitor=monitor.name, mAP=result.mAP, rank1=float(result.cmc[0]))

    loop(run, Images(dataset.train, recipe.size), sampler, recipe,
         {"model": model, "optimizer": optimizer}, take_step, machine, after_epoch, model.collapsed,
         finish=lambda: save_backbone("backbone.pth", recipe.epochs))
    return model
