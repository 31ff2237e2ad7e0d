"""Studies: trainings that differ in one thing, over several seeds; a table and a picture of each.

    demo       both papers on synthetic people, from nothing to a rank list; one seed
    few-shot   random weights, UP-ReID, PersonViT; fine-tuned on 10, 30, 100 % of the identities
    upreid     UP-ReID's losses, one by one
    personvit  PersonViT without its masks, without its local crops

Rows with the same network and share of labels are fine-tuned alike, and with the same seed on the
same labelled people. Each training has a folder below --out, so a study that was stopped goes on
with the same command; parts of it (--seeds 0 1, --seeds 2) may run side by side with the same
--out, and the command with all seeds then trains nothing anew and prints the whole table.
Read `few_shot`, then `run_rows`.

Exercises (answers: README). 1. How many seeds does it take to see a gain of one point? The tables
print the spread of the differences. 2. Pre-train on the labelled people alone (`some_identities` in
`run_rows`): is it the pre-training that helps, or the images without labels?
"""

import argparse
import dataclasses
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import (NAMES, InputError, PKSampler, ShuffleSampler, command_line, load_dataset,
                  some_identities)
from evaluate import (colour_histograms, device_name, draw_ranks, evaluate, load_model,
                      rank_features)
from pictures import draw_dots
from pretrain import METHODS, pretrain, pretrain_recipe_for
from runs import Machine, check_recipe, default_threads, open_run
from train import Recipe, fine_tune_and_evaluate, pair, recipe_for
from weights import build_backbone

RANDOM = "random weights"


@dataclass
class Row:
    """One line of a table: where the backbone comes from, and how it is fine-tuned."""

    origin: str
    before: object      # recipe of the pre-training, or None
    recipe: Recipe

    @property
    def group(self) -> str:
        few = self.recipe.labelled < 1
        return self.recipe.arch + (f", {self.recipe.labelled:.0%} of the identities" if few else "")


# ---------------------------------------------------------------------------------------------
# What is compared
# ---------------------------------------------------------------------------------------------


def recipes(method: str, dataset, seed: int, given: dict):
    """Recipes of pre-training and fine-tuning for a method's laptop network; given: bf16, and size,
    epochs, pretrain_epochs where they differ from the usual ones."""
    before = pretrain_recipe_for(method, "synthetic")
    recipe = recipe_for(dataset.name, before.arch)
    people = len({r.pid for r in dataset.train})
    both = {"seed": seed, "size": given.get("size", before.size), "bf16": given["bf16"]}
    return (dataclasses.replace(before, **both,
                                epochs=given.get("pretrain_epochs", before.epochs)),
            dataclasses.replace(recipe, **both, ids=min(recipe.ids, people),
                                epochs=given.get("epochs", recipe.epochs)))


def demo(dataset, seed: int, given: dict) -> list[Row]:
    """Each network from random weights and from its pre-training, at half the usual length."""
    return few_shot(dataset, seed, {"epochs": 12, "pretrain_epochs": 8} | given, shares=(1.0,))


def few_shot(dataset, seed: int, given: dict, shares=(0.1, 0.3, 1.0)) -> list[Row]:
    """The fewer people are labelled, the more should pre-training help: it needs no labels, and so
    sees all training images in every row."""
    rows = []
    for method, title in (("upreid", "UP-ReID"), ("personvit", "PersonViT")):
        before, recipe = recipes(method, dataset, seed, given)
        for share in shares:
            people = round(share * len({r.pid for r in dataset.train}))
            if people < 2:
                raise InputError(f"{dataset.name} has too few people: {share:.0%} of them are "
                                 f"{people}, a study needs 2")
            few = dataclasses.replace(recipe, labelled=share, ids=min(recipe.ids, people))
            rows += [Row(RANDOM, None, few), Row(title, before, few)]
    return rows


