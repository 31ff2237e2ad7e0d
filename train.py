"""Fine-tuning for ReID: the recipes, the losses, the loop, the run folder.

    images of P identities x K each -> backbone -> feature f -> BNNeck -> classifier
    L = cross-entropy(classifier(BN(f)), identity) + triplet(f)                 weights 1 : 1

The identity loss knows only training identities; the triplet loss shapes distances, which is what
ranks new people. Three steps of this loop equal the reference code's (tests/golden/finetune_3steps).

A run lives in its folder under runs/: recipe.json, log.jsonl, checkpoint.pth, and at the end
model.pth and results.json. The same command goes on where the folder stopped: all random draws of a
step depend on (seed, step) alone, so a resumed run is the uninterrupted one. Read `fine_tune` first.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data import (FineTuneTransform, Images, InputError, NAMES, PKSampler, closest, load_dataset,
                  step_generator, write_atomic)
from evaluate import (ARCHS, ReIDModel, build_backbone, colour_histograms, draw_ranks, evaluate,
                      load_weights, quiet_worker, rank_features, read_checkpoint)

# ---------------------------------------------------------------------------------------------
# Recipes: every hyper-parameter in one table, each with its source
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Fine-tuning hyper-parameters; defaults are PersonViT's published recipe for ViT-S [PersonViT code].

    Every field is a flag of the command line.
    """

    arch: str = "vit_small"                # backbone
    size: tuple[int, int] = (256, 128)     # image height x width
    epochs: int = 120                      # passes over all training images
    ids: int = 16                          # P, identities per batch
    images: int = 4                        # K, images per identity
    optimizer: str = "sgd"                 # sgd (momentum 0.9), adam or adamw
    lr: float = 4e-4                       # peak learning rate, made for batch 64 and pre-trained weights
    bias_lr: float = 2.0                   # factor on the learning rate of biases
    weight_decay: float = 1e-4             # on every parameter
    schedule: str = "cosine"               # cosine, or steps (x 0.1 at 1/3 and at 7/12 of the epochs)
    warmup: int = 20                       # epochs of linear warm-up from 1 % of the rate
    smoothing: float = 0.0                 # label smoothing of the cross-entropy
    margin: float | None = None            # triplet margin; none = soft margin log(1 + exp(d_ap - d_an))
    drop_path: float = 0.1                 # stochastic depth of the last ViT block
    last_stride: int = 1                   # stride of the last ResNet stage
    erase: str = "noise"                   # random erasing with pixel noise, or with the mean colour
    norm: str = "half"                     # mean = std = 0.5, or imagenet's statistics
    neck_feat: str = "before"              # feature of the ranking: before or after the BNNeck
    seed: int = 1234                       # of everything random
    bf16: bool = False                     # bfloat16 in the backbone; on by default on a GPU

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std of the normalisation, per RGB channel in [0, 1]."""
        return {"half": ((0.5,) * 3, (0.5,) * 3),
                "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}[self.norm]


CHOICES = {"arch": ARCHS, "optimizer": ("sgd", "adam", "adamw"), "schedule": ("cosine", "steps"),
           "erase": ("noise", "mean"), "norm": ("half", "imagenet"), "neck_feat": ("before", "after"),
           "last_stride": (1, 2)}

# "Bag of Tricks" for ResNet-50 (reid-strong-baseline). Network, losses, neck and last stride are its
# paper's; the numbers below are from memory, to be checked against its configs. [BoT]
BAG_OF_TRICKS = dict(optimizer="adam", lr=3.5e-4, bias_lr=1.0, weight_decay=5e-4, schedule="steps",
                     warmup=10, smoothing=0.1, margin=0.3, erase="mean", norm="imagenet",
                     neck_feat="after")
# Small nets from random weights on a CPU in minutes. [ours]
LAPTOP = dict(size=(128, 64), epochs=24, ids=16, images=4, optimizer="adamw", lr=1e-3, bias_lr=1.0,
              weight_decay=0.05, schedule="cosine", warmup=3, smoothing=0.1, margin=0.3)


def recipe_for(dataset: str, arch: str | None = None) -> Recipe:
    """The recipe of a dataset and a backbone; arch=None takes the dataset's usual one."""
    arch = arch or ("resnet_tiny" if dataset == "synthetic" else "vit_small")
    if arch not in ARCHS:
        raise InputError(f"no architecture is called {arch!r}; did you mean {closest(arch, ARCHS)}?")
    values = BAG_OF_TRICKS if arch.startswith("resnet") else {}
    if dataset == "synthetic":
        values = values | LAPTOP
    elif (dataset, arch) == ("market1501", "vit_base"):
        values = values | dict(warmup=5)  # its config leaves WARMUP_EPOCHS at the default [PersonViT code]
    return Recipe(arch=arch, **values)


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
    dist = dist.clamp(min=1e-12).sqrt()        # the clamp also keeps the root's gradient finite at 0
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

    Warm-up does not delay the cosine, it hides the curve's beginning; start and end are fractions of
    the unscaled rate, for biases too [PersonViT code].
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
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer](groups, **kwargs)


