"""CMC and mAP of features or distances, and re-ranking: functions of arrays alone.

Protocol of Market-1501, as PersonViT's published numbers use it. For each query q:

    rank the gallery by distance to q            nearest first
    drop images of q's person by q's camera      finding the next video frame again proves nothing
    CMC@k = share of queries with a hit among the first k          (rank-1 is CMC@1)
    AP    = mean precision at the hits; mAP = its mean over queries  (which precision: `cmc_map`)

Queries without any right answer left do not count; every result says how many did ("valid a/b").
Usual evaluation is kind to a model in three ways. Here ties count against the query, so that a
collapsed network (all features equal) scores below chance and not 100 %; NaN is an error; and a
copy of the query's file in the gallery is no answer. Read `count_before`, then `cmc_map`.

Exercises (answers: README). 1. Hits and misses 0110010: AP by both rules, on paper, then by
`cmc_map`. 2. One query, 100 gallery images of which the first 5 are right, all distances 0: what do
`cmc_map` and a ranking by a stable np.argsort make of this network, which has learnt nothing?
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from data import InputError

TIE = 1e-6  # similarities that differ by less count as equal: float32 rounds them by about as much

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


def as_ids(values) -> Tensor:
    values = np.asarray(values)
    if values.size and values.dtype.kind not in "biu":
        raise InputError(f"ids, cameras and image numbers are integers, not {values.dtype}")
    return torch.as_tensor(values).long().flatten()


class Labels:
    """Ids, cameras and image numbers, 0 or more, of the n images of one side of a ranking, "query"
    or "gallery": (n,) each. images=None: no two are the same file. Raises InputError if sizes
    do not agree."""

    def __init__(self, side: str, n: int, pids, camids, images=None):
        self.pids, self.camids = as_ids(pids), as_ids(camids)
        unlike = -1 if side == "query" else -2  # a query's number is then no gallery image's
        self.images = torch.full((n,), unlike) if images is None else as_ids(images)
        sizes = {"ids": self.pids, "cameras": self.camids, "image numbers": self.images}
        wrong = [f"{len(values)} {name}" for name, values in sizes.items() if len(values) != n]
        if n < 1 or wrong:
            raise InputError(f"the {side} has " + " and ".join([f"{n} images", *wrong]))


class Gallery:
    """A gallery's labels, sorted by id: an id's images are one slice."""

    def __init__(self, labels: Labels):
        self.order = torch.argsort(labels.pids, stable=True)
        self.pids, self.camids, self.images = (
            x[self.order] for x in (labels.pids, labels.camids, labels.images))

    def split(self, query: Labels, part: slice):
        """For B queries: columns (B, W) of the images with the query's id, W the largest number of
        images that any of these ids has, and two masks (B, W): `match`, the right answers, and
        `same`, all images of that id (the others are junk)."""
        pids = query.pids[part]                                              # (B,)
        low = torch.searchsorted(self.pids, pids)
        high = torch.searchsorted(self.pids, pids, right=True)
        width = max(int((high - low).max()), 1)
        place = low[:, None] + torch.arange(width)                           # (B, W)
        same = place < high[:, None]
        place = place.clamp(max=len(self.pids) - 1)
        junk = ((self.camids[place] == query.camids[part, None]) |
                (self.images[place] == query.images[part, None]))            # a copy of the query
        return self.order[place], same & ~junk, same


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
    hits = hits.sort(1).values + tie                             # (B, W), padded with inf
    farthest = hits.masked_fill(hits.isinf(), -torch.inf).amax(1)
    dist[row[same], columns[same]] = torch.inf                   # own id: never before its own
    counts = torch.zeros(B, W + 1, dtype=torch.long, device=dist.device)
    for i, near in enumerate(dist <= farthest[:, None]):         # few, if the network is good
        # bin = number of hits nearer than an image: it stands before all hits but those
        bins = torch.searchsorted(hits[i], dist[i, near])
        counts[i] = torch.bincount(bins, minlength=W + 1)
    return counts.cumsum(1)[:, :W] + torch.arange(W, device=dist.device)


def accumulate(chunks, query: Labels, gallery: Labels, max_rank: int, ap: str,
               tie: float) -> RankResult:
    """CMC and mAP from an iterator of distance blocks (B, G) that covers the queries in order."""
    if ap not in ("step", "market") or max_rank < 1:
        raise InputError(f"ap is 'step' or 'market', max_rank at least 1; not {ap!r}, {max_rank}")
    lookup = Gallery(gallery)
    total, start, cmc = len(query.pids), 0, torch.zeros(max_rank, dtype=torch.float64)
    APs = {name: torch.full((total,), torch.nan, dtype=torch.float64)
           for name in ("step", "market")}
    for dist in chunks:
        part = slice(start, start + len(dist))
        start += len(dist)
        if not torch.stack(dist.aminmax()).isfinite().all():  # NaN is its own minimum
            raise InputError("distances hold NaN or infinity: a ranking of them means nothing")
        columns, match, same = (t.to(dist.device) for t in lookup.split(query, part))
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
        raise InputError(explain_no_valid(query.pids, lookup))
    mAPs = {name: float(values.nanmean()) for name, values in APs.items()}
    return RankResult((cmc.cumsum(0) / valid).numpy(), mAPs[ap], valid, total, ap, mAPs,
                      APs[ap].numpy())


def explain_no_valid(q_pids: Tensor, gallery: Gallery) -> str:
    absent = int((~torch.isin(q_pids, gallery.pids)).sum())
    return (f"no query has a right answer in the gallery: of {len(q_pids)} queries, "
            f"{absent} have an id that is not in the gallery, {len(q_pids) - absent} have it only "
            f"by the query's own camera (or as the same image). If the camera ids mean nothing, "
            f"--cams none excludes only the query image itself; if ids differ, "
            f"do query and gallery come from the same set?")


def cmc_map(distmat, q_pids, g_pids, q_camids, g_camids, max_rank: int = 50, ap: str = "step",
            *, q_images=None, g_images=None) -> RankResult:
    """CMC and mAP of a distance matrix (Q, G), smaller = more alike; ids and cameras (Q,) and (G,).

    ap="step": AP = mean of precision@rank over the right answers (PersonViT, TransReID, fast-reid,
    torchreid). ap="market": the trapezoid of Market-1501's MATLAB code, mean of the precision
    before and at each right answer; never higher. Images of the query's id by the query's camera
    are left out, as are, when image numbers are given, images of its id with its number;
    distractors (id 0) stay. Equal distances are ties, which count against the query; to
    `rank_features` also those that rounding cannot tell apart. Raises InputError (a ValueError) for
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
    query = Labels("query", len(dist), q_pids, q_camids, q_images)
    gallery = Labels("gallery", dist.shape[1], g_pids, g_camids, g_images)
    chunks = (block.clone() for block in dist.split(256))
    return accumulate(chunks, query, gallery, max_rank, ap, tie=0.0)


