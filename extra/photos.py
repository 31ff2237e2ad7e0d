"""Your own photos, with a trained model: evaluate.py --extract, --compare, --query."""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor, nn

from data import Record
from evaluate import extract
from extra import pictures
from extra.files import InputError, list_images, read_image, write_atomic


def use(args: argparse.Namespace, model: nn.Module, recipe: dict, run: dict) -> None:
    """Do what the command line asks for."""
    def features(paths: list[str]) -> tuple[Tensor, Tensor]:
        records = [Record(path, -1, 0) for path in paths]
        return extract(model, records, tuple(recipe["size"]), recipe["mean"], recipe["std"], **run)

    if args.compare:
        (a, b), _ = features(args.compare)
        similarity = float(a @ b)
        print(f"cosine similarity {similarity:.4f}; {explain_similarity(args.weights, similarity)}")
    elif args.extract:
        paths = readable(args.extract, args.skip_bad)
        feats = features(paths)[0].numpy()                                   # (N, D)
        content = {"paths": np.array(paths), "features": feats}
        write_atomic(Path(args.out), lambda handle: np.savez(handle, **content))
        print(f"{len(paths)} images, features {feats.shape} in {args.out}")
    else:
        search(args, features)


def readable(folder: str, skip_bad: bool) -> list[str]:
    """Paths of all images below a folder, in the order of their names. Unreadable ones are listed;
    unless skip_bad they raise InputError."""
    paths = list_images(Path(folder))
    bad = {}
    for path in paths:
        try:
            read_image(path, (8, 8), Image.Resampling.NEAREST)
        except InputError as error:
            bad[path] = str(error)
    if len(bad) == len(paths) or bad and not skip_bad:
        raise InputError(f"{folder}: holds {len(paths) - len(bad)} images that can be read and "
                         f"{len(bad)} that cannot, which --skip-bad leaves out if others are left. "
                         f"{'; '.join([*bad.values()][:5])}")
    for error in bad.values():
        print(f"left out: {error}")
    return [path for path in paths if path not in bad]


def search(args: argparse.Namespace, features) -> None:
    """--query: the ten most similar images of --gallery but for copies of the photo's own file."""
    wanted, own = features([args.query])                                     # (1, D), (1,)
    paths = readable(args.gallery, args.skip_bad)
    feats, numbers = features(paths)                                         # (G, D), (G,)
    similarity = (feats @ wanted[0]).tolist()                                # (G,)
    found = []
    for path, same_file, value in zip(paths, (numbers == own).tolist(), similarity):
        if same_file:
            print(f"left out: {path} is the query's very file")
        else:
            found.append((path, value))
    if not found:
        raise InputError(f"{args.gallery}: holds no image but the query")
    best = sorted(found, key=lambda pair: -pair[1])[:10]
    for place, (path, value) in enumerate(best, 1):
        print(f"{place:3d}  {value:.4f}  {path}")
    print(explain_similarity(args.weights))
    if args.ranks:
        title = f"nearest of {len(found):,} images in {args.gallery}"
        pictures.draw_search(args.ranks, title, args.query, best)


def explain_similarity(weights: str, similarity: float | None = None) -> str:
    """What similarities of this model mean, and a pair's own, if its run was evaluated."""
    file = Path(weights).parent / "results.json"
    note = "a threshold needs calibration on pairs of your own cameras"
    try:
        results = json.loads(file.read_text())
        if "verification" in results:
            return f"{explain_threshold(results['verification'], similarity)}; {note}"
        same = results["similarity"]["same"]     # a run of an earlier version
        other = results["similarity"]["other"]
        return (f"{note}; on its evaluation set 90 % of pairs of the same person lay in "
                f"{same[0]} .. {same[2]}, of different people in {other[0]} .. {other[2]}")
    except (OSError, ValueError, LookupError, TypeError, OverflowError):
        return f"{note}; no evaluation of this model is known (no {file})"


def explain_threshold(found: dict, similarity: float | None) -> str:
    """Where a `Verification` had the threshold, and on which side of it a pair lies."""
    t = found["threshold"]
    same = found["false_reject"]
    other = 1 - found["false_accept"]
    text = (f"on {found['people']} both error rates were nearest at a threshold of {t:.4f} (EER "
            f"{found['eer']:.2%})")
    if similarity is None:
        return text
    side = "below"
    if similarity >= t:
        side = "at or above"
        same = 1 - same
        other = 1 - other
    return (f"{text}: this pair lies {side} it, as did {same:.2%} of {found['same_pairs']:,} pairs "
            f"of one person and {other:.2%} of {found['other_pairs']:,} of two")
