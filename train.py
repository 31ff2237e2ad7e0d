"""Training: fine-tuning for ReID, and the command line of all training.

P identities x K images -> backbone -> feature f -> BNNeck (a batch norm) -> classifier

    L = cross-entropy(classifier(BN(f)), identity) + triplet(f)               weights 1 : 1

The identity loss knows only training identities; the triplet loss shapes distances, which is what
ranks new people. Three steps equal the reference code's (tests/golden/finetune_3steps).
Pre-training is in pretrain.py, what all runs share in runs.py, comparisons of many trainings in
study.py. Read `fine_tune`.

Exercises (answers: README). 1. Train with the soft margin (--arch vit_mini --seed 0 --margin none):
where does the triplet loss stay, and what is the mAP? 2. Leave out the triplet loss (one term of
`loss`; --arch vit_mini --seed 0), then the identity loss instead: what is each worth? 3. Train
resnet_tiny with --seed 0, 1 and 2: how large must a gain be before it is one?
"""

import argparse
import dataclasses
import json
import math
import typing
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from augment import IMAGENET_MEAN, IMAGENET_STD, FineTuneTransform
from data import (NAMES, Images, InputError, PKSampler, command_line, cores, load_dataset,
                  some_identities)
from evaluate import device_name, evaluate, similarity_ranges
from pretrain import LAPTOP_ARCHS, RECIPES, pretrain, pretrain_recipe_for
from runs import (Machine, Run, all_rows, average_gradients, check_finite, check_recipe, cosine,
                  default_threads, first_then_others, loop, open_run, option, processes,
                  share_batch_norms)
from upreid import gathered
from weights import ARCHS, ReIDModel, build_backbone, load_weights

# ---------------------------------------------------------------------------------------------
# Recipes: every hyper-parameter of fine-tuning in one table, each with its source
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Fine-tuning; the defaults are PersonViT's published recipe for ViT-S [PersonViT code], unless
    another source is named."""

    arch: str = option("vit_small", "backbone", choices=ARCHS)
    size: tuple[int, int] = option((256, 128), "image height x width", 8, 4096)
    epochs: int = option(120, "passes over the training images; 0 only evaluates", 0, 1e6)
    ids: int = option(16, "P, identities per batch", 2, 1e5)
    images: int = option(4, "K, images per identity", 1, 1e5)
    optimizer: str = option("sgd", "sgd has momentum 0.9", choices=("sgd", "adam", "adamw"))
    lr: float = option(4e-4, "peak learning rate, for batch 64 and pre-trained weights", 0, 1e3)
    bias_lr: float = option(2.0, "factor on the learning rate of biases", 0, 1e3)
    weight_decay: float = option(1e-4, "on every parameter", 0, 1e3)
    schedule: str = option("cosine", "steps: x 0.1 after 1/3 and 7/12 of the epochs [BoT]",
                           choices=("cosine", "steps"))
    warmup: int = option(20, "epochs of linear warm-up from 1 %% of the rate", 0, 1e6)
    smoothing: float = option(0.0, "label smoothing of the cross-entropy", 0, 1)
    margin: float | None = option(None, "of the triplet; none: log(1 + exp(d_ap - d_an))", 0, 1e3)
    labelled: float = option(1.0, "share of the identities that are trained on [ours]", 1e-6, 1)
    drop_path: float = option(0.1, "stochastic depth of the last ViT block", 0, 0.99)
    last_stride: int = option(1, "stride of the last ResNet stage [BoT]", choices=(1, 2))
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


# "Bag of Tricks" for ResNet-50 (reid-strong-baseline): network, neck and last stride are its
# paper's, and the losses but for its centre loss; the numbers are from memory, to be checked
# against its configuration files. [BoT]
BAG_OF_TRICKS = dict(optimizer="adam", lr=3.5e-4, bias_lr=1.0, weight_decay=5e-4, schedule="steps",
                     warmup=10, smoothing=0.1, margin=0.3, erase="mean", norm="imagenet",
                     neck_feat="after")
# Small nets from random weights on a CPU in minutes. With a margin of 0.3 a ViT's features stay
# nearly parallel (cosines above 0.999); the BNNeck subtracts their mean, hence "after". [ours]
LAPTOP = dict(size=(128, 64), epochs=24, optimizer="adamw", lr=1e-3, bias_lr=1.0,
              weight_decay=0.05, schedule="cosine", warmup=3, smoothing=0.1, margin=0.3,
              neck_feat="after")


def recipe_for(dataset: str, arch: str | None = None) -> Recipe:
    """The fine-tuning recipe of a dataset (name or path) and a backbone; arch=None: the usual."""
    dataset = Path(dataset).stem.lower()
    arch = arch or ("resnet_tiny" if dataset == "synthetic" else "vit_small")
    values = BAG_OF_TRICKS if arch.startswith("resnet") else {}
    if dataset == "synthetic" or arch in LAPTOP_ARCHS.values():
        values = values | LAPTOP
    elif (dataset, arch) == ("market1501", "vit_base"):
        values = values | dict(warmup=5)  # its configuration leaves the entry out [PersonViT code]
    return Recipe(arch=arch, **values)


# ---------------------------------------------------------------------------------------------
# Losses and schedule: pure functions
# ---------------------------------------------------------------------------------------------


def hardest(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean distance of each anchor to its farthest positive and nearest negative: (B,), (B,).

    features (B, D), not normalised (unit vectors are at most 2 apart, so that the soft margin could
    not fall below log(1 + e^-2) = 0.127); labels (B,). The anchor counts among its positives, at
    distance 0, so that a lone image is no special case. Raises ValueError if all labels are equal.
    """
    features = features.float()
    square = features.square().sum(1)                                         # (B,)
    dist = square[:, None] + square[None, :] - 2 * features @ features.T      # (B, B)
    dist = dist.clamp(min=1e-12).sqrt()        # the clamp keeps the root's gradient finite at 0
    same = labels[:, None] == labels[None, :]                                 # (B, B)
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
# Fine-tuning
# ---------------------------------------------------------------------------------------------


