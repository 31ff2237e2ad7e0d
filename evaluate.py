"""How well a network ranks: CMC and mAP of its features, by Market-1501's protocol.

For each query q:

    rank the gallery by distance to q            nearest first, at rank 1
    drop images of q's person from q's camera    finding the next video frame again proves nothing
    CMC@k = share of queries with a correct match among the first k       (rank-1 is CMC@1)
    AP    = mean, over q's correct matches, of the precision at their ranks       ("step"); or
            of (precision at the rank + precision one rank earlier) / 2           ("market", as
            in Market-1501's own code: the area below the curve by trapezoids; never higher)
    mAP   = mean of AP over queries
    INP   = correct matches / rank of the last one; mINP = its mean over queries

A query that has no correct match left does not count; every result says how many do ("valid a/b").
Three things that usual evaluation leaves open are settled here:

    1  ties count against the query: else a collapsed network, all features equal, gets what the
       order of the gallery gives it, up to 100 %
    2  NaN is an error
    3  a copy of the query's file in the gallery is no match

    Q, G    images of query and gallery; D width of the feature; B images of a batch
    M       correct matches of one query

Read `ranks_of`, then `score`, `extract`, `load_model`. Weights files of any kind are read by
extra/formats.py; re-ranking, verification and your own photos are in extra/, too.
"""

import argparse
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import personvit
import upreid
from data import NAMES, Record, load_dataset, make_loader, normalize
from extra import flags, runs
from extra.files import InputError, command_line, read_image
from extra.folders import closest
from extra.rerank import TIE, rerank, reranked_rows  # rerank: for your own code

# ---------------------------------------------------------------------------------------------
# Ranking: CMC and mAP
# ---------------------------------------------------------------------------------------------


@dataclass
class RankResult:
    """cmc (max_rank,): cmc[k-1] = CMC@k. mAP in [0, 1] by the convention `ap`; mAPs holds both.

    mINP: how soon the last correct match comes, see the module's docstring. valid of total queries
    had a correct match in the gallery. AP (total,) by query, NaN if invalid.
    """

    cmc: np.ndarray
    mAP: float
    mINP: float
    valid: int
    total: int
    ap: str
    mAPs: dict[str, float]
    AP: np.ndarray

    def numbers(self) -> dict:
        """What results.json holds of a ranking."""
        found = {"mAP": self.mAP, "mAP_market": self.mAPs["market"], "mINP": self.mINP}
        for k in (1, 5, 10):
            if k <= len(self.cmc):
                found[f"rank{k}"] = float(self.cmc[k - 1])
        return found | {"cmc": self.cmc.tolist(), "valid": self.valid, "queries": self.total}

    def __str__(self) -> str:
        step, market = self.mAPs["step"], self.mAPs["market"]
        text = f"mAP {step:.2%} (step; market {market:.2%})"
        if self.ap == "market":
            text = f"mAP {market:.2%} (market; step {step:.2%})"
        for k in (1, 5, 10):
            if k <= len(self.cmc):
                text += f"  rank-{k} {self.cmc[k - 1]:.2%}"
        return f"{text}  mINP {self.mINP:.2%}  valid queries {self.valid}/{self.total}"


class Labels(NamedTuple):
    """Of each image on one side, query or gallery: identity, camera, number of the file (n,)."""

    pids: np.ndarray
    camids: np.ndarray
    files: np.ndarray


def matches_of(query: Labels, i: int, gallery: Labels) -> tuple[np.ndarray, np.ndarray]:
    """Places in the gallery of the images of query i's person: the correct matches (M,), and those
    that are left out, from the same camera or of the same file."""
    own = np.flatnonzero(gallery.pids == query.pids[i])
    same_camera = gallery.camids[own] == query.camids[i]
    same_file = gallery.files[own] == query.files[i]
    junk = same_camera | same_file
    return own[~junk], own[junk]


