"""Re-ranking by k-reciprocal neighbours (Zhong et al. 2017), for sets of any size.

Two images are alike if the same images are near to both: the Jaccard distance of their
neighbourhoods is mixed with their own. Exact, as in the paper and the code in use, but sparse:

    N = Q + G, images of query and gallery together; D width of the feature
    R         (N, N) of 0 and 1: are two images among each other's k nearest?
    V         (N, N) row i: weights, summing to 1, of the reciprocal neighbours of image i
"""

from collections.abc import Iterator

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

TIE = 1e-6  # similarities that differ by less count as equal: float32 rounds them by about as much


def rerank(q: Tensor, g: Tensor, k1: int = 20, k2: int = 6, lam: float = 0.3) -> Tensor:
    """Distances (Q, G) of unit features (Q, D), (G, D) after k-reciprocal re-ranking; for your own
    code: the scripts go through `rank_features`.

    (1 - lam) Jaccard distance of the neighbourhoods + lam squared Euclidean distance over the
    row's largest. Queries are part of one another's neighbourhoods: results depend on the whole
    query set, which a deployed system would not have. Among equal distances neighbours are picked
    arbitrarily. k1 and k2 shrink to what few images allow.
    """
    q = torch.as_tensor(q).float()
    g = torch.as_tensor(g).float()
    rows = list(reranked_rows(q, g, k1, k2, lam))
    return torch.from_numpy(np.stack(rows))


def reranked_rows(q, g, k1: int = 20, k2: int = 6, lam: float = 0.3) -> Iterator[np.ndarray]:
    """Re-ranked distances (G,) of one query after the other; see `rerank`."""
    x = torch.cat([q, g])                                                    # (N, D)
    k1 = min(k1, len(x) - 1)
    k2 = min(k2, k1 + 1)
    indices, farthest = nearest(x, k1 + 1)
    V = encode_neighbours(x, indices, farthest, k1)
    if k2 > 1:  # the mean over an image and its nearest: local query expansion
        V = rows_of(indices[:, :k2], 1 / k2) @ V
        V = V.tocsr()
    of_gallery = V[len(q):].tocsc()               # column t: the gallery images near image t
    for i, original in enumerate(squared_distances(q, g)):                   # (G,)
        own = slice(V.indptr[i], V.indptr[i + 1])
        near = V.indices[own]
        known = of_gallery[:, near]               # those that have a neighbour t of i as well
        counts = np.diff(known.indptr)
        weight = np.repeat(V.data[own], counts)
        # m_j = sum_t min(V_it, V_jt), the weight that the neighbourhoods share
        shared = np.minimum(known.data, weight)
        m = np.bincount(known.indices, shared, len(g))
        m = m.astype(np.float32)                                             # (G,)
        jaccard = 1 - m / (2 - m)
        euclidean = lam * original / farthest[i]
        yield (1 - lam) * jaccard + euclidean


def squared_distances(q: Tensor, g: Tensor, chunk: int = 128) -> Iterator[np.ndarray]:
    """Squared Euclidean distances (G,) of one unit vector of q (Q, D) after the other."""
    for rows in q.split(chunk):
        distance = 2 - 2 * rows @ g.T                                        # (chunk, G)
        yield from distance.clamp(min=0).cpu().numpy()


def nearest(x: Tensor, k: int, chunk: int = 256):
    """For unit vectors (N, D): indices of the k nearest of all N, nearest first, (N, k), and the
    squared Euclidean distance of the farthest, (N,)."""
    indices = []
    farthest = []
    for rows in x.split(chunk):
        similarity = rows @ x.T                                              # (chunk, N)
        best = similarity.topk(k, dim=1)
        indices.append(best.indices.cpu())
        least = similarity.amin(1).cpu()
        farthest.append(2 - 2 * least)
    # not below the rounding of a similarity: where all features are equal, all distances are
    largest = torch.cat(farthest)
    largest = largest.clamp(min=2 * TIE)
    return torch.cat(indices).numpy(), largest.numpy()


def rows_of(columns: np.ndarray, weight: float) -> sparse.csr_matrix:
    """(N, N) sparse, of which row i holds `weight` in columns[i]; columns (N, k)."""
    N, k = columns.shape
    values = np.full(N * k, weight, np.float32)
    starts = k * np.arange(N + 1)
    content = (values, columns.ravel(), starts)
    return sparse.csr_matrix(content, (N, N))


def reciprocal(indices: np.ndarray, k: int) -> sparse.csr_matrix:
    """R for the first k of the nearest images (N, >= k)."""
    first = rows_of(indices[:, :k], 1)
    mutual = first.multiply(first.T)
    return mutual.tocsr()


def encode_neighbours(x: Tensor, indices, farthest, k1: int) -> sparse.csr_matrix:
    """V before query expansion. Distances of row i are divided by its farthest."""
    R = reciprocal(indices, k1 + 1)
    half = reciprocal(indices, round(k1 / 2) + 1)
    size = half.sum(1).A1                                                    # (N,)
    neighbours = []
    for start in range(0, len(indices), 4096):
        rows = R[start:start + 4096]
        # a neighbour whose own nearer neighbours are, by two thirds, mine too, brings them along
        common = (rows @ half.T).multiply(rows)
        trusted = common.tocsr()
        enough = 3 * trusted.data > 2 * size[trusted.indices]
        trusted.data = enough.astype(np.float32)
        trusted.eliminate_zeros()
        neighbours.append(rows + trusted @ half)
    V = sparse.vstack(neighbours, format="csr")
    counts = np.diff(V.indptr)
    row = np.repeat(np.arange(len(indices)), counts)                         # (entries of V,)
    for start in range(0, V.nnz, 1 << 13):        # the distances of these few pairs alone
        part = slice(start, start + (1 << 13))
        i = torch.from_numpy(row[part])
        j = torch.from_numpy(V.indices[part])
        one = x[i.to(x.device)]
        other = x[j.to(x.device)]
        similarity = (one * other).sum(1)
        distance = (2 - 2 * similarity).clamp(min=0)
        distance = distance.cpu().numpy()
        largest = farthest[row[part]]
        V.data[part] = np.exp(-distance / largest)
    total = V.sum(1).A1
    V.data /= np.repeat(total, counts)
    return V
