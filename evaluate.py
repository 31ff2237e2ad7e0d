"""From a file of weights to what it is worth: features, CMC and mAP, and your own photos.

The protocol is Market-1501's, as the published numbers of both papers use it. For each query q:

    rank the gallery by distance to q            nearest first
    drop images of q's person by q's camera      finding the next video frame again proves nothing
    CMC@k = share of queries with a right answer among the first k        (rank-1 is CMC@1)
    AP    = mean precision at the right answers; mAP = its mean over queries    (which: `cmc_map`)
    INP   = right answers / rank of the last; mINP = its mean: what finding everyone takes

A query that has no right answer left does not count; every result says how many do ("valid a/b").
Usual evaluation is kind to a model in three ways. Here ties count against the query, so that a
collapsed network (all features equal) scores below chance and not 100 %; NaN is an error; and a
copy of the query's file in the gallery is no answer.

    Q, G    images of query and gallery; D width of the feature; B images of a batch
    W       right answers of one query
    N       = Q + G, what re-ranking looks at together

Files that this project wrote are understood here, those of others by extra/formats.py; pictures are
drawn by extra/pictures.py. Read `ranks_of`, then `score`, `extract`, `load_model`.
"""

import argparse
import functools
import hashlib
import json
import multiprocessing.util
import os
import signal
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from scipy import sparse
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import personvit
import upreid
from data import (NAMES, InputError, Record, closest, command_line, list_images, load_dataset,
                  normalize, read_image, write_atomic)

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
    """Backbone, BNNeck, classifier: images (B, 3, H, W) -> in training scores (B, num_ids) and
    feature (B, D), in evaluation the feature before [PersonViT code] or after the neck [BoT].
    (train.py's `FineTuning` calls base and head apart, as the neck sees all processes' rows.)

    The two losses disagree on what a feature is: the triplet loss wants distances, the classifier
    angles; with a batch norm between them each has a space of its own. State keys base.*,
    bottleneck.*, classifier.* are TransReID's.
    """

    def __init__(self, backbone: nn.Module, num_ids: int, neck_feat: str = "before"):
        super().__init__()
        assert neck_feat in ("before", "after"), neck_feat
        self.base, self.neck_feat = backbone, neck_feat
        self.bottleneck = nn.BatchNorm1d(backbone.embed_dim)
        # no shift, no classifier bias: decision planes go through the origin, as in cosine ranking
        self.bottleneck.bias.requires_grad_(False)
        self.classifier = nn.Linear(backbone.embed_dim, num_ids, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.head(self.base(x).float())        # (B, D); statistics and losses in float32

    def head(self, feature: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """What forward returns, of the backbone's features (B, D)."""
        if not self.training and self.neck_feat == "before":
            return feature
        neck = self.bottleneck(feature)               # (B, D)
        return (self.classifier(neck), feature) if self.training else neck


# ---------------------------------------------------------------------------------------------
# Weights: a file is understood wholly or refused, and nothing in it is executed
# ---------------------------------------------------------------------------------------------

OWN = ("reid-model", "reid-backbone")  # what train.py writes


def read_checkpoint(path: str | Path):
    """What torch.save wrote. Only tensors and plain values are read: a pickle may ask for any
    function to be called, and `weights_only` calls none. Raises InputError that says what the file
    is, when it is not that."""
    if Path(path).is_fifo() or Path(path).is_char_device():  # would be read for ever
        raise InputError(f"{path}: is a pipe or a device; name a file of weights")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # hostile bytes make the reader raise anything at all
        from extra import formats
        return formats.read(path, error)


def read_weights(path: str | Path) -> dict:
    """A file of weights in any of the formats of docs/data-and-weights.md, as a dictionary:

        base, neck   tensors of the backbone, under the names used here; of BNNeck and classifier,
                     none if it is not fine-tuned
        recipe       arch, size, mean, std, neck_feat, last_stride, stride
        grid         rows and columns of patches that a ViT's positions belong to, else None
        kind         what the file is
        dropped      names of tensors that the feature does not need

    Raises InputError, with the file's name, for one that is damaged or of no backbone known here.
    """
    content = read_checkpoint(path)
    if not isinstance(content, dict) or content.get("format") not in OWN:
        from extra import formats
        content = formats.convert(str(path), content)
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():  # PyTorch checks no sums
            raise ValueError("a checksum does not match")
        file = arrange(content)
        bad = [k for k, v in (file["base"] | file["neck"]).items() if not usable(k, v)]
    except Exception as error:  # strange tensors make anything at all fail
        raise InputError(f"{path}: damaged, its tensors or its recipe make no sense ({error}); "
                         f"nothing was loaded") from None
    if bad:
        raise InputError(f"{path}: {len(bad)} weights are not finite floating-point numbers, first "
                         f"{bad[0]}: the training diverged, or they were rounded to integers; "
                         f"nothing was loaded")
    return file


def arrange(content: dict) -> dict:
    """What `read_weights` returns, of a dictionary as train.py saves it."""
    recipe = {"neck_feat": "none", "last_stride": 1, "stride": None} | content["recipe"]
    recipe |= {key: content[key] for key in ("size", "mean", "std") if key in content}
    state = content.get("model") or {f"base.{k}": v for k, v in content["backbone"].items()}
    base = {k.removeprefix("base."): v for k, v in state.items() if k.startswith("base.")}
    neck, grid = {k: v for k, v in state.items() if not k.startswith("base.")}, None
    size, mean, std = (np.array(recipe[key], float) for key in ("size", "mean", "std"))
    if not (size.shape == (2,) and ((8 <= size) & (size <= 4096) & (size % 1 == 0)).all() and
            mean.shape == std.shape == (3,) and ((1e-6 <= std) & (abs(mean) + std < 1e3)).all() and
            recipe["last_stride"] in (1, 2) and isinstance(recipe["arch"], str) and
            recipe["neck_feat"] in (("before", "after") if neck else ("none",))):
        raise ValueError("its arch, size, mean, std, last_stride or neck_feat")
    recipe |= {"size": tuple(map(int, size)), "mean": mean.tolist(), "std": std.tolist()}
    if "pos_embed" in base:
        patch, shape = base["patch_embed.proj.weight"].shape[-1], tuple(base["pos_embed"].shape)
        grid = tuple((n - patch) // (recipe["stride"] or patch) + 1 for n in recipe["size"])
        if shape[:-1] != (1, 1 + grid[0] * grid[1]):
            raise ValueError(f"pos_embed of shape {shape} is not of {grid[0]} x {grid[1]} patches")
    return {"kind": f"{content['format'].removeprefix('reid-')} of this project", "dropped": [],
            **content, "recipe": recipe, "base": base, "neck": neck, "grid": grid}


def usable(name: str, tensor: Tensor) -> bool:
    """Finite numbers, all of them stored? (An expanded tensor may claim terabytes.)"""
    stored = tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()
    counts = name.endswith("num_batches_tracked")
    return stored and (counts or tensor.is_floating_point() and bool(tensor.isfinite().all()))


def load_weights(path: str | Path, backbone: nn.Module) -> str:
    """Fill a backbone from a weights file and say what was done; it is filled wholly or not at all.

    Classifiers and heads are dropped; position embeddings are resized to the backbone's grid.
    Raises InputError as `read_weights` does, and when the file's network is another one.
    """
    file = read_weights(path)
    state, there, here = file["base"], file["grid"], getattr(backbone, "grid", None)
    if not there or not here or there == here:
        return fill(backbone, state, path, file)
    pos = personvit.resize_pos_embed(state["pos_embed"].float(), there, here)    # (1, 1 + N, D)
    return (fill(backbone, state | {"pos_embed": pos}, path, file) +
            "; pos_embed resized {}x{} -> {}x{}".format(*there, *here))


def fill(model: nn.Module, state: dict[str, Tensor], path: str | Path, file: dict) -> str:
    """Load state and say so, or raise InputError that names what differs, and leave the model."""
    # old files lack the counter of batch norm, which only an average over all steps would read
    here, there = ({k: tuple(v.shape) for k, v in tensors.items() if "num_batches" not in k}
                   for tensors in (model.state_dict(), state))
    differ = [f"{k} is {there.get(k, 'absent')} there and {here.get(k, 'absent')} here"
              for k in here | there if here.get(k) != there.get(k)]
    if differ:
        raise InputError(f"{path}: another --arch, {file['recipe']['arch']}; nothing was loaded: "
                         f"{len(differ)} of {len(here)} tensors differ, first {differ[0]}")
    model.load_state_dict({k: state[k] for k in here}, strict=False)
    dropped = [*(k for k in file["neck"] if k not in state), *file["dropped"]]
    return (f"{path}: {file['kind']}; all {len(here)} weights loaded, dropped: {len(dropped)}"
            f"{' (' + ', '.join(dropped[:3]) + ')' if dropped else ''}")


def load_model(path: str | Path) -> tuple[nn.Module, dict]:
    """A model to evaluate, and how to use it: its recipe, {"arch", "size", "mean", "std",
    "neck_feat", ...}.

    A fine-tuned model (ours, TransReID's, PersonViT's) comes with its BNNeck; a pre-trained
    backbone gives its plain feature. Raises InputError as `load_weights` does.
    """
    file = read_weights(path)
    recipe, state, neck = file["recipe"], file["base"], file["neck"]
    if recipe["arch"] not in ARCHS:
        raise InputError(f"{path}: its network, {recipe['arch']}, is none that can be evaluated "
                         f"here, {', '.join(ARCHS)}; nothing was loaded")
    model = build_backbone(recipe["arch"], tuple(recipe["size"]), stride=recipe["stride"],
                           last_stride=recipe["last_stride"])
    if neck:
        neck = {"classifier.weight": torch.zeros(1, model.embed_dim)} | neck  # ranking needs none
        ids = neck["classifier.weight"].numel() // model.embed_dim
        model = ReIDModel(model, ids, recipe["neck_feat"])
        state = {f"base.{k}": v for k, v in state.items()} | neck
    print(fill(model, state, path, file))
    return model.eval(), recipe


# ---------------------------------------------------------------------------------------------
# Features
# ---------------------------------------------------------------------------------------------


def make_loader(dataset, batches, workers: int, collate=tuple):
    """A DataLoader that yields collate(what the dataset gives) for each list of indices in
    `batches`, in their order, made by worker processes (0: by this one): a list of items, or, of
    `Images`, the whole batch. It has a random generator of its own, else its start would take a
    number from stochastic depth's."""
    multiprocessing.util.Finalize(None, end_workers, exitpriority=0)  # at the end of this process
    return torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=workers,
                                       collate_fn=functools.partial(hand_over, collate),
                                       pin_memory=torch.cuda.is_available(),
                                       worker_init_fn=quiet_worker, generator=torch.Generator())


def hand_over(collate, items):
    """collate(items), in a worker moved to shared memory here: where that is full, PyTorch's thread
    that sends batches would print an error, drop the batch, and leave the main process waiting."""
    batch, in_worker = collate(items), torch.utils.data.get_worker_info()
    return tree_map_only(Tensor, Tensor.share_memory_, batch) if in_worker else batch


def quiet_worker(_: int) -> None:
    """Ctrl-C, and SIGTERM to all processes of a job, are for the main process: it finishes its step
    and saves, for which it needs its workers. They end when it does (`end_workers`), or within 5
    seconds of its being killed, which PyTorch lets them look for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_workers() -> None:
    """End this process's workers at once, whatever they are doing. multiprocessing's own exit would
    send them SIGTERM, which they ignore, and wait for ever; its finalizers, as this, come first."""
    if hasattr(signal, "SIGCHLD"):  # PyTorch would call it an error; not on Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        if worker.daemon:  # as the DataLoader's are
            worker.kill()


def read_batch(size: tuple[int, int], records: list[Record]) -> tuple[Tensor, Tensor]:
    """uint8 images (B, 3, H, W), resized bilinearly as in the reference code, and numbers (B,) made
    of their files' bytes. A broken file is an error: leaving it out would make another test."""
    images = [read_image(r.path, size, Image.Resampling.BILINEAR) for r in records]
    digests = [hashlib.blake2b(Path(r.path).read_bytes(), digest_size=7).digest() for r in records]
    return torch.stack(images), torch.tensor([int.from_bytes(d, "big") for d in digests])


def everyones(mine) -> list:
    """The same thing of each process, in their order."""
    if not dist.is_initialized():
        return [mine]
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return parts


@torch.compiler.set_stance("force_eager")  # each view and precision would be a graph
def bfloat16_is_right(nets: list[nn.Module], views) -> bool:
    """Do networks give the same features in both precisions, up to rounding, for views (..., 3, H,
    W)? Some processors' kernels are wrong where a stride of 2 leaves a map one pixel wide (AMX,
    PyTorch 2.14). Takes no random number and changes no running statistics."""
    def error(net: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            rough = net.eval()(x.flatten(0, -4)).detach().float()            # (n, D)
        exact = net(x.flatten(0, -4)).detach()
        return (rough - exact).norm() / exact.norm()

    return all(error(net, x) < 0.3 for net in nets for x in views if len(x))  # NaN is not


@torch.inference_mode()
@torch.compiler.set_stance("force_eager")  # the last batch has a shape of its own
def extract(model: nn.Module, records: list[Record], size: tuple[int, int], mean, std,
            batch_size: int = 128, workers: int = 2, device: str = "cpu", bf16: bool = False,
            rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
    """L2-normalised features (N, D) in float32 and image numbers (N,): equal bytes, equal number.

    Of several processes each takes every world-th batch, and all return all features. Raises
    InputError, naming the file, for an unreadable image or a feature that is not finite.
    """
    model.eval()
    batches = [b.tolist() for b in torch.arange(len(records)).split(batch_size)]
    loader = make_loader(records, batches[rank::world], workers,
                         functools.partial(read_batch, size))
    done = []
    for images, numbers in loader:
        x = normalize(images.to(device, non_blocking=True), mean, std)       # (B, 3, H, W)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            feature = model(x)                                               # (B, D)
        # a copy: what comes from a worker holds an open file as long as it lives
        done.append((F.normalize(feature.float(), dim=1).cpu(), numbers.clone()))
    parts = everyones(done) if world > 1 else [done]
    # the same batches as in one process, so the very same features
    done = [parts[i % world][i // world] for i in range(len(batches))]
    features, numbers = map(torch.cat, zip(*done))                           # (N, D), (N,)
    bad = (~features.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise InputError(f"{len(bad)} of {len(features)} features are not finite, first for "
                         f"{records[bad[0]].path}: the weights hold NaN or have diverged")
    return features, numbers


# ---------------------------------------------------------------------------------------------
# Ranking: CMC and mAP
# ---------------------------------------------------------------------------------------------

TIE = 1e-6  # similarities that differ by less count as equal: float32 rounds them by about as much


@dataclass
class RankResult:
    """cmc (max_rank,): cmc[k-1] = CMC@k. mAP in [0, 1] by the convention `ap`; mAPs holds both.

    mINP: how soon the last right answer comes, see the module's docstring. valid of total queries
    had a right answer in the gallery. AP (total,) by query, NaN if invalid.
    """

    cmc: np.ndarray
    mAP: float
    mINP: float
    valid: int
    total: int
    ap: str
    mAPs: dict[str, float]
    AP: np.ndarray

    def __str__(self) -> str:
        ranks = "  ".join(f"rank-{k} {self.cmc[k - 1]:.2%}"
                          for k in (1, 5, 10) if k <= len(self.cmc))
        other = "market" if self.ap == "step" else "step"
        return (f"mAP {self.mAP:.2%} ({self.ap}; {other} {self.mAPs[other]:.2%})  {ranks}  "
                f"mINP {self.mINP:.2%}  valid queries {self.valid}/{self.total}")

    def numbers(self) -> dict:
        """What results.json holds of a ranking."""
        return {"mAP": self.mAP, "mAP_market": self.mAPs["market"], "mINP": self.mINP,
                **{f"rank{k}": float(self.cmc[k - 1]) for k in (1, 5, 10) if k <= len(self.cmc)},
                "cmc": self.cmc.tolist(), "valid": self.valid, "queries": self.total}


def labels_of(side: str, n: int, pids, camids, images=None) -> np.ndarray:
    """(3, n): identity, camera and image number of each image on one side, "query" or "gallery".
    images=None: no two are the same file. Raises InputError if sizes do not agree."""
    if images is None:
        images = np.full(n, -1 if side == "query" else -2)  # no query's number is a gallery image's
    labels = [np.asarray(values) for values in (pids, camids, images)]
    for name, values in zip(("ids", "cameras", "image numbers"), labels):
        if n < 1 or values.shape != (n,) or values.dtype.kind not in "biu":
            raise InputError(f"the {side} has {n} images and {values.size} {name} of type "
                             f"{values.dtype}; as many integers are needed, one at least")
    return np.stack(labels).astype(np.int64)


def answers(query: np.ndarray, gallery: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places in the gallery, labels (3, G), of the images of a query's person, labels (3,): the
    right answers (W,), and those that are left out, by the same camera or of the same file."""
    pid, camid, image = query
    own = np.flatnonzero(gallery[0] == pid)
    junk = (gallery[1, own] == camid) | (gallery[2, own] == image)
    return own[~junk], own[junk]


def ranks_of(row: np.ndarray, right: np.ndarray, junk: np.ndarray, tie: float) -> np.ndarray:
    """0-based ranks (W,) of a query's right answers, nearest first. row (G,): its distances,
    overwritten.

    No ranking is made: the j-th right answer has rank j + the number of other people's images that
    are at most as far away. "At most": an image at the same distance counts as before it, else the
    order of the gallery would decide, and a network that maps everything to one point would win.
    """
    hits = np.sort(row[right]) + row.dtype.type(tie)                         # (W,)
    row[right] = row[junk] = np.inf               # own images stand before none of their own
    near = row[row <= hits[-1]]                   # few, if the network is good
    return np.arange(len(hits)) + [np.count_nonzero(near <= hit) for hit in hits]


def score(rows, query: np.ndarray, gallery: np.ndarray, max_rank: int, ap: str,
          tie: float) -> RankResult:
    """CMC and mAP from an iterator of distances (G,), one row for each query, in their order."""
    if ap not in ("step", "market") or max_rank < 1:
        raise InputError(f"ap is 'step' or 'market', max_rank at least 1; not {ap!r}, {max_rank}")
    total, cmc, INP = query.shape[1], np.zeros(max_rank), []
    APs = {name: np.full(total, np.nan) for name in ("step", "market")}
    for i, row in enumerate(rows):
        if not np.isfinite(row).all():
            raise InputError("distances hold NaN or infinity: a ranking of them means nothing")
        right, junk = answers(query[:, i], gallery)
        if not len(right):
            continue
        p = ranks_of(row, right, junk, tie)                                  # (W,)
        j = np.arange(len(p))
        new = (j + 1) / (p + 1)                                   # precision at each right answer
        old = np.where(p > 0, j / np.maximum(p, 1), 1.0)          # ... and just before it
        APs["step"][i] = new.mean()
        APs["market"][i] = (old + new).mean() / 2
        cmc[p[0]:] += 1
        INP.append(len(p) / (p[-1] + 1))
    valid = int(np.isfinite(APs["step"]).sum())
    if not valid:
        absent = int((~np.isin(query[0], gallery[0])).sum())
        raise InputError(
            f"no query has a right answer in the gallery: of {total} queries, {absent} have an id "
            f"that is not in the gallery, {total - absent} have it only by the query's own camera "
            f"(or as the same image). If cameras mean nothing, evaluate.py --cams none excludes "
            f"the image alone; if ids differ, do query and gallery come from the same set?")
    mAPs = {name: float(np.nanmean(values)) for name, values in APs.items()}
    return RankResult(cmc / valid, mAPs[ap], float(np.mean(INP)), valid, total, ap, mAPs, APs[ap])


def cmc_map(distmat, q_pids, g_pids, q_camids, g_camids, max_rank: int = 50, ap: str = "step",
            *, q_images=None, g_images=None) -> RankResult:
    """CMC and mAP of a distance matrix (Q, G), smaller = more alike; ids and cameras (Q,) and (G,);
    for your own code: the scripts go through `rank_features`, whose arguments have another order.

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
    matrix = np.asarray(distmat.detach().cpu() if isinstance(distmat, Tensor) else distmat)
    matrix = matrix if matrix.dtype == np.float32 else matrix.astype(np.float64)
    if matrix.ndim != 2:
        raise InputError(f"distances are a matrix (queries, gallery), not of shape {matrix.shape}")
    query = labels_of("query", len(matrix), q_pids, q_camids, q_images)
    gallery = labels_of("gallery", matrix.shape[1], g_pids, g_camids, g_images)
    return score((row.copy() for row in matrix), query, gallery, max_rank, ap, tie=0.0)


def rank_features(q_feats, q_pids, q_camids, g_feats, g_pids, g_camids, max_rank: int = 50,
                  ap: str = "step", rerank: bool = False, *, q_images=None, g_images=None,
                  chunk: int = 256) -> RankResult:
    """CMC and mAP of unit features (Q, D) and (G, D), without the (Q, G) matrix in memory.

    rerank: by k-reciprocal neighbours, k1 = 20, k2 = 6, lambda = 0.3 (see `rerank`). Cosine
    similarity ranks as the Euclidean distance of unit vectors does; similarities closer than TIE
    are ties. Raises InputError as `cmc_map` does, and for features that are not of length 1.
    """
    q, g = (torch.as_tensor(f).detach().float() for f in (q_feats, g_feats))
    for side, feats in (("query", q), ("gallery", g)):
        if feats.ndim != 2 or feats.shape[1] != q.shape[-1]:
            raise InputError(f"{side} features of shape {tuple(feats.shape)} beside query features "
                             f"of shape {tuple(q.shape)}")
        if not ((feats.norm(dim=1) - 1).abs() < 1e-3).all():  # nor where one is NaN
            raise InputError(f"{side} features are not of length 1 (or NaN); L2-normalise them")
    query = labels_of("query", len(q), q_pids, q_camids, q_images)
    gallery = labels_of("gallery", len(g), g_pids, g_camids, g_images)
    rows = (reranked_rows(q, g, 20, 6, 0.3) if rerank else                   # (G,) each
            (row for part in q.split(chunk) for row in ((-part) @ g.T).cpu().numpy()))
    return score(rows, query, gallery, max_rank, ap, tie=TIE)


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


def rows_of(columns: np.ndarray, weight: float) -> sparse.csr_matrix:
    """(N, N) sparse, of which row i holds `weight` in columns[i]; columns (N, k)."""
    N, k = columns.shape
    values = np.full(columns.size, weight, np.float32)
    return sparse.csr_matrix((values, columns.ravel(), np.arange(N + 1) * k), (N, N))


def reciprocal(indices: np.ndarray, k: int) -> sparse.csr_matrix:
    """(N, N) of 0 and 1: are i and j among each other's first k, of indices (N, >= k)?"""
    first = rows_of(indices[:, :k], 1)
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
        trusted = (rows @ half.T).multiply(rows).tocsr()
        trusted.data = (trusted.data * 3 > 2 * size[trusted.indices]).astype(np.float32)
        trusted.eliminate_zeros()
        known.append(rows + trusted @ half)
    V = sparse.vstack(known, format="csr")
    row = np.repeat(np.arange(len(indices)), np.diff(V.indptr))              # (entries of V,)
    for start in range(0, V.nnz, 1 << 14):        # the distances of these few pairs alone
        part = slice(start, start + (1 << 14))
        i, j = (torch.from_numpy(n[part]).long().to(x.device) for n in (row, V.indices))
        distance = (2 - 2 * (x[i] * x[j]).sum(1)).clamp(min=0).cpu().numpy()
        V.data[part] = np.exp(-distance / farthest[row[part]])
    V.data /= np.repeat(V.sum(1).A1, np.diff(V.indptr))
    # the mean over an image and its nearest: local query expansion
    return (rows_of(indices[:, :k2], 1 / k2) @ V).tocsr() if k2 > 1 else V


def reranked_rows(q: Tensor, g: Tensor, k1: int, k2: int, lam: float, chunk: int = 128):
    """Re-ranked distances (G,) of one query after the other; see `rerank`."""
    x = torch.cat([q, g])                                                    # (N, D)
    k1 = min(k1, len(x) - 1)
    indices, farthest = nearest(x, k1 + 1)
    V = encode_neighbours(x, indices, farthest, k1, min(k2, k1 + 1))
    inverted = V[len(q):].tocsc()                 # column t: the gallery images near image t
    for start in range(0, len(q), chunk):
        original = (2 - 2 * q[start:start + chunk] @ g.T).clamp(min=0).cpu().numpy()
        for i, D in enumerate(original, start):                              # (G,)
            own = slice(V.indptr[i], V.indptr[i + 1])
            known = inverted[:, V.indices[own]]   # those that have a neighbour t of i as well
            weight = np.repeat(V.data[own], np.diff(known.indptr))
            # m_j = sum_t min(V_it, V_jt), the weight that the neighbourhoods share
            m = np.bincount(known.indices, np.minimum(known.data, weight), len(g)).astype(D.dtype)
            yield (1 - lam) * (1 - m / (2 - m)) + lam * D / farthest[i]


def rerank(q: Tensor, g: Tensor, k1: int = 20, k2: int = 6, lam: float = 0.3) -> Tensor:
    """Distances (Q, G) of unit features (Q, D), (G, D) after k-reciprocal re-ranking; for your own
    code: the scripts go through `rank_features`.

    (1 - lam) Jaccard distance of the neighbourhoods + lam squared Euclidean distance over the
    row's largest. Exact, as in Zhong et al. 2017 and the code in use, but V is sparse. Queries are
    part of one another's neighbourhoods: results depend on the whole query set, which a deployed
    system would not have. Among equal distances neighbours are picked arbitrarily. k1 and k2 shrink
    to what few images allow.
    """
    q, g = (torch.as_tensor(f).float() for f in (q, g))
    return torch.from_numpy(np.stack(list(reranked_rows(q, g, k1, k2, lam))))


# ---------------------------------------------------------------------------------------------
# Evaluation of a dataset
# ---------------------------------------------------------------------------------------------


@dataclass
class Features:
    """What a ranking needs of one split: unit features (N, D); image numbers, pids, camids (N,)."""

    feats: Tensor
    images: Tensor
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
        # without cameras, an image is its own camera: "same camera" then excludes the image alone
        camids = torch.tensor([r.camid for r in records]) if use_cameras else numbers
        splits.append(Features(feats, numbers, torch.tensor([r.pid for r in records]), camids))
    return rank_splits(*splits, ap), *splits


def rank_splits(q: Features, g: Features, ap: str, rerank: bool = False) -> RankResult:
    """`rank_features` of two splits; a copy of the query's file in the gallery is no answer."""
    return rank_features(q.feats, q.pids, q.camids, g.feats, g.pids, g.camids, ap=ap,
                         rerank=rerank, q_images=q.images, g_images=g.images)


def similarity_ranges(q: Features, g: Features, most: int = 500) -> dict[str, list[float]]:
    """5 %, 50 % and 95 % quantiles of the cosine similarity of pairs by different cameras, of the
    same person and of others; from at most `most` queries."""
    some = torch.linspace(0, len(q.pids) - 1, min(len(q.pids), most)).long()
    similarity = q.feats[some] @ g.feats.T                                   # (most, G)
    same, apart = q.pids[some, None] == g.pids, q.camids[some, None] != g.camids
    return {name: np.quantile(similarity[pairs], [0.05, 0.5, 0.95]).round(3).tolist()
            for name, pairs in (("same", same & apart), ("other", ~same & apart)) if pairs.any()}


# ---------------------------------------------------------------------------------------------
# What the command line does: a dataset, or your own photos
# ---------------------------------------------------------------------------------------------


def evaluate_dataset(args: argparse.Namespace, model: nn.Module, recipe: dict, run: dict) -> None:
    """--dataset: numbers and pictures."""
    from extra import pictures
    if any(getattr(args, kind) for kind in PATCHES):
        pictures.vit_of(model)  # raises before minutes are spent
    dataset = load_dataset(args.dataset, args.data_root)
    result, q, g = evaluate(model, dataset, recipe, args.ap, args.cams == "file", **run)
    print(result)
    if args.rerank:
        print(f"re-ranked (k1=20, k2=6, lambda=0.3): {rank_splits(q, g, args.ap, True)}")
    if args.ranks:
        pictures.draw_ranks(args.ranks, dataset, result, q, g)
    for kind in PATCHES:
        if file := getattr(args, kind):
            getattr(pictures, f"draw_{kind}")(file, dataset, model.cpu(), recipe)


def photos(folder: str, skip_bad: bool) -> list[str]:
    """Paths of all images below a folder, in the order of their names. Unreadable ones are listed;
    unless skip_bad they raise InputError."""
    paths, bad = list_images(Path(folder)), {}
    for path in paths:
        try:
            read_image(path, (8, 8), Image.Resampling.NEAREST)
        except InputError as error:
            bad[path] = str(error)
    if len(bad) == len(paths) or bad and not skip_bad:
        raise InputError(f"{folder}: holds {len(paths) or 'no'} images, {len(bad)} of which cannot "
                         f"be read; --skip-bad leaves them out, if others can: "
                         f"{'; '.join([*bad.values()][:5])}")
    for error in bad.values():
        print(f"left out: {error}")
    return [path for path in paths if path not in bad]


def use_photos(args: argparse.Namespace, model: nn.Module, recipe: dict, run: dict) -> None:
    """--extract, --compare, --query."""
    def features(paths: list[str]) -> tuple[Tensor, Tensor]:
        return extract(model, [Record(path, -1, 0) for path in paths], tuple(recipe["size"]),
                       recipe["mean"], recipe["std"], **run)

    if args.compare:
        (a, b), _ = features(args.compare)
        print(f"cosine similarity {float(a @ b):.4f}; {explain_similarity(args.weights)}")
    elif args.extract:
        paths = photos(args.extract, args.skip_bad)
        feats = features(paths)[0].numpy()                                   # (N, D)
        write_atomic(Path(args.out), lambda f: np.savez(f, paths=np.array(paths), features=feats))
        print(f"{len(paths)} images, features {feats.shape} in {args.out}")
    else:
        search(args, features)


def search(args: argparse.Namespace, features) -> None:
    """--query: the ten most similar images of --gallery but for copies of the photo's own file."""
    wanted, own = features([args.query])                                     # (1, D), (1,)
    paths = np.array(photos(args.gallery, args.skip_bad))
    feats, numbers = features(paths)                                         # (G, D), (G,)
    other, similarity = (numbers != own).numpy(), (feats @ wanted[0]).numpy()    # (G,), (G,)
    for path in paths[~other]:
        print(f"left out: {path} is the query's very file")
    if not other.any():
        raise InputError(f"{args.gallery}: holds no image but the query")
    best = sorted(zip(paths[other], similarity[other]), key=lambda pair: -pair[1])[:10]
    for place, (path, similarity) in enumerate(best, 1):
        print(f"{place:3d}  {similarity:.4f}  {path}")
    print(explain_similarity(args.weights))
    if args.ranks:
        from extra import pictures
        pictures.draw_search(args.ranks, f"nearest of {other.sum():,} images in {args.gallery}",
                             args.query, best)


def explain_similarity(weights: str) -> str:
    """What similarities of this model mean, if its run was evaluated."""
    results = Path(weights).parent / "results.json"
    note = "a threshold needs calibration on pairs of your own cameras"
    try:
        same, other = (json.loads(results.read_text())["similarity"][k] for k in ("same", "other"))
        return (f"{note}; on its evaluation set 90 % of pairs of the same person lay in "
                f"{same[0]} .. {same[2]}, of different people in {other[0]} .. {other[2]}")
    except (OSError, ValueError, LookupError, TypeError):
        return f"{note}; no evaluation of this model is known (no {results})"


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def device_name(text: str) -> str:
    """cpu, cuda or cuda:1, if there is such a thing here."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    here = ["cpu", *["cuda"][:len(gpus)], *gpus]
    if text not in here:
        raise argparse.ArgumentTypeError(f"{text!r} is none of what is here: {', '.join(here)}")
    return text


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0],
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
    add("--data-root", default="data", help="folder that holds the datasets")
    add("--ap", choices=("step", "market"), default="step", help="rule of mAP")
    add("--cams", choices=("file", "none"), default="file", help="none: exclude the image alone")
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
    add("--device", type=device_name, help="cpu or cuda",
        default="cuda" if torch.cuda.is_available() else "cpu")
    add("--bf16", action=argparse.BooleanOptionalAction, help="default: on a GPU, if trained so")
    return parser


PATCHES = ("attention", "clusters", "correspondence")  # pictures of a ViT's patches
GOES_WITH = dict.fromkeys(("rerank", *PATCHES), "dataset") | {
    "ranks": "dataset or query", "skip_bad": "extract or query"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    if not 0 < args.batch_size <= 1 << 16 or args.workers < 0:
        parser.error("--batch-size is 1 to 65536, --workers at least 0")
    if "" in vars(args).values():
        parser.error("a name is empty")
    if not (args.weights or args.inspect or args.curves):
        parser.error("--weights FILE is needed")
    for flag, tasks in GOES_WITH.items():
        if getattr(args, flag) and not any(getattr(args, t) for t in tasks.split(" or ")):
            parser.error(f"--{flag.replace('_', '-')} goes with --{tasks.replace('or ', 'or --')}")
    for task, flag in (("extract", "out"), ("query", "gallery"), ("curves", "runs")):
        if bool(getattr(args, task)) != bool(getattr(args, flag)):
            parser.error(f"--{task} and --{flag} go together")
    files = [(flag, name) for flag in ("ranks", *PATCHES, "curves", "out")
             if (name := getattr(args, flag))]
    for flag, name in files:
        suffix = ".npz" if flag == "out" else ".png"
        if not name.endswith(suffix):
            parser.error(f"--{flag} {name}: the file is a {suffix[1:].upper()}, name it so")
        if os.path.exists(name) and not args.overwrite:
            parser.error(f"{name} exists; --overwrite replaces it")
        if os.path.isdir(name) or not os.access(Path(name).parent, os.W_OK):
            parser.error(f"--{flag} {name}: its folder is absent or read-only")
    if len({os.path.abspath(name) for _, name in files}) < len(files):
        parser.error("two pictures cannot go into one file")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    from extra import formats, pictures
    if args.inspect:
        return print(formats.describe(args.inspect, read_weights(args.inspect)))
    if args.curves:
        return pictures.draw_curves(args.curves, args.runs)
    model, recipe = load_model(args.weights)
    feature = {"none": "of the backbone, L2-normalised (WARNING: not fine-tuned for ReID)"}.get(
        recipe["neck_feat"], f"{recipe['neck_feat']} the neck, L2-normalised")
    print(f"{recipe['arch']} at {recipe['size'][0]}x{recipe['size'][1]}, feature {feature}, mean "
          f"{tuple(recipe['mean'])}, std {tuple(recipe['std'])}")
    run = {"batch_size": args.batch_size, "workers": args.workers, "device": args.device,
           "bf16": bool(recipe.get("bf16")) and args.device != "cpu" if args.bf16 is None else
           args.bf16}
    (evaluate_dataset if args.dataset else use_photos)(args, model.to(args.device), recipe, run)


if __name__ == "__main__":
    command_line(main)
