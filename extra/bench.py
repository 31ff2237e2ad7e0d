"""Right before fast: `make check-gpu`, then `make bench`.

check-gpu   one step of each training, small, from the same state and batch: views, losses,
            gradients, weights after the step, features of evaluation, the next step from a
            checkpoint; on the GPU in float32 and bfloat16, eager and compiled, beside the CPU in
            float32
bench       each training from files to weights, eager, compiled, and with CUDA graphs: images per
            second of the whole, of the data alone, of the computation alone; the share of the
            limit that the arithmetic sets; launches of a step; seconds until the first step;
            memory. Then CMC, mAP and re-ranking at MSMT17's size

Each row is printed when it is ready; --only NAME ... runs some of them.
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import multiprocessing
import os
import random
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
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import train
from data import FineTuneTransform, load_dataset, make_loader, normalize
from evaluate import rank_features
from extra import runs
from extra.files import command_line
from extra.flags import device_name, usual_device
from personvit import PersonViT
from upreid import UPReID

# name: training, networks on a CPU and on a GPU, what differs from their usual recipe
TRAININGS = {"personvit": ("personvit", ("vit_mini", "vit_small"), {}),
             "upreid": ("upreid", ("resnet_tiny", "resnet50"), {}),
             "finetune-vit": ("", ("vit_mini", "vit_small"), {}),
             "finetune-resnet": ("", ("resnet_tiny", "resnet50"), {}),
             "personvit-8-crops": ("personvit", ("vit_mini", "vit_small"), {"local_crops": 8})}
HOW = {"compiled": "inductor", "eager": "", "CUDA graphs": "inductor"}  # backends of torch.compile


def recipe_of(name: str, dataset: str, on_gpu: bool, **more):
    """(method or "", recipe) of one of TRAININGS."""
    method, archs, change = TRAININGS[name]
    kind = train.METHODS.get(method, train.Recipe)
    recipe = kind.preset(dataset, archs[on_gpu])
    return method, dataclasses.replace(recipe, **change, **more)


# ---------------------------------------------------------------------------------------------
# Is a GPU right?
# ---------------------------------------------------------------------------------------------

# Largest relative differences from float32 on a CPU, (ViT, ResNet) each. In float32: 2 to 30 times
# what noise of 1e-5 on the pixels does on a CPU; batch norm magnifies it, and AdamW takes steps as
# large for tiny gradients. In bfloat16: 2 to 4 times a CPU's own difference.
LIMITS = {"float32": {"views": (2e-5, 2e-5), "losses": (1e-5, 1e-4), "gradients": (1e-3, 5e-2),
                      "update": (5e-2, 0.2), "features": (1e-3, 1e-2), "next losses": (1e-3, 1e-2)},
          "bfloat16": {"views": (2e-5, 2e-5), "losses": (1e-2, 1e-2), "gradients": (5e-2, 0.8),
                       "features": (4e-2, 0.15), "next losses": (2e-2, 0.15)}}
SMALL = {"size": (64, 32), "drop_path": 0.0}  # stochastic depth differs between kinds of devices


class SmallStep:
    """One training that takes single steps on a fixed batch of noise."""

    def __init__(self, name: str, device: str, bf16: bool, backend: str):
        size = {key: SMALL[key] for key in SMALL if not (name == "upreid" and key == "drop_path")}
        self.method, self.recipe = recipe_of(name, "synthetic", False, **size)
        if self.method:
            self.recipe = dataclasses.replace(self.recipe, batch=16)
        self.device, self.bf16 = torch.device(device), bf16
        runtime = runs.Runtime(device, backend=backend)
        if self.method:
            self.objective = train.build_objective(self.recipe, runtime)
            self.transform = train.views_of(self.recipe)
            self.optimizer = self.recipe.optimizer(self.objective)
        else:
            with contextlib.redirect_stdout(io.StringIO()):  # a warning of random weights
                model = train.build_model(self.recipe, 4, runtime, None)
            self.objective = train.FineTuning(model, self.recipe).train()
            mean, std = train.NORMS[self.recipe.norm]
            self.transform = FineTuneTransform(self.recipe.size, mean, std, noise=False)
            self.optimizer = train.make_optimizer(self.recipe, model)
        runs.compile_networks(self.objective, runtime)
        self.make_views = runs.compiled(self.transform.__call__, runtime)
        self.batch = self.noise_batch()

    def noise_batch(self) -> dict:
        rng = random.Random(0)
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (16, 3, *self.recipe.size), generator=generator)
        params = torch.tensor([self.transform.draw(rng) for _ in range(16)])
        batch = {"images": images.to(torch.uint8), "params": params, "pids": torch.arange(16) // 4}
        if self.method == "personvit":
            masks = [self.recipe.draw(generator)["masks"] for _ in range(16)]
            batch["masks"] = torch.stack(masks, dim=1)
        return batch

    def step(self) -> dict[str, Tensor]:
        """What is compared of a step; it is taken."""
        images = self.batch["images"].to(self.device)
        views = self.make_views(images, self.batch["params"].to(self.device))
        inputs, settings = (views, self.batch["pids"].to(self.device)), {}
        seen = [views]
        if self.method:
            seen = [view.flatten() for view in views.values()]
            rates, settings = self.recipe.schedule(50, 100)
            for group in self.optimizer.param_groups:
                group["lr"] = rates["lr"]
            if "masks" in self.batch:
                views["masks"] = self.batch["masks"]
            inputs = (views,)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            losses = self.objective(*inputs, **settings)
        losses["total"].backward()
        trained = [p for p in self.objective.parameters() if p.grad is not None]
        gradients, before = flat([p.grad for p in trained]), flat(trained)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.method:
            self.objective.update_teacher(**settings)
        kept = [name for name in ("cls", "patch", "instance", "global", "local", "id", "triplet")
                if name in losses]
        return {"views": flat(seen), "losses": flat([losses[name] for name in kept]),
                "gradients": gradients, "update": flat(trained) - before,
                "features": self.features(images)}

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")
    def features(self, images: Tensor) -> Tensor:
        net = runs.networks(self.objective)[0].eval()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            found = net(normalize(images, self.transform.mean, self.transform.std))
        net.train()
        return flat([found])

    def checkpoint(self) -> bytes:
        content = io.BytesIO()
        torch.save([self.objective.state_dict(), self.optimizer.state_dict()], content)
        return content.getvalue()

    def restore(self, content: bytes) -> None:
        model, optimizer = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        self.objective.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)


def flat(tensors) -> Tensor:
    """Many tensors as one vector of doubles on the CPU."""
    return torch.cat([x.detach().double().flatten().cpu() for x in tensors])


def check(name: str, device: str, compiles: bool) -> bool:
    """One training on the device beside the CPU in float32: is all within its limit?"""
    def say(how: str, what: str, got: Tensor, wanted: Tensor) -> bool:
        limits = LIMITS[how.split()[0]]
        if what not in limits:
            return True
        error = float((got - wanted).norm() / wanted.norm())
        limit = limits[what]["vit" not in name]
        good = error <= limit  # NaN is not
        verdict = "" if good else "   WRONG"
        print(f"  {name:16} {how:22} {what:12} {error:9.1e}   at most {limit:7.1e}{verdict}",
              flush=True)
        return good

    reference = SmallStep(name, "cpu", False, "")
    wanted, saved = reference.step(), reference.checkpoint()
    following = reference.step()["losses"]
    good = True
    for precision in ("float32", "bfloat16"):
        for backend in ("", "inductor")[:1 + compiles]:
            how = f"{precision} {'compiled' if backend else 'eager'}"
            other = SmallStep(name, device, precision == "bfloat16", backend)
            found = other.step()
            for what, value in found.items():
                good &= say(how, what, value, wanted[what])
            content = other.checkpoint()
            other.restore(saved)  # the CPU's, gone on from here; and the other way round
            good &= say(how, "next losses", other.step()["losses"], following)
            reference.restore(content)
            good &= say(f"{how}, then CPU", "next losses", reference.step()["losses"], following)
    return good


# ---------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------


def seconds(function, device: str) -> float:
    start = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


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


# ---------------------------------------------------------------------------------------------
# Whole trainings
# ---------------------------------------------------------------------------------------------


class Enough(Exception):
    """Raised in a training that has gone on for long enough."""


class Launches(TorchDispatchMode):
    """Counts operations; on a GPU each is at least one launch."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += torch.Tag.inplace_view not in func.tags and not func.is_view
        return func(*args, **(kwargs or {}))


