"""Speed on this machine, every comparison in one run: `make bench`, or `make bench FLAGS=--quick`.

1. forward + backward of our networks beside torchvision's of the same size, taking turns, so that a
   change of the machine's mood hits both; ratio = median of the paired times (below 1: ours is
   faster)
2. a step of PersonViT beside the plain formulation that the reference code has; of UP-ReID beside
   MoCo v2's
3. each training from files to weights, on a GPU eager, compiled, and compiled with CUDA graphs:
   images per second of the data alone, of the computation alone, of both; where a step's time
   goes; launches, memory, loss, and the arithmetic's own limit
4. CMC, mAP and re-ranking at MSMT17's size, the first beside a dense textbook version
5. LUPerson's size: 4.2 M paths listed, shuffled and read by 16 workers, and their memory
"""

import argparse
import collections
import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.utils.flop_counter
import torchvision
from torch.utils._python_dispatch import TorchDispatchMode

import train
from data import Images, MultiCrop, ShuffleSampler, command_line, from_step, load_dataset
from evaluate import device_name, make_loader, rank_features
from personvit import Attention, PersonViT, PersonViTRecipe, vit_small
from upreid import UPReID, UPReIDRecipe, resnet50

# ---------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------


def seconds(function, device: str) -> float:
    start = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def paired(ours, theirs, repeats: int, device: str) -> tuple[float, float, float]:
    """Median seconds of both and the median ratio of pairs, taking turns at going first."""
    pairs = []
    for i in range(repeats + 1):
        order = (ours, theirs) if i % 2 else (theirs, ours)
        took = {f: seconds(f, device) for f in order}
        pairs.append((took[ours], took[theirs]))
    pairs = np.array(pairs[1:])                   # (repeats, 2); the first one was for warming up
    return *np.median(pairs, axis=0), np.median(pairs[:, 0] / pairs[:, 1])


def in_new_process(function, *args):
    """function(*args) without what it prints, where no other measurement has touched the memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=mute) as pool:
        return pool.submit(function, *args).result()


def mute() -> None:
    sys.stdout = open(os.devnull, "w")


def peak_rss() -> float:
    """MB of this process at its largest; Linux only (getrusage would count the parent's peak)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2 ** 10


def half(device: str):
    """The networks' precision in a training: bfloat16 on a GPU."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=device != "cpu")


# ---------------------------------------------------------------------------------------------
# Networks, and single steps of pre-training
# ---------------------------------------------------------------------------------------------


def networks(repeats: int, device: str) -> None:
    """Ours beside torchvision's, whose ViT takes square images only; both get 121 patches."""
    B = 64 if device != "cpu" else 8
    their_vit = torchvision.models.VisionTransformer(176, 16, 12, 6, 384, 1536)
    their_resnet = torchvision.models.resnet50(weights=None)
    their_vit.heads = their_resnet.fc = torch.nn.Identity()
    for name, ours, theirs, size in (
            ("ResNet-50", resnet50(last_stride=2), their_resnet, (256, 128)),
            ("ViT-S/16", vit_small((176, 176)), their_vit, (176, 176))):
        x = torch.randn(B, 3, *size, device=device)
        ours, theirs = ours.to(device).train(), theirs.to(device).train()

        def step(net):
            net.zero_grad(set_to_none=True)
            with half(device):
                out = net(x)
            out.float().square().mean().backward()

        a, b, ratio = paired(lambda: step(ours), lambda: step(theirs), repeats, device)
        print(f"  {name} {size[0]}x{size[1]} forward + backward: ours {B / a:7.1f} img/s, "
              f"torchvision {B / b:7.1f} img/s, time ratio {ratio:.3f}", flush=True)


class PlainAttention(Attention):
    """Attention that writes its (N, N) matrix, as timm had it."""

    def forward(self, x):
        B, N, D = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, N, D))


