"""CMC and mAP against the definition, the lies an evaluator can tell, re-ranking, the picture."""

import dataclasses
import gc
import math
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, Golden, market_tree, write_image
from PIL import Image

import evaluate
import extra.rerank
from data import Record, load_dataset
from evaluate import RankResult, ReIDModel, cmc_map, filtered_ranking, labels_of, matches_of, rank_features, rerank
from extra import verification
from extra.files import InputError
from extra.pictures import GREEN, GREY, draw_ranks
from conftest import colour_histograms
from extra.workers import end_workers
from personvit import VisionTransformer

# ---- ranking ---------------------------------------------------------------------------------


def by_definition(dist, q_pids, g_pids, q_cams, g_cams, max_rank, q_files=None, g_files=None):
    """CMC, both APs and INP in plain Python, one query at a time, from the words of the protocol."""
    cmc, APs = np.zeros(max_rank), {"step": [], "market": [], "INP": []}
    for q in range(len(q_pids)):
        kept = []
        for g in range(len(g_pids)):
            same = q_pids[q] == g_pids[g]
            copy = q_files is not None and q_files[q] == g_files[g]
            if not (same and (q_cams[q] == g_cams[g] or copy)):
                kept.append((float(dist[q][g]), same))
        kept.sort()  # False < True: among ties other people come first
        hits = [rank for rank, (_, same) in enumerate(kept) if same]
        if not hits:
            for values in APs.values():
                values.append(math.nan)
            continue
        cmc[hits[0]:] += 1
        step = market = 0.0
        for j, p in enumerate(hits):
            new = (j + 1) / (p + 1)
            old = j / p if p else 1.0
            step += new / len(hits)
            market += (old + new) / 2 / len(hits)
        APs["step"].append(step), APs["market"].append(market)
        APs["INP"].append(len(hits) / (hits[-1] + 1))            # ranks of the last one count from 1
    valid = sum(not math.isnan(a) for a in APs["step"])
    return cmc / max(valid, 1), APs, valid


def random_problem(seed: int):
    """A small random problem: coarse distances (many ties), junk, distractors, ids without a match."""
    rng = np.random.default_rng(seed)
    Q, G = rng.integers(1, 12), rng.integers(1, 60)
    ids, cams = rng.integers(1, 8), rng.integers(1, 4)
    dist = rng.integers(0, rng.choice([3, 20, 10_000]), (Q, G)).astype(rng.choice(["float32", "float64"]))
    return (dist, rng.integers(0, ids + 1, Q), rng.integers(0, ids + 1, G), rng.integers(0, cams, Q),
            rng.integers(0, cams, G), rng.integers(0, 30, Q), rng.integers(0, 30, G))


@pytest.mark.parametrize("seed", range(200))
def test_cmc_map_equals_the_definition(seed):
    dist, qp, gp, qc, gc, qi, gi = random_problem(seed)
    most = 1 + seed % 12
    images = dict(q_files=qi, g_files=gi) if seed % 2 else {}
    cmc, APs, valid = by_definition(dist, qp, gp, qc, gc, most, **images)
    if not valid:
        with pytest.raises(InputError, match="no query has a correct match in the gallery"):
            cmc_map(dist, qp, gp, qc, gc, most, **images)
        return
    for ap in ("step", "market"):
        result = cmc_map(dist, qp, gp, qc, gc, most, ap=ap, **images)
        assert isinstance(result, RankResult) and result.ap == ap
        assert result.mINP == pytest.approx(np.nanmean(APs["INP"])) and f"mINP {result.mINP:.2%}" in str(result)
        np.testing.assert_allclose(result.cmc, cmc, atol=1e-12)
        np.testing.assert_allclose(result.AP, APs[ap], atol=1e-12)
        assert result.mAP == pytest.approx(np.nanmean(APs[ap])) and result.mAP == result.mAPs[ap]
        assert (result.valid, result.total) == (valid, len(qp))
        assert f"valid queries {valid}/{len(qp)}" in str(result)
        other = {"step": "market", "market": "step"}[ap]
        assert f"mAP {result.mAP:.2%} ({ap}; {other} {result.mAPs[other]:.2%})" in str(result)
        assert result.numbers()["cmc"] == result.cmc.tolist() and ("rank10" in result.numbers()) == (most >= 10)


