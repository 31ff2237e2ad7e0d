"""Training: fine-tuning for ReID, the two training loops, and the command line of all training.

    pretrain      crops -> views -> losses of a paper's objective -> optimiser -> teacher
    fine_tune     P identities x K images -> backbone -> feature f -> BNNeck -> classifier

        L = cross-entropy(classifier(BN(f)), identity) + triplet(f)           weights 1 : 1

The identity loss tells training identities apart; the triplet loss shapes distances, by which new
people are ranked. Three steps equal the reference code's, up to rounding
(tests/golden/finetune_3steps).

A run lives in its folder under runs/: recipe.json, log.jsonl, checkpoint_<step>.pth, and at the end
its weights. The same command continues where the folder stopped. Under torchrun several processes
share each batch, and the first alone writes. The loops read numbers from the device only when a
line of the log, a checkpoint or a look at the mAP is due. What surrounds them is in extra/runs.py
and can be skipped:

    run.begin             takes the folder for this process, and writes recipe.json
    run.restore           model and optimiser from the folder's checkpoint -> steps done
    run.log, .save ...    one line of the log; a file, written whole or not at all
    run.stop              ends the process, as Ctrl-C or SIGTERM asked (then `stop` is not empty)
    any_process           has one of several processes been asked to stop?
    meter.timed           the batches of a loader, while a clock measures how long it is waited for
    meter.add, .read      keeps scalars on the device; their means since the last line of the log
    meter.reset           forgets them, so that an evaluation does not count as time of training
    compile_networks      torch.compile of the networks, `compiled` of a function; on a CPU nothing
    distributed           DistributedDataParallel around a model, if there are several processes
    usable_bfloat16       False where bfloat16 is not wanted, or a test shows this CPU's is wrong

Read `triplet_loss`, then `pretrain`, then `fine_tune`.
"""

import argparse
import math
import shlex
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data import (IMAGENET_MEAN, IMAGENET_STD, NAMES, Batches, ContrastViews, FineTuneTransform,
                  MultiCrop, PKSampler, ShuffleSampler, erasing_noise, hold_out, load_dataset,
                  make_loader, some_identities)
from evaluate import ARCHS, ReIDModel, build_backbone, evaluate, load_weights
from extra import flags, runs
from extra.files import InputError, command_line
from extra.folders import LUPERSON
from extra.runs import Meter, Run, Runtime
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
    warmup: int = 20                    # epochs of warm-up, from 1 % of lr
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
    # Small nets from random weights on a CPU in minutes. With a margin of 0.3 vit_mini's features
    # stayed nearly parallel (cosines above 0.999); the BNNeck subtracts their mean, hence "after".
    # [ours]
    LAPTOP: ClassVar = dict(size=(128, 64), epochs=24, optimizer="adamw", lr=1e-3, bias_lr=1.0,
                            weight_decay=0.05, schedule="cosine", warmup=3, smoothing=0.1,
                            margin=0.3, neck_feat="after")

    @classmethod
    def preset(cls, dataset: str, arch: str | None = None) -> "Recipe":
        """The recipe for a dataset's name and a backbone; arch=None: the usual one."""
        arch = arch or ("resnet_tiny" if dataset == "synthetic" else "vit_small")
        values = {}
        if arch.startswith("resnet"):
            values = cls.BAG_OF_TRICKS
        if dataset == "synthetic" or arch in ("vit_mini", "resnet_tiny"):
            values = values | cls.LAPTOP
        elif (dataset, arch) == ("market1501", "vit_base"):
            values = dict(warmup=5)  # its file has no entry: the default there [PersonViT code]
        return cls(arch=arch, **values)


NORMS = {"half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # mean, std
         "imagenet": (IMAGENET_MEAN, IMAGENET_STD)}