class Stages:
    """One training in stages, each from one line of its log to the next: "warm" (compiling too),
    "both" (from files to weights), "compute" (one batch again and again), "phases" (seconds of each
    part of a step, waiting for the device after each), "launches"."""

    names = ("warm", "both", "compute", "phases", "launches")

    def __init__(self, device: str):
        self.device = device
        self.lines: dict[str, dict] = {}
        self.seconds = collections.Counter()
        self.loader = None
        self.begin = time.perf_counter()
        self.first_step = 0.0  # seconds until it was done
        self.counter = Launches()
        if device != "cpu":
            kinds = [torch.profiler.ProfilerActivity.CUDA]
            self.counter = torch.profiler.profile(activities=kinds)

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
            if self.stage() == "phases":
                out = []
                took = seconds(lambda: out.append(function(*args, **kwargs)), self.device)
                self.seconds[phase] += took
                return out[0]
            out = function(*args, **kwargs)
            if phase == "optimiser" and not self.first_step:
                seconds(lambda: None, self.device)  # the device has done it, too
                self.first_step = time.perf_counter() - self.begin
            return out
        return wrapped

    def per_step(self, stage: str, total: float) -> float:
        before = self.lines[self.names[self.names.index(stage) - 1]]["step"]
        return total / (self.lines[stage]["step"] - before)

    def launches(self) -> float:
        if self.device == "cpu":
            return self.per_step("launches", self.counter.count)
        # by the names of CUDA's functions
        launch = re.compile("_*cu(da)?(Graph)?(Launch|Mem(cpy|set))")
        events = [event for event in self.counter.events() if launch.match(event.name)]
        return self.per_step("launches", len(events))