# ---------------------------------------------------------------------------------------------
# The run folder
# ---------------------------------------------------------------------------------------------

RUN_FILES = ("recipe.json", "log.jsonl", "checkpoint.pth", "model.pth", "results.json")


class Run:
    """A folder that holds one run. Opening it compares recipes; nothing is overwritten unasked."""

    def __init__(self, folder: str | Path, recipe: dict, overwrite: bool = False):
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if overwrite:
                for name in RUN_FILES:
                    (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"{folder}: cannot be used for the results ({error.strerror}); "
                             f"choose another folder with --out") from None
        recipe = json.loads(json.dumps(recipe))  # tuples become lists, as they will when read back
        if (self.folder / "recipe.json").exists():
            self.compare(recipe)
        elif any((self.folder / name).exists() for name in RUN_FILES):
            raise InputError(f"{folder} holds files of something else; choose another folder with --out, "
                             f"or --overwrite to delete {', '.join(RUN_FILES)} in it")
        else:
            self.write("recipe.json", json.dumps(recipe, indent=1).encode())

    def compare(self, recipe: dict) -> None:
        try:
            old = json.loads((self.folder / "recipe.json").read_text())
            changed = [f"{k}: {old.get(k)} there, {recipe.get(k)} now"
                       for k in sorted({*old, *recipe}) if old.get(k) != recipe.get(k)]
        except (ValueError, AttributeError):
            changed = ["recipe.json is damaged"]
        if changed:
            raise InputError(f"{self.folder} holds a run with another recipe ({'; '.join(changed)}); choose "
                             f"another folder with --out, or start over in this one with --overwrite")

    def write(self, name: str, content: bytes) -> None:
        write_atomic(self.folder / name, content)

    def save(self, name: str, content: dict) -> None:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        self.write(name, buffer.getvalue())

    def load(self, name: str) -> dict | None:
        path = self.folder / name
        return read_checkpoint(path) if path.exists() else None

    def log(self, **values) -> None:
        """One JSON object per line, to the screen and to log.jsonl."""
        line = json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()})
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
    """Ctrl-C (or SIGTERM) asks the loop to stop between two steps; a second Ctrl-C kills at once."""
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
# The loop
# ---------------------------------------------------------------------------------------------