def hardest_pairs(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean distance of each anchor to its farthest positive and nearest negative: (B,), (B,).

    features (B, D), not normalised; labels (B,). Unit vectors would be at most 2 apart, so that the
    soft margin could not fall below log(1 + e^-2) = 0.127. The anchor counts among its positives,
    at distance 0, so that a lone image is no special case; where all labels are equal, which
    `PKSampler` excludes, the nearest negative is infinitely far away.
    """
    x = features.float()
    # (B, B); by matrix products, |x|^2 - 2xy + |y|^2 would cancel
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    same = labels[:, None] == labels[None, :]                                # (B, B)
    d_ap = distance.masked_fill(~same, -torch.inf).amax(1)
    d_an = distance.masked_fill(same, torch.inf).amin(1)
    return d_ap, d_an


def triplet_loss(features: Tensor, labels: Tensor, margin: float | None = None) -> Tensor:
    """Batch-hard triplet loss (Hermans et al. 2017) of features (B, D), labels (B,): a scalar.

    margin=None: soft margin, mean log(1 + exp(d_ap - d_an)); it is 0.693 = log 2 where positives
    are as far away as negatives, as in a collapsed network. Else mean max(0, d_ap - d_an + margin).
    """
    d_ap, d_an = hardest_pairs(features, labels)
    if margin is None:
        return F.softplus(d_ap - d_an).mean()
    return F.relu(d_ap - d_an + margin).mean()


class FineTuning(nn.Module):
    """The losses of a `ReIDModel`: images (B, 3, H, W), identities (B,) -> scalars.

    Each process computes the loss of all n = B x processes images, as the images of a hardest pair
    may be in different processes. `reference` and `warning` serve the log, as those of PersonViT
    and UPReID do.
    """

    def __init__(self, model: ReIDModel, recipe: Recipe):
        super().__init__()
        self.model = model
        self.smoothing = recipe.smoothing
        self.margin = recipe.margin
        self.reference = {"ln_ids": math.log(model.classifier.out_features)}

    def forward(self, x: Tensor, pids: Tensor) -> dict[str, Tensor]:
        feature = self.model.base(x).float()                                 # (B, D)
        feature = all_gather_with_gradient(feature)                          # (n, D)
        y = all_gather_with_gradient(pids)                                   # (n,)
        logits, feature = self.model.head(feature)                           # (n, ids), (n, D)
        id_loss = F.cross_entropy(logits.float(), y, label_smoothing=self.smoothing)
        triplet = triplet_loss(feature, y, self.margin)
        accuracy = (logits.argmax(1) == y).float().mean()
        return {"total": id_loss + triplet, "id": id_loss, "triplet": triplet,
                "accuracy": accuracy}

    def warning(self, values: dict[str, float]) -> str:
        """Nothing: in a collapse the triplet loss itself stays at its margin, or at log 2."""
        return ""


def all_gather_with_gradient(x: Tensor) -> Tensor:
    """Rows of all processes, (B, ...) -> (n, ...), in their order, with gradient for one's own."""
    if not dist.is_initialized():
        return x
    world = dist.get_world_size()
    rows = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(rows, x.detach().contiguous())
    rows[dist.get_rank()] = x
    if x.requires_grad:
        # Each process has the gradient of the whole loss by its own rows alone. The sum over the
        # processes is wanted, DistributedDataParallel computes their mean. With two processes and
        # gradients a and b: (2 a + 2 b) / 2 = a + b
        x.register_hook(lambda grad: grad * world)
    return torch.cat(rows)


def learning_rate(recipe: Recipe, epoch: int, scale: float = 1.0) -> float:
    """Learning rate of an epoch (counted from 0); scale multiplies the peak (biases).

    The cosine runs over all epochs; warm-up replaces its first ones, so that the cosine takes over
    below the peak. Start and end are fractions of the unscaled rate, for biases too [PersonViT
    code].
    """
    peak = recipe.lr * scale
    start = 0.01 * recipe.lr
    end = 0.002 * recipe.lr
    if epoch < recipe.warmup:
        return start + (peak - start) * epoch / recipe.warmup
    t = epoch / recipe.epochs
    if recipe.schedule == "cosine":
        return cosine(t, peak, end)
    if t < 1 / 3:
        return peak
    if t < 7 / 12:
        return 0.1 * peak
    return 0.01 * peak


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """Two groups, weights and biases; `scale` is the factor on the scheduled learning rate."""
    weights, biases = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith("bias"):
            biases.append(parameter)
        else:
            weights.append(parameter)
    groups = [{"params": weights, "scale": 1.0},
              {"params": biases, "scale": recipe.bias_lr}]
    common = {"lr": recipe.lr, "weight_decay": recipe.weight_decay, "fused": True}
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, **common)
    if recipe.optimizer == "adam":
        return torch.optim.Adam(groups, **common)
    return torch.optim.AdamW(groups, **common)