def staged(method: str, recipe, dataset, device: str, steps: int, backend: str) -> Stages:
    """A training of 5 times `steps` steps; method: "" for fine-tuning."""
    stages = Stages(device)
    compiled = runs.compiled

    def timed_views(function, runtime):
        made = compiled(function, runtime)
        return stages.timed("views", made) if hasattr(function, "draw") else made

    module = {"personvit": PersonViT, "upreid": UPReID}.get(method, train.FineTuning)
    places = [(module, "forward", "forward"), (torch.Tensor, "backward", "backward"),
              (module, "clip_gradients", "clipping"), (module, "update_teacher", "teacher")]
    for kind in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD):
        places.append((kind, "step", "optimiser"))
    with contextlib.ExitStack() as stack:
        for owner, attribute, phase in places:
            if hasattr(owner, attribute):
                timed = stages.timed(phase, getattr(owner, attribute))
                stack.enter_context(mock.patch.object(owner, attribute, timed))
        stack.enter_context(mock.patch.object(runs, "compiled", timed_views))
        stack.enter_context(mock.patch.object(train, "make_loader", stages.batches))
        run = runs.Run(stack.enter_context(tempfile.TemporaryDirectory()), {})
        run.log = stages.log
        stack.enter_context(contextlib.suppress(Enough))
        workers = 1 if device == "cpu" else min(runs.cores(), 16)
        runtime = runs.Runtime(device, workers, save_every=10 ** 9, log_every=steps,
                               backend=backend)
        if method:
            train.pretrain(recipe, dataset, run, runtime)
        else:
            train.fine_tune(recipe, dataset, run, runtime)
    return stages


COLUMNS = (f"  {'training':18}{'how':12}{'whole':>8}{'data':>9}{'compute':>9}{'of limit':>9}"
           f"{'launches':>9}{'1st step':>9}{'MB':>8}{'loss':>9}   milliseconds of a step")


def whole_loop(name: str, device: str, folder: str, steps: int, how: str) -> str:
    """One training from files to weights, in a process of its own: what limits it?"""
    multiprocessing.set_start_method("fork", force=True)  # of the workers, as in a training
    gpu = device != "cpu"  # recipes for one GPU, or for a laptop; images are the synthetic people's
    method, recipe = recipe_of(name, "market1501" if gpu else "synthetic", gpu, bf16=gpu)
    dataset = load_dataset("synthetic", folder)
    # a line of the log ends each stage, and one is written at the end of each epoch
    dataset = dataclasses.replace(dataset, train=dataset.train * (20 if gpu else 1))
    done = staged(method, recipe, dataset, device, steps, HOW[how])
    memory = torch.cuda.max_memory_allocated() / 2 ** 20 if gpu else peak_rss()
    alone, n = iter(make_loader(*done.loader)), 4 * done.loader[-1]
    sizes = [len(next(alone)["images"]) for _ in range(n)]  # workers have started, not ahead
    took = seconds(lambda: [next(alone) for _ in range(n)], "cpu")
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        staged(method, recipe, dataset, device, 1, "")
    work = counter.get_total_flops() / sizes[0] / len(Stages.names)  # of an image
    limit = matrix_rate(device) / work
    both, compute = done.lines["both"], done.lines["compute"]
    phases = ", ".join(f"{phase} {1e3 * done.per_step('phases', total):.1f}"
                       for phase, total in done.seconds.items())
    return (f"  {name:18}{how:12}{both['img_s']:8,.0f}{sum(sizes) / took:9,.0f}"
            f"{compute['img_s']:9,.0f}{compute['img_s'] / limit:9.0%}{done.launches():9,.0f}"
            f"{done.first_step:8.1f}s{memory:8,.0f}{both['total']:9.4f}   {phases}; "
            f"{recipe.arch} {recipe.size[0]}x{recipe.size[1]}, batch {sizes[0]}, "
            f"{done.loader[-1]} workers, {work / 1e9:.2f} GFLOP an image")


