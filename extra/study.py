"""Studies: trainings that differ in one thing, over several seeds; a table and a picture of each.

    demo       both papers on synthetic people, from nothing to a rank list; one seed
    few-shot   random weights, UP-ReID, PersonViT; fine-tuned on 10, 30, 100 % of the identities
    upreid     UP-ReID's losses, one by one
    personvit  PersonViT without its masks, without its local crops
    epochs     PersonViT after a quarter, a half ... of its epochs
    data       PersonViT on 3, 25, 50, 100 % of the unlabelled images, in equally many steps
    initialisation  PersonViT from random weights and from --weights FILE
    evidence   ViT-S on one GPU, from random weights and after PersonViT; one seed

Rows with the same network and share of labels are fine-tuned alike, and with the same seed on the
same labelled people, --labelled SHARE of them; --rates tries several learning rates of it, as a
comparison is fair when each row is at its own best one. Networks are a laptop's; --arch resnet50
vit_small are those for one GPU, pre-trained by its recipes. Each training has a folder below --out,
so a study that was stopped goes on with the same command; parts of it (--seeds 0 1, --seeds 2) may
run side by side with the same --out, and the command with all seeds then trains nothing anew and
prints the whole table.
Read `pairs`, then `run_rows`.
"""

import argparse
import dataclasses
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import torch

from data import NAMES, PKSampler, ShuffleSampler, load_dataset, some_identities
from evaluate import build_backbone, evaluate, load_model, load_weights
from extra.files import InputError, command_line
from extra.flags import check_values, device_name, has_bfloat16, two_numbers, usual_device
from extra.pictures import draw_ranks
from extra.runs import Runtime, choose_backend, cores, open_run
from train import METHODS, Recipe, build_objective, fine_tune_and_evaluate, pretrain

RANDOM = "random weights"
TITLES = {"upreid": "UP-ReID", "personvit": "PersonViT"}


@dataclass
class Row:
    """One line of a table: where the backbone comes from, and how it is fine-tuned."""

    origin: str
    method: str             # of METHODS, whose network it is
    before: object          # recipe of the pre-training, or None
    recipe: Recipe
    share: float = 1.0      # of the images that the pre-training sees
    start: str = ""         # weights that the first of the trainings starts from; none: random
    kept: int = 0           # epochs of pre-training after which it is fine-tuned; 0: all
    rate: str = ""          # of the fine-tuning, in words, if several are tried

    @property
    def group(self) -> str:
        few = f", {self.recipe.labelled:.0%} of the identities" if self.recipe.labelled < 1 else ""
        return self.recipe.arch + few + self.rate


# ---------------------------------------------------------------------------------------------
# What is compared
# ---------------------------------------------------------------------------------------------


def recipes(method: str, dataset, seed: int, given: dict):
    """Recipes of pre-training and fine-tuning, for a method's laptop network if no other is given;
    given: bf16, and arch (networks, one of them the method's), size, epochs, pretrain_epochs where
    they differ from the usual ones. Fine-tuned as a laptop's are, from random weights with AdamW,
    where the published recipes assume pre-trained ones; the wide ViTs at a lower rate."""
    kind = METHODS[method]
    own = [a for a in given.get("arch", ()) if a in get_args(get_type_hints(kind)["arch"])]
    before = kind.preset(dataset.name, own[0]) if own else kind.preset("synthetic")
    recipe = Recipe.preset("synthetic", before.arch)
    lr = {"vit_small": 3e-4, "vit_base": 3e-4}.get(recipe.arch, recipe.lr)
    both = {"seed": seed, "size": given.get("size", before.size), "bf16": given["bf16"]}
    return (dataclasses.replace(before, **both,
                                epochs=given.get("pretrain_epochs", before.epochs)),
            dataclasses.replace(recipe, **both, lr=lr, epochs=given.get("epochs", recipe.epochs)))


def pairs(method: str, dataset, seed: int, given: dict, shares=(1.0,)) -> list[Row]:
    """Random weights and the method's pre-training, fine-tuned on shares of the identities, or on
    the given one. Without labels all training images are seen in every row."""
    before, recipe = recipes(method, dataset, seed, given)
    rows = []
    people = len({record.pid for record in dataset.train})
    for share in given.get("labelled", shares):
        few = round(share * people)
        if few < 2:
            raise InputError(f"--labelled: 2 people at least, {share:.1%} of {people} are {few}")
        labelled = dataclasses.replace(recipe, labelled=share, ids=min(recipe.ids, few))
        rows += [Row(RANDOM, method, None, labelled), Row(TITLES[method], method, before, labelled)]
    return rows