def rank_features(q_feats, q_pids, q_camids, g_feats, g_pids, g_camids, max_rank: int = 50,
                  ap: str = "step", rerank: bool = False, *, q_images=None, g_images=None,
                  chunk: int = 256) -> RankResult:
    """CMC and mAP of unit features (Q, D) and (G, D), without the (Q, G) matrix in memory.

    rerank: by k-reciprocal neighbours, k1 = 20, k2 = 6, lambda = 0.3 (see `rerank`). Cosine
    similarity ranks as the Euclidean distance of unit vectors does; similarities closer than TIE
    are ties. Raises InputError as `cmc_map` does, and for features that are not of length 1.
    """
    q_feats, g_feats = (torch.as_tensor(f).detach().float() for f in (q_feats, g_feats))
    sides = []
    for side, feats, *labels in (("query", q_feats, q_pids, q_camids, q_images),
                                 ("gallery", g_feats, g_pids, g_camids, g_images)):
        if feats.ndim != 2 or feats.shape[1] != q_feats.shape[-1]:
            raise InputError(f"{side} features of shape {tuple(feats.shape)} "
                             f"beside query features of shape {tuple(q_feats.shape)}")
        sides.append(Labels(side, len(feats), *labels))
        if not feats.isfinite().all():
            raise InputError(f"{side} features hold NaN or infinity: "
                             f"a ranking of them means nothing")
        if (feats.norm(dim=1) - 1).abs().max() > 1e-3:
            raise InputError(f"{side} features are not of length 1; L2-normalise them first")
    chunks = (reranked_chunks(q_feats, g_feats, 20, 6, 0.3) if rerank else
              ((-q) @ g_feats.T for q in q_feats.split(chunk)))
    return accumulate(chunks, *sides, max_rank, ap, tie=TIE)


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
    # not below the rounding of a similarity: where all features are equal, all distances are
    return torch.cat(indices).numpy(), torch.cat(farthest).clamp(min=2 * TIE).numpy()


