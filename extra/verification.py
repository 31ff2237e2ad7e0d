"""Verification: do two images show one person? What an evaluation says beside CMC and mAP.

A pair of images is accepted as one person's if its cosine similarity is at least a threshold t.
Pairs are each query with each gallery image from another camera; distractors are other people.
Read `Verification`, then `verify`.
"""

from dataclasses import dataclass

import numpy as np

from evaluate import check_unit_length, negative_similarities


@dataclass
class Verification:
    """threshold: the t at which both error rates differ least, that is false_reject, the share of
    the same_pairs (of one person) that are not accepted, and false_accept, the share of the
    other_pairs that are; eer: their mean. accepted: the share of same_pairs accepted by the
    smallest t that accepts at most 1 or 0.1 % of the other_pairs; None where these are too few to
    tell. people: whose pairs these are.
    """

    eer: float
    threshold: float
    false_reject: float
    false_accept: float
    accepted: dict[str, float | None]
    same_pairs: int
    other_pairs: int
    people: str

    def __str__(self) -> str:
        text = (f"verification, read off {self.people}: EER {self.eer:.2%} at cosine similarity "
                f"{self.threshold:.4f}")
        for level, share in self.accepted.items():
            found = "not resolved"
            if share is not None:
                found = f"{share:.2%}"
            text += f"; true accepts at {level} of false ones {found}"
        return (f"{text} ({self.same_pairs:,} pairs of one person, {self.other_pairs:,} of two, "
                f"each counting the same; a threshold for these cameras alone)")


def pair_similarities(q, g):
    """Yields cosine similarities of one query after the other with the gallery's images from other
    cameras, but for copies of its file: those of its own person, and those of others."""
    for i, distances in enumerate(negative_similarities(q.feats, g.feats)):
        wanted = ((g.camids != q.camids[i]) & (g.files != q.files[i])).numpy()
        own = (g.pids == q.pids[i]).numpy()
        yield -distances[wanted & own], -distances[wanted & ~own]


def verify(q, g, people: str = "the test set") -> Verification | None:
    """Verification of query and gallery (`evaluate.Features`); None if one kind of pair does not
    exist. Raises InputError for features that are not of length 1.

    Exact, but never holding all pairs: those of one person are few and kept, the others are counted
    between them, and listed only where the error rates meet.
    """
    check_unit_length("query", q.feats, q.feats)
    check_unit_length("gallery", g.feats, q.feats)
    same = np.sort(np.concatenate([own for own, _ in pair_similarities(q, g)]))  # (S,)
    between = np.zeros(len(same) + 1, np.int64)   # [j]: others with j of `same` at or below them
    for _, others in pair_similarities(q, g):
        places = np.searchsorted(same, np.sort(others), side="right")  # unsorted takes longer
        between += np.bincount(places, minlength=len(same) + 1)
    S = len(same)
    N = int(between.sum())
    if S == 0 or N == 0:
        return None
    wrong = N - np.cumsum(between)                # (S + 1,) others accepted at t = same[j]; last: 0
    accepted = {}
    for one_in, level in ((100, "1 %"), (1000, "0.1 %")):
        accepted[level] = None
        if N >= one_in:
            accepted[level] = float(np.mean(wrong[:-1] * one_in <= N))
    # The rates meet between two neighbours in `same`, low and high. There each similarity of the
    # others, as t, accepts another number of them, and the best t may be among these.
    lost = np.searchsorted(same, same)            # of `same` itself, below t = same[j]
    j = np.searchsorted(lost * N - wrong[:-1] * S, 0)
    first = max(j - 1, 0)
    low, high = np.append(same, np.inf)[[first, j]]  # one if no error is made: none between
    near = [others[(low < others) & (others < high)] for _, others in pair_similarities(q, g)]
    near = np.sort(np.concatenate(near))
    t = np.unique(np.concatenate([near, same[first:j + 1]]))
    lost = np.searchsorted(same, t)               # of `same`, not accepted
    at_low = wrong[first]
    wrong = wrong[j] + len(near) - np.searchsorted(near, t)
    wrong[0] = at_low
    best = np.abs(lost * N - wrong * S).argmin()  # of equals the lowest t
    false_reject = float(lost[best] / S)
    false_accept = float(wrong[best] / N)
    return Verification((false_reject + false_accept) / 2, float(t[best]), false_reject,
                        false_accept, accepted, S, N, people)
