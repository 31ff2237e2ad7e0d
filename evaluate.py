"""From a model to mAP: features, ranking, CMC and average precision, re-ranking, the rank list.

Protocol of Market-1501, as PersonViT's published numbers use it. For each query q:

    rank the gallery by distance to q            nearest first
    drop images of q's person by q's camera      finding the next video frame again proves nothing
    CMC@k = share of queries with a hit among the first k          (rank-1 is CMC@1)
    AP    = mean precision at the hits; mAP = its mean             (which precision: see `cmc_map`)

Queries without any right answer left do not count; every result says how many did ("valid a/b").
Where code in use is kind to a model, this is not: ties count against the query, so that a collapsed
network (all features equal) scores at chance and not at 100 %; NaN is an error; and a copy of the
query's file in the gallery is no answer. Read `count_before`, then `cmc_map`; the rest is reading
and writing.
"""

import argparse
import hashlib
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy import sparse
from torch import Tensor, nn

from augment import normalize
from data import NAMES, InputError, Record, command_line, load_dataset, read_image
from weights import ReIDModel, inspect, load_model, load_weights

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
            batch_size: int = 128, workers: int = 2, device: str = "cpu",
            bf16: bool = False) -> tuple[Tensor, Tensor]:
    """L2-normalised features (N, D) in float32 and image numbers (N,): equal bytes, equal number.

    Raises InputError, naming the file, for an unreadable image or a feature that is not finite.
    """
    model.eval()
    loader = torch.utils.data.DataLoader(EvalImages(records, size), batch_size, num_workers=workers,
                                         pin_memory=device != "cpu", worker_init_fn=quiet_worker)
    features, numbers = [], []
    for images, number in loader:
        images = normalize(images.to(device, non_blocking=True), mean, std)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            feature = model(images)
        features.append(F.normalize(feature.float(), dim=1).cpu())           # (B, D)
        numbers.append(number)
    features = torch.cat(features)
    bad = (~features.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise InputError(f"{len(bad)} of {len(features)} features are not finite, first for "
                         f"{records[bad[0]].path}: the weights hold NaN or have diverged")
    return features, torch.cat(numbers)


def quiet_worker(_: int) -> None:
    """Ctrl-C is for the main process; its workers end when it tells them to, without tracebacks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


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
# Ranking: CMC and mAP
# ---------------------------------------------------------------------------------------------


@dataclass
class RankResult:
    """cmc (max_rank,): cmc[k-1] = CMC@k. mAP in [0, 1] by the convention `ap`; mAPs holds both.

    valid of total queries had a right answer in the gallery. AP (total,) by query, NaN if invalid.
    """

    cmc: np.ndarray
    mAP: float
    valid: int
    total: int
    ap: str
    mAPs: dict[str, float]
    AP: np.ndarray

    def __str__(self) -> str:
        rank = "  ".join(f"rank-{k} {self.cmc[k - 1]:.2%}"
                         for k in (1, 5, 10) if k <= len(self.cmc))
        other = "market" if self.ap == "step" else "step"
        return (f"mAP {self.mAP:.2%} ({self.ap}; {other} {self.mAPs[other]:.2%})  {rank}  "
                f"valid queries {self.valid}/{self.total}")


class Gallery:
    """Ids, cameras and image numbers of a gallery, sorted by id: an id's images are one slice."""

    def __init__(self, pids, camids, images=None):
        self.order = torch.argsort(as_ids(pids), stable=True)
        self.pids = as_ids(pids)[self.order]
        self.camids = as_ids(camids)[self.order]
        self.images = None if images is None else as_ids(images)[self.order]

    def split(self, q_pids: Tensor, q_camids: Tensor, q_images: Tensor | None):
        """For B queries: columns (B, W) of the images with the query's id, and two masks (B, W):
        `match`, the right answers, and `same`, all images of that id (the others are junk)."""
        low = torch.searchsorted(self.pids, q_pids)
        high = torch.searchsorted(self.pids, q_pids, right=True)
        width = max(int((high - low).max()), 1)
        place = low[:, None] + torch.arange(width)                           # (B, W)
        same = place < high[:, None]
        place = place.clamp(max=len(self.pids) - 1)
        junk = self.camids[place] == q_camids[:, None]
        if self.images is not None and q_images is not None:                 # a copy of the query
            junk |= self.images[place] == q_images[:, None]
        return self.order[place], same & ~junk, same


def as_ids(values) -> Tensor:
    return torch.as_tensor(np.asarray(values)).long().flatten()


def count_before(dist: Tensor, columns: Tensor, match: Tensor, same: Tensor, tie: float) -> Tensor:
    """0-based rank of every right answer, nearest first: (B, W), meaningless past a row's matches.

    dist (B, G), overwritten; columns, match, same as from `Gallery.split`. Nothing is sorted but
    the few right answers: the j-th of them has rank j + the number of other people's images that
    are at most as far away. "At most": an image at the same distance counts as before it, else the
    order of the gallery would decide, and a network that maps everything to one point would win.
    """
    B, W = columns.shape
    row = torch.arange(B, device=dist.device)[:, None].expand(B, W)
    hits = torch.where(match, dist.gather(1, columns), torch.inf)
    hits = hits.sort(1).values                                   # (B, W), padded with inf
    dist[row[same], columns[same]] = torch.inf                   # own id: never before its own
    # bin[g] = number of hits nearer than g: g stands before all hits but those
    bins = torch.searchsorted(hits + tie, dist)                  # (B, G)
    bins += torch.arange(B, device=dist.device)[:, None] * (W + 1)
    counts = torch.bincount(bins.flatten(), minlength=B * (W + 1)).view(B, W + 1)
    return counts.cumsum(1)[:, :W] + torch.arange(W, device=dist.device)


@dataclass
class Labels:
    """Ids, cameras and, if at hand, image numbers of one side of a ranking: (N,) each."""

    pids: object
    camids: object
    images: object = None

    def check(self, n: int, side: str) -> None:
        sizes = {"ids": self.pids, "cameras": self.camids, "image numbers": self.images}
        sizes = {name: len(values) for name, values in sizes.items() if values is not None}
        if n < 1 or set(sizes.values()) != {n}:
            raise InputError(f"the {side} has {n} images and " +
                             ", ".join(f"{size} {name}" for name, size in sizes.items()))


def accumulate(chunks, query: Labels, gallery: Labels, max_rank: int, ap: str,
               tie: float) -> RankResult:
    """CMC and mAP from an iterator of distance blocks (B, G) that covers the queries in order."""
    if ap not in ("step", "market") or max_rank < 1:
        raise InputError(f"ap is 'step' or 'market', max_rank at least 1; not {ap!r}, {max_rank}")
    lookup = Gallery(gallery.pids, gallery.camids, gallery.images)
    q_pids, q_camids = as_ids(query.pids), as_ids(query.camids)
    q_images = None if query.images is None else as_ids(query.images)
    total, start, cmc = len(q_pids), 0, torch.zeros(max_rank, dtype=torch.float64)
    APs = {name: torch.full((total,), torch.nan, dtype=torch.float64)
           for name in ("step", "market")}
    for dist in chunks:
        part = slice(start, start + len(dist))
        start += len(dist)
        if not dist.isfinite().all():
            raise InputError("distances hold NaN or infinity: a ranking of them means nothing")
        split = lookup.split(q_pids[part], q_camids[part],
                             None if q_images is None else q_images[part])
        columns, match, same = (t.to(dist.device) for t in split)
        rank = count_before(dist, columns, match, same, tie).cpu()           # (B, W)
        R = match.sum(1).cpu()                                               # (B,) right answers
        j = torch.arange(rank.shape[1])
        hit = j < R[:, None]                                                 # (B, W)
        p, j = rank.double(), j.double()
        new = (j + 1) / (p + 1)                                              # precision at the hit
        old = torch.where(p > 0, j / p.clamp(min=1), 1.0)                    # ... and just before
        for name, precision in (("step", new), ("market", (old + new) / 2)):
            APs[name][part] = (precision * hit).sum(1) / R                   # 0/0 = NaN: invalid
        first = rank[R > 0, 0]
        cmc += torch.bincount(first[first < max_rank], minlength=max_rank)
    valid = int((~APs["step"].isnan()).sum())
    if not valid:
        raise InputError(explain_no_valid(q_pids, lookup))
    mAPs = {name: float(values.nanmean()) for name, values in APs.items()}
    return RankResult((cmc.cumsum(0) / valid).numpy(), mAPs[ap], valid, total, ap, mAPs,
                      APs[ap].numpy())


def explain_no_valid(q_pids: Tensor, gallery: Gallery) -> str:
    absent = int((~torch.isin(q_pids, gallery.pids)).sum())
    return (f"no query has a right answer in the gallery: of {len(q_pids)} queries, "
            f"{absent} have an id that is not in the gallery, {len(q_pids) - absent} have it only "
            f"by the query's own camera (or as the same image). If the camera ids mean nothing, "
            f"--cams none excludes only the query image itself; if ids differ, "
            f"are query and gallery of one set?")


def cmc_map(distmat, q_pids, g_pids, q_camids, g_camids, max_rank: int = 50, ap: str = "step",
            *, q_images=None, g_images=None) -> RankResult:
    """CMC and mAP of a distance matrix (Q, G), smaller = more alike; ids and cameras (Q,) and (G,).

    ap="step": AP = mean of precision@rank over the right answers (PersonViT, TransReID, fast-reid,
    torchreid). ap="market": the trapezoid of Market-1501's MATLAB code, mean of the precision
    before and at each right answer; never higher. Images of the query's id by the query's camera
    are left out, as are, when image numbers are given, images of its id with its number;
    distractors (id 0) stay; ties count against the query. Raises InputError (a ValueError) for
    distances that are not finite, sizes that do not agree and when no query has a right answer.

    >>> hits_at = [1, 1, 0, 1, 0, 0, 1]                      # one query, a gallery already in order
    >>> result = cmc_map([[1, 2, 3, 4, 5, 6, 7]], [1], hits_at, [0], [1] * 7)
    >>> round(result.mAPs["step"], 4), round(result.mAPs["market"], 4)
    (0.8304, 0.811)
    """
    dist = torch.as_tensor(
        np.ascontiguousarray(distmat) if not isinstance(distmat, Tensor) else distmat)
    dist = dist if dist.is_floating_point() else dist.double()
    if dist.ndim != 2:
        raise InputError(f"distances are a matrix (queries, gallery), "
                         f"not of shape {tuple(dist.shape)}")
    query, gallery = Labels(q_pids, q_camids, q_images), Labels(g_pids, g_camids, g_images)
    query.check(len(dist), "query")
    gallery.check(dist.shape[1], "gallery")
    chunks = (block.clone() for block in dist.split(256))
    return accumulate(chunks, query, gallery, max_rank, ap, tie=0.0)


TIE = 1e-6  # closer similarities of unit vectors are equal: float32 rounds a dot product so


def rank_features(q_feats, q_pids, q_camids, g_feats, g_pids, g_camids, max_rank: int = 50,
                  ap: str = "step", rerank: bool = False, *, q_images=None, g_images=None,
                  chunk: int = 256) -> RankResult:
    """CMC and mAP of unit features (Q, D) and (G, D), without the (Q, G) matrix in memory.

    rerank: by k-reciprocal neighbours, k1 = 20, k2 = 6, lambda = 0.3 (see `rerank`). Cosine
    similarity ranks as the Euclidean distance of unit vectors does; similarities closer than TIE
    are ties. Raises InputError as `cmc_map` does, and for features that are not of length 1.
    """
    q_feats, g_feats = (torch.as_tensor(f).float() for f in (q_feats, g_feats))
    query, gallery = Labels(q_pids, q_camids, q_images), Labels(g_pids, g_camids, g_images)
    for feats, labels, side in ((q_feats, query, "query"), (g_feats, gallery, "gallery")):
        if feats.ndim != 2 or feats.shape[1] != q_feats.shape[-1]:
            raise InputError(f"{side} features of shape {tuple(feats.shape)} "
                             f"beside query features of shape {tuple(q_feats.shape)}")
        labels.check(len(feats), side)
        if not feats.isfinite().all():
            raise InputError(f"{side} features hold NaN or infinity: "
                             f"a ranking of them means nothing")
        if (feats.norm(dim=1) - 1).abs().max() > 1e-3:
            raise InputError(f"{side} features are not of length 1; L2-normalise them first")
    chunks = (reranked_chunks(q_feats, g_feats, 20, 6, 0.3) if rerank else
              ((-q) @ g_feats.T for q in q_feats.split(chunk)))
    return accumulate(chunks, query, gallery, max_rank, ap, tie=TIE)


# ---------------------------------------------------------------------------------------------
# Re-ranking by k-reciprocal neighbours
# ---------------------------------------------------------------------------------------------


def nearest(x: Tensor, k: int, chunk: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """For unit vectors (N, D): indices of the k nearest of all N, nearest first, (N, k), and the
    squared Euclidean distance of the farthest, (N,)."""
    indices, farthest = [], []
    for rows in x.split(chunk):
        similarity = rows @ x.T                                              # (chunk, N)
        indices.append(similarity.topk(k, dim=1).indices.cpu())
        farthest.append(2 - 2 * similarity.amin(1).cpu())
    return torch.cat(indices).numpy(), torch.cat(farthest).clamp(min=1e-12).numpy()


def reciprocal(indices: np.ndarray, k: int) -> sparse.csr_matrix:
    """(N, N) booleans: i and j are among each other's first k, of indices (N, >= k)."""
    N = len(indices)
    indices = indices[:, :k]
    first = sparse.csr_matrix((np.ones(indices.size, np.float32), indices.ravel(),
                               np.arange(N + 1) * indices.shape[1]), (N, N))
    return first.multiply(first.T).tocsr()


def encode_neighbours(x: Tensor, indices: np.ndarray, farthest: np.ndarray, k1: int,
                      k2: int) -> sparse.csr_matrix:
    """V, (N, N) sparse: each image as weights, summing to 1, of images that it knows and that know
    it. Distances D_ij are divided by the farthest of row i."""
    R, half = reciprocal(indices, k1 + 1), reciprocal(indices, round(k1 / 2) + 1)
    size, known = half.sum(1).A1, []
    for start in range(0, len(indices), 4096):
        rows = R[start:start + 4096]
        # a neighbour whose own nearer neighbours are, by two thirds, mine too, brings them along
        common = (rows @ half.T).multiply(rows).tocoo()
        trusted = common.data * 3 > 2 * size[common.col]
        trusted = sparse.csr_matrix((common.data[trusted], (common.row[trusted],
                                                            common.col[trusted])), rows.shape)
        known.append(rows + trusted @ half)
    V = sparse.vstack(known, format="csr")
    rows = np.repeat(np.arange(len(indices)), np.diff(V.indptr))
    for start in range(0, V.nnz, 1 << 17):  # the distances of these few pairs alone
        part = slice(start, start + (1 << 17))
        i = torch.from_numpy(rows[part]).to(x.device)
        j = torch.from_numpy(V.indices[part]).long().to(x.device)
        distance = (2 - 2 * (x[i] * x[j]).sum(1)).cpu().numpy()
        V.data[part] = np.exp(-distance / farthest[rows[part]])
    V.data /= np.repeat(V.sum(1).A1, np.diff(V.indptr))
    if k2 > 1:  # the mean over an image and its nearest: local query expansion
        mean = sparse.csr_matrix((np.full(len(indices) * k2, 1 / k2, np.float32),
                                  indices[:, :k2].ravel(), np.arange(len(indices) + 1) * k2),
                                 V.shape)
        V = (mean @ V).tocsr()
    return V


def reranked_chunks(q: Tensor, g: Tensor, k1: int, k2: int, lam: float, chunk: int = 128):
    """Blocks (chunk, G) of the re-ranked distances; see `rerank`."""
    x, (Q, G) = torch.cat([q, g]), (len(q), len(g))
    k1 = min(k1, len(x) - 1)
    k2 = min(k2, k1 + 1)
    indices, farthest = nearest(x, k1 + 1)
    V = encode_neighbours(x, indices, farthest, k1, k2)
    V, inverted = V[:Q], V[Q:].tocsc()  # column t: the gallery images that know t
    for start in range(0, Q, chunk):
        block = V[start:start + chunk].tocoo()
        # sum_t min(V_it, V_jt): each weight of i meets those of all gallery images j that know t
        counts = np.diff(inverted.indptr)[block.col]
        shift = np.cumsum(counts) - counts
        place = np.arange(counts.sum()) + np.repeat(inverted.indptr[block.col] - shift, counts)
        pair = np.repeat(block.row.astype(np.int64) * G, counts) + inverted.indices[place]
        least = np.minimum(np.repeat(block.data, counts), inverted.data[place])
        m = np.bincount(pair, least, block.shape[0] * G).reshape(-1, G)
        m = torch.from_numpy(m).float().to(x.device)
        rows = x[start:start + len(m)]
        original = (2 - 2 * rows @ g.T) / torch.from_numpy(
            farthest[start:start + len(m)]).to(x.device)[:, None]
        yield (1 - lam) * (1 - m / (2 - m)) + lam * original


def rerank(q: Tensor, g: Tensor, k1: int = 20, k2: int = 6, lam: float = 0.3) -> Tensor:
    """Distances (Q, G) of unit features (Q, D), (G, D) after k-reciprocal re-ranking.

    (1 - lam) Jaccard distance of the neighbourhoods + lam squared Euclidean distance over the
    row's largest. Exact, as in Zhong et al. 2017 and the code in use, but V is sparse. Queries are
    part of one another's neighbourhoods: results depend on the whole query set, which a deployed
    system would not have. k1 and k2 shrink to what few images allow.
    """
    q, g = (torch.as_tensor(f).float() for f in (q, g))
    return torch.cat(list(reranked_chunks(q, g, k1, k2, lam)))


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
# The rank list as a picture
# ---------------------------------------------------------------------------------------------

GREEN, RED, GREY, INK = (30, 150, 60), (205, 45, 45), (120, 120, 120), (30, 30, 30)


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


def draw_ranks(file: str | Path, dataset, result: RankResult, q: Features, g: Features,
               rows: int = 8, columns: int = 10) -> None:
    """Rank-list picture (PNG): a row per query, the query first, then its nearest gallery images.

    Green frames are right answers, red ones wrong, with camera and cosine similarity beneath. Rows
    are spread evenly over all valid queries: a picture of the best ones only would be a lie.
    """
    valid = np.flatnonzero(~np.isnan(result.AP))
    chosen = valid[np.linspace(0, len(valid), min(rows, len(valid)), endpoint=False, dtype=int)]
    w, h, gap, label, head = 64, 128, 14, 16, 44
    width, height = gap + (columns + 1) * (w + gap) + gap, head + len(chosen) * (h + label + gap)
    picture = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    draw.text((gap, 6), "query", INK, font)
    draw.text((3 * gap + w, 6),
              f"{dataset.name}: nearest {columns} of {len(g.pids):,} gallery images; "
              "same person by the same camera left out", INK, font)
    for color, name, x in ((GREEN, "same person", 3 * gap + w), (RED, "another person", 230)):
        draw.rectangle((x, 27, x + 10, 37), outline=color, width=3)
        draw.text((x + 16, 24), name, INK, font)

    def paste(record: Record, column: int, y: int, color, text: str) -> None:
        x = gap + column * (w + gap) + (gap if column else 0)
        pixels = read_image(record.path, (h, w), Image.Resampling.BILINEAR).permute(1, 2, 0)
        picture.paste(Image.fromarray(pixels.numpy()), (x, y))
        draw.rectangle((x - 3, y - 3, x + w + 2, y + h + 2), outline=color, width=3)
        draw.text((x, y + h + 3), text, INK, font)

    def camera(record: Record) -> str:
        return f"c{record.camid + 1}" if dataset.has_cameras else ""

    for row, i in enumerate(chosen.tolist()):
        y = head + row * (h + label + gap)
        paste(dataset.query[i], 0, y, GREY, camera(dataset.query[i]))
        order, similarity = filtered_ranking(q, g, i)
        for k, (j, s) in enumerate(zip(order[:columns].tolist(), similarity.tolist())):
            color = GREEN if g.pids[j] == q.pids[i] else RED
            paste(dataset.gallery[j], k + 1, y, color, f"{camera(dataset.gallery[j])} {s:.3f}")
    picture.save(file, format="PNG")


def device_name(text: str) -> str:
    """cpu, cuda or cuda:1, if there is such a thing here."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither cpu nor cuda")
    if text != "cpu" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("no GPU is usable here: run with --device cpu")
    return text


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="CMC and mAP of a fine-tuned model on a ReID dataset.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dataset", required=True, metavar="NAME",
                        help=f"{', '.join(NAMES)} or any folder")
    parser.add_argument("--data-root", default="data", help="folder that holds the datasets")
    parser.add_argument("--weights", required=True, help="model.pth of a run of train.py")
    parser.add_argument("--ap", choices=("step", "market"), default="step", help="rule of mAP")
    parser.add_argument("--cams", choices=("file", "none"), default="file",
                        help="cameras from the file names, or none: exclude only the image itself")
    parser.add_argument("--ranks", metavar="PNG", help="draw the rank list into this new file")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing picture")
    parser.add_argument("--batch-size", type=int, default=128, help="images per forward pass")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode images")
    parser.add_argument("--device", type=device_name, help="cpu or cuda",
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 network, float32 ranking")
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if args.batch_size < 1 or args.workers < 0:
        parser.error("--batch-size is at least 1, --workers at least 0")
    if args.ranks and not args.ranks.endswith(".png"):
        parser.error(f"--ranks {args.ranks}: the picture is a PNG, name it so")
    if args.ranks and os.path.exists(args.ranks) and not args.overwrite:
        raise InputError(f"{args.ranks} exists; --overwrite replaces it")
    model, recipe = load_model(args.weights)
    dataset = load_dataset(args.dataset, args.data_root)
    print(f"{args.weights}: {recipe['arch']} at {recipe['size'][0]}x{recipe['size'][1]}, "
          f"feature {recipe['neck_feat']} the neck, L2-normalised, "
          f"mean {recipe['mean']}, std {recipe['std']}")
    result, q, g = evaluate(model.to(args.device), dataset, recipe, args.ap, args.cams == "file",
                            batch_size=args.batch_size, workers=args.workers, device=args.device,
                            bf16=args.bf16)
    print(result)
    if args.ranks:
        draw_ranks(args.ranks, dataset, result, q, g)
        print(f"rank list in {args.ranks}")


if __name__ == "__main__":
    command_line(main)