def reciprocal(indices: np.ndarray, k: int) -> sparse.csr_matrix:
    """(N, N) booleans: i and j are among each other's first k, of indices (N, >= k)."""
    N = len(indices)
    indices = indices[:, :k]
    first = sparse.csr_matrix((np.ones(indices.size, np.float32), indices.ravel(),
                               np.arange(N + 1) * indices.shape[1]), (N, N))
    return first.multiply(first.T).tocsr()


def encode_neighbours(x: Tensor, indices: np.ndarray, farthest: np.ndarray, k1: int,
                      k2: int) -> sparse.csr_matrix:
    """V, (N, N) sparse: row i holds weights, summing to 1, of i's reciprocal neighbours (each among
    the other's nearest). Distances D_ij are divided by the farthest of row i."""
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
    for start in range(0, V.nnz, 1 << 14):  # the distances of these few pairs alone
        part = slice(start, start + (1 << 14))
        i = torch.from_numpy(rows[part]).to(x.device)
        j = torch.from_numpy(V.indices[part]).long().to(x.device)
        distance = (2 - 2 * (x[i] * x[j]).sum(1)).clamp(min=0).cpu().numpy()
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
    x, Q = torch.cat([q, g]), len(q)
    k1 = min(k1, len(x) - 1)
    k2 = min(k2, k1 + 1)
    indices, farthest = nearest(x, k1 + 1)
    V = encode_neighbours(x, indices, farthest, k1, k2)
    V, inverted = V[:Q], V[Q:].tocsc()
    for start in range(0, Q, chunk):
        m = torch.from_numpy(shared_weight(V[start:start + chunk], inverted)).float().to(x.device)
        rows = x[start:start + len(m)]
        original = (2 - 2 * rows @ g.T).clamp(min=0) / torch.from_numpy(
            farthest[start:start + len(m)]).to(x.device)[:, None]
        yield (1 - lam) * (1 - m / (2 - m)) + lam * original


def shared_weight(rows: sparse.csr_matrix, inverted: sparse.csc_matrix) -> np.ndarray:
    """sum_t min(V_it, V_jt) of queries i (B, N) and gallery images j (G, N): (B, G)."""
    m = np.zeros((rows.shape[0], inverted.shape[0]))
    for i in range(len(m)):
        own = slice(rows.indptr[i], rows.indptr[i + 1])
        known = inverted[:, rows.indices[own]]   # the images j that have a neighbour t of i as well
        weight = np.repeat(rows.data[own], np.diff(known.indptr))
        m[i] = np.bincount(known.indices, np.minimum(known.data, weight), len(m[i]))
    return m


def rerank(q: Tensor, g: Tensor, k1: int = 20, k2: int = 6, lam: float = 0.3) -> Tensor:
    """Distances (Q, G) of unit features (Q, D), (G, D) after k-reciprocal re-ranking.

    (1 - lam) Jaccard distance of the neighbourhoods + lam squared Euclidean distance over the
    row's largest. Exact, as in Zhong et al. 2017 and the code in use, but V is sparse. Queries are
    part of one another's neighbourhoods: results depend on the whole query set, which a deployed
    system would not have. Among equal distances neighbours are picked arbitrarily. k1 and k2 shrink
    to what few images allow.
    """
    q, g = (torch.as_tensor(f).float() for f in (q, g))
    return torch.cat(list(reranked_chunks(q, g, k1, k2, lam)))