def test_equals_reference():
    golden = Golden("cmc_map")
    args = [golden[k].numpy() for k in ("distmat", "q_pids", "g_pids", "q_camids", "g_camids")]
    before = args[0].copy()
    result = cmc_map(*args)
    np.testing.assert_allclose(result.cmc, golden["cmc"], atol=1e-6)
    np.testing.assert_allclose(result.AP, golden["AP"], atol=1e-9)
    assert result.mAP == pytest.approx(float(golden["mAP"]), abs=1e-9)
    assert np.array_equal(args[0], before)  # the caller's matrix is not touched


@pytest.mark.parametrize("hits, step, market", [  # worked by hand, and published examples
    ([1, 0, 1], 0.833333, 0.791667), ([0, 1, 0, 1, 1], 0.533333, 0.405556), ([1, 1, 1], 1, 1),
    ([0, 0, 1], 0.333333, 0.166667), ([1, 1, 0, 1, 0, 0, 1], 0.8304, 0.8110)])
def test_average_precision_examples(hits, step, market):
    result = cmc_map([list(range(len(hits)))], [1], hits, [0], [1] * len(hits))
    assert result.mAPs["step"] == pytest.approx(step, abs=5e-5)
    assert result.mAPs["market"] == pytest.approx(market, abs=5e-5)


@pytest.mark.parametrize("hits, wanted", [                     # correct matches / rank of the last
    ([1, 1, 1], 1), ([1, 0, 0, 0, 1], 0.4), ([0, 0, 1], 1 / 3), ([1, 0, 1, 0, 0, 0], 2 / 3)])
def test_inverse_negative_penalty(hits, wanted):
    result = cmc_map([list(range(len(hits)))], [1], hits, [0], [1] * len(hits))
    assert result.mINP == pytest.approx(wanted)
    other = cmc_map([[0, 1], [0, 1], [0, 1]], [1, 2, 3], [1, 2], [0] * 3, [1, 1])       # a mean over the valid alone
    assert other.mINP == pytest.approx((1 + 1 / 2) / 2) and other.valid == 2