class PlainPersonViT(PersonViT):
    """The objective the reference's way: all tokens of all views through head and prototypes, and
    loops over views."""

    def forward(self, views, teacher_temp, **_):
        masks = views["masks"].to(views["globals"].device)
        with torch.no_grad():
            t_cls, t_patch = self.scores(self.teacher, views["globals"])
        s_cls, s_patch = self.scores(self.student, views["globals"], masks.flatten(0, 1),
                                     self.mask_token)
        s_cls = s_cls + self.scores(self.student, views["locals"])[0]
        cls, patch, self.forwards = 0.0, 0.0, 1
        G, V = len(t_cls), len(s_cls)
        for i in range(G):
            p_cls = ((t_cls[i] - self.center) / teacher_temp).softmax(-1)
            p_patch = ((t_patch[i] - self.patch_center) / teacher_temp).softmax(-1)
            hidden = masks[i].flatten(1).float()
            ce = -(p_patch * (s_patch[i] / 0.1).log_softmax(-1)).sum(-1)
            patch += ((ce * hidden).sum(1) / hidden.sum(1).clamp(min=1)).mean() / G
            for j in set(range(V)) - {i}:
                ce = -(p_cls * (s_cls[j] / 0.1).log_softmax(-1)).sum(-1)
                cls += ce.mean() / (G * (V - 1))
        return {"total": cls + patch}

    def scores(self, net, views, *masks):
        """Lists of (B, K) and (B, N, K), one per view."""
        z = net["head"](net["backbone"].forward_features(views.flatten(0, 1), *masks))
        cls, patch = net["head"].last_layer(z[:, 0]), net["head"].last_layer2(z[:, 1:])
        return cls.split(views.shape[1]), patch.split(views.shape[1])


def training_step(method: str, recipe, device: str, plain: bool = False):
    """A step of `train.pretrain` on images of noise, from pixels to the teacher."""
    torch.manual_seed(0)
    model, make_views = recipe.build().to(device).train(), train.METHODS[method][1](recipe)
    optimizer, generator = recipe.optimizer(model), torch.Generator().manual_seed(0)
    if plain:
        model.__class__ = PlainPersonViT
        for block in (m for m in model.modules() if isinstance(m, Attention)):
            block.__class__ = PlainAttention
    for group in optimizer.param_groups:
        group |= {"lr": 1e-5, "fused": not plain}
    images = torch.randint(256, (recipe.batch, 3, *recipe.size), dtype=torch.uint8).to(device)
    numbers = make_views.draw(torch.rand(recipe.batch, make_views.uniforms)).to(device)
    others = [recipe.draw(generator) for _ in range(recipe.batch)]
    others = {k: torch.stack([other[k] for other in others], dim=1) for k in others[0]}
    _, now = recipe.schedule(0, 100)

    def step():
        views = make_views(images, numbers) | others
        with half(device):
            losses = model(views, **now)
        losses["total"].backward()
        model.finish_gradients(recipe.epochs)
        optimizer.step()
        optimizer.zero_grad()
        model.update_teacher(**now)

    return step


def peak_memory(*args) -> float:
    """MB that two of these steps need beyond the model and its batch."""
    step, device = training_step(*args), args[2]
    before = peak_rss() if device == "cpu" else torch.cuda.memory_allocated() / 2 ** 20
    step(), step()
    return (peak_rss() if device == "cpu" else torch.cuda.max_memory_allocated() / 2 ** 20) - before