# ---------------------------------------------------------------------------------------------
# Pre-training
# ---------------------------------------------------------------------------------------------

METHODS = {"personvit": PersonViTRecipe, "upreid": UPReIDRecipe}


def views_of(recipe):
    """What a training by this recipe sees of an image."""
    if isinstance(recipe, Recipe):
        mean, std = NORMS[recipe.norm]
        return FineTuneTransform(recipe.size, mean, std, noise=recipe.erase == "noise")
    if isinstance(recipe, PersonViTRecipe):
        return MultiCrop(recipe.size, recipe.local_crops, recipe.global_scale, recipe.local_scale,
                         recipe.aspect)
    stripes = 0
    if recipe.weight_local > 0:
        stripes = recipe.stripes
    return ContrastViews(recipe.size, recipe.weight_global > 0, stripes)


def build_objective(recipe, runtime: Runtime, weights: str | None = None) -> nn.Module:
    """A paper's objective on its device; both its networks start from `weights`, if not at random.
    Raises InputError for a recipe that does not fit together."""
    torch.manual_seed(recipe.seed)
    try:
        objective = recipe.build(runtime.world * runtime.accumulate)
    except ValueError as error:  # the method files know nothing of InputError
        raise InputError(str(error)) from None
    if weights:
        for net in runs.networks(objective):
            print(load_weights(weights, net))
    return objective.to(runtime.device, memory_format=torch.channels_last).train()