@pytest.mark.parametrize("seed", range(10))
def test_features_rank_as_their_distances(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    problems = (random_problem(1000 * seed + i) for i in range(100))
    _, qp, gp, qc, gc, _, _ = next(p for p in problems if by_definition(p[0], *p[1:5], 5)[2])  # a valid query
    q = torch.nn.functional.normalize(torch.tensor(rng.normal(size=(len(qp), 9))).float(), dim=1)
    g = torch.nn.functional.normalize(torch.tensor(rng.normal(size=(len(gp), 9))).float(), dim=1)
    dense = cmc_map(2 - 2 * (q.double() @ g.double().T), qp, gp, qc, gc)
    whole = evaluate.negative_similarities
    for chunk in (1, 3, 256):
        used = []
        monkeypatch.setattr(evaluate, "negative_similarities", lambda q, g: used.append(chunk) or whole(q, g, chunk))
        result = rank_features(q, qp, qc, g, gp, gc)
        assert used == [chunk]
        np.testing.assert_allclose(result.cmc, dense.cmc, atol=1e-12)
        np.testing.assert_allclose(result.AP, dense.AP, atol=1e-12)


def test_collapsed_network_scores_at_chance():
    torch.manual_seed(0)
    ids, cams = torch.arange(40).repeat(3), torch.arange(3).repeat_interleave(40)
    point = torch.nn.functional.normalize(torch.randn(1, 384), dim=1)
    features = point.expand(120, -1)
    for noise in (0, 1e-9):  # rounding noise around one point is a collapse as well
        f = torch.nn.functional.normalize(features + noise * torch.randn(120, 384), dim=1)
        result = rank_features(f[:40], ids[:40], cams[:40], f[40:], ids[40:], cams[40:])
        assert result.cmc[0] == 0 and result.mAP < 0.05
    assert cmc_map(np.zeros((1, 4)), [1], [1, 1, 2, 3], [0], [1, 1, 1, 1]).cmc[0] == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_features_raise(value):
    f = torch.eye(4)
    f[2, 1] = value
    with pytest.raises(ValueError, match="NaN"):
        rank_features(f, [1, 2, 3, 4], [0] * 4, torch.eye(4), [1, 2, 3, 4], [1] * 4)
    with pytest.raises(ValueError, match="NaN"):
        cmc_map([[math.nan, 1.0]], [1], [1, 2], [0], [1, 1])


def test_copies_of_the_query_never_count():
    f = torch.nn.functional.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    pids = [1, 1, 2, 2, 3, 3]
    honest = rank_features(f, pids, [0] * 6, f, pids, [1] * 6, q_files=range(6), g_files=range(6))
    lie = rank_features(f, pids, [0] * 6, f, pids, [1] * 6)
    assert lie.cmc[0] == 1 and honest.cmc[0] < 1
    alone = rank_features(f, pids, list(range(6)), f, pids, list(range(6)))  # an image is its own camera
    np.testing.assert_allclose(alone.AP, honest.AP)


def test_no_valid_query_is_explained():
    with pytest.raises(InputError) as caught:
        cmc_map(np.ones((5, 3)), [1, 1, 2, 8, 9], [1, 2, 3], [0] * 5, [0] * 3)
    text = str(caught.value)
    assert "of 5 queries, 2 have an id that is not in the gallery, 3 have it only from the query's own camera" in text
    assert "--cams none" in text


@pytest.mark.parametrize("dist, args", [
    (np.zeros((1, 0)), ([1], [], [0], [])), (np.zeros((0, 2)), ([], [1, 2], [], [0, 0])),
    (np.ones(3), ([1], [1], [0], [0])), (np.ones((2, 2)), ([1, 2], [1, 2], [0], [1, 1])),
    ([[math.inf, 1.0]], ([1], [1, 2], [0], [1, 1]))])
def test_odd_inputs_get_one_line(dist, args):
    with pytest.raises(InputError) as caught:
        cmc_map(dist, *args)
    assert "\n" not in str(caught.value)


def test_features_must_be_unit_vectors_with_labels():
    f = torch.eye(3)
    for change, words in (({"g_feats": 2 * f}, "gallery features are not of length 1"),
                          ({"q_feats": 1e-4 * f}, "query features are not of length 1"),
                          ({"g_feats": torch.eye(4)}, "gallery features of shape"),
                          ({"q_feats": f[0]}, "query features of shape"), ({"q_feats": 1.0}, "query features of shape"),
                          ({"q_camids": [0]}, "query has 3 images and 1 cameras"),
                          ({"g_files": [1]}, "1 file numbers")):
        args = dict(q_feats=f, q_pids=[1, 2, 3], q_camids=[0] * 3, g_feats=f, g_pids=[1, 2, 3], g_camids=[1] * 3)
        with pytest.raises(InputError, match=words):
            rank_features(**(args | change))


def test_distances_that_float32_cannot_tell_apart_keep_their_order():
    for dist in ([[2 ** 24 + 1, 2 ** 24]], [[0.3 + 1e-12, 0.3]]):
        for kind in (list, np.array, lambda rows: torch.from_numpy(np.array(rows))):
            assert cmc_map(kind(dist), [1], [2, 1], [0], [1, 1]).cmc[0] == 1
    needs_gradient = torch.tensor([[2.0, 1.0]], requires_grad=True)
    assert cmc_map(needs_gradient, [1], [2, 1], [0], [1, 1]).cmc[0] == 1


def test_picture_and_metric_agree_on_ties():
    """A correct match closer than TIE to another person's image stands behind it, in both."""
    angle = torch.acos(torch.tensor([0.5000006, 0.5000004], dtype=torch.float64))
    g = torch.stack([angle.cos(), angle.sin()], dim=1).float()
    q = torch.tensor([[1.0, 0.0]])
    result = rank_features(q, [1], [0], g, [1, 2], [1, 1])
    one, two = torch.tensor([1, 1]), torch.tensor([1, 2])
    order, _ = filtered_ranking(evaluate.Features(q, torch.tensor([9]), one[:1], torch.tensor([0])),
                                evaluate.Features(g, two, two, one), 0)
    assert result.cmc[0] == 0 and order.tolist() == [1, 0]


def test_shapes_must_agree():
    with pytest.raises(InputError, match="the gallery has 3 images and 2 ids"):
        cmc_map(np.ones((2, 3)), [1, 2], [1, 2], [0, 0], [1, 1])
    for empty, words in ((0, "the query has 0 images"), (1, "the gallery has 0 images")):
        feats, labels = [torch.eye(3), torch.eye(3)], [[1, 2, 3], [1, 2, 3]]
        feats[empty], labels[empty] = torch.zeros(0, 3), []
        with pytest.raises(InputError, match=words):
            rank_features(feats[0], labels[0], labels[0], feats[1], labels[1], labels[1])
    with pytest.raises(InputError, match="'step' or 'market'"):
        cmc_map(np.ones((1, 1)), [1], [1], [0], [1], ap="sklearn")


MARKET = next((p for p in (Path(os.environ.get("REID_DATA", ROOT / "data")) / "Market-1501-v15.09.15",)
               if (p / "gt_query").is_dir()), None)


@pytest.mark.skipif(MARKET is None, reason="Market-1501 with gt_query is not here (REID_DATA names its parent)")
def test_official_good_and_junk_lists_agree():
    from scipy.io import loadmat
    dataset = load_dataset("market1501", MARKET)
    listing = sorted(p.name for p in (MARKET / "bounding_box_test").glob("*.jpg"))  # .mat files count these from 1
    place = {name: i + 1 for i, name in enumerate(listing)}
    in_listing = np.array([place[os.path.basename(r.path)] for r in dataset.gallery])
    query, gallery = (labels_of(side, len(part), [r.pid for r in part], [r.camid for r in part])
                      for side, part in (("query", dataset.query), ("gallery", dataset.gallery)))
    assert len(dataset.query) == 3368
    for i, record in enumerate(dataset.query):
        correct, left_out = matches_of(query, i, gallery)
        stem = os.path.basename(record.path).split(".")[0]
        good, junk = (set(loadmat(MARKET / "gt_query" / f"{stem}_{kind}.mat")[f"{kind}_index"].flatten().tolist())
                      for kind in ("good", "junk"))
        assert set(in_listing[correct].tolist()) == good
        own = set(in_listing[left_out].tolist())
        gone = {place[n] for n in listing if n.startswith("-1")}  # junk of pid -1 was dropped on reading
        assert own == {i for i in junk if i not in gone and i <= len(listing)} or (not own and len(junk) == 1)


# ---- verification ----------------------------------------------------------------------------


def plain_verification(similarity, q, g):
    """From the words of the definition: every pair in a list, every similarity a threshold."""
    same, other = [], []
    for i in range(len(q.pids)):
        for k in range(len(g.pids)):
            if q.camids[i] != g.camids[k] and q.files[i] != g.files[k]:
                (same if q.pids[i] == g.pids[k] else other).append(float(similarity[i, k]))
    if not same or not other:
        return None
    best, accepted = None, {"1 %": None, "0.1 %": None}
    for t in [*sorted({*same, *other}), math.inf]:
        rejects, accepts = sum(s < t for s in same), sum(o >= t for o in other)
        gap = abs(rejects * len(other) - accepts * len(same))    # of the rates, without rounding
        if best is None or gap < best[0]:
            best = gap, t, rejects / len(same), accepts / len(other)
        for name, one_in in (("1 %", 100), ("0.1 %", 1000)):
            if len(other) >= one_in and accepts * one_in <= len(other) and accepted[name] is None:
                accepted[name] = sum(s >= t for s in same) / len(same)
    _, t, reject, accept = best
    return (reject + accept) / 2, t, reject, accept, accepted, len(same), len(other)


def random_side(rng, n: int, width: int, kind: int, cameras: bool):
    x = rng.normal(size=(n, width))
    if kind == 1:                                                # few directions, so that many pairs are equal
        x = rng.integers(0, 2, (n, width)) + np.eye(1, width)
    if kind == 2:                                                # a collapsed network
        x = np.ones((n, width))
    images = torch.tensor(rng.integers(0, 4 * n, n))
    camids = torch.tensor(rng.integers(0, rng.integers(1, 5), n)) if cameras else images
    return evaluate.Features(F.normalize(torch.tensor(x).float(), dim=1), images,
                             torch.tensor(rng.integers(0, rng.integers(1, 9), n)), camids)


@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("cameras", [True, False])
def test_verification_equals_the_plain_loop(kind, cameras):
    seen = set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        width = rng.integers(2, 6)
        q, g = (random_side(rng, rng.integers(1, most), width, kind, cameras) for most in (20, 80))
        similarity = -np.stack(list(evaluate.negative_similarities(q.feats, g.feats)))
        wanted, found = plain_verification(similarity, q, g), verification.verify(q, g, "these")
        if wanted is None:
            assert found is None
            seen.add("no pairs")
            continue
        assert dataclasses.astuple(found) == (*wanted, "these")
        assert f"EER {wanted[0]:.2%} at cosine similarity {wanted[1]:.4f}" in str(found) and "read off these" in str(found)
        assert f"{wanted[5]:,} pairs of one person, {wanted[6]:,} of two" in str(found)
        assert ("at 1 % of false ones not resolved" in str(found)) == (wanted[6] < 100)
        seen.update((level, share is None) for level, share in found.accepted.items())
    assert seen >= {"no pairs", ("1 %", True), ("1 %", False), ("0.1 %", True)}


def test_verification_of_sets_that_can_be_reckoned():
    def sides(similarities, pids):
        x = torch.tensor(similarities)
        g = torch.stack([x, (1 - x ** 2).sqrt()], dim=1)
        one = torch.ones(1, dtype=torch.int64)
        n = torch.arange(len(x))
        return evaluate.Features(torch.tensor([[1.0, 0.0]]), -one, one, -one), evaluate.Features(g, n, torch.tensor(pids), n)

    apart = verification.verify(*sides([0.9, 0.8, 0.1, 0.2, 0.3], [1, 1, 0, 2, 3]))       # 0: a distractor, another person
    assert (apart.eer, apart.same_pairs, apart.other_pairs) == (0, 2, 3) and apart.threshold == pytest.approx(0.8)
    mixed = verification.verify(*sides([0.9, 0.6, 0.4, 0.1] + [0.95] + 999 * [0.5], [1] * 4 + 1000 * [2]))
    assert mixed.accepted == {"1 %": 0.5, "0.1 %": 0.5} and mixed.other_pairs == 1000
    assert (mixed.false_reject, mixed.false_accept) == (0.5, 0.001)                   # 0.5 would accept them all
    assert verification.verify(*sides([0.9, 0.8], [1, 1])) is None and verification.verify(*sides([0.9], [2])) is None


@pytest.mark.parametrize("right", [True, False])
def test_verification_never_holds_all_pairs(right):
    """... not even of a network that makes no error, or of a collapsed one."""
    def side(n: int, images: int):
        pids = torch.arange(n) % 50
        feats = torch.eye(50)[pids if right else 0 * pids]
        return evaluate.Features(feats, images + torch.arange(n), pids, torch.full((n,), images))

    q, g = side(50, 0), side(20_000, 100)
    tracemalloc.start()
    found = verification.verify(q, g)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.other_pairs == 980_000 and peak < 4 * found.other_pairs / 2
    assert (found.eer, found.threshold) == ((0, 1) if right else (0.5, 1))


@pytest.mark.parametrize("value", [math.nan, 2.0])
def test_verification_refuses_what_ranking_refuses(value):
    q, g = (random_side(np.random.default_rng(0), 9, 3, 0, True) for _ in range(2))
    for side in (q, g):
        kept = side.feats[4].clone()
        side.feats[4] = value
        with pytest.raises(InputError, match="features are not of length 1"):
            verification.verify(q, g)
        side.feats[4] = kept


# ---- model and weights -----------------------------------------------------------------------


def test_model_names_and_outputs():
    model = ReIDModel(VisionTransformer((32, 16), 8, embed_dim=12, depth=1, num_heads=2), 5)
    assert {k.split(".")[0] for k in model.state_dict()} == {"base", "bottleneck", "classifier"}
    assert not model.bottleneck.bias.requires_grad and model.classifier.bias is None
    x = torch.randn(4, 3, 32, 16)
    logits, feature = model.train()(x)
    assert logits.shape == (4, 5) and feature.shape == (4, 12)
    before = model.eval()(x)
    torch.testing.assert_close(before, model.base(x))
    model.neck_feat = "after"
    torch.testing.assert_close(model(x), model.bottleneck(before))


# ---- features, picture -----------------------------------------------------------------------


class MeanColour(torch.nn.Module):
    """A stand-in for a network: three means."""

    def forward(self, x):
        return x.mean((2, 3)) + 0.1


RECIPE = {"size": (16, 8), "mean": [0.5] * 3, "std": [0.5] * 3}


def test_extraction_is_independent_of_batches_and_workers(market):
    dataset = load_dataset("market1501", market)
    runs = [evaluate.extract(MeanColour(), dataset.gallery, **RECIPE, batch_size=b, workers=w)
            for b, w in ((1, 0), (5, 2), (64, 1))]
    for features, images in runs[1:]:
        torch.testing.assert_close(features, runs[0][0], rtol=1e-6, atol=1e-7)
        assert torch.equal(images, runs[0][1])
    torch.testing.assert_close(runs[0][0].norm(dim=1), torch.ones(len(dataset.gallery)))


class TopLeft(torch.nn.Module):
    """A network to which a mirror image is another one."""

    def forward(self, x):
        return x[:, :, 0, 0] + x[:, :, 5, 1] ** 2 + 0.1


def test_flip_adds_the_mirror_image_before_it_normalises(market):
    records = load_dataset("market1501", market).gallery
    plain, _ = evaluate.extract(TopLeft(), records, **RECIPE, workers=0)
    found, images = evaluate.extract(TopLeft(), records, **RECIPE, workers=0, flip=True)
    x = torch.stack([evaluate.read_image(r.path, RECIPE["size"], Image.Resampling.BILINEAR) for r in records])
    x = evaluate.normalize(x, RECIPE["mean"], RECIPE["std"])
    wanted = F.normalize(TopLeft()(x) + TopLeft()(torch.flip(x, dims=[-1])), dim=1)
    torch.testing.assert_close(found, wanted)
    assert (found - plain).abs().max() > 0.1 and len(images) == len(records)
    both, _ = evaluate.extract(MeanColour(), records, **RECIPE, workers=0, flip=True)     # its own mirror image
    torch.testing.assert_close(both, evaluate.extract(MeanColour(), records, **RECIPE, workers=0)[0])


def test_a_linear_probe_learns_from_the_features(market):
    """... which PyTorch would refuse, were they inference tensors."""
    records = load_dataset("market1501", market).gallery
    model = torch.nn.Sequential(MeanColour(), torch.nn.Linear(3, 8))
    features, images = evaluate.extract(model, records, **RECIPE, workers=0)
    assert not features.requires_grad and not features.is_inference() and not images.is_inference()
    probe = torch.nn.Linear(8, 8)
    torch.nn.functional.cross_entropy(probe(features), torch.tensor([r.pid for r in records])).backward()
    assert probe.weight.grad.abs().sum() > 0
    features.requires_grad_().sum().backward()                   # and they can be learnt themselves
    assert torch.equal(features.grad, torch.ones_like(features))


def test_no_images_are_one_line():
    with pytest.raises(InputError, match="^no images, so no features$"):
        evaluate.extract(MeanColour(), [], **RECIPE, workers=0)


def test_unreadable_image_is_named(market):
    broken = market / "query" / "0003_c1s1_005010_00.jpg"
    for content in (b"", b"not an image", broken.read_bytes()[:200]):
        broken.write_bytes(content)
        dataset = load_dataset("market1501", market)
        for workers in (0, 1):  # one clear line, from a worker's traceback too
            with pytest.raises(InputError) as caught:
                evaluate.evaluate(MeanColour(), dataset, RECIPE, workers=workers)
            assert str(broken) in str(caught.value) and "\n" not in str(caught.value)
            del caught
            end_workers()  # PyTorch raises a worker's error in a cycle of references, and waits ten seconds
            gc.collect()   # for its workers when that is collected


def test_not_finite_features_are_an_error(market):
    class Broken(MeanColour):
        def forward(self, x):
            return super().forward(x) * torch.nan

    with pytest.raises(InputError, match="not finite"):
        evaluate.evaluate(Broken(), load_dataset("market1501", market), RECIPE, workers=0)


def test_folder_without_cameras_excludes_the_image_alone(tmp_path):
    for i in range(3):
        for k in range(4):
            write_image(tmp_path / "people" / f"{i:04d}" / f"{k}.jpg", 10 * i + k)
    dataset = load_dataset("folder", tmp_path / "people")
    result, q, g = evaluate.evaluate(MeanColour(), dataset, RECIPE, workers=0)
    assert result.valid == result.total == 12
    order, _ = filtered_ranking(q, g, 5)
    assert sorted(order.tolist()) == [i for i in range(12) if i != 5]
    one_camera = tmp_path / "one"
    for p in sorted(tmp_path.glob("people/*/*.jpg")):
        write_image(one_camera / f"{p.parent.name}_c1_{p.name}", int(p.parent.name + p.stem))
    dataset = load_dataset("folder", one_camera)
    with pytest.raises(InputError, match="--cams none"):
        evaluate.evaluate(MeanColour(), dataset, RECIPE, workers=0)
    assert evaluate.evaluate(MeanColour(), dataset, RECIPE, use_cameras=False, workers=0)[0].valid == 12


def test_first_column_is_green_for_exactly_the_hits(tmp_path):
    root = market_tree(tmp_path / "market1501", ids=12, images=4)
    rng = np.random.default_rng(0)
    for path in root.glob("*/*.jpg"):  # an identity is a shade, blurred so far that about half are found
        shade = 8 * int(path.name[:4]) + rng.integers(0, 20, 3)
        Image.new("RGB", (8, 16), tuple(shade.tolist())).save(path)
    dataset = load_dataset("market1501", root)
    result, q, g = evaluate.evaluate(MeanColour(), dataset, RECIPE, workers=0)
    draw_ranks(tmp_path / "ranks.png", dataset, result, q, g, rows=12, columns=3)
    picture = Image.open(tmp_path / "ranks.png")
    tops = [y for y in range(picture.height) if picture.getpixel((12, y)) == GREY
            and picture.getpixel((12, y - 1)) != GREY]
    assert len(tops) == 12
    frames = [picture.getpixel((14 * 2 + 64 + 14 - 2, y + 60)) for y in tops]
    firsts = [bool(g.pids[filtered_ranking(q, g, i)[0][0]] == q.pids[i]) for i in range(12)]
    assert [f == GREEN for f in frames] == firsts
    assert np.mean(firsts) == pytest.approx(result.cmc[0]) and 0 < sum(firsts) < 12


def test_histogram_counts_colours(tmp_path):
    for name, colour in (("a", (255, 0, 0)), ("b", (255, 0, 0)), ("c", (0, 0, 255))):
        Image.new("RGB", (8, 16), colour).save(tmp_path / f"{name}.png")
    f = colour_histograms([Record(str(tmp_path / f"{n}.png"), 1, 0) for n in "abc"])
    torch.testing.assert_close(f @ f.T, torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]]))