def ranks_of(distances: np.ndarray, correct: np.ndarray, junk: np.ndarray,
             tie: float) -> np.ndarray:
    """Ranks (M,) of a query's correct matches, nearest first; 1 is the best. distances (G,) are
    changed; tie: distances that differ by no more than this count as equal.

    The j-th correct match has rank j + the number of other people's images that are at most as far
    away. "At most": an image at the same distance counts as before it, else the order of the
    gallery would decide.
    """
    found = np.sort(distances[correct]) + tie                                # (M,)
    distances[correct] = np.inf                   # only other people's images are left
    distances[junk] = np.inf
    near = distances[distances <= found[-1]]      # few, if the network is good
    others_before = [np.count_nonzero(near <= distance) for distance in found]
    return np.arange(1, len(found) + 1) + others_before


def score(rows: Iterator[np.ndarray], query: Labels, gallery: Labels, max_rank: int, ap: str,
          tie: float) -> RankResult:
    """CMC and mAP from distances (G,), one row for each query, in their order."""
    if ap not in ("step", "market") or max_rank < 1:
        raise InputError(f"ap is 'step' or 'market', max_rank at least 1; not {ap!r}, {max_rank}")
    total = len(query.pids)
    cmc = np.zeros(max_rank)
    INP = []
    APs = {"step": np.full(total, np.nan), "market": np.full(total, np.nan)}
    for i, distances in enumerate(rows):
        if not np.isfinite(distances).all():
            raise InputError("distances hold NaN or infinity: a ranking of them means nothing")
        correct, junk = matches_of(query, i, gallery)
        if not len(correct):
            continue
        rank = ranks_of(distances, correct, junk, tie)                       # (M,)
        hits = np.arange(1, len(rank) + 1)        # correct matches up to each
        precision = hits / rank                   # at each correct match, and
        earlier = np.where(rank > 1, (hits - 1) / np.maximum(rank - 1, 1), 1.0)  # a rank earlier
        APs["step"][i] = precision.mean()
        APs["market"][i] = (earlier + precision).mean() / 2
        cmc[rank[0] - 1:] += 1                    # found at rank r: found among the first k >= r
        INP.append(len(rank) / rank[-1])
    if not INP:
        absent = int((~np.isin(query.pids, gallery.pids)).sum())
        raise InputError(
            f"no query has a correct match in the gallery: of {total} queries, {absent} have an id "
            f"that is not in the gallery, {total - absent} have it only from the query's own "
            f"camera (or as the same image). If cameras mean nothing, evaluate.py --cams none "
            f"excludes the image alone; if ids differ, do query and gallery come from the same "
            f"set?")
    mAPs = {name: float(np.nanmean(values)) for name, values in APs.items()}
    return RankResult(cmc / len(INP), mAP=mAPs[ap], mINP=float(np.mean(INP)), valid=len(INP),
                      total=total, ap=ap, mAPs=mAPs, AP=APs[ap])


def labels_of(side: str, n: int, pids, camids, files=None) -> Labels:
    """The labels of one side, "query" or "gallery". files=None: no query's file is in the gallery.
    Raises InputError if sizes do not agree."""
    if files is None:
        other = {"query": -1, "gallery": -2}
        files = np.full(n, other[side])
    labels = []
    for name, values in (("ids", pids), ("cameras", camids), ("file numbers", files)):
        values = np.asarray(values)
        if n < 1 or values.shape != (n,) or values.dtype.kind not in "biu":  # bool, int, unsigned
            raise InputError(f"the {side} has {n} images and {values.size} {name} of type "
                             f"{values.dtype}; as many integers are needed, one at least")
        labels.append(values.astype(np.int64))
    return Labels(*labels)