def batches(images: Images, sampler: PKSampler, first_step: int, epochs: int, workers: int):
    """uint8 batches (images, asked, used) from a global step to the end of the last epoch."""
    def indices():
        for epoch in range(first_step // len(sampler), epochs):
            sampler.set_epoch(epoch)
            skip = max(first_step - epoch * len(sampler), 0)
            yield from list(sampler)[skip:]

    # one loader for all epochs: workers live as long as the run, none starts over at an epoch's end
    return torch.utils.data.DataLoader(images, batch_sampler=indices(), num_workers=workers,
                                       collate_fn=keep, worker_init_fn=quiet_worker,
                                       pin_memory=torch.cuda.is_available())


def keep(batch):
    return batch


def fine_tune(recipe: Recipe, dataset, run: Run, weights: str | None = None, device: str = "cpu",
              workers: int = 2, save_every: int = 500, log_every: int = 20) -> ReIDModel:
    """Fine-tune and return the model (in evaluation mode), going on from the run's checkpoint.

    Raises InputError for too few identities, too many broken images, a loss that is not finite.
    """
    torch.manual_seed(recipe.seed)
    labels = torch.tensor([r.pid for r in dataset.train])
    sampler = PKSampler(labels, recipe.ids, recipe.images, recipe.seed)
    backbone = build_backbone(recipe.arch, recipe.size, recipe.drop_path, recipe.last_stride)
    model = ReIDModel(backbone, int(labels.max()) + 1, recipe.neck_feat)
    print(load_weights(weights, backbone) if weights else
          "WARNING: random weights (no --weights): the published recipes assume pre-trained ones")
    model.to(device, memory_format=torch.channels_last).train()
    optimizer = make_optimizer(recipe, model)
    transform = FineTuneTransform(*recipe.statistics, noise=recipe.erase == "noise",
                                  erase_area=1 / 3 if recipe.erase == "noise" else 0.4)
    images, bad, first = Images(dataset.train, recipe.size), set(), 0
    if state := run.load("checkpoint.pth"):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, bad = state["step"], set(state["bad"])
        run.cut_log(state["log_size"])
        print(f"going on at step {first:,} from {run.folder / 'checkpoint.pth'}", flush=True)
    last, meter = recipe.epochs * len(sampler), Meter()

    def checkpoint(step: int) -> None:
        run.save("checkpoint.pth", {"format": "reid-checkpoint", "step": step, "bad": sorted(bad),
                                    "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                                    "log_size": run.log_size()})

    with stop_requests() as stop:
        for step, (x, asked, used) in enumerate(
                meter.waiting(batches(images, sampler, first, recipe.epochs, workers)), first):
            epoch = step // len(sampler)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, epoch, group["scale"])
            bad.update(asked[asked != used].tolist())
            check_broken(bad, dataset.train)
            y = labels[used].to(device)                                         # (B,)
            x = transform(x.to(device, non_blocking=True), recipe.seed, step)   # (B, 3, H, W) float
            torch.manual_seed(step_generator(recipe.seed, step).initial_seed())  # stochastic depth
            with torch.autocast(device, torch.bfloat16, enabled=recipe.bf16):
                scores, feature = model(x)                                      # (B, ids), (B, D)
            id_loss = F.cross_entropy(scores.float(), y, label_smoothing=recipe.smoothing)
            triplet = triplet_loss(feature, y, recipe.margin)
            loss = id_loss + triplet
            if not loss.isfinite():
                raise InputError(f"the loss is {loss.item()} at step {step}; the weights before it are in "
                                 f"{run.folder}; lower --lr or switch --bf16 off")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            hits = (scores.argmax(1) == y).float().mean()
            meter.add(len(y), loss=loss, id=id_loss, triplet=triplet, accuracy=hits)
            done = step + 1
            if done % log_every == 0 or done == last:
                run.log(epoch=epoch + 1, step=done, steps=last, **meter.read(last - done),
                        lr=learning_rate(recipe, epoch),
                        broken_images=len(bad))
            if done % save_every == 0 or done == last or stop:
                checkpoint(done)
            if stop and done < last:
                sys.exit(f"stopped after step {done:,} of {last:,}; {run.folder / 'checkpoint.pth'} holds "
                         f"it, the same command goes on from there")
    return model.eval()


def check_broken(bad: set[int], records) -> None:
    if len(bad) > 0.01 * len(records):
        names = ", ".join(records[i].path for i in sorted(bad)[:3])
        raise InputError(f"{len(bad)} of {len(records)} training images cannot be read, more than 1 %: "
                         f"{names}; the copy of the dataset is damaged")


class Meter:
    """Means of the losses between two log lines, images per second, and the share of time waiting."""

    def __init__(self):
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

    def add(self, images: int, **losses: Tensor) -> None:
        for name, value in losses.items():  # summed on the device: reading would wait for the GPU
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.steps, self.images = self.steps + 1, self.images + images

    def read(self, steps_left: int) -> dict[str, float | str]:
        values = {name: float(total) / self.steps for name, total in self.sums.items()}
        seconds = time.perf_counter() - self.since
        left = seconds / self.steps * steps_left
        values |= {"img_s": round(self.images / seconds, 1), "wait": round(self.waited / seconds, 3),
                   "left": f"{int(left // 3600)}:{int(left % 3600 // 60):02d}:{int(left % 60):02d}"}
        self.__init__()
        return values


def fine_tune_and_evaluate(recipe: Recipe, dataset, out, overwrite=False, weights=None, device="cpu",
                           workers=2, save_every=500):
    """One whole run: train, save model.pth, evaluate, save results.json; returns evaluate's triple."""
    described = dataclasses.asdict(recipe) | {"dataset": dataset.name, "weights": weights}
    run = Run(out, described, overwrite)
    start = time.perf_counter()
    print(f"run {run.folder}: " + " ".join(f"{k}={v}" for k, v in described.items()))
    print(f"  at random weights: id loss ln({len({r.pid for r in dataset.train})}) = "
          f"{math.log(max(len({r.pid for r in dataset.train}), 1)):.2f}, triplet near "
          f"{'ln 2 = 0.69' if recipe.margin is None else recipe.margin}; "
          f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads", flush=True)
    model = fine_tune(recipe, dataset, run, weights, device, workers, save_every)
    mean, std = recipe.statistics
    stored = dataclasses.asdict(recipe) | {"mean": list(mean), "std": list(std), "dataset": dataset.name}
    run.save("model.pth", {"format": "reid-model", "recipe": stored,
                           "num_ids": model.classifier.out_features, "model": model.state_dict()})
    if not dataset.query:
        print(f"saved {run.folder / 'model.pth'}; {dataset.name} has no queries, so nothing is evaluated")
        return None
    result, q, g = evaluate(model, dataset, stored, workers=workers, device=device, bf16=recipe.bf16)
    numbers = {"mAP": result.mAP, "mAP_market": result.mAPs["market"],
               **{f"rank{k}": float(result.cmc[k - 1]) for k in (1, 5, 10)},
               "valid": result.valid, "queries": result.total,
               "minutes": round((time.perf_counter() - start) / 60, 1)}
    run.write("results.json", json.dumps(numbers, indent=1).encode())
    print(f"{result}\nsaved {run.folder / 'model.pth'}, {numbers['minutes']} minutes", flush=True)
    return result, q, g


# ---------------------------------------------------------------------------------------------
# The demo
# ---------------------------------------------------------------------------------------------


def demo(data_root: str, out: Path, device: str, overwrite: bool) -> None:
    """Synthetic people, from nothing to a table and a picture, on a laptop's CPU."""
    start = time.perf_counter()
    dataset = load_dataset("synthetic", data_root)
    recipe = recipe_for("synthetic")
    run_args = dict(device=device, workers=0)  # small images, kept in memory: workers would not pay
    ids = {s: ([r.pid for r in getattr(dataset, s)], [r.camid for r in getattr(dataset, s)])
           for s in ("query", "gallery")}
    colours = rank_features(colour_histograms(dataset.query), *ids["query"],
                            colour_histograms(dataset.gallery), *ids["gallery"])
    torch.manual_seed(recipe.seed)
    untrained = ReIDModel(build_backbone(recipe.arch, recipe.size), 1, "before")
    mean, std = recipe.statistics
    plain, _, _ = evaluate(untrained, dataset, {"size": recipe.size, "mean": mean, "std": std},
                           workers=0, device="cpu")
    trained, q, g = fine_tune_and_evaluate(recipe, dataset, out / recipe.arch, overwrite, **run_args)
    draw_ranks(out / "ranks.png", dataset, q, g)
    print(f"\nsynthetic people, {trained.valid}/{trained.total} queries   mAP    rank-1  rank-5  rank-10")
    for name, result in (("colour histogram", colours), (f"{recipe.arch}, untrained", plain),
                         (f"{recipe.arch}, {recipe.epochs} epochs", trained)):
        cmc = "  ".join(f"{result.cmc[k - 1]:6.1%}" for k in (1, 5, 10))
        print(f"  {name:<36} {result.mAP:6.1%}  {cmc}")
    print(f"rank list in {out / 'ranks.png'}; {(time.perf_counter() - start) / 60:.1f} minutes in all")


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def parse_size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text!r}: write height x width, e.g. 256x128")
    return int(height), int(width)


def parse_margin(text: str) -> float | None:
    return None if text == "none" else float(text)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Fine-tune a backbone for ReID on one dataset, evaluate, save.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dataset", default="synthetic", metavar="NAME",
                        help=f"{', '.join(NAMES)} or the path of any folder")
    parser.add_argument("--data-root", default="data", help="folder that holds the datasets")
    parser.add_argument("--train-only", action="store_true", help="MSMT17 without its val list")
    parser.add_argument("--weights", metavar="FILE", help="pre-trained backbone; default: random weights")
    parser.add_argument("--out", metavar="DIR", help="run folder; default: runs/<dataset>_<arch>")
    parser.add_argument("--overwrite", action="store_true", help="start over in a used run folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 8),
                        help="processes that decode images; 0 = none")
    parser.add_argument("--save-every", type=int, default=500, metavar="STEPS", help="checkpoint interval")
    parser.add_argument("--demo", action="store_true", help="the whole pipeline on synthetic people")
    group = parser.add_argument_group("recipe", "defaults depend on dataset and arch; a run prints them all")
    types = {"size": parse_size, "margin": parse_margin}
    for field in dataclasses.fields(Recipe):
        if field.name == "bf16":
            group.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
                               help="bfloat16 in the backbone; on by default on a GPU")
            continue
        kind = types.get(field.name, type(field.default))
        group.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=argparse.SUPPRESS,
                           help=", ".join(map(str, CHOICES.get(field.name, (kind.__name__.replace("parse_", ""),)))))
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = vars(parser.parse_args(argv))
    given = {f.name: args.pop(f.name) for f in dataclasses.fields(Recipe) if f.name in args}
    args = argparse.Namespace(**args)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("no GPU is usable here: run with --device cpu")
    if args.demo:
        demo(args.data_root, Path(args.out or "runs/demo"), args.device, args.overwrite)
        return
    recipe = recipe_for(args.dataset, given.pop("arch", None))
    recipe = dataclasses.replace(recipe, **({"bf16": args.device != "cpu"} | given))
    for name, allowed in CHOICES.items():
        if (value := getattr(recipe, name)) not in allowed:
            raise InputError(f"--{name.replace('_', '-')} {value}: choose from {', '.join(map(str, allowed))}")
    dataset = load_dataset(args.dataset, args.data_root, args.train_only)
    out = args.out or f"runs/{Path(args.dataset).name}_{recipe.arch}"
    fine_tune_and_evaluate(recipe, dataset, out, args.overwrite, args.weights, args.device, args.workers,
                           args.save_every)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted before the first checkpoint of this start; earlier ones are kept")