def variants(method: str, changes: dict[str, dict]) -> Callable:
    """Rows that differ in the pre-training alone."""
    def rows(dataset, seed: int, given: dict) -> list[Row]:
        before, recipe = recipes(method, dataset, seed, given)
        return [Row(RANDOM, None, recipe)] + [
            Row(name, dataclasses.replace(before, **change), recipe)
            for name, change in changes.items()]
    return rows


STUDIES = {
    "demo": demo,
    "few-shot": few_shot,
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


# ---------------------------------------------------------------------------------------------
# Running it
# ---------------------------------------------------------------------------------------------


def run_rows(rows: list[Row], dataset, out: Path, overwrite: bool, machine: Machine) -> dict:
    """Train and evaluate rows of one seed: {(group, origin): (results, run folder)}."""
    done, pretrained = {}, {}
    for row in rows:
        seed = row.recipe.seed
        if row.before and row.origin not in pretrained:
            run = open_run(out / file_name(f"{row.origin}_{seed}_pretraining"), row.before, dataset,
                           overwrite, machine)
            pretrain(row.before, dataset, run, machine)
            pretrained[row.origin] = str(run.folder / "backbone.pth")
        weights = pretrained.get(row.origin)
        folder = out / file_name(f"{row.group}_{row.origin}_{seed}")
        results = fine_tune_and_evaluate(row.recipe, dataset, folder, overwrite, weights, machine)
        done[row.group, row.origin] = results, folder
    return done


def file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text)


def check(rows: list[Row], dataset, machine: Machine) -> None:
    """Raise InputError for what would otherwise end a study after hours."""
    for row in rows:
        check_recipe(row.recipe)
        few = some_identities(dataset.train, row.recipe.labelled, row.recipe.seed)
        PKSampler([r.pid for r in few], row.recipe.ids, row.recipe.images)
        if row.before:
            check_recipe(row.before)
            METHODS[type(row.before)](row.before, machine)
            ShuffleSampler(len(dataset.train), row.before.batch)


def study(name: str, dataset, seeds: list[int], given: dict, out: Path, overwrite: bool,
          machine: Machine) -> None:
    """All rows of a study over all seeds, a table after each seed, a picture at the end."""
    start, table = time.perf_counter(), {}
    pictures = [out / f"{name}.png"] + [out / "ranks.png"] * (name == "demo")
    taken = [p.name for p in pictures if p.exists()]
    if taken and not overwrite and not any(out.glob("*/recipe.json")):
        raise InputError(f"{out} is no study's folder, and {' and '.join(taken)} in it would be "
                         f"replaced; choose another with --out")
    for seed in seeds:
        check(STUDIES[name](dataset, seed, given), dataset, machine)
    if name == "demo":
        table = untrained(dataset, machine)
    for number, seed in enumerate(seeds, 1):
        done = run_rows(STUDIES[name](dataset, seed, given), dataset, out, overwrite, machine)
        for key, (results, _) in done.items():
            table.setdefault(key, []).append(results)
        print_table(table, f"{dataset.name}, {len(dataset.query):,} queries, "
                           f"seeds {seeds[:number]}")
    groups: dict = {}
    for (group, origin), results in table.items():
        groups.setdefault(group, {})[origin] = [100 * r["mAP"] for r in results]
    draw_dots(pictures[0], f"{name} on {dataset.name}: mAP in % of each seed, and the mean", groups)
    print(f"\npicture in {pictures[0]}; {(time.perf_counter() - start) / 60:.1f} minutes")
    if name == "demo":
        best, (_, folder) = max(done.items(), key=lambda item: item[1][0]["mAP"])
        model, recipe = load_model(str(folder / "model.pth"))
        draw_ranks(pictures[1], dataset, *evaluate(model, dataset, recipe, workers=0))
        print(f"rank list of {', '.join(best)} in {pictures[1]}")