def cmc_map(distmat, q_pids, g_pids, q_camids, g_camids, max_rank: int = 50, ap: str = "step",
            *, q_files=None, g_files=None) -> RankResult:
    """CMC and mAP of a distance matrix (Q, G), smaller = more alike; ids and cameras (Q,) and (G,);
    for your own code: the scripts go through `rank_features`, whose arguments have another order.

    ap: "step", as PersonViT, TransReID, fast-reid, torchreid have it, or "market" (Market-1501's
    MATLAB code); see the module's docstring. Images of the query's id from the query's camera are
    left out, as are, when file numbers are given, images of its id with its number; distractors (id
    0) stay. Equal distances are ties, which count against the query; to `rank_features` also those
    that rounding cannot tell apart.
    Raises InputError (a ValueError) for distances that are not finite, sizes that do not agree and
    when no query has a correct match.

    >>> hits_at = [1, 1, 0, 1, 0, 0, 1]                      # one query, a gallery already in order
    >>> result = cmc_map([[1, 2, 3, 4, 5, 6, 7]], [1], hits_at, [0], [1] * 7)
    >>> round(result.mAPs["step"], 4), round(result.mAPs["market"], 4)
    (0.8304, 0.811)
    """
    if isinstance(distmat, Tensor):
        distmat = distmat.detach().cpu()
    matrix = np.asarray(distmat)
    if matrix.dtype != np.float32:
        matrix = matrix.astype(np.float64)
    if matrix.ndim != 2:
        raise InputError(f"distances are a matrix (queries, gallery), not of shape {matrix.shape}")
    query = labels_of("query", len(matrix), q_pids, q_camids, q_files)
    gallery = labels_of("gallery", matrix.shape[1], g_pids, g_camids, g_files)
    rows = (row.copy() for row in matrix)
    return score(rows, query, gallery, max_rank, ap, tie=0.0)


def rank_features(q_feats, q_pids, q_camids, g_feats, g_pids, g_camids, max_rank: int = 50,
                  ap: str = "step", rerank: bool = False, *, q_files=None,
                  g_files=None) -> RankResult:
    """CMC and mAP of unit features (Q, D) and (G, D), without the (Q, G) matrix in memory.

    rerank: by k-reciprocal neighbours, k1 = 20, k2 = 6, lambda = 0.3 (extra/rerank.py). Cosine
    similarity ranks as the Euclidean distance of unit vectors does; similarities closer than TIE,
    1e-6, are ties. Raises InputError as `cmc_map` does, and for features that are not of length 1.
    """
    q = torch.as_tensor(q_feats).detach().float()
    g = torch.as_tensor(g_feats).detach().float()
    check_unit_length("query", q, q)
    check_unit_length("gallery", g, q)
    query = labels_of("query", len(q), q_pids, q_camids, q_files)
    gallery = labels_of("gallery", len(g), g_pids, g_camids, g_files)
    rows = negative_similarities(q, g)
    if rerank:
        rows = reranked_rows(q, g)
    return score(rows, query, gallery, max_rank, ap, tie=TIE)


def check_unit_length(side: str, features: Tensor, q: Tensor) -> None:
    """Raise InputError unless features (n, D) are as wide as q (Q, D) and of length 1."""
    if features.ndim != 2 or features.shape[1:] != q.shape[1:]:
        raise InputError(f"{side} features of shape {tuple(features.shape)} beside query features "
                         f"of shape {tuple(q.shape)}")
    if not ((features.norm(dim=1) - 1).abs() < 1e-3).all():  # NaN fails this, too
        raise InputError(f"{side} features are not of length 1 (or NaN); L2-normalise them")


def negative_similarities(q: Tensor, g: Tensor, chunk: int = 256) -> Iterator[np.ndarray]:
    """Distances (G,) of one query after the other, a chunk of them in memory: the cosine similarity
    times -1, so that nearer is smaller."""
    for part in q.split(chunk):
        yield from (-part @ g.T).cpu().numpy()


# ---------------------------------------------------------------------------------------------
# The model that is fine-tuned and evaluated
# ---------------------------------------------------------------------------------------------

ARCHS = {**personvit.VITS, **upreid.RESNETS}