# ---- re-ranking ------------------------------------------------------------------------------


def textbook_rerank(q, g, k1, k2, lam, flip=None, dtype=np.float64):
    """Zhong et al.'s algorithm with dense matrices and loops; flip: exchange two places of a rank list."""
    x = np.concatenate([q, g]).astype(np.float64)
    D = ((x[:, None] - x[None]) ** 2).sum(-1)
    D /= D.max(1, keepdims=True)
    rank, N, V = np.argsort(D, 1, kind="stable"), len(x), np.zeros((len(x), len(x)), dtype)
    for i, place in flip or []:
        rank[i, [place - 1, place]] = rank[i, [place, place - 1]]

    def known(i, k):
        return [j for j in rank[i, :k + 1] if i in rank[j, :k + 1]]

    for i in range(N):
        mine = known(i, k1)
        more = list(mine)
        for c in mine:
            half = known(c, round(k1 / 2))
            if len(set(half) & set(mine)) > 2 / 3 * len(half):
                more += half
        more = np.unique(more)
        V[i, more] = np.exp(-D[i, more]) / np.exp(-D[i, more]).sum()
    V = np.stack([V[rank[i, :k2]].mean(0) for i in range(N)])
    m = np.zeros((len(q), len(g)), dtype)
    for t in range(N):  # one by one, as it is how a short float type loses digits
        m += np.minimum(V[:len(q), t, None], V[None, len(q):, t])
    m = m.astype(np.float64)
    return (1 - lam) * (1 - m / (2 - m)) + lam * D[:len(q), len(q):], D