def matrix_rate(device: str) -> float:
    """Multiplications and additions per second of a large matrix product, in the loops' own
    precision."""
    n, dtype = (2048, torch.float32) if device == "cpu" else (8192, torch.bfloat16)
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / np.median([seconds(lambda: a @ a, device) for _ in range(9)])


def loops(names: list[str], device: str, quick: bool) -> None:
    """Images per second from files to weights, and what they are made of."""
    hows = list(HOW) if device != "cpu" else ["eager"]
    rows = [(name, how) for how in hows for name in names]
    print(COLUMNS)
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            load_dataset("synthetic", folder)
        for name, how in rows:
            os.environ["TORCHINDUCTOR_CUDAGRAPHS"] = str(int(how == "CUDA graphs"))
            try:
                steps = 2 if quick else 7
                print(in_new_process(whole_loop, name, device, folder, steps, how), flush=True)
            except RuntimeError as error:  # what a compiler or a graph cannot hold
                print(f"  {name:18}{how:12} {str(error).strip().splitlines()[-1]}", flush=True)


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


def measured(rerank: bool, Q: int, G: int, ids: int, device: str) -> tuple[float, float, str]:
    """Seconds, MB above the features (of the CPU), and the result."""
    args = [x.to(device) if x.is_floating_point() else x for x in clustered(Q, G, ids)]
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making them (Linux)
    before, start = peak_rss(), time.perf_counter()
    result = rank_features(*args, rerank=rerank)
    return time.perf_counter() - start, peak_rss() - before, str(result)


def ranking(device: str, quick: bool) -> None:
    """MSMT17's size; re-ranking has a quarter of the pairs."""
    Q, G, ids = (1_000, 8_000, 300) if quick else (11_659, 82_161, 3_060)
    for rerank, part in ((False, 1), (True, 2)):
        size = Q // part, G // part, ids // part
        took, memory, result = in_new_process(measured, rerank, *size, device)
        kind = "re-rank" if rerank else "rank"
        print(f"  {kind} {size[0]:,} x {size[1]:,}, 384-d: {took:.1f} s, {memory:,.0f} MB above "
              f"the features; {result[:60]}", flush=True)


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def check_all(names: list[str], device: str) -> None:
    """Exit with status 1 where something is wrong."""
    compiles = bool(runs.choose_backend(None, device))
    print(f"largest relative differences of {device} from float32 on the CPU; torch "
          f"{torch.__version__}")
    wrong = [name for name in names if not check(name, device, compiles)]
    sys.exit(f"WRONG: {', '.join(wrong)}" if wrong else print("right"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m extra.bench", description="Right, and fast?")
    parser.add_argument("--device", type=device_name, help="cpu or cuda; default: what is here",
                        default=usual_device())
    parser.add_argument("--check", action="store_true", help="is the GPU right? no speeds")
    parser.add_argument("--only", nargs="+", choices=[*TRAININGS, "rank"], metavar="NAME",
                        help=f"some of: {' '.join(TRAININGS)} rank")
    parser.add_argument("--quick", action="store_true", help="few repeats: does it run at all?")
    args = parser.parse_args()
    wanted = args.only or [*TRAININGS, "rank"]
    names = [name for name in TRAININGS if name in wanted]
    if args.check:
        return check_all([name for name in names if not TRAININGS[name][2]], args.device)
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads; images "
          f"per second of the whole, of the data and of the computation alone")
    if names:
        loops(names, args.device, args.quick)
    if "rank" in wanted:
        ranking(args.device, args.quick)


if __name__ == "__main__":
    command_line(main)