def fine_tune(recipe: Recipe, dataset, run: Run, weights: str | None, machine: Machine,
              finish=lambda model: None) -> ReIDModel:
    """Fine-tune on dataset.train, going on from the run's checkpoint; the model, ready to evaluate,
    is given to `finish` while the run's folder is still locked.

    Raises InputError for too few identities, weights that do not fit, and as `loop` does.
    """
    torch.manual_seed(recipe.seed)
    labels = torch.tensor([r.pid for r in dataset.train])
    sampler = PKSampler(labels, recipe.ids, recipe.images, recipe.seed, machine.rank, machine.world)
    backbone = build_backbone(recipe.arch, recipe.size, recipe.drop_path, recipe.last_stride)
    model = ReIDModel(backbone, int(labels.max()) + 1, recipe.neck_feat)
    print(load_weights(weights, backbone) if weights else
          "WARNING: random weights (no --weights): the published recipes assume pre-trained ones")
    share_batch_norms(backbone)
    model.to(machine.device, memory_format=torch.channels_last).train()
    optimizer = make_optimizer(recipe, model)
    transform = FineTuneTransform(*recipe.statistics, noise=recipe.erase == "noise",
                                  erase_area=1 / 3 if recipe.erase == "noise" else 0.4,
                                  rank=machine.rank, world=machine.world)  # [PersonViT code, BoT]

    def take_step(step: int, x: Tensor, used: Tensor) -> dict[str, Tensor | float]:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step // len(sampler), group["scale"])
        x = transform(x, recipe.seed, step)                                 # (B, 3, H, W) float
        with torch.autocast(x.device.type, torch.bfloat16, enabled=recipe.bf16):
            # the hardest pair may lie in two processes: each computes the loss of the whole batch
            feature = all_rows(backbone(x).float())                         # (n, D), n = P K
            scores, feature = model.head(feature)                           # (n, ids), (n, D)
        y = labels[gathered(used)].to(x.device)                             # (n,)
        id_loss = F.cross_entropy(scores.float(), y, label_smoothing=recipe.smoothing)
        triplet = triplet_loss(feature, y, recipe.margin)
        loss = id_loss + triplet
        check_finite(loss.detach(), step, run)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(model.parameters())
        optimizer.step()
        return {"total": loss, "id": id_loss, "triplet": triplet,
                "accuracy": (scores.argmax(1) == y).float().mean(),
                "lr": optimizer.param_groups[0]["lr"]}

    loop(run, Images(dataset.train, recipe.size), sampler, recipe,
         {"model": model, "optimizer": optimizer}, take_step, machine,
         finish=lambda: finish(model.eval()))
    return model