@pytest.mark.parametrize("name, k1, k2", [("rerank_20_6_03", 20, 6), ("rerank_50_15_03", 50, 15)])
def test_rerank_equals_textbook_and_reference(name, k1, k2):
    golden = Golden(name)
    q, g = golden["query"], golden["gallery"]
    ours = rerank(q, g, k1, k2, 0.3)
    wanted, D = textbook_rerank(q.numpy(), g.numpy(), k1, k2, 0.3)
    np.testing.assert_allclose(ours, wanted, atol=2e-6)
    # the reference rounds distances to float32 before it ranks them; where two are that close, its order is luck
    close, D = [], np.sort(D, 1)
    for place in (k2, round(k1 / 2) + 1, k1 + 1):
        close += [(i, place) for i in np.flatnonzero(D[:, place] - D[:, place - 1] < 1e-7)]
    assert len(close) <= 1
    wanted, _ = textbook_rerank(q.numpy(), g.numpy(), k1, k2, 0.3, flip=close, dtype=np.float16)  # as it has
    np.testing.assert_allclose(golden["distmat"], wanted, atol=3e-3)


@pytest.mark.parametrize("seed", range(6))
def test_rerank_equals_textbook_on_random_problems(seed):
    rng = np.random.default_rng(seed)
    Q, G, D = rng.integers(1, 20), rng.integers(8, 60), rng.integers(2, 12)
    centres = rng.normal(size=(6, D))
    q, g = (torch.as_tensor(centres[rng.integers(0, 6, n)] + 0.4 * rng.normal(size=(n, D))) for n in (Q, G))
    q, g = (F.normalize(x, dim=1).float() for x in (q, g))
    k1, k2 = int(rng.integers(1, 8)), int(rng.integers(1, 4))
    k2 = min(k2, k1 + 1)
    wanted, _ = textbook_rerank(q.numpy(), g.numpy(), k1, k2, 0.25)
    np.testing.assert_allclose(rerank(q, g, k1, k2, 0.25), wanted, atol=1e-5)


