"""From a model to what it is worth: features, CMC and mAP, pictures, and use on your own photos.

The protocol is ranking.py's, weights files are weights.py's. Read `extract`, then `evaluate`.

Exercises (answers: README). Of a network of train.py --seed 0: 1. Let images by the query's own
camera count (--cams none): how much better does the same network look? 2. Features before the neck
of a network that was trained to be read after it: torch.load model.pth, set its
["recipe"]["neck_feat"] to "before", torch.save it elsewhere, and evaluate that.
"""

import argparse
import hashlib
import json
import os
import re
import signal
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn

import pictures
from augment import normalize
from data import (NAMES, InputError, Record, command_line, list_images, load_dataset, read_image,
                  write_atomic)
from personvit import VisionTransformer
from ranking import TIE, RankResult, as_ids, cmc_map, rank_features, rerank
from weights import ReIDModel, inspect, load_model, load_weights

__all__ = ["ReIDModel", "cmc_map", "evaluate", "extract", "load_model", "load_weights",
           "rank_features", "rerank"]

# ---------------------------------------------------------------------------------------------
# Features
# ---------------------------------------------------------------------------------------------


class EvalImages(torch.utils.data.Dataset):
    """Item i: uint8 image (3, H, W), resized bilinearly as in the reference code, and a number made
    of the file's bytes. A broken file is an error: leaving it out would make another test."""

    def __init__(self, records: list[Record], size: tuple[int, int]):
        self.records, self.size = records, size

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        path = self.records[i].path
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        image = read_image(path, self.size, Image.Resampling.BILINEAR, content)
        return image, int.from_bytes(hashlib.blake2b(content, digest_size=7).digest(), "big")