def build_backbone(arch: str, size: tuple[int, int] = (256, 128), drop_path: float = 0.0,
                   last_stride: int = 1, stride: int | None = None) -> nn.Module:
    """A backbone of ARCHS with random weights. size (H, W): a ViT's grid; a ResNet takes any.
    stride: of a ViT's patches, None = they do not overlap; last_stride: of a ResNet's last stage.

    Raises InputError for an unknown name and a size without a single patch.
    """
    if arch not in ARCHS:
        raise InputError(f"--arch {arch}: no network has this name; did you mean "
                         f"{closest(arch, ARCHS)}?")
    if arch.startswith("resnet"):
        return ARCHS[arch](last_stride)
    if min(size) < 16:
        raise InputError(f"--size {size[0]}x{size[1]}: a ViT's patches are of 16 x 16 pixels")
    return ARCHS[arch](size, drop_path=drop_path, stride=stride)


class ReIDModel(nn.Module):
    """Backbone, BNNeck, classifier; the neck is one batch norm. Images (B, 3, H, W) -> in training
    logits (B, num_ids) and feature (B, D), in evaluation the feature, before [PersonViT code] or
    after the neck [BoT].

    The two losses disagree on what a feature is: the triplet loss wants distances, the classifier
    angles; with a batch norm between them each has a space of its own. State keys base.*,
    bottleneck.*, classifier.* are TransReID's.
    """

    def __init__(self, backbone: nn.Module, num_ids: int, neck_feat: str = "before"):
        super().__init__()
        assert neck_feat in ("before", "after"), neck_feat
        self.base = backbone
        self.neck_feat = neck_feat
        self.bottleneck = nn.BatchNorm1d(backbone.embed_dim)
        # no shift, no classifier bias: decision planes go through the origin, as in cosine ranking
        self.bottleneck.bias.requires_grad_(False)
        self.classifier = nn.Linear(backbone.embed_dim, num_ids, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.head(self.base(x).float())        # (B, D); statistics and losses in float32

    def head(self, feature: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """What forward returns, of the backbone's features (B, D)."""
        if self.training:
            return self.classifier(self.bottleneck(feature)), feature
        if self.neck_feat == "after":
            return self.bottleneck(feature)
        return feature


# ---------------------------------------------------------------------------------------------
# Features
# ---------------------------------------------------------------------------------------------


class ImageBatches(torch.utils.data.Dataset):
    """[i] is the i-th batch of records: uint8 images (B, 3, H, W), resized bilinearly as in the
    reference code, and the numbers of their files (B,). A broken file is an error: leaving it out
    would make another test."""

    def __init__(self, records: list[Record], size: tuple[int, int], batch_size: int):
        self.records = records
        self.size = size
        self.batch_size = batch_size

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        images = []
        numbers = []
        for record in self.records[i * self.batch_size:(i + 1) * self.batch_size]:
            images.append(read_image(record.path, self.size, Image.Resampling.BILINEAR))
            numbers.append(file_number(record.path))
        return torch.stack(images), torch.tensor(numbers)


def file_number(path: str) -> int:
    """A number made of a file's bytes: copies of a file have the same. 7 bytes fit an int64."""
    content = Path(path).read_bytes()
    digest = hashlib.blake2b(content, digest_size=7).digest()
    return int.from_bytes(digest, "big")


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # else the smaller last batch would be compiled again
def extract(model: nn.Module, records: list[Record], size: tuple[int, int], mean, std,
            batch_size: int = 128, workers: int = 2, device: str = "cpu", bf16: bool = False,
            rank: int = 0, world: int = 1, flip: bool = False) -> tuple[Tensor, Tensor]:
    """L2-normalised features (N, D) in float32 and file numbers (N,): equal bytes, equal number.

    flip: the sum of an image's feature and its mirror image's, normalised. Each process takes every
    world-th batch, and all return all features. Raises InputError, naming the file, for an
    unreadable image or a feature that is not finite; and for no images.
    """
    if not records:
        raise InputError("no images, so no features")
    model.eval()
    batches = math.ceil(len(records) / batch_size)
    done = []
    dataset = ImageBatches(records, size, batch_size)
    loader = make_loader(dataset, range(rank, batches, world), workers)
    for images, numbers in loader:
        x = normalize(images.to(device, non_blocking=True), mean, std)       # (B, 3, H, W)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            feature = model(x).float()                                       # (B, D)
            if flip:
                feature = feature + model(x.flip(3)).float()
        feature = F.normalize(feature, dim=1).cpu()
        # a copy: what comes from a worker holds an open file as long as it lives
        done.append((feature, numbers.clone()))
    parts = [done]
    if world > 1:
        parts = runs.all_gather_object(done)
    features = []
    all_numbers = []
    for i in range(batches):                      # in the order of one process
        feature, numbers = parts[i % world][i // world]  # batch i was the i % world-th process's
        features.append(feature)
        all_numbers.append(numbers)
    features = torch.cat(features)                                           # (N, D)
    bad = (~features.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise InputError(f"{len(bad)} of {len(features)} features are not finite, first for "
                         f"{records[bad[0]].path}: the weights hold NaN or have diverged")
    return features, torch.cat(all_numbers)


# ---------------------------------------------------------------------------------------------
# Evaluation of a dataset
# ---------------------------------------------------------------------------------------------


@dataclass
class Features:
    """What a ranking needs of one split: unit features (N, D); file numbers, pids, camids (N,)."""

    feats: Tensor
    files: Tensor
    pids: Tensor
    camids: Tensor


def evaluate(model: nn.Module, dataset, recipe: dict, ap: str = "step", use_cameras: bool = True,
             **extract_args) -> tuple[RankResult, Features, Features]:
    """Extract, rank and return (result, query features, gallery features) of a dataset.

    use_cameras=False: exclude nothing but the query image itself.
    """
    if not dataset.query or not dataset.gallery:
        raise InputError(f"{dataset.root} has {len(dataset.query)} query images and "
                         f"{len(dataset.gallery)} to search, both are needed; {dataset.note}")
    splits = []
    for records in (dataset.query, dataset.gallery):
        feats, numbers = extract(model, records, tuple(recipe["size"]), recipe["mean"],
                                recipe["std"], **extract_args)
        pids = torch.tensor([record.pid for record in records])
        camids = torch.tensor([record.camid for record in records])
        if not use_cameras:
            camids = numbers  # an image is its own camera: "same camera" excludes the image alone
        splits.append(Features(feats, numbers, pids, camids))
    q, g = splits
    return rank_splits(q, g, ap), q, g


def rank_splits(q: Features, g: Features, ap: str, rerank: bool = False) -> RankResult:
    """`rank_features` of two splits; a copy of the query's file in the gallery is no match."""
    return rank_features(q.feats, q.pids, q.camids, g.feats, g.pids, g.camids, ap=ap,
                         rerank=rerank, q_files=q.files, g_files=g.files)


def filtered_ranking(q: Features, g: Features, i: int) -> tuple[Tensor, Tensor]:
    """Gallery indices of query i, nearest first, and their cosine similarities: what a rank list
    shows. The rules of `matches_of` and `ranks_of` in another form: junk is left out, and at equal
    distance other people come first."""
    similarity = g.feats @ q.feats[i]                                        # (G,)
    own = g.pids == q.pids[i]
    junk = own & ((g.camids == q.camids[i]) | (g.files == q.files[i]))
    distance = torch.where(own, -similarity + TIE, -similarity)
    order = torch.from_numpy(np.lexsort((own, distance)))  # by distance, then by own
    order = order[~junk[order]]
    return order, similarity[order]


# ---------------------------------------------------------------------------------------------
# Networks from weights files
# ---------------------------------------------------------------------------------------------


def load_weights(path: str | Path, backbone: nn.Module) -> str:
    """Fill a backbone from a weights file and say what was done; it is filled wholly or not at all.

    Classifiers and heads are dropped; position embeddings are resized to the backbone's grid.
    Raises InputError for a file that is damaged or of another network.
    """
    from extra import formats
    file = formats.read_weights(path)
    state, resized = resize_positions(file, backbone)
    return fill(backbone, state, path, file, f"another --arch, {file['recipe']['arch']}") + resized


def load_model(path: str | Path, /, **given) -> tuple[nn.Module, dict]:
    """A model to evaluate, and how to use it: its recipe, {"arch", "size", "mean", "std",
    "neck_feat", ...}.

    A fine-tuned model (ours, TransReID's, PersonViT's) comes with its BNNeck, without classifier; a
    pre-trained backbone gives its frozen feature. What a file does not say is assumed, and printed.
    given: what to use in its place, as load_model(path, last_stride=2, norm="half"). Raises
    InputError as `load_weights` does.
    """
    from extra import formats
    file = formats.read_weights(path, formats.check_settings(given))
    recipe, neck = file["recipe"], file["neck"]
    if recipe["arch"] not in ARCHS:
        raise InputError(f"{path}: its network, {recipe['arch']}, is none that can be evaluated "
                         f"here, {', '.join(ARCHS)}; nothing was loaded")
    model = build_backbone(recipe["arch"], tuple(recipe["size"]), stride=recipe["stride"],
                           last_stride=recipe["last_stride"])
    state, resized = resize_positions(file, model)
    if neck:
        model = ReIDModel(model, 1, recipe["neck_feat"])
        model.classifier = nn.Identity()  # of training identities: ranking needs none
        state = {f"base.{name}": tensor for name, tensor in state.items()}
        state |= {name: neck[name] for name in neck if name != "classifier.weight"}
    print(fill(model, state, path, file, f"not all of {recipe['arch']}") + resized)
    print(f"{recipe['arch']} {formats.usage(file)}")
    return model.eval(), recipe


def resize_positions(file: dict, backbone: nn.Module) -> tuple[dict[str, Tensor], str]:
    """Tensors of a file's backbone, position embeddings resized to the backbone's grid if it has
    another, and a text that says so.

    file: what `formats.read_weights` returns, here and below. Its keys: base, tensors of the
    backbone; neck, of BNNeck and classifier; recipe; grid, rows and columns of a ViT's patches;
    kind, what the file is; dropped, names of tensors that are not used.
    """
    there = file["grid"]
    here = getattr(backbone, "grid", None)
    if not there or not here or there == here:
        return file["base"], ""
    pos = file["base"]["pos_embed"].float()                                  # (1, 1 + N, D)
    pos = personvit.resize_pos_embed(pos, there, here)
    resized = "; pos_embed resized {}x{} -> {}x{}".format(*there, *here)
    return file["base"] | {"pos_embed": pos}, resized


def fill(model: nn.Module, state: dict[str, Tensor], path: str | Path, file: dict,
         problem: str) -> str:
    """Load a file's tensors and say so; or raise InputError, and leave the model as it was.

    problem: how the error begins, as "not all of resnet50".
    """
    differ = differences(model, state)
    here = shapes(model.state_dict())
    if differ:
        raise InputError(f"{path}: {problem}; nothing was loaded: {len(differ)} of {len(here)} "
                         f"tensors differ, first {differ[0]}")
    model.load_state_dict({name: state[name] for name in here}, strict=False)
    dropped = [name for name in file["neck"] if name not in state]
    dropped += file["dropped"]
    text = f"{path}: {file['kind']}; all {len(here)} weights loaded, dropped: {len(dropped)}"
    if dropped:
        text += f" ({', '.join(dropped[:3])})"
    return text


def differences(model: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """In words, which tensors differ in shape, or are in the model or the file alone."""
    here = shapes(model.state_dict())
    there = shapes(state)
    return [f"{name} is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
            for name in here | there if here.get(name) != there.get(name)]


def shapes(state: dict[str, Tensor]) -> dict[str, tuple]:
    """Shape of each tensor, without batch norm's counter of steps, which old files lack."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()
            if "num_batches" not in name}


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def evaluate_dataset(args: argparse.Namespace, model: nn.Module, recipe: dict, run: dict) -> None:
    """--dataset: numbers and pictures."""
    from extra import pictures, verification
    pictures.check(args, model)  # raises before minutes are spent
    dataset = load_dataset(args.dataset, args.data_root)
    result, q, g = evaluate(model, dataset, recipe, args.ap, args.cams == "file", **run)
    print(result)
    pairs = verification.verify(q, g)
    if pairs:
        print(pairs)
    else:
        print("verification: not possible without pairs of one person and of two")
    if args.rerank:
        print(f"re-ranked (k1=20, k2=6, lambda=0.3): {rank_splits(q, g, args.ap, rerank=True)}")
    if args.ranks:
        pictures.draw_ranks(args.ranks, dataset, result, q, g)
    pictures.draw_patches(args, dataset, model.cpu(), recipe)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Evaluate a model: CMC and mAP, features, "
                                                 "your own photos.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    task = parser.add_mutually_exclusive_group(required=True).add_argument
    task("--dataset", metavar="NAME", help=f"evaluate: {', '.join(NAMES)} or a folder")
    task("--extract", metavar="DIR", help="features of all images below a folder")
    task("--compare", nargs=2, metavar="IMAGE", help="similarity of two photos")
    task("--query", metavar="IMAGE", help="find a photo's person in --gallery DIR")
    task("--inspect", metavar="FILE", help="say what a weights file holds")
    task("--curves", metavar="PNG", help="draw loss and CMC curves of --runs DIR ...")
    add = parser.add_argument
    add("--weights", metavar="FILE", help="model.pth of train.py, or a format that the docs list")
    add("--as", nargs="+", type=flags.setting, dest="given", default={}, metavar="NAME=VALUE",
        help="use --weights in another way than assumed: size=256x128, norm=imagenet, half or "
             "lup, neck=before or after, a ResNet's last_stride=1, a ViT's stride=12")
    add("--data-root", default="data", help="folder that holds the datasets")
    add("--ap", choices=("step", "market"), default="step",
        help="average precision without interpolation, or with (market)")
    add("--cams", choices=("file", "none"), default="file", help="none: exclude the image alone")
    add("--flip", action="store_true", help="add the feature of the mirror image; twice the time")
    add("--rerank", action="store_true", help="print the result of k-reciprocal re-ranking too")
    add("--ranks", metavar="PNG", help="draw the rank list")
    add("--attention", metavar="PNG", help="draw where a ViT's heads look")
    add("--clusters", metavar="PNG", help="draw which patches are alike to a ViT")
    add("--correspondence", metavar="PNG", help="draw which patches of two images belong together")
    add("--gallery", metavar="DIR", help="with --query: where to search")
    add("--runs", nargs="+", metavar="DIR", help="with --curves: run folders")
    add("-o", "--out", metavar="NPZ", help="with --extract: the file for paths and features")
    add("--skip-bad", action="store_true", help="leave unreadable photos out, listing them")
    add("--overwrite", action="store_true", help="replace existing pictures and files")
    add("--batch-size", type=int, default=128, help="images per forward pass")
    add("--workers", type=int, default=2, help="processes that decode images")
    add("--device", type=flags.device_name, default=flags.usual_device(), help="cpu or cuda")
    add("--bf16", action=argparse.BooleanOptionalAction, help="default: on a GPU, if trained so")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    flags.check_evaluation(parser, args)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    from extra import formats, photos, pictures
    if args.inspect:
        file = formats.read_weights(args.inspect, formats.check_settings(args.given))
        print(formats.describe(args.inspect, file))
        return
    if args.curves:
        pictures.draw_curves(args.curves, args.runs)
        return
    model, recipe = load_model(args.weights, **args.given)
    bf16 = args.bf16
    if bf16 is None:
        bf16 = bool(recipe.get("bf16")) and flags.has_bfloat16(args.device)
    run = {"batch_size": args.batch_size, "workers": args.workers, "device": args.device,
           "bf16": bf16, "flip": args.flip}
    model.to(args.device)
    if args.dataset:
        evaluate_dataset(args, model, recipe, run)
    else:
        photos.use(args, model, recipe, run)


if __name__ == "__main__":
    command_line(main)