def test_rerank_of_near_duplicates_and_of_galleries_smaller_than_k1():
    torch.manual_seed(0)
    q = F.normalize(torch.randn(4, 8), dim=1)
    for g in (q.repeat(10, 1), F.normalize(q.repeat(3, 1) + 1e-7 * torch.randn(12, 8), dim=1), q[:1], q[:2]):
        dist = rerank(q, g)
        assert dist.shape == (4, len(g)) and dist.isfinite().all() and -1e-5 <= dist.min() and dist.max() <= 1 + 1e-5
    same = rerank(q, q.repeat(10, 1), 5, 2)
    assert (same.argmin(1) % 4 == torch.arange(4)).all()


@pytest.mark.parametrize("noise", [0, 1e-8, 1e-7])
def test_rerank_of_a_collapsed_network_is_finite(noise):
    torch.manual_seed(0)
    feats = F.normalize(torch.ones(60, 8) + noise * torch.randn(60, 8), dim=1)
    dist = rerank(feats[:10], feats[10:])
    assert dist.isfinite().all() and dist.max() <= 1 + 1e-5


def test_rerank_in_small_pieces_is_the_same(monkeypatch):
    torch.manual_seed(0)
    x = F.normalize(torch.randn(20, 8)[torch.arange(90) % 20] + 0.3 * torch.randn(90, 8), dim=1)
    whole = rerank(x[:30], x[30:], 6, 3, 0.3)
    module, used = extra.rerank, []
    usual = {name: getattr(module, name) for name in ("nearest", "squared_distances")}
    for chunk in (1, 7):
        for name, function in usual.items():
            def in_pieces(*args, function=function):
                used.append(function.__name__)
                return function(*args, chunk=chunk)

            monkeypatch.setattr(module, name, in_pieces)
        torch.testing.assert_close(rerank(x[:30], x[30:], 6, 3, 0.3), whole)
    assert used == 2 * ["nearest", "squared_distances"]


def test_rank_features_with_rerank_ranks_the_reranked_distances():
    torch.manual_seed(0)
    centres, pids = torch.randn(12, 8), torch.arange(150) % 12
    feats = F.normalize(centres[pids] + torch.randn(150, 8), dim=1)
    cams = torch.randint(4, (150,))
    args = feats[:30], pids[:30], cams[:30], feats[30:], pids[30:], cams[30:]
    result = evaluate.rank_features(*args, rerank=True)
    wanted = evaluate.cmc_map(rerank(feats[:30], feats[30:]), pids[:30], pids[30:], cams[:30], cams[30:])
    assert result.mAP == pytest.approx(wanted.mAP, abs=1e-6) and np.allclose(result.cmc, wanted.cmc)
    assert result.mAP > evaluate.rank_features(*args).mAP       # clustered features gain by it