@torch.inference_mode()
def extract(model: nn.Module, records: list[Record], size: tuple[int, int], mean, std,
            batch_size: int = 128, workers: int = 2, device: str = "cpu", bf16: bool = False,
            rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
    """L2-normalised features (N, D) in float32 and image numbers (N,): equal bytes, equal number.

    Of several processes each takes every world-th batch, and all return all features. Raises
    InputError, naming the file, for an unreadable image or a feature that is not finite.
    """
    model.eval()
    batches = torch.arange(len(records)).split(batch_size)
    loader = torch.utils.data.DataLoader(EvalImages(records, size), num_workers=workers,
                                         batch_sampler=[b.tolist() for b in batches[rank::world]],
                                         pin_memory=device != "cpu", worker_init_fn=quiet_worker)
    done = []
    for images, number in loader:
        images = normalize(images.to(device, non_blocking=True), mean, std)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            feature = model(images)
        done.append((F.normalize(feature.float(), dim=1).cpu(), number))     # (B, D), (B,)
    if world > 1:  # the same batches as in one process, so the very same features
        parts: list = [None] * world
        torch.distributed.all_gather_object(parts, done)
        done = [parts[i % world][i // world] for i in range(len(batches))]
    features, numbers = map(torch.cat, zip(*done))
    bad = (~features.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise InputError(f"{len(bad)} of {len(features)} features are not finite, first for "
                         f"{records[bad[0]].path}: the weights hold NaN or have diverged")
    return features, numbers


def quiet_worker(_: int) -> None:
    """Ctrl-C, or SIGTERM to all processes of a job, is for the main process; its workers end when
    it tells them to, without tracebacks. A second SIGTERM ends a worker all the same."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))


def colour_histograms(records: list[Record], size=(128, 64), bins: int = 8) -> Tensor:
    """What colour alone can do, the baseline of the demo: (N, bins^3), L2-normalised.

    A joint RGB histogram of the whole image; the square root makes the dot product the
    Bhattacharyya coefficient, under which large plain areas do not drown everything else.
    """
    features = []
    for image, _ in (EvalImages(records, size)[i] for i in range(len(records))):
        r, g, b = image.long() * bins // 256                                 # (H, W) each
        counts = torch.bincount((r * bins * bins + g * bins + b).flatten(), minlength=bins ** 3)
        features.append(counts.float().sqrt())
    return F.normalize(torch.stack(features), dim=1)


# ---------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------


@dataclass
class Features:
    """What a ranking needs of one split: unit features (N, D), image numbers, pids, camids."""

    feats: Tensor
    images: Tensor
    pids: list[int]
    camids: list[int]


def evaluate(model: nn.Module, dataset, recipe: dict, ap: str = "step", use_cameras: bool = True,
             **extract_args) -> tuple[RankResult, Features, Features]:
    """Extract, rank and return (result, query features, gallery features) of a dataset.

    use_cameras=False: exclude nothing but the query image itself.
    """
    if not dataset.query or not dataset.gallery:
        raise InputError(f"{dataset.name} has {len(dataset.query)} query and "
                         f"{len(dataset.gallery)} gallery images; both are needed to evaluate")
    splits = []
    for records in (dataset.query, dataset.gallery):
        feats, images = extract(model, records, tuple(recipe["size"]), recipe["mean"],
                                recipe["std"], **extract_args)
        # without cameras, an image is its own camera: "same camera" then excludes the image alone
        camids = [r.camid for r in records] if use_cameras else images.tolist()
        splits.append(Features(feats, images, [r.pid for r in records], camids))
    q, g = splits
    result = rank_features(q.feats, q.pids, q.camids, g.feats, g.pids, g.camids, ap=ap,
                           q_images=q.images, g_images=g.images)
    return result, q, g


# ---------------------------------------------------------------------------------------------
# What the pictures show
# ---------------------------------------------------------------------------------------------


def filtered_ranking(q: Features, g: Features, i: int) -> tuple[Tensor, Tensor]:
    """Gallery indices of query i, nearest first, as the evaluator sees them (junk left out, ties
    against the query), and their cosine similarities."""
    similarity = g.feats @ q.feats[i]                                        # (G,)
    own = as_ids(g.pids) == q.pids[i]
    junk = own & ((as_ids(g.camids) == q.camids[i]) | (g.images == q.images[i]))
    distance = torch.where(own, -similarity + TIE, -similarity)              # as in `count_before`
    order = torch.argsort(own.int(), stable=True)                            # wrong ones first ...
    order = order[torch.argsort(distance[order], stable=True)]               # ... among equals
    order = order[~junk[order]]
    return order, similarity[order]


def thumbnail(record: Record) -> Tensor:
    return read_image(record.path, (pictures.H, pictures.W), Image.Resampling.BILINEAR)


def draw_ranks(file: str | Path, dataset, result: RankResult, q: Features, g: Features,
               rows: int = 8, columns: int = 10) -> None:
    """Rank-list picture (PNG) of a dataset, with camera and cosine distance beneath each image.

    Rows are spread evenly over all valid queries: a picture of the best ones only would be a lie.
    """
    def text(record: Record, distance: str = "") -> str:
        return f"c{record.camid + 1} {distance}" if dataset.has_cameras else distance

    table = []
    for i in spread(np.flatnonzero(~np.isnan(result.AP)), rows):
        order, similarity = filtered_ranking(q, g, i)
        nearest = zip(order[:columns].tolist(), similarity.tolist())
        query = dataset.query[i]
        table.append(((thumbnail(query), text(query)),
                      [(thumbnail(dataset.gallery[j]), text(dataset.gallery[j], f"{1 - s:.3f}"),
                        g.pids[j] == q.pids[i]) for j, s in nearest]))
    # `evaluate` gives an image number for a camera where cameras do not count
    cameras = dataset.has_cameras and g.camids == [r.camid for r in dataset.gallery]
    left_out = "same person by same camera" if cameras else "the query image itself"
    shown = min(columns, len(g.pids))
    pictures.draw_ranks(file, f"{dataset.name}: nearest {shown} of {len(g.pids):,} gallery images; "
                        f"{left_out} left out", text(Record("", 0, 2), "0.123") + " = " +
                        ("camera 3, " if dataset.has_cameras else "") + "cosine distance 0.123",
                        table)


def spread(values, n: int) -> list[int]:
    """n of the values at even distances, all if there are fewer."""
    return [int(values[i]) for i in np.linspace(0, len(values), min(n, len(values)),
                                                endpoint=False, dtype=int)]


def vit_of(model: nn.Module) -> VisionTransformer:
    backbone = getattr(model, "base", model)
    if not isinstance(backbone, VisionTransformer):
        raise InputError("attention and clusters are pictures of a ViT's patches; these weights "
                         "are of a ResNet")
    return backbone


@torch.inference_mode()
def cls_attention(vit: VisionTransformer, x: Tensor) -> Tensor:
    """How much [CLS] attends to each patch in the last block, by head [ours].

    (B, 3, H, W) -> (B, heads, rows, columns); what is missing to a sum of 1 goes to [CLS] itself.
    """
    last, seen = vit.blocks[-1].attn, []
    handle = last.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    vit.forward_features(x)
    handle.remove()
    B, N, D = seen[0].shape
    q, k, _ = last.qkv(seen[0]).reshape(B, N, 3, last.num_heads, -1).permute(2, 0, 3, 1, 4)
    weights = (q[:, :, :1] @ k.mT / q.shape[-1] ** 0.5).softmax(-1)          # (B, heads, 1, N)
    return weights[:, :, 0, 1:].unflatten(-1, vit.grid_of(*x.shape[2:]))


@torch.inference_mode()
def patch_clusters(vit: VisionTransformer, x: Tensor, count: int = 8,
                   seed: int = 0) -> tuple[Tensor, Tensor]:
    """k-means over the patch tokens of all images at once [ours]: cluster of each patch
    (B, rows, columns), and its cosine similarity to the cluster's centre, of the same shape."""
    tokens = F.normalize(vit.forward_features(x)[:, 1:].float(), dim=-1)     # (B, N, D)
    points = tokens.flatten(0, 1).cpu().numpy().astype(np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # empty clusters, where patches are all alike
        centres, found = kmeans2(points, min(count, len(points)), minit="++", seed=seed)
    centres = np.nan_to_num(centres)
    centres = centres / np.linalg.norm(centres, axis=1, keepdims=True).clip(1e-12)
    typical = (points * centres[found]).sum(1)
    shape = (len(x), *vit.grid_of(*x.shape[2:]))
    return torch.from_numpy(found).view(shape), torch.from_numpy(typical).view(shape)


def people_of(dataset, n: int) -> list[Record]:
    """Query images of n different people."""
    one_each = list({record.pid: record for record in reversed(dataset.query)}.values())[::-1]
    return [one_each[i] for i in spread(range(len(one_each)), n)]


def draw_attention(file: str | Path, dataset, model: nn.Module, recipe: dict, n: int = 6) -> None:
    """Where each head of the last block looks, for n people of a dataset."""
    images, x = read_batch(people_of(dataset, n), recipe)
    pictures.draw_attention(file, f"{dataset.name}: attention of [CLS] to the patches, last block",
                            images, cls_attention(vit_of(model), x))


def draw_clusters(file: str | Path, dataset, model: nn.Module, recipe: dict, n: int = 20) -> None:
    """Which patches of n people are alike to the network."""
    images, x = read_batch(people_of(dataset, n), recipe)
    vit = vit_of(model)
    clusters, typical = patch_clusters(vit, x)
    examples, shares = [], []
    for c in range(int(clusters.max()) + 1):
        own = torch.where(clusters == c, typical, -torch.inf).flatten()
        best = own.topk(min(12, len(own)))
        places = [np.unravel_index(int(i), clusters.shape)
                  for i, value in zip(best.indices, best.values) if value > -torch.inf]
        examples.append([images[i, :, r * vit.stride:r * vit.stride + vit.patch_size,
                                k * vit.stride:k * vit.stride + vit.patch_size]
                         for i, r, k in places])
        shares.append(float((clusters == c).float().mean()))
    pictures.draw_clusters(file, f"{dataset.name}: patch tokens in {len(shares)} clusters", images,
                           clusters, examples, shares)


def read_batch(records: list[Record], recipe: dict) -> tuple[Tensor, Tensor]:
    """Images of a few records, as they are and as the network takes them: uint8, float32."""
    size = tuple(recipe["size"])
    images = torch.stack([read_image(r.path, size, Image.Resampling.BILINEAR) for r in records])
    return images, normalize(images, recipe["mean"], recipe["std"])


def draw_curves(file: str | Path, folders: list[str]) -> None:
    """Losses over training, and CMC where a run was evaluated, of one or several run folders."""
    if len(folders) > len(pictures.PALETTE):
        raise InputError(f"--runs: {len(folders)} runs, but colours for {len(pictures.PALETTE)}")
    losses, cmc = {}, {}
    for folder in folders:
        try:
            text = Path(folder, "log.jsonl").read_text()
            lines = [json.loads(line) for line in text.splitlines(True)
                     if line.endswith("\n")]  # a power cut may have left half a line
            points = [(line["step"], float(line["total"])) for line in lines if "total" in line]
            results = Path(folder, "results.json")
            hits = json.loads(results.read_text()).get("cmc", []) if results.exists() else []
            hits = [float(hit) for hit in hits]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{folder}: is no run folder with a readable log.jsonl and "
                             f"results.json ({error})") from None
        points = [(step, loss) for step, loss in points if np.isfinite(loss)]
        if points:
            losses[folder] = tuple(zip(*points))
        if hits:
            cmc[folder] = (range(1, len(hits) + 1), hits)
    panels = [("means between log lines", "step", "loss", losses),
              ("share of queries with a hit so far", "rank", "CMC", cmc)]
    panels = [panel for panel in panels if panel[-1]]
    if not panels:
        raise InputError(f"{', '.join(folders)}: nothing logged yet, nothing to draw")
    pictures.draw_curves(file, panels)


# ---------------------------------------------------------------------------------------------
# Your own photos
# ---------------------------------------------------------------------------------------------


def photos(folder: str, skip_bad: bool) -> list[Record]:
    """All images below a folder, in the order of their names. Unreadable ones are listed; unless
    skip_bad they raise InputError."""
    paths, good, bad = list_images(Path(folder), recursive=True), [], []
    for path in paths:
        try:
            read_image(path, (8, 8), Image.Resampling.NEAREST)
            good.append(Record(path, -1, 0))
        except InputError as error:
            bad.append(str(error))
    if bad and not skip_bad:
        raise InputError(f"{len(bad)} of {len(paths)} images below {folder} cannot be read; "
                         f"--skip-bad leaves them out: {'; '.join(bad[:5])}")
    for error in bad:
        print(f"left out: {error}")
    if not good:
        raise InputError(f"{folder}: holds no readable image")
    return good


def similarity_ranges(q: Features, g: Features, most: int = 500) -> dict[str, list[float]]:
    """5 %, 50 % and 95 % quantiles of the cosine similarity of pairs by different cameras, of the
    same person and of others; from at most `most` queries."""
    chosen = spread(range(len(q.pids)), most)
    similarity = q.feats[chosen] @ g.feats.T
    same = as_ids(q.pids)[chosen, None] == as_ids(g.pids)
    pairs = as_ids(q.camids)[chosen, None] != as_ids(g.camids)
    ranges = {}
    for name, mask in (("same", same & pairs), ("other", ~same & pairs)):
        if mask.any():
            values = np.quantile(similarity[mask], [0.05, 0.5, 0.95])
            ranges[name] = [round(float(v), 3) for v in values]
    return ranges


def explain_similarity(weights: str) -> str:
    """What similarities of this model mean, if its run was evaluated."""
    results = Path(weights).parent / "results.json"
    note = "a threshold needs calibration on pairs of your own cameras"
    try:
        ranges = json.loads(results.read_text())["similarity"]
        return (f"{note}; on its evaluation set 90 % of pairs of the same person lay in "
                f"{ranges['same'][0]} .. {ranges['same'][2]}, of different people in "
                f"{ranges['other'][0]} .. {ranges['other'][2]}")
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return f"{note}; no evaluation of this model is known (no {results})"


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def device_name(text: str) -> str:
    """cpu, cuda or cuda:1, if there is such a thing here."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither cpu nor cuda")
    if text != "cpu" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("no GPU is usable here: run with --device cpu")
    if text[5:] and int(text[5:]) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text}: {torch.cuda.device_count()} GPUs are here, the "
                                         f"first is cuda:0")
    return text


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="CMC and mAP of a model on a ReID dataset; pictures; your own photos.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    what = parser.add_argument_group("what to do, one of").add_mutually_exclusive_group(
        required=True)
    what.add_argument("--dataset", metavar="NAME", help=f"evaluate: {', '.join(NAMES)} or a folder")
    what.add_argument("--extract", metavar="DIR", help="features of all images below a folder")
    what.add_argument("--compare", nargs=2, metavar="IMAGE", help="similarity of two photos")
    what.add_argument("--query", metavar="IMAGE", help="find a photo's person in --gallery DIR")
    what.add_argument("--inspect", metavar="FILE", help="say what a weights file holds")
    what.add_argument("--curves", metavar="PNG", help="draw loss and CMC curves of --runs DIR ...")
    add = parser.add_argument
    add("--weights", metavar="FILE", help="model.pth of train.py, or any format of the README")
    add("--data-root", default="data", help="folder that holds the datasets")
    add("--ap", choices=("step", "market"), default="step", help="rule of mAP")
    add("--cams", choices=("file", "none"), default="file",
        help="cameras from the file names, or none: exclude only the image itself")
    add("--rerank", action="store_true", help="print the result of k-reciprocal re-ranking too")
    add("--ranks", metavar="PNG", help="draw the rank list")
    add("--attention", metavar="PNG", help="draw where a ViT's heads look")
    add("--clusters", metavar="PNG", help="draw which patches are alike to a ViT")
    add("--gallery", metavar="DIR", help="with --query: where to search")
    add("--runs", nargs="+", metavar="DIR", help="with --curves: run folders")
    add("-o", "--out", metavar="NPZ", help="with --extract: the file for paths and features")
    add("--skip-bad", action="store_true", help="leave unreadable photos out, listing them")
    add("--overwrite", action="store_true", help="replace existing pictures and files")
    add("--batch-size", type=int, default=128, help="images per forward pass")
    add("--workers", type=int, default=2, help="processes that decode images")
    add("--device", type=device_name, help="cpu or cuda",
        default="cuda" if torch.cuda.is_available() else "cpu")
    add("--bf16", action=argparse.BooleanOptionalAction,
        help="bfloat16 network, float32 ranking; default: as the model was trained")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.batch_size < 1 or args.workers < 0:
        parser.error("--batch-size is at least 1, --workers at least 0")
    if "" in (args.dataset, args.extract, args.query, args.gallery, args.inspect, args.curves):
        parser.error("a name is empty")
    if not args.weights and not args.inspect and not args.curves:
        parser.error("--weights FILE is needed")
    for flag in ("rerank", "attention", "clusters"):
        if getattr(args, flag) and not args.dataset:
            parser.error(f"--{flag} goes with --dataset")
    if args.ranks and not (args.dataset or args.query):
        parser.error("--ranks goes with --dataset or --query")
    if args.skip_bad and not (args.extract or args.query):
        parser.error("--skip-bad goes with --extract or --query")
    for first, second in (("extract", "out"), ("query", "gallery"), ("curves", "runs")):
        if bool(getattr(args, first)) != bool(getattr(args, second)):
            parser.error(f"--{first} and --{second} go together")
    for flag, suffix in (("ranks", ".png"), ("attention", ".png"), ("clusters", ".png"),
                         ("curves", ".png"), ("out", ".npz")):
        name = getattr(args, flag)
        if name and not name.endswith(suffix):
            parser.error(f"--{flag} {name}: the file is a {suffix[1:].upper()}, name it so")
        if name and os.path.exists(name) and not args.overwrite:
            parser.error(f"{name} exists; --overwrite replaces it")
        if name and (os.path.isdir(name) or not os.access(Path(name).parent, os.W_OK)):
            parser.error(f"--{flag} {name}: its folder is absent or read-only")
    drawn = [name for name in (args.ranks, args.attention, args.clusters) if name]
    if len(drawn) > len(set(map(os.path.abspath, drawn))):
        parser.error("two pictures cannot go into one file")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.inspect:
        print(inspect(args.inspect))
        return
    if args.curves:
        draw_curves(args.curves, args.runs)
        print(f"curves in {args.curves}")
        return
    model, recipe = load_model(args.weights)
    plain = recipe["neck_feat"] == "none"
    print(f"{recipe['arch']} at {recipe['size'][0]}x{recipe['size'][1]}, feature "
          f"{'of the backbone' if plain else recipe['neck_feat'] + ' the neck'}, L2-normalised, "
          f"mean {tuple(recipe['mean'])}, std {tuple(recipe['std'])}")
    if plain:
        print("WARNING: a pre-trained backbone, not fine-tuned for ReID: its plain features count")
    model.to(args.device)
    run = {"batch_size": args.batch_size, "workers": args.workers, "device": args.device,
           "bf16": bool(recipe.get("bf16")) if args.bf16 is None else args.bf16}
    if args.dataset:
        evaluate_dataset(args, model, recipe, run)
    else:
        use_photos(args, model, recipe, run)


def evaluate_dataset(args: argparse.Namespace, model: nn.Module, recipe: dict, run: dict) -> None:
    """--dataset: numbers and pictures."""
    if args.attention or args.clusters:
        vit_of(model)  # raises before minutes are spent
    dataset = load_dataset(args.dataset, args.data_root)
    result, q, g = evaluate(model, dataset, recipe, args.ap, args.cams == "file", **run)
    print(result)
    if args.rerank:
        again = rank_features(q.feats, q.pids, q.camids, g.feats, g.pids, g.camids, ap=args.ap,
                              rerank=True, q_images=q.images, g_images=g.images)
        print(f"re-ranked (k1=20, k2=6, lambda=0.3): {again}")
    model.cpu()
    for file, draw in ((args.ranks, lambda f: draw_ranks(f, dataset, result, q, g)),
                       (args.attention, lambda f: draw_attention(f, dataset, model, recipe)),
                       (args.clusters, lambda f: draw_clusters(f, dataset, model, recipe))):
        if file:
            draw(file)
            print(f"picture in {file}")


def use_photos(args: argparse.Namespace, model: nn.Module, recipe: dict, run: dict) -> None:
    """--extract, --compare, --query."""
    def features(records: list[Record]) -> tuple[Tensor, Tensor]:
        return extract(model, records, tuple(recipe["size"]), recipe["mean"], recipe["std"], **run)

    if args.compare:
        (a, b), _ = features([Record(path, -1, 0) for path in args.compare])
        print(f"cosine similarity {float(a @ b):.4f}; {explain_similarity(args.weights)}")
        return
    query = args.query and Record(args.query, -1, 0)
    wanted, own = features([query]) if query else (None, None)  # first: it may be unreadable
    records = photos(args.extract or args.gallery, args.skip_bad)
    feats, numbers = features(records)
    if args.extract:
        paths = np.array([r.path for r in records])
        write_atomic(Path(args.out), lambda f: np.savez(f, paths=paths, features=feats.numpy()))
        print(f"{len(records)} images, features {tuple(feats.shape)} in {args.out}")
        return
    for i in (numbers == own).nonzero().flatten().tolist():
        print(f"left out: {records[i].path} is the query's very file")
    similarity = (feats @ wanted[0]).masked_fill(numbers == own, -torch.inf)
    found = int((numbers != own).sum())
    if not found:
        raise InputError(f"{args.gallery}: holds no image but the query")
    best = torch.argsort(similarity, descending=True, stable=True)[:min(found, 10)].tolist()
    for place, i in enumerate(best, 1):
        print(f"{place:3d}  {similarity[i]:.4f}  {records[i].path}")
    print(explain_similarity(args.weights))
    if args.ranks:
        row = [(thumbnail(records[i]), f"{similarity[i]:.3f}", None) for i in best]
        pictures.draw_ranks(args.ranks, f"nearest of {found:,} images in {args.gallery}",
                            "0.987 = cosine similarity, 1 = the same",
                            [((thumbnail(query), ""), row)])
        print(f"picture in {args.ranks}")


if __name__ == "__main__":
    command_line(main)