def personvit_step(repeats: int, device: str, quick: bool) -> None:
    """Ours beside the plain formulation: the same losses, ViT-S, the paper's recipe."""
    B = 4 if quick else 8 if device == "cpu" else 128
    args = [("personvit", PersonViTRecipe(batch=B), device, plain) for plain in (False, True)]
    ours, theirs = (training_step(*each) for each in args)
    a, b, ratio = paired(ours, theirs, max(repeats // 3, 1), device)
    mine, plain = (in_new_process(peak_memory, *each) for each in args)
    print(f"  PersonViT step, ViT-S/16 256x128, 2 + 8 crops, batch {B}: ours {B / a:.2f} img/s, "
          f"plain formulation {B / b:.2f} img/s, time ratio {ratio:.3f}; memory {mine:,.0f} MB, "
          f"plain {plain:,.0f} MB, ratio {mine / plain:.3f}", flush=True)


def upreid_step(repeats: int, device: str, quick: bool) -> None:
    """UP-ReID beside MoCo v2, which is the same code with the instance contrast alone."""
    B, groups = (4, 2) if quick else (8, 2) if device == "cpu" else (128, 4)
    recipe = UPReIDRecipe(batch=B, groups=groups)
    moco = dataclasses.replace(recipe, weight_global=0.0, weight_local=0.0)
    a, b, ratio = paired(*(training_step("upreid", r, device) for r in (recipe, moco)), repeats,
                         device)
    print(f"  UP-ReID step, ResNet-50 256x128, batch {B}, queue 65,536: {B / a:.2f} img/s, MoCo v2 "
          f"{B / b:.2f} img/s, time ratio {ratio:.3f}", flush=True)


# ---------------------------------------------------------------------------------------------
# Whole trainings
# ---------------------------------------------------------------------------------------------

TRAININGS = {"fine-tuning, ResNet": ("resnet_tiny", "resnet50"),  # networks on a CPU, on a GPU
             "fine-tuning, ViT": ("vit_mini", "vit_small"), "personvit": ("vit_mini", "vit_small"),
             "upreid": ("resnet_tiny", "resnet50")}
HOW = ("eager", "compiled", "compiled, CUDA graphs")


class Enough(Exception):
    """Raised in a training that has gone on for long enough."""


class Launches(TorchDispatchMode):
    """Counts operations; on a GPU each is at least one launch."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += torch.Tag.inplace_view not in func.tags and not func.is_view
        return func(*args, **(kwargs or {}))


class Stages:
    """One training, stage after stage, each from one line of its log to the next: "warm" (compiling
    too), "both" (from files to weights), "compute" (one batch again and again), "phases" (where the
    time goes, the device being waited for after each), "launches"."""

    names = ("warm", "both", "compute", "phases", "launches")

    def __init__(self, device: str):
        self.device, self.lines, self.seconds, self.loader = device, {}, collections.Counter(), None
        self.counter = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]
                                              ) if device != "cpu" else Launches()

    def stage(self) -> str:
        return self.names[len(self.lines)]

    def log(self, **values) -> None:
        self.lines[self.stage()] = values
        if len(self.lines) == len(self.names):
            self.counter.__exit__(None, None, None)
            raise Enough
        if self.stage() == "launches":
            self.counter.__enter__()

    def batches(self, *args):
        """In place of `make_loader`."""
        self.loader = args
        for batch in make_loader(*args):
            again = True
            while again:
                yield batch
                again = self.stage() in self.names[2:]

    def timed(self, phase: str, function):
        def wrapped(*args, **kwargs):
            if self.stage() != "phases":
                return function(*args, **kwargs)
            out = []
            self.seconds[phase] += seconds(lambda: out.append(function(*args, **kwargs)),
                                           self.device)
            return out[0]
        return wrapped

    def per_step(self, stage: str, total: float) -> float:
        before = self.lines[self.names[self.names.index(stage) - 1]]["step"]
        return total / (self.lines[stage]["step"] - before)

    def launches(self) -> float:
        n = self.counter.count if self.device == "cpu" else sum(  # by the names of CUDA's functions
            bool(re.match("_*cu(da)?(Graph)?(Launch|Mem(cpy|set))", event.name))
            for event in self.counter.events())
        return self.per_step("launches", n)


def staged(name: str, recipe, dataset, device: str, steps: int, backend: str) -> Stages:
    """A training of 5 times `steps` steps."""
    stages, compiled = Stages(device), train.compiled
    module = {"personvit": PersonViT, "upreid": UPReID}.get(name, train.FineTuning)
    optimisers = [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD]
    places = [(train, "on_device", "copy"), (module, "forward", "forward"),
              (torch.Tensor, "backward", "backward"), (module, "finish_gradients", "clipping"),
              *((kind, "step", "optimiser") for kind in optimisers),
              (module, "update_teacher", "teacher")]
    with contextlib.ExitStack() as stack:
        for owner, attribute, phase in places:
            if hasattr(owner, attribute):
                stack.enter_context(mock.patch.object(owner, attribute, stages.timed(
                    phase, getattr(owner, attribute))))
        stack.enter_context(mock.patch.object(train, "compiled", lambda *args: stages.timed(
            "views", compiled(*args))))
        stack.enter_context(mock.patch.object(train, "make_loader", stages.batches))
        run = train.Run(stack.enter_context(tempfile.TemporaryDirectory()), {})
        run.log = stages.log
        stack.enter_context(contextlib.suppress(Enough))
        machine = train.Machine(device, 8 if device != "cpu" else 1, save_every=10 ** 9,
                                log_every=steps, backend=backend)
        if name in train.METHODS:
            train.pretrain(name, recipe, dataset, run, machine)
        else:
            train.fine_tune(recipe, dataset, run, None, machine)
    return stages


def whole_loop(name: str, device: str, folder: str, steps: int, how: str) -> str:
    """One training from files to weights, in a process of its own: what limits it?"""
    multiprocessing.set_start_method("fork", force=True)  # of the workers, as in a training
    gpu = device != "cpu"  # recipes for one GPU, or for a laptop; images are the synthetic people's
    kind = train.METHODS[name][0] if name in train.METHODS else train.Recipe
    recipe = kind.preset("market1501" if gpu else "synthetic", TRAININGS[name][gpu])
    recipe, dataset = dataclasses.replace(recipe, bf16=gpu), load_dataset("synthetic", folder)
    # a line of the log ends each stage, and one is written at the end of each epoch
    dataset = dataclasses.replace(dataset, train=dataset.train * (20 if gpu else 1))
    done = staged(name, recipe, dataset, device, steps, "" if how == "eager" else "inductor")
    memory = torch.cuda.max_memory_allocated() / 2 ** 20 if gpu else peak_rss()
    alone, n = iter(make_loader(*done.loader)), 4 * done.loader[-1]
    B = [len(next(alone)[0]) for _ in range(n)][0]  # workers have started, and are not ahead
    took = seconds(lambda: [next(alone) for _ in range(n)], "cpu")
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        staged(name, recipe, dataset, device, 1, "")
    work, rate = counter.get_total_flops() / B / len(Stages.names), matrix_rate(device)
    both, compute = done.lines["both"], done.lines["compute"]
    phases = ", ".join(f"{name} {1e3 * done.per_step('phases', total):.1f}"
                       for name, total in done.seconds.items())
    return (f"  {name} ({recipe.arch} {recipe.size[0]}x{recipe.size[1]}, batch {B}, "
            f"{how}), img/s: data alone {n * B / took:,.0f} "
            f"({done.loader[-1]} workers), compute alone {compute['img_s']:,.0f}, both "
            f"{both['img_s']:,.0f}, waiting {both['wait']:.1%}\n    ms of a step: {phases}; "
            f"{done.launches():,.0f} launches; peak memory {memory:,.0f} MB; loss "
            f"{both['total']:.4f}\n"
            f"    {work / 1e9:.2f} GFLOP per image at {rate / 1e9:,.0f} GFLOP/s of a matrix "
            f"product: at most {rate / work:,.0f} img/s, of which compute reaches "
            f"{compute['img_s'] * work / rate:.0%}")


def matrix_rate(device: str) -> float:
    """Multiplications and additions per second of a large matrix product, in the loops' own
    precision."""
    n, dtype = (2048, torch.float32) if device == "cpu" else (8192, torch.bfloat16)
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / np.median([seconds(lambda: a @ a, device) for _ in range(9)])


def loops(device: str, quick: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        load_dataset("synthetic", folder)
        for name, how in itertools.product(TRAININGS, HOW if device != "cpu" else HOW[:1]):
            os.environ["TORCHINDUCTOR_CUDAGRAPHS"] = str(int(how == HOW[-1]))  # PyTorch reads it
            try:
                print(in_new_process(whole_loop, name, device, folder, 2 if quick else 7, how),
                      flush=True)
            except RuntimeError if how == HOW[-1] else () as error:  # what graphs cannot hold
                print(f"  {name} ({how}): {error}", flush=True)


# ---------------------------------------------------------------------------------------------
# Ranking
# ---------------------------------------------------------------------------------------------


def clustered(Q: int, G: int, ids: int, D: int = 384):
    """Random features that cluster by person, as a trained network's do, with ids and cameras."""
    torch.manual_seed(0)
    pids, cams = torch.randint(ids, (Q + G,)), torch.randint(15, (Q + G,))
    centres = torch.nn.functional.normalize(torch.randn(ids, D), dim=1)
    feats = torch.nn.functional.normalize(centres[pids] + 0.08 * torch.randn(Q + G, D), dim=1)
    return feats[:Q], pids[:Q], cams[:Q], feats[Q:], pids[Q:], cams[Q:]


def dense_rank(q, q_pids, q_cams, g, g_pids, g_cams) -> float:
    """mAP with the whole matrix of distances, sorted, as textbooks have it."""
    order = np.argsort((2 - 2 * q @ g.T).cpu().numpy(), axis=1)
    APs = []
    for i in range(len(q)):
        same = g_pids[order[i]] == q_pids[i]
        hits = same[~(same & (g_cams[order[i]] == q_cams[i]))].numpy()
        if hits.any():
            APs.append((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].mean())
    return float(np.mean(APs))


def measured(kind: str, Q: int, G: int, ids: int, device: str) -> tuple[float, float, str]:
    """Seconds, MB above the features (of the CPU), and the result."""
    args = [x.to(device) if x.is_floating_point() else x for x in clustered(Q, G, ids)]
    actions = {"rank": lambda: rank_features(*args), "dense rank": lambda: dense_rank(*args),
               "rerank": lambda: rank_features(*args, rerank=True)}
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making them (Linux)
    before, start = peak_rss(), time.perf_counter()
    result = actions[kind]()
    return time.perf_counter() - start, peak_rss() - before, str(result)


def ranking(device: str, quick: bool) -> None:
    """MSMT17's size; re-ranking and the dense textbook version have a quarter of the pairs."""
    Q, G, ids = (1_000, 8_000, 300) if quick else (11_659, 82_161, 3_060)
    for kind, part in (("rank", 1), ("dense rank", 2), ("rerank", 2)):
        size = Q // part, G // part, ids // part
        took, memory, result = in_new_process(measured, kind, *size, device)
        print(f"  {kind} of {size[0]:,} x {size[1]:,}, 384-d: {took:.1f} s, {memory:,.0f} MB above "
              f"the features; {result[:60]}", flush=True)


# ---------------------------------------------------------------------------------------------
# LUPerson's size
# ---------------------------------------------------------------------------------------------


def memory_of_all() -> tuple[float, int]:
    """MB of this process and its children, a page that several share counted once; and their open
    files."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    pids = [Path("/proc", pid) for pid in ("self", *children)]
    pss = [int(re.search(r"Pss:\s+(\d+) kB", (p / "smaps_rollup").read_text())[1]) for p in pids]
    return sum(pss) / 2 ** 10, sum(len(os.listdir(p / "fd")) for p in pids)


def scale(folder: Path, quick: bool) -> None:
    """LUPerson's number of paths: the synthetic people, seen through 3,850 links to their folder.
    Linux only."""
    links, steps = (40, 100) if quick else (3_850, 1_000)
    people = [Path(record.path) for record in load_dataset("synthetic", folder).train]
    (folder / "luperson").mkdir()
    for i in range(links):
        (folder / "luperson" / f"{i:05d}").symlink_to(people[0].parent)
    lines = (f"{i:05d}/{path.name}\n" for i in range(links) for path in people)
    (folder / "luperson.index.txt").write_text("".join(lines))
    start, (before, _) = time.perf_counter(), memory_of_all()
    dataset = load_dataset("luperson", folder)
    listed = time.perf_counter() - start
    sampler = ShuffleSampler(len(dataset.train), 32)
    images = Images(dataset.train, MultiCrop((128, 64)))
    loader = iter(make_loader(images, from_step(sampler, 0, len(sampler)), 16))
    next(loader)
    print(f"  {len(dataset.train):,} paths from the index in {listed:.1f} s, first batch of 16 "
          f"workers after {time.perf_counter() - start:.1f} s", flush=True)
    start = time.perf_counter()
    for step in range(1, steps):
        if step in (steps // 10, steps - 1):
            memory, opened = memory_of_all()
            rate = 32 * step / (time.perf_counter() - start)
            print(f"    after {step:,} batches of 32: {memory:,.0f} MB in all ({before:,.0f} "
                  f"before the set was opened), {opened} open files, {rate:,.0f} img/s", flush=True)
        next(loader)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m extra.bench",
                                     description="Speed on this machine.")
    parser.add_argument("--device", type=device_name, help="cpu or cuda; default: what is here",
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="few repeats: does it run at all?")
    args = parser.parse_args()
    repeats = 3 if args.quick else 15
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads")
    networks(repeats, args.device)
    personvit_step(repeats, args.device, args.quick)
    upreid_step(repeats, args.device, args.quick)
    loops(args.device, args.quick)
    ranking(args.device, args.quick)
    with tempfile.TemporaryDirectory() as folder:
        scale(Path(folder), args.quick)


if __name__ == "__main__":
    command_line(main)