def untrained(dataset, machine: Machine) -> dict:
    """What is to be beaten: colours alone, and a network that has learnt nothing."""
    labels = [([r.pid for r in part], [r.camid for r in part])
              for part in (dataset.query, dataset.gallery)]
    features = [colour_histograms(part) for part in (dataset.query, dataset.gallery)]
    colours = rank_features(features[0], *labels[0], features[1], *labels[1])
    torch.manual_seed(0)
    recipe = recipe_for("synthetic")  # the usual size, whatever --size says
    reading = {"size": recipe.size, "mean": recipe.statistics[0], "std": recipe.statistics[1]}
    # without BNNeck: a fresh one would change no ranking
    network, _, _ = evaluate(build_backbone(recipe.arch, recipe.size), dataset, reading,
                             workers=machine.workers)
    return {("no training", name): [{"mAP": result.mAP, **{f"rank{k}": float(result.cmc[k - 1])
                                                           for k in (1, 5, 10)}}]
            for name, result in (("colour histogram", colours), (recipe.arch, network))}


def print_table(table: dict, title: str) -> None:
    """A line per row: means in per cent +- standard deviation over seeds, and how much the mAP
    differs from random weights of the same seed."""
    heads = ("mAP", "rank-1", "rank-5", "rank-10", "mAP - random's")
    print(f"\n{title:<52}" + "".join(f"{head:>16}" for head in heads))
    for (group, origin), results in table.items():
        values = 100 * np.array([[r[k] for k in ("mAP", "rank1", "rank5", "rank10")]
                                 for r in results])                          # (seeds, 4)
        columns = list(values.T)
        if origin != RANDOM and (group, RANDOM) in table:
            columns.append(values[:, 0] - [100 * r["mAP"] for r in table[group, RANDOM]])
        cells = [f"{c.mean():.1f}" + (f" +- {c.std(ddof=1):.1f}" if len(c) > 1 else "")
                 for c in columns]
        print(f"  {group + ', ' + origin:<50}" + "".join(f"{cell:>16}" for cell in cells))


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("study", choices=tuple(STUDIES))
    add("--dataset", default="synthetic", metavar="NAME",
        help=f"{', '.join(NAMES)} or the path of a folder; default: synthetic")
    add("--data-root", default="data", help="folder that holds the datasets")
    add("--seeds", nargs="+", type=int, metavar="N", help="default: 0 for the demo, else 0 1 2 3 4")
    add("--size", type=pair(int), help="image height x width, of both trainings; default: 128x64")
    add("--epochs", type=int, metavar="N", help="of fine-tuning; default: 24, demo: 12")
    add("--pretrain-epochs", type=int, metavar="N", help="of pre-training; default: 16, demo: 8")
    add("--out", metavar="DIR", help="default: runs/<study>, or runs/<study>_<dataset>")
    add("--overwrite", action="store_true", help="start over in a used folder")
    add("--device", type=device_name, default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda; default: cuda if there is one")
    # small images are kept in memory after the first epoch: processes that decode would not pay
    add("--workers", type=int, default=0, help="decoding processes; default: 0")
    add("--threads", type=int, default=default_threads(), help="default: %(default)s")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.workers < 0 or args.threads < 1 or len(set(args.seeds or [])) < len(args.seeds or []):
        parser.error("--workers is at least 0, --threads at least 1, and no seed counts twice")
    if "WORLD_SIZE" in os.environ:
        parser.error("a study runs in one process: start it with python, not with torchrun")
    torch.set_num_threads(args.threads)
    given = {key: getattr(args, key) for key in ("size", "epochs", "pretrain_epochs")
             if getattr(args, key) is not None} | {"bf16": args.device != "cpu"}
    dataset = load_dataset(args.dataset, args.data_root)
    if not dataset.query:
        raise InputError(f"{dataset.name} has no queries, by which a study could be judged")
    seeds = args.seeds or ([0] if args.study == "demo" else [0, 1, 2, 3, 4])
    name = args.study if args.dataset == "synthetic" else f"{args.study}_{Path(args.dataset).name}"
    study(args.study, dataset, seeds, given, Path(args.out or f"runs/{name}"), args.overwrite,
          Machine(args.device, args.workers))


if __name__ == "__main__":
    command_line(main)