def pretrain(recipe, dataset, run: Run, runtime: Runtime, weights: str | None = None,
             monitor=None) -> nn.Module:
    """Pre-train on dataset.train without labels, going on from the run's checkpoint. Returns the
    objective.

    recipe: a method's, which builds its objective. weights: where both networks start, if not at
    random. monitor: a labelled dataset whose mAP by frozen features is logged. Raises InputError
    for a recipe that does not fit together, too few images, too many broken ones, and a loss that
    is not finite.
    """
    device = torch.device(runtime.device)
    objective = build_objective(recipe, runtime, weights)
    optimizer = recipe.optimizer(objective)
    transform = views_of(recipe)
    runs.compile_networks(objective, runtime)  # on a GPU
    make_views = runs.compiled(transform, runtime)
    ddp = runs.distributed(objective, runtime)  # itself, or DistributedDataParallel around it
    sampler = ShuffleSampler(len(dataset.train), recipe.batch, recipe.seed)
    batches = Batches(dataset.train, sampler, transform, recipe.seed, recipe.draw, runtime.rank,
                     runtime.world)  # batches[step]
    meter = Meter(objective, dataset.train, run, runtime)
    steps_per_epoch = len(sampler)
    last = recipe.epochs * steps_per_epoch
    parts = runtime.accumulate  # micro-batches of a step
    with run.begin(), runs.stop_requests() as stop:  # from here on the folder is this run's
        done = run.restore(model=objective, optimizer=optimizer)  # steps; 0 without a checkpoint
        bf16 = runs.usable_bfloat16(recipe.bf16, objective, batches, run)
        loader = meter.timed(make_loader(batches, range(done, last), runtime.workers))
        for epoch in range(done // steps_per_epoch, recipe.epochs):
            if done % steps_per_epoch == 0:  # else a run goes on within an epoch
                between_epochs(objective, epoch, transform, recipe, monitor, run, runtime)
            meter.reset()
            for step in range(done, (epoch + 1) * steps_per_epoch):
                # of the optimiser (lr, weight decay), of the objective (momentum, temperatures)
                rates, settings = recipe.schedule(step, steps_per_epoch)
                for group in optimizer.param_groups:
                    group["lr"] = rates["lr"]
                    group["weight_decay"] = rates["weight_decay"] * group["decay"]
                batch = next(loader)
                images = batch["images"].to(device, non_blocking=True)  # (B, 3, H, W) uint8
                params = batch["params"].to(device, non_blocking=True)  # (B, views, numbers)
                # for stochastic depth; `hash` of numbers is the same in every run
                torch.manual_seed(hash((recipe.seed, step, runtime.rank)))
                for i in range(parts):                    # their gradients add up
                    # name -> (..., 3, h, w) float32, normalised: "globals", "locals"; "first" ...
                    views = make_views(images.chunk(parts)[i], params.chunk(parts)[i])
                    if "masks" in batch:                  # they stay on the CPU, see `forward`
                        views["masks"] = batch["masks"].chunk(parts, dim=1)[i]
                    # processes exchange gradients once a step
                    ddp.require_backward_grad_sync = (i + 1 == parts)
                    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                        losses = ddp(views, **settings)   # takes what it needs
                    (losses["total"] / parts).backward()
                    meter.add(losses)
                grad_norm = objective.clip_gradients(epoch)
                meter.add({"grad_norm": grad_norm})
                optimizer.step()
                optimizer.zero_grad()
                objective.update_teacher(**settings)      # no gradient reaches the teacher

                done = step + 1
                stopping = bool(stop)
                if runtime.world > 1:
                    stopping = runs.any_process(stop)
                saving = stopping or done % runtime.save_every == 0 or done == last
                if saving or done % runtime.log_every == 0 or done % steps_per_epoch == 0:
                    run.log(epoch=epoch + 1, **meter.read(done, last), **rates, **settings)
                if saving:
                    run.save_checkpoint(done, model=objective, optimizer=optimizer)
                if stopping:
                    run.stop(done, last)                  # ends the process
        between_epochs(objective, recipe.epochs, transform, recipe, monitor, run, runtime)
        run.save("backbone.pth", exported(objective, recipe.epochs, transform, recipe))
    return objective


def exported(objective: nn.Module, epoch: int, transform, recipe) -> dict:
    """The backbone that is fine-tuned, with all that tells how to use it."""
    return {"format": "reid-backbone", "recipe": asdict(recipe), "epoch": epoch,
            "size": transform.size, "mean": transform.mean, "std": transform.std,
            "backbone": objective.backbone_for_export().state_dict()}


def between_epochs(objective, epoch: int, transform, recipe, monitor, run: Run,
                   runtime: Runtime) -> None:
    """Save a copy of the backbone, and log the mAP of its frozen features (losses say little of
    what is learnt), where one or the other is due after `epoch` epochs."""
    content = exported(objective, epoch, transform, recipe)
    if runtime.keep_every and epoch and epoch % runtime.keep_every == 0:
        run.save(f"backbone_e{epoch:04d}.pth", content)
    log_monitor(objective.backbone_for_export(), content, epoch, recipe, monitor, run, runtime)


def log_monitor(net, reading: dict, epoch: int, recipe, monitor, run: Run,
                runtime: Runtime) -> None:
    """Log the mAP on the dataset `monitor`, if there is one and it is due after `epoch` epochs.

    reading: how images are read, as `evaluate` takes it. No random number is sampled, and the
    network is left in training mode.
    """
    due = epoch % runtime.monitor_every == 0 or epoch == recipe.epochs
    # by the first process alone: the batch norms of others have running statistics of their own
    if monitor and due and runtime.rank == 0:
        result, _, _ = evaluate(net, monitor, reading, workers=runtime.workers,
                                device=runtime.device)
        net.train()  # what is exported may be what is trained
        run.log(epoch=epoch, monitor=monitor.name, mAP=result.mAP, rank1=float(result.cmc[0]))


# ---------------------------------------------------------------------------------------------
# Fine-tuning
# ---------------------------------------------------------------------------------------------


def build_model(recipe: Recipe, num_ids: int, runtime: Runtime, weights: str | None) -> ReIDModel:
    """The network that is fine-tuned, on its device; its backbone from `weights`, if given."""
    torch.manual_seed(recipe.seed)
    backbone = build_backbone(recipe.arch, recipe.size, recipe.drop_path, recipe.last_stride)
    model = ReIDModel(backbone, num_ids, recipe.neck_feat)
    if weights:
        print(load_weights(weights, backbone))
    else:
        print("WARNING: random weights (no --weights): the published recipes assume pre-trained "
              "ones")
    if runtime.world > 1 and recipe.arch.startswith("resnet"):
        if runtime.device == "cpu":
            raise InputError("batch norm over several processes needs GPUs: fine-tune a ResNet on "
                             "a CPU in one process, without torchrun or GPUS=")
        nn.SyncBatchNorm.convert_sync_batchnorm(backbone)  # the neck gets the rows of all anyway
    return model.to(runtime.device, memory_format=torch.channels_last).train()


def fine_tune(recipe: Recipe, dataset, run: Run, runtime: Runtime, weights: str | None = None,
              monitor=None) -> ReIDModel:
    """Fine-tune on dataset.train, going on from the run's checkpoint. Returns the model, ready to
    evaluate.

    monitor: a labelled dataset whose mAP is logged. Raises InputError for too few identities,
    weights that do not fit, too many broken images, and a loss that is not finite.
    """
    device = torch.device(runtime.device)
    identities = [record.pid for record in dataset.train]
    sampler = PKSampler(identities, recipe.ids, recipe.images, recipe.seed)
    model = build_model(recipe, len(sampler.members), runtime, weights)
    optimizer = make_optimizer(recipe, model)
    transform = views_of(recipe)
    runs.compile_networks(model, runtime)  # on a GPU
    augment = runs.compiled(transform, runtime)
    objective = FineTuning(model, recipe)
    ddp = runs.distributed(objective, runtime)  # itself, or DistributedDataParallel around it
    batches = Batches(dataset.train, sampler, transform, recipe.seed, None, runtime.rank,
                     runtime.world)  # batches[step]
    meter = Meter(objective, dataset.train, run, runtime)
    reading = stored(recipe, dataset)
    steps_per_epoch = len(sampler)
    last = recipe.epochs * steps_per_epoch
    with run.begin(), runs.stop_requests() as stop:  # from here on the folder is this run's
        done = run.restore(model=model, optimizer=optimizer)  # steps; 0 without a checkpoint
        bf16 = runs.usable_bfloat16(recipe.bf16, model, batches, run)
        loader = meter.timed(make_loader(batches, range(done, last), runtime.workers))
        for epoch in range(done // steps_per_epoch, recipe.epochs):
            if done % steps_per_epoch == 0:  # else a run goes on within an epoch
                log_monitor(model, reading, epoch, recipe, monitor, run, runtime)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, epoch, group["scale"])
            rates = {"lr": learning_rate(recipe, epoch)}
            meter.reset()
            for step in range(done, (epoch + 1) * steps_per_epoch):
                batch = next(loader)
                images = batch["images"].to(device, non_blocking=True)  # (B, 3, H, W) uint8
                params = batch["params"].to(device, non_blocking=True)  # (B, 7)
                pids = batch["pids"].to(device, non_blocking=True)      # (B,)
                noise = None
                if recipe.erase == "noise":
                    noise = erasing_noise(images, recipe.seed, step, runtime.rank, runtime.world)
                x = augment(images, params, noise)                      # (B, 3, H, W) float32
                # for stochastic depth; `hash` of numbers is the same in every run
                torch.manual_seed(hash((recipe.seed, step, runtime.rank)))
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    losses = ddp(x, pids)
                losses["total"].backward()
                gradients = [p.grad for p in model.parameters() if p.grad is not None]
                losses["grad_norm"] = nn.utils.get_total_norm(gradients)
                meter.add(losses)
                optimizer.step()
                optimizer.zero_grad()

                done = step + 1
                stopping = bool(stop)
                if runtime.world > 1:
                    stopping = runs.any_process(stop)
                saving = stopping or done % runtime.save_every == 0 or done == last
                if saving or done % runtime.log_every == 0 or done % steps_per_epoch == 0:
                    run.log(epoch=epoch + 1, **meter.read(done, last), **rates)
                if saving:
                    run.save_checkpoint(done, model=model, optimizer=optimizer)
                if stopping:
                    run.stop(done, last)                  # ends the process
        log_monitor(model, reading, recipe.epochs, recipe, monitor, run, runtime)
        run.save("model.pth", {"format": "reid-model", "recipe": reading,
                               "model": model.state_dict()})
    return model.eval()


def stored(recipe: Recipe, dataset) -> dict:
    """What model.pth says of itself."""
    mean, std = NORMS[recipe.norm]
    return {**asdict(recipe), "mean": mean, "std": std, "dataset": dataset.name}


def fine_tune_and_evaluate(recipe: Recipe, dataset, out, overwrite: bool, weights: str | None,
                           runtime: Runtime, monitor=None) -> dict | None:
    """One whole run: train, save model.pth, evaluate, save results.json; what that file holds, or
    None without queries. A run that was finished before is not run again."""
    if any(record.pid < 0 for record in dataset.train):
        raise InputError(f"{dataset.root} has images without identity; fine-tuning needs names "
                         f"like 0002_c1 or a folder for each person; else they serve --pretrain")
    dataset = replace(dataset, train=some_identities(dataset.train, recipe.labelled, recipe.seed))
    run = runs.open_run(out, recipe, dataset, overwrite, runtime, weights=weights)
    results = run.results()
    if results and not overwrite:
        print(f"{run.folder} is finished; --overwrite starts over")
        return results
    model = fine_tune(recipe, dataset, run, runtime, weights, monitor)
    print(f"saved {run.folder}/model.pth; training took {run.seconds / 60:.1f} minutes")
    if not dataset.query or not dataset.gallery:
        print(f"{dataset.name} has no queries, or no gallery, to evaluate it with")
        return None
    from extra import verification
    result, q, g = evaluate(model, dataset, stored(recipe, dataset), workers=runtime.workers,
                            device=runtime.device, rank=runtime.rank, world=runtime.world,
                            bf16=recipe.bf16 and runtime.device != "cpu")
    results = {**result.numbers(), "people": dataset.people,
               "minutes": round(run.seconds / 60, 1)}
    if runtime.rank == 0:  # the process that writes; verification takes longer than ranking
        pairs = verification.verify(q, g, dataset.people)
        if pairs:
            results["verification"] = asdict(pairs)
            print(pairs)
    run.save_results(results)
    print(f"{dataset.people}: {result}")
    return results


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None):
    """The flags of a run, and its recipe. Values given are refused where they make no sense."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--pretrain", choices=tuple(METHODS),
                       help="pre-train without labels; ends in backbone.pth")
    first.add_argument("--dataset", default="synthetic", metavar="NAME",
                       help=f"{', '.join(NAMES)} or the path of any folder")
    first.add_argument("--device", type=flags.device_name, help="cpu or cuda",
                       default=flags.usual_device())
    first.add_argument("--arch")  # the recipe's own flag, with its choices, takes its place
    known, _ = first.parse_known_args(argv)
    kind = METHODS.get(known.pretrain, Recipe)
    # data/LUP and luperson.txt are LUPerson for `load_dataset`, too
    name = Path(known.dataset).name.lower().removesuffix(".txt")
    usual = kind.preset(LUPERSON.sub("luperson", name), known.arch)
    usual = replace(usual, bf16=flags.has_bfloat16(known.device))
    parser = argparse.ArgumentParser(
        description="Fine-tune or pre-train; defaults depend on flags.", conflict_handler="resolve",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, parents=[first], allow_abbrev=False)
    add = parser.add_argument
    add("--data-root", default="data", help="folder that holds the datasets")
    add("--train-only", action="store_true", help="MSMT17 without its val list")
    add("--weights", metavar="FILE", help="pre-trained backbone; without it weights are random")
    add("--out", metavar="DIR", help="run folder; else runs/<dataset>_<method>_<arch>")
    add("--overwrite", action="store_true", help="start over in a used run folder")
    add("--workers", type=int, default=min(runs.cores(), 8), help="decoding processes")
    # never left to OMP_NUM_THREADS, as each number of threads rounds sums in its own way
    add("--threads", type=int, default=min(runs.cores(), 8), help="of a process, for a CPU's sums")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="networks and views as graphs; if not given: on a GPU that can")
    add("--held-out", type=int, default=0, metavar="N",
        help="training people to evaluate on, in place of the test set; 0: none")
    add("--sheet", metavar="PNG", help="draw what the first step would see, and end")
    add("--save-every", type=int, default=500, metavar="STEPS", help="checkpoint interval")
    add("--accum", type=int, default=1, metavar="N", help="pre-training: micro-batches of a step")
    add("--keep-every", type=int, default=0, metavar="EPOCHS", help="pre-training: keep backbones")
    add("--monitor", metavar="NAME",
        help="log the mAP on held-out, the people of --held-out; pre-training: or on a dataset")
    add("--monitor-every", type=int, default=10, metavar="N", help="at first, each N epochs, last")
    flags.add_recipe_flags(parser.add_argument_group("recipe"), usual)
    args = parser.parse_args(argv)
    flags.check_training(parser, args)
    values = {field.name: getattr(args, field.name) for field in fields(kind)}
    return args, kind(**values)


def main(argv: list[str] | None = None) -> None:
    """Read the flags, join the processes, load the data, train."""
    args, recipe = parse_args(argv)
    from extra import formats, pictures  # optional: other files' weights, drawings
    torch.set_num_threads(args.threads)
    runtime = runs.join_processes(Runtime(
        args.device, args.workers, args.save_every, args.accum, args.keep_every,
        args.monitor_every))
    runtime.backend = runs.choose_backend(args.compile, runtime.device)
    names = [Path(args.dataset).name, args.pretrain, recipe.arch]
    out = args.out or "runs/" + "_".join(filter(None, names))
    if runtime.rank > 0:
        runs.barrier()  # the first process loads first, as it may render people or list images
    dataset = load_dataset(args.dataset, args.data_root, args.train_only)
    if args.held_out:
        dataset = hold_out(dataset, args.held_out)
        if args.weights:
            dataset = formats.with_origin(dataset, args.weights)
    monitor = None
    if args.monitor == "held-out":
        monitor = replace(dataset, name="held-out")
    elif args.monitor:
        monitor = load_dataset(args.monitor, args.data_root, args.train_only)
    if runtime.rank == 0:
        runs.barrier()
    if monitor and not (monitor.query and monitor.gallery):
        raise InputError(f"--monitor {args.monitor}: it has no queries, or no gallery")
    if args.sheet:
        if args.pretrain:
            build_objective(recipe, runtime)  # refuses what cannot be trained
        pictures.draw_sheet(args.sheet, dataset, recipe, views_of(recipe))
        return
    if args.pretrain:
        run = runs.open_run(out, recipe, dataset, args.overwrite, runtime, args.weights,
                            pretrain=args.pretrain)
        pretrain(recipe, dataset, run, runtime, args.weights, monitor)
        labelled = "market1501"
        if dataset.query:
            labelled = args.dataset
        words = ["--dataset", labelled, "--data-root", args.data_root, "--arch", recipe.arch,
                 "--weights", f"{run.folder}/backbone.pth"]
        if args.held_out:
            words += ["--held-out", str(args.held_out)]
        print(f"saved {run.folder}/backbone.pth; fine-tune it with: python train.py",
              shlex.join(words))
    else:
        fine_tune_and_evaluate(recipe, dataset, out, args.overwrite, args.weights, runtime,
                               monitor)
    runs.barrier()  # no process leaves while another one still talks to it


if __name__ == "__main__":
    command_line(main)