def fine_tune_and_evaluate(recipe: Recipe, dataset, out, overwrite: bool = False,
                           weights: str | None = None, machine: Machine = Machine()):
    """One whole run: train, save model.pth, evaluate, save results.json; what that file holds, or
    None without queries. A run that was finished before is not run again."""
    nameless = next((r.path for r in dataset.train if r.pid < 0), None)
    if nameless:
        raise InputError(f"{dataset.name} has training images without identity, first "
                         f"{nameless}; fine-tuning needs names like 0002_c1, unlabelled crops "
                         f"serve --pretrain")
    if weights and overwrite and Path(weights).resolve().parent == Path(out).resolve():
        raise InputError(f"--overwrite would delete {weights}; choose another folder with --out")
    few = some_identities(dataset.train, recipe.labelled, recipe.seed)
    dataset = dataclasses.replace(dataset, train=few)
    ids = len({r.pid for r in dataset.train})
    run = open_run(out, recipe, dataset, overwrite, machine, weights=weights)
    if run.results():
        print(f"{run.folder} is finished: mAP {run.results()['mAP']:.2%}; --overwrite starts over")
        return run.results()
    print(f"  id loss of a network that knows nothing: ln({ids}) = {math.log(max(ids, 1)):.2f}")

    def finish(model: ReIDModel) -> None:
        mean, std = recipe.statistics
        stored = dataclasses.asdict(recipe) | {"mean": list(mean), "std": list(std),
                                               "dataset": dataset.name}
        run.save("model.pth", {"format": "reid-model", "recipe": stored,
                               "model": model.state_dict()})
        print(f"saved {run.folder}/model.pth; training took {run.seconds / 60:.1f} minutes")
        if not dataset.query:
            print(f"{dataset.name} has no queries to evaluate it with")
            return
        result, q, g = evaluate(model, dataset, stored, workers=machine.workers,
                                device=machine.device, bf16=recipe.bf16, rank=machine.rank,
                                world=machine.world)
        numbers = {"mAP": result.mAP, "mAP_market": result.mAPs["market"],
                   **{f"rank{k}": float(result.cmc[k - 1]) for k in (1, 5, 10)},
                   "cmc": result.cmc.tolist(), "similarity": similarity_ranges(q, g),
                   "valid": result.valid, "queries": result.total,
                   "minutes": round(run.seconds / 60, 1)}
        run.write("results.json", json.dumps(numbers, indent=1).encode())
        print(result)

    fine_tune(recipe, dataset, run, weights, machine, finish)
    return run.results()


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
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
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
    add("--workers", type=int, default=min(cores(), 8), help="decoding processes")
    add("--threads", type=int, default=default_threads(), help="of each process, for a CPU's sums")
    add("--save-every", type=int, default=500, metavar="STEPS", help="checkpoint interval")
    add("--checkpoints", type=int, default=2, metavar="N", help="how many of them are kept")
    add("--accum", type=int, default=1, metavar="N",
        help="pre-training: passes that a step is split into, for less memory")
    add("--compile", action="store_true", help="PersonViT pre-training: use torch.compile")
    add("--pretrain", choices=tuple(RECIPES), help="pre-train without labels; ends in backbone.pth")
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
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--pretrain")
    kind = RECIPES.get(first.parse_known_args(argv)[0].pretrain, Recipe)
    parser = make_parser(kind)
    args = parser.parse_args(argv)
    given = {k: v for k, v in vars(args).items() if k in kind.__dataclass_fields__}
    if (min(args.workers, args.keep_every) < 0 or
            min(args.threads, args.save_every, args.checkpoints, args.monitor_every,
                args.accum) < 1):
        parser.error("--workers and --keep-every are at least 0, --threads, --save-every, "
                     "--checkpoints, --monitor-every and --accum at least 1")
    if args.accum > 1 and not args.pretrain:
        parser.error("--accum is for --pretrain: the triplet loss needs its whole batch at once")
    if (args.monitor or args.keep_every) and not args.pretrain:
        parser.error("--monitor and --keep-every are for --pretrain")
    if args.compile and args.pretrain != "personvit":
        parser.error("--compile is for --pretrain personvit")
    if args.pretrain and "weights" in args:
        parser.error("--weights is for fine-tuning; pre-training starts from random weights")
    return args, given


def main(argv: list[str] | None = None) -> None:
    args, given = parse_args(argv)
    torch.set_num_threads(args.threads)
    machine = Machine(args.device, args.workers, args.save_every, args.checkpoints,
                      accumulate=args.accum, compile=args.compile)
    arch = given.pop("arch", None)
    recipe = (pretrain_recipe_for(args.pretrain, args.dataset, arch) if args.pretrain else
              recipe_for(args.dataset, arch))
    recipe = dataclasses.replace(recipe, **({"bf16": args.device != "cpu"} | given))
    check_recipe(recipe)
    name = "_".join(filter(None, (Path(args.dataset).name, args.pretrain, recipe.arch)))
    out = getattr(args, "out", f"runs/{name}")
    with processes(machine) as machine:
        dataset, monitor = first_then_others(machine.rank, lambda: [
            load_dataset(name, args.data_root, args.train_only) if name else None
            for name in (args.dataset, args.monitor)])
        if args.pretrain:
            run = open_run(out, recipe, dataset, args.overwrite, machine, pretrain=args.pretrain)
            pretrain(recipe, dataset, run, machine, args.keep_every, monitor, args.monitor_every)
            labelled = args.dataset if dataset.query else "market1501"
            root = "" if args.data_root == "data" else f" --data-root {args.data_root}"
            print(f"saved {run.folder}/backbone.pth; fine-tune it with: python train.py --dataset "
                  f"{labelled}{root} --arch {recipe.arch} --weights {run.folder}/backbone.pth")
            return
        fine_tune_and_evaluate(recipe, dataset, out, args.overwrite,
                               getattr(args, "weights", None), machine)


if __name__ == "__main__":
    command_line(main)