def few_shot(dataset, seed: int, given: dict) -> list[Row]:
    """The fewer people are labelled, the more should pre-training help: it needs no labels."""
    return [row for name in TITLES for row in pairs(name, dataset, seed, given, (0.1, 0.3, 1.0))]


def demo(dataset, seed: int, given: dict) -> list[Row]:
    """Each paper in a setting of minutes in which it improves mAP, at this rate, with every seed
    tried (docs/results.md); where only the mean improves, one seed may show the opposite."""
    return (pairs("upreid", dataset, seed, {"pretrain_epochs": 12, "epochs": 12} | given, (0.1,)) +
            pairs("personvit", dataset, seed, {"pretrain_epochs": 8} | given, (0.3,)))


def variants(method: str, changes: dict[str, dict]):
    """A function of rows that differ in the pre-training alone."""
    def rows(dataset, seed: int, given: dict) -> list[Row]:
        random, row = pairs(method, dataset, seed, given)
        return [random] + [dataclasses.replace(row, origin=name, before=dataclasses.replace(
            row.before, **change)) for name, change in changes.items()]
    return rows


def epochs(dataset, seed: int, given: dict) -> list[Row]:
    """Accuracy against epochs of one pre-training, as PersonViT's Figure 3 has it."""
    random, row = pairs("personvit", dataset, seed, given)
    part = max(row.before.epochs // 4, 1)
    return [random] + [dataclasses.replace(row, origin=f"PersonViT, {n} epochs", kept=n)
                       for n in range(part, row.before.epochs + 1, part)]


def amounts(dataset, seed: int, given: dict) -> list[Row]:
    """Accuracy against the number of unlabelled images, as in PersonViT's Table 5, in equally many
    steps; the batches of few images are smaller."""
    random, row = pairs("personvit", dataset, seed, given)
    rows, n, before = [random], len(dataset.train), row.before
    for share in (0.03, 0.25, 0.5, 1.0):
        few = max(round(share * n), 1)
        batch = min(before.batch, few)
        steps = before.epochs * (n // before.batch)
        recipe = dataclasses.replace(before, batch=batch, epochs=max(steps // (few // batch), 1))
        rows.append(dataclasses.replace(row, origin=f"PersonViT, {share:.0%} of the images",
                                        before=recipe, share=share))
    return rows


def initialisation(dataset, seed: int, given: dict) -> list[Row]:
    """PersonViT from random and from given weights (--weights), which are fine-tuned alone, too."""
    random, row = pairs("personvit", dataset, seed, given)
    return [random, row,
            dataclasses.replace(random, origin="given weights", start=given["weights"]),
            dataclasses.replace(row, origin="PersonViT from given weights", start=given["weights"])]


def evidence(dataset, seed: int, given: dict) -> list[Row]:
    """ViT-S at 128x64 on one GPU: does pre-training improve mAP on this set? On Market-1501 ten
    minutes, as computed from an H100's speeds at 256x128 (docs/results.md)."""
    given = {"arch": ["vit_small"], "size": (128, 64), "epochs": 20, "pretrain_epochs": 25} | given
    random, row = pairs("personvit", dataset, seed, given)
    return [random, dataclasses.replace(row, before=dataclasses.replace(row.before, warmup=2))]


STUDIES = {
    "demo": demo, "few-shot": few_shot, "epochs": epochs, "data": amounts,
    "initialisation": initialisation, "evidence": evidence,
    "upreid": variants("upreid", {
        "U1, instance contrast (MoCo v2)": dict(weight_global=0.0, weight_local=0.0),
        "U1 + U2, global consistency": dict(weight_local=0.0),
        "U1 + U3, intrinsic contrast": dict(weight_global=0.0),
        "UP-ReID": {}}),
    "personvit": variants("personvit", {
        "PersonViT": {},
        "without masks (DINO)": dict(masks=False),
        "without local crops": dict(local_crops=0),
        "without both": dict(masks=False, local_crops=0)}),
}


def rows_of(name: str, dataset, seed: int, given: dict) -> list[Row]:
    """The rows of a study, all of them at each learning rate of the fine-tuning that is to be tried
    (--rates): what is pre-trained may want another than random weights do."""
    rows = STUDIES[name](dataset, seed, given)
    if unused := set(given.get("arch", ())) - {row.recipe.arch for row in rows}:
        raise InputError(f"--arch {' '.join(unused)}: not a network, or not one of this study")
    return [dataclasses.replace(row, rate=f", rate {lr:g}",
                                recipe=dataclasses.replace(row.recipe, lr=lr))
            for lr in given.get("rates", ()) for row in rows] or rows


# ---------------------------------------------------------------------------------------------
# Running it
# ---------------------------------------------------------------------------------------------


def run_rows(rows: list[Row], dataset, out: Path, overwrite: bool, runtime: Runtime) -> dict:
    """Train and evaluate rows of one seed: {(group, origin): (results, run folder)}."""
    done = {}
    pretrained = {}
    for row in rows:
        seed = row.recipe.seed
        key = (row.method, row.before, row.start)
        weights = row.start or None
        if row.before and key not in pretrained:
            part = dataclasses.replace(dataset, train=some_images(dataset.train, row.share, seed))
            name = f"{TITLES[row.method]} kept" if row.kept else row.origin
            run = open_run(out / file_name(f"{name}_{seed}_pretraining"), row.before, part,
                           overwrite, runtime, weights, pretrain=row.method)
            pretrain(row.before, part, run, dataclasses.replace(runtime, keep_every=row.kept),
                     weights)
            pretrained[key] = run.folder
        if row.before:
            name = f"backbone_e{row.kept:04d}.pth" if row.kept else "backbone.pth"
            weights = str(pretrained[key] / name)
        folder = out / file_name(f"{row.group}_{row.origin}_{seed}")
        results = fine_tune_and_evaluate(row.recipe, dataset, folder, overwrite, weights, runtime)
        done[row.group, row.origin] = results, folder
    return done


def some_images(records, share: float, seed: int):
    """A share of the images, sampled by the seed; a smaller one is a part of a larger."""
    order = np.random.default_rng(seed).permutation(len(records))[:round(share * len(records))]
    return [records[i] for i in sorted(order)]


def file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text)


def check(rows: list[Row], dataset) -> None:
    """Raise InputError for what would otherwise end a study after hours."""
    for row in rows:
        few = some_identities(dataset.train, row.recipe.labelled, row.recipe.seed)
        PKSampler([r.pid for r in few], row.recipe.ids, row.recipe.images)
        backbone = build_backbone(row.recipe.arch, row.recipe.size)
        if row.start:
            load_weights(row.start, backbone)
        if row.before:
            build_objective(row.before, Runtime())
            ShuffleSampler(len(some_images(dataset.train, row.share, 0)), row.before.batch)


def study(name: str, dataset, seeds: list[int], given: dict, out: Path, overwrite: bool,
          runtime: Runtime) -> None:
    """All rows of a study over all seeds, a table after each seed; of the demo a rank list, too."""
    start = time.perf_counter()
    for seed in seeds:
        check(rows_of(name, dataset, seed, given), dataset)
    table: dict = {}
    for number, seed in enumerate(seeds, 1):
        rows = rows_of(name, dataset, seed, given)
        done = run_rows(rows, dataset, out, overwrite, runtime)
        for key, (results, _) in done.items():
            table.setdefault(key, []).append(results)
        print_table(table, heading(dataset, rows, seeds[:number]))
    print(f"\n{(time.perf_counter() - start) / 60:.1f} minutes")
    if name == "demo":
        best, (_, folder) = max(done.items(), key=lambda item: item[1][0]["mAP"])
        model, recipe = load_model(str(folder / "model.pth"))
        found = evaluate(model, dataset, recipe, workers=runtime.workers)
        draw_ranks(folder / "ranks.png", dataset, *found)
        print(f"it is the rank list of {', '.join(best)}")


# ---------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------


def heading(dataset, rows: list[Row], seeds: list[int]) -> str:
    """What a reader must know beside each number: how many queries, seeds and labels."""
    shares = ", ".join(f"{share:.0%}" for share in sorted({row.recipe.labelled for row in rows}))
    return (f"{dataset.name}, {len(dataset.query):,} queries; seeds "
            f"{', '.join(map(str, seeds))}; labelled: {shares} of the identities")


def print_table(table: dict, title: str) -> None:
    """A line per row: means in per cent +- standard deviation over seeds, and how much the mAP
    differs from random weights of the same seed."""
    heads = ("mAP", "rank-1", "rank-5", "rank-10", "mAP - random's")
    wide = max(50, *(len(f"{group}, {origin}") for group, origin in table))
    print(f"\n{title}\n{'':<{wide + 2}}" + "".join(f"{head:>16}" for head in heads))
    for (group, origin), results in table.items():
        values = 100 * np.array([[r[k] for k in ("mAP", "rank1", "rank5", "rank10")]
                                 for r in results])                          # (seeds, 4)
        columns = list(values.T)
        if origin != RANDOM and (group, RANDOM) in table:
            columns.append(values[:, 0] - [100 * r["mAP"] for r in table[group, RANDOM]])
        cells = [f"{c.mean():.1f}" + (f" +- {c.std(ddof=1):.1f}" if len(c) > 1 else "")
                 for c in columns]
        print(f"  {group + ', ' + origin:<{wide}}" + "".join(f"{cell:>16}" for cell in cells))


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m extra.study", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("study", choices=tuple(STUDIES))
    add("--dataset", default="synthetic", metavar="NAME",
        help=f"{', '.join(NAMES)} or the path of a folder; default: synthetic")
    add("--data-root", default="data", help="folder that holds the datasets")
    add("--seeds", nargs="+", type=int, metavar="N", help="default: 0, of studies 0 to 4")
    add("--arch", nargs="+", help="resnet50, vit_small or both; default: resnet_tiny, vit_mini")
    add("--size", type=two_numbers, help="height x width, in both trainings; default: the recipe's")
    add("--epochs", type=int, metavar="N", help="of fine-tuning; default: 24, demo 12, 24")
    add("--pretrain-epochs", type=int, metavar="N", help="pre-training; laptop 16, 64, demo 12, 8")
    add("--labelled", nargs=1, type=float, metavar="SHARE", help="of the people to fine-tune on")
    add("--rates", nargs="+", type=float, metavar="LR", help="of the fine-tuning, each is tried")
    add("--weights", metavar="FILE", help="initialisation: the weights to start from")
    add("--out", metavar="DIR", help="default: runs/<study>, or runs/<study>_<dataset>")
    add("--overwrite", action="store_true", help="start over in a used folder")
    add("--device", type=device_name, default=usual_device(),
        help="cpu or cuda; default: cuda if there is one")
    for flag in ("--workers", "--threads"):
        add(flag, type=int, default=min(cores(), 8), help="default: %(default)s")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    check_values(parser, args)
    if (args.study == "initialisation") != bool(args.weights) or args.weights and args.overwrite:
        parser.error("--weights FILE, without --overwrite, is for the study of initialisations")
    # none counts twice
    seeds = list(dict.fromkeys(args.seeds or range(1 if args.study in ("demo", "evidence") else 5)))
    if "WORLD_SIZE" in os.environ:
        parser.error("a study runs in one process: start it with python, not with torchrun")
    torch.set_num_threads(args.threads)
    given = {"bf16": has_bfloat16(args.device)}
    for key in ("arch", "size", "epochs", "pretrain_epochs", "labelled", "rates", "weights"):
        if getattr(args, key) is not None:
            given[key] = getattr(args, key)
    dataset = load_dataset(args.dataset, args.data_root)
    if not any(q.pid == g.pid and q.camid != g.camid for q in dataset.query
               for g in dataset.gallery):
        raise InputError(f"{dataset.name}: no query has a correct match from another camera, so "
                         f"that nothing can be evaluated")
    name = args.study if args.dataset == "synthetic" else f"{args.study}_{Path(args.dataset).name}"
    study(args.study, dataset, seeds, given, Path(args.out or f"runs/{name}"), args.overwrite,
          Runtime(args.device, args.workers,
                  backend=choose_backend(None, args.device)))


if __name__ == "__main__":
    command_line(main)
