"""Pre-training without labels: the recipes and the step around the objective.

Unlabelled crops -> views -> `PersonViT` (personvit.py) -> optimiser -> teacher. Read `pretrain`.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from augment import IMAGENET_MEAN, IMAGENET_STD, MultiCrop, step_generator
from data import Images, InputError, ShuffleSampler
from evaluate import ARCHS, build_backbone, evaluate
from personvit import PersonViT, draw_masks, gathered_mean
from runs import Machine, Run, average_gradients, cosine, loop, option

# ---------------------------------------------------------------------------------------------
# Recipes
# ---------------------------------------------------------------------------------------------

VITS = tuple(arch for arch in ARCHS if arch.startswith("vit"))


@dataclass(frozen=True)
class PersonViTRecipe:
    """PersonViT pre-training on LUPerson. The paper's true values lie in its released checkpoints
    (`args`). [iBOT] = its published ViT-S/16 command, for ViT-B too but for norm_last_layer;
    [inferred] = read into the checkpoint's name. Probabilities of augmentation and masks stand with
    their code."""

    arch: str = option("vit_small", "backbone [PersonViT]", choices=VITS)
    size: tuple[int, int] = option((256, 128), "global crops [PersonViT]; local: half", 16, 4096)
    epochs: int = option(300, "passes over the images [notes on the paper]", 1, 1e6)
    batch: int = option(512, "images per step, of all processes [ours]", 1, 1e6)
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


# ---------------------------------------------------------------------------------------------
# PersonViT
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
    rank, world = machine.rank, machine.world
    if recipe.batch % world:
        raise InputError(f"--batch {recipe.batch} cannot be shared evenly by {world} processes")
    mine = recipe.batch // world                       # images of this process
    sampler = ShuffleSampler(len(dataset.train), mine, recipe.seed, rank, world)
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
                           recipe.aspect, rank, world)
    if machine.compile:
        for block in (*model.student["backbone"].blocks, *model.teacher["backbone"].blocks):
            block.compile()  # in place, so that names in the checkpoint stay

    def take_step(step: int, x: Tensor, used: Tensor) -> dict[str, Tensor | float]:
        now = pretrain_schedule(recipe, step, len(sampler))
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = now["lr"], now["weight_decay"] * group["decay"]
        views = multi_crop(x, recipe.seed, step)
        masks = [draw_masks(2, *backbone.grid, step_generator(recipe.seed, step, 2, i))
                 for i in range(rank * mine, (rank + 1) * mine)]
        views["masks"] = torch.stack(masks, dim=1)                          # (2, B, rows, columns)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=recipe.bf16):
            losses = model(views, now["teacher_temp"], now["teacher_temp"], recipe.student_temp)
        optimizer.zero_grad()
        losses["total"].backward()
        average_gradients(model.parameters())
        # what is logged, and found not finite, is the mean over all processes
        values = gathered_mean(torch.stack([v.detach().float() for v in losses.values()]))
        logged = dict(zip(losses, values))
        norm = clip_each(model.parameters(), recipe.clip)
        # fused AdamW skips a step whose gradient is not finite, without the host having to look;
        # `loop` looks before it logs or saves, and stops the run
        optimizer.found_inf = 1 - (logged["total"] + norm).isfinite().float()
        if step // len(sampler) < recipe.freeze_last_layer:
            for name, p in model.named_parameters():
                if "last_layer" in name:
                    p.grad = None
        optimizer.step()
        model.update_teacher(now["momentum"])
        return {**logged, "ln_K": math.log(recipe.prototypes),
                "grad_norm": norm, **now}

    def after_epoch(epoch: int) -> None:
        if keep_every and epoch % keep_every == 0:
            save_backbone(run, f"backbone_e{epoch:04d}.pth", recipe, model, epoch)
        if monitor and epoch % monitor_every == 0 and rank == 0:
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
