"""Fine-tuning's losses and three whole steps against the reference; all trainings: what a step does, going on, several
processes, run folders, command line."""

import collections
import contextlib
import dataclasses
import inspect
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DOUBLE, PATIENCE, ROOT, Golden, Script, command, log_lines, market_tree, torchrun
from double import NETWORKS
from PIL import Image
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import stress
import train
from data import LUP_MEAN, LUP_STD, Batches, PKSampler, ShuffleSampler, hold_out, load_dataset, make_loader
from evaluate import ARCHS, ReIDModel, build_backbone, evaluate, load_model
from extra import pictures, runs
from extra.files import InputError, command_line
from extra.runs import Meter, Run, Runtime, bfloat16_is_right
from personvit import VITS, PersonViT, PersonViTRecipe, VisionTransformer
from train import FineTuning, Recipe, hardest_pairs, learning_rate, make_optimizer, triplet_loss
from upreid import RESNETS, UPReID, UPReIDRecipe

@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch):
    """What is tested here does not depend on a network's size; scripts in processes of their own have the
    usual ones, unless they take these from double.py."""
    for table in (VITS, RESNETS, ARCHS):
        for name in NETWORKS.keys() & table.keys():
            monkeypatch.setitem(table, name, NETWORKS[name])


# ---- losses and schedule of fine-tuning ------------------------------------------------------


@pytest.mark.parametrize("name, margin", [("triplet_soft", None), ("triplet_margin03", 0.3)])
def test_triplet_equals_reference(name, margin):
    golden = Golden(name)
    features = golden["features"].requires_grad_()
    loss = triplet_loss(features, golden["labels"], margin)
    loss.backward()
    torch.testing.assert_close(loss, golden["loss"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(features.grad, golden["grad"], rtol=1e-4, atol=1e-6)
    d_ap, d_an = hardest_pairs(features, golden["labels"])
    torch.testing.assert_close(d_ap, golden["dist_ap"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d_an, golden["dist_an"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_triplet_equals_the_loop(seed):
    rng = np.random.default_rng(seed)
    B, D = rng.integers(3, 12), rng.integers(2, 6)
    labels = np.concatenate([[0, 1], rng.integers(0, 3, B - 2)])  # unequal counts, lone images
    f = rng.normal(size=(B, D))
    soft, hard = [], []
    for i in range(B):
        d = [math.dist(f[i], f[j]) for j in range(B)]
        d_ap = max(d[j] for j in range(B) if labels[j] == labels[i])
        d_an = min(d[j] for j in range(B) if labels[j] != labels[i])
        soft.append(math.log1p(math.exp(d_ap - d_an)))
        hard.append(max(0, d_ap - d_an + 0.3))
    x, y = torch.tensor(f), torch.tensor(labels)
    assert float(triplet_loss(x, y)) == pytest.approx(np.mean(soft), rel=1e-4)
    assert float(triplet_loss(x, y, 0.3)) == pytest.approx(np.mean(hard), rel=1e-4, abs=1e-5)


def test_triplet_at_the_edges():
    same = torch.ones(4, 3, requires_grad=True)
    loss = triplet_loss(same, torch.tensor([0, 0, 1, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6) and same.grad.isfinite().all()
    huge = (torch.randn(8, 16) * 1e3).to(torch.bfloat16)
    assert triplet_loss(huge, torch.arange(8) // 2).isfinite()
    lone = torch.randn(4, 3, requires_grad=True)                 # nobody else in the batch: nothing to push away from
    assert hardest_pairs(lone, torch.zeros(4))[1].isposinf().all()
    for margin in (None, 0.3):
        assert triplet_loss(lone, torch.zeros(4), margin).item() == 0


def test_learning_rates_equal_reference():
    golden, recipe = Golden("finetune_3steps"), Recipe()
    for scale, key in ((1.0, "lr_weight"), (recipe.bias_lr, "lr_bias")):
        rates = [learning_rate(recipe, epoch, scale) for epoch in range(120)]
        np.testing.assert_allclose(rates, golden[key], rtol=1e-6)
    samples = {1: 4.0e-6, 2: 2.38e-5, 10: 1.822e-4, 20: 3.802e-4, 21: 3.733e-4, 60: 2.056e-4, 120: 8.68e-7}
    for epoch, rate in samples.items():
        assert learning_rate(recipe, epoch - 1) == pytest.approx(rate, rel=1e-3)


def test_step_schedule_of_bag_of_tricks():
    recipe = Recipe.preset("market1501", "resnet50")
    rates = [learning_rate(recipe, e) / recipe.lr for e in (0, 5, 10, 39, 40, 69, 70, 119)]
    np.testing.assert_allclose(rates, [0.01, 0.505, 1, 1, 0.1, 0.1, 0.01, 0.01], rtol=1e-9)


def test_three_steps_equal_reference():
    golden, recipe = Golden("finetune_3steps"), Recipe()
    model = ReIDModel(VisionTransformer((64, 32), 16, embed_dim=24, depth=2, num_heads=3), 10)
    model.load_state_dict(golden.state("w."), strict=True)
    optimizer, losses_of, seen = make_optimizer(recipe, model.train()), FineTuning(model, recipe), []
    head = model.head
    model.head = lambda feature: seen.append(head(feature)) or seen[-1]
    for i in (1, 2, 3):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, i - 1, group["scale"])
        losses = losses_of(golden[f"x{i}"], golden[f"y{i}"])
        logits, feature = seen.pop()
        torch.testing.assert_close(logits, golden[f"score{i}"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(feature, golden[f"feat{i}"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(losses["total"], golden[f"loss{i}"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(losses["total"], losses["id"] + losses["triplet"])
        assert losses["accuracy"] == (logits.argmax(1) == golden[f"y{i}"]).float().mean()
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
    for key, value in golden.state("after.").items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-4, atol=1e-5, msg=key)
    model.head = head
    torch.testing.assert_close(model.eval()(golden["x_eval"]), golden["feat_eval"], rtol=1e-4, atol=1e-5)


def test_recipes():
    assert Recipe.preset("msmt17") == Recipe.preset("market1501") == Recipe()      # the published ViT-S recipe
    assert Recipe.preset("msmt17", "vit_base") == Recipe(arch="vit_base")
    assert Recipe.preset("market1501", "vit_base").warmup == 5
    bot = Recipe.preset("msmt17", "resnet50")
    assert (bot.smoothing, bot.margin, bot.last_stride, bot.neck_feat) == (0.1, 0.3, 1, "after")
    assert Recipe.preset("synthetic").size == (128, 64)
    assert all(Recipe.preset(d, a).arch == a for d in ("synthetic", "market1501", "msmt17") for a in ARCHS)


@pytest.mark.parametrize("path, known", [
    ("data/LUP", "luperson"), ("LUPerson-NL", "luperson"), ("lists/luperson.txt", "luperson"), ("data/synthetic", "synthetic"),
    ("data/synthetic.v2", "folder"), ("data/lupine", "folder"), ("people.txt", "folder")])
def test_a_path_gets_the_recipe_of_what_is_read_there(path, known):
    for flags in ([], ["--pretrain", "personvit"], ["--pretrain", "upreid"]):
        given, usual = (train.parse_args([*flags, "--dataset", name])[1] for name in (path, known))
        assert given == usual


# ---- the loops: three trainings in this process ----------------------------------------------

TINY = Recipe(arch="vit_mini", size=(32, 16), epochs=2, ids=3, images=2, lr=0.01, warmup=1, drop_path=0.3, seed=5)
SMALL = PersonViTRecipe(arch="vit_mini", size=(64, 32), epochs=3, batch=4, warmup=1, prototypes=16, hidden=16,
                        bottleneck=8, temp_warmup=2, local_crops=2, drop_path=0.2, freeze_last_layer=1)
SMALL_UP = UPReIDRecipe(arch="resnet_tiny", size=(64, 32), epochs=3, batch=4, queue=10, groups=2)
TRAININGS = pytest.mark.parametrize("recipe", [TINY, SMALL, SMALL_UP], ids=["fine-tuning", "PersonViT", "UP-ReID"])
MODULES = {Recipe: FineTuning, PersonViTRecipe: PersonViT, UPReIDRecipe: UPReID}  # whose forward gives the losses


def method_of(recipe) -> str:
    return next(name for name, kind in train.METHODS.items() if isinstance(recipe, kind))


def trained(recipe, dataset, folder, weights=None, monitor=None, workers=0, log_every=2, device="cpu", **more):
    """(what was trained, its run), trained here."""
    run = Run(folder, dataclasses.asdict(recipe))
    runtime = Runtime(device, workers, log_every=log_every, **more)
    if isinstance(recipe, Recipe):
        return train.fine_tune(recipe, dataset, run, runtime, weights, monitor), run
    return train.pretrain(recipe, dataset, run, runtime, weights, monitor), run


def same_weights(one, two) -> bool:
    return all(torch.equal(value, two.state_dict()[key]) for key, value in one.state_dict().items())


class Watch(TorchDispatchMode):
    """Names, by step, of operations that a GPU would have to be waited for, and of those that draw random numbers."""

    def __init__(self):
        super().__init__()
        self.step, self.reads, self.draws = None, collections.defaultdict(list), collections.defaultdict(list)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.step is not None:
            indices = args[1] if func.name().startswith(("aten::index", "aten::_index_put")) else ()
            by_mask = isinstance(indices, (list, tuple)) and any(
                isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)
            counts = torch.Tag.dynamic_output_shape in func.tags and not func.name().startswith("aten::index")
            if by_mask or counts or torch.Tag.data_dependent_output in func.tags:
                what = " of booleans" * (isinstance(args[0], torch.Tensor) and args[0].dtype == torch.bool)
                self.reads[self.step].append(func.name() + what)
            if torch.Tag.nondeterministic_seeded in func.tags and not without_dropout(func.name(), args):
                own = (kwargs or {}).get("generator") is not None
                self.draws[self.step].append(func.name().split(".")[0] + " of its own generator" * own)
        return func(*args, **(kwargs or {}))


def without_dropout(name: str, args: tuple) -> bool:
    """Attention could drop entries of its matrix; its fourth argument is their share."""
    return name.startswith("aten::_scaled_dot_product") and args[3:4] in ((), (0.0,))


class WatchMethods(TorchFunctionMode):
    """... and of methods of tensors by which Python reads them: on a CPU some of these are no operations."""

    READING = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__"}

    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if self.watch.step is not None and name in self.READING:
            self.watch.reads[self.watch.step].append(name)
        return func(*args, **(kwargs or {}))


@TRAININGS
def test_a_step_reads_nothing_and_draws_what_the_design_names(dataset, tmp_path, monkeypatch, recipe):
    """From a batch coming out of the loader to the call for the next, in which neither line nor checkpoint is due."""
    watch, few = Watch(), dataclasses.replace(recipe, epochs=2)

    def watched(*args):
        for step, batch in enumerate(make_loader(*args)):
            watch.step = step
            steps.append(step)
            yield batch
            watch.step = None                                    # what the loader does is not watched

    steps: list[int] = []
    monkeypatch.setattr(train, "make_loader", watched)
    with watch, WatchMethods(watch):
        trained(few, dataset, tmp_path / "run", workers=1, log_every=999)
    per_epoch = 3 if recipe is TINY else 4
    due = {step for step in steps if (step + 1) % per_epoch == 0}  # at the end of an epoch there is a line
    assert len(due) >= 2 and len(steps) - len(due) >= 4
    assert all("tolist" in watch.reads[step] for step in due)    # which is seen
    masks = ["aten::nonzero of booleans"] if recipe is SMALL else []  # on the CPU, as the test below shows
    for step in set(steps) - due:
        assert watch.reads[step] == masks, (step, watch.reads[step])
        draws = collections.Counter(watch.draws[step])
        depth = {"aten::rand": 2 * (1 + (recipe is SMALL))}      # two branches of the second block, in each forward
        assert draws == {TINY: {"aten::randn of its own generator": 1, **depth}, SMALL: depth, SMALL_UP: {}}[recipe]


def knows_a_gpu() -> bool:
    """Has this PyTorch a GPU's name for tensors without content? An old one without a GPU, or one for CPUs alone, has not."""
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, contextlib.suppress(RuntimeError):
        return fake.from_tensor(torch.empty(1)).to("cuda", non_blocking=True).device.type == "cuda"
    return False


@pytest.mark.skipif(not knows_a_gpu(), reason="this PyTorch needs a GPU for a GPU's tensors")
@TRAININGS
def test_a_step_on_a_gpu_mixes_no_devices(dataset, tmp_path, monkeypatch, recipe):
    """The loops themselves, on tensors that have shapes and a GPU's name but no content: no GPU is needed for these. An
    operation of tensors on two devices raises, as does reading a number. (A backward pass would need the GPU.)"""
    class Enough(Exception):
        pass

    fake, to, models = FakeTensorMode(allow_non_fake_inputs=True), torch.nn.Module.to, []
    how_many, counted = [], []                                   # masked patches of a batch

    def to_gpu(model, *args, **kwargs):
        models.append(model)
        with fake:
            return to(model, *args, **kwargs)

    def first_batches(*args):
        batches = list(itertools.islice(make_loader(*args), 2))
        how_many.extend(int(batch["masks"].sum()) for batch in batches if "masks" in batch)
        stack.enter_context(fake)
        yield from batches
        raise Enough

    def nonzero(masks):                                          # the one count of a step, on the CPU
        assert masks.device.type == "cpu" and masks.dtype == torch.bool
        counted.append(how_many.pop(0))
        return torch.zeros(counted[-1], masks.ndim, dtype=torch.long)

    def backward(loss):
        assert loss.device.type == "cuda"
        for p in models[0].parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None

    monkeypatch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
    monkeypatch.setattr(torch.nn.Module, "to", to_gpu)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(torch, "_fused_sgd_", lambda params, *args, **kwargs: [p.add_(0) for p in params])  # has no shapes
    monkeypatch.setattr(torch.Tensor, "nonzero", nonzero)
    monkeypatch.setattr(train, "erasing_noise", lambda images, *_: torch.randn_like(images, dtype=torch.float32))
    monkeypatch.setattr(train, "make_loader", first_batches)
    with contextlib.ExitStack() as stack, pytest.raises(Enough):
        trained(recipe, dataset, tmp_path / "run", device="cuda", log_every=999)
    assert {p.device.type for p in models[0].parameters()} == {"cuda"}
    assert len(counted) == (2 if recipe is SMALL else 0) and all(counted)


@pytest.mark.parametrize("recipe, shape", [(TINY, (6,)), (SMALL, (4,)), (SMALL_UP, (4,))],
                         ids=["fine-tuning", "PersonViT", "UP-ReID"])
def test_draws_are_the_same_for_any_number_of_workers_and_processes(dataset, recipe, shape):
    """Images, parameters of views and masks of each place of each step, bit for bit; and where a run goes on."""
    pids = [r.pid for r in dataset.train]
    sampler = PKSampler(pids, 4, 2, recipe.seed) if recipe is TINY else ShuffleSampler(len(pids), recipe.batch, recipe.seed)

    def batches(workers=0, world=1, first=0):
        """By step: images, parameters, identities and masks of the whole batch."""
        found, steps = collections.defaultdict(list), range(first, 2 * len(sampler))
        for rank in range(world):
            images = Batches(dataset.train, sampler, train.views_of(recipe), recipe.seed, getattr(recipe, "draw", None), rank, world)
            for step, batch in zip(steps, make_loader(images, steps, workers), strict=True):
                masks = [batch["masks"].transpose(0, 1)] if recipe is SMALL else []
                assert batch.keys() == {"images", "params", "pids", "replaced", *["masks"] * (recipe is SMALL)}
                found[step].append((batch["images"], batch["params"], batch["pids"], *masks))
        return {step: [torch.cat(parts) for parts in zip(*found[step])] for step in found}

    whole = batches()
    params = torch.cat([parts[1] for parts in whole.values()]).flatten(1)
    assert len(whole) >= 4 and len(params.unique(dim=0)) == len(params)         # no place of any step is like another
    assert recipe is not SMALL or whole[0][3].shape == (4, 2, 4, 2)
    for how in (dict(workers=1), dict(workers=2), dict(world=2), dict(world=2, workers=1), dict(first=3, workers=2)):
        again = batches(**how)
        assert list(again) == list(whole)[how.get("first", 0):]
        for step, parts in again.items():
            assert all(torch.equal(a, b) for a, b in zip(parts, whole[step], strict=True)), (how, step)


@TRAININGS
def test_a_run_that_goes_on_equals_the_uninterrupted_one(dataset, tmp_path, recipe, monkeypatch):
    """Killed when the state of a step was just saved: both networks, centres, queue, the log and the exported file."""
    recipe = dataclasses.replace(recipe, epochs=2)
    whole, run_whole = trained(recipe, dataset, tmp_path / "whole", save_every=1)
    last = log_lines(run_whole.folder)[-1]["steps"]
    for stop_at in (1, last // 2 + 1, last - 1):
        saves, folder = [], tmp_path / f"cut{stop_at}"

        def save_then_die(self, name, content, save=Run.save):
            save(self, name, content)
            if name.startswith("checkpoint"):
                saves.append(content["step"])
                if content["step"] == stop_at:
                    raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Run, "save", save_then_die)
            with pytest.raises(KeyboardInterrupt):
                trained(recipe, dataset, folder, save_every=1)
        assert saves == list(range(1, stop_at + 1))
        with open(folder / "log.jsonl", "a") as log:             # lines of steps after the checkpoint
            log.write('{"step": 999}\n')
        again, run_cut = trained(recipe, dataset, folder, save_every=1)
        assert same_weights(whole, again) and log_lines(run_whole.folder) == log_lines(folder)
        name = "model.pth" if isinstance(recipe, Recipe) else "backbone.pth"
        assert (run_whole.folder / name).read_bytes() == (folder / name).read_bytes()


# Where rounding is not magnified: at random weights UP-ReID's gradient is chaotic. Its steps are small here, and the seed
# is not 0, which of 0 to 5 is the only one whose rounding errors of 1e-6 grow to 5e-4 in eight steps.
CALM = {Recipe: dict(epochs=2, drop_path=0.0), PersonViTRecipe: dict(epochs=2, drop_path=0.0),
        UPReIDRecipe: dict(epochs=2, lr=1e-3, seed=1)}


@TRAININGS
def test_compiled_networks_and_views_change_nothing(dataset, tmp_path, monkeypatch, recipe):
    """One graph for each shape, all made in the first step, and the same weights as without. (No compiler is needed here:
    "aot_eager" records the graphs, forward and backward, and calls PyTorch's own operations.)"""
    recipe = dataclasses.replace(recipe, **CALM[type(recipe)])
    graphs, read = [], Meter.read
    monkeypatch.setattr(Meter, "read", lambda *args: graphs.append(counters["stats"]["unique_graphs"]) or read(*args))
    torch._dynamo.reset()
    counters.clear()
    eager, _ = trained(recipe, dataset, tmp_path / "eager", monitor=None if recipe is TINY else dataset, monitor_every=1)
    assert set(graphs) == {0}
    graphs.clear()
    ours, _ = trained(recipe, dataset, tmp_path / "compiled", backend="aot_eager", log_every=1,
                      monitor=None if recipe is TINY else dataset, monitor_every=1)
    # views of one shape or two; a ViT's forward, PersonViT's teacher and student on two shapes, UP-ReID's encoders on two each
    assert len(graphs) > 2 and set(graphs) == {{Recipe: 2, PersonViTRecipe: 4, UPReIDRecipe: 5}[type(recipe)]}
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-5, msg=name)
    assert not counters["graph_break"]


@TRAININGS
def test_nothing_that_a_graph_computed_is_used_in_the_next_step(dataset, tmp_path, monkeypatch, recipe):
    """CUDA graphs write over it. Here it becomes NaN where a step begins, gradients of the micro-batches before included."""
    kept, marks = [], []

    def graph(module, _):
        def call(*args):
            out = module(*args)
            given = {x.untyped_storage().data_ptr() for x in args}  # parameters that a backward pass needs come out, too
            kept.extend(x.detach() for x in out if isinstance(x, torch.Tensor) and x.is_floating_point()
                        and x.untyped_storage().data_ptr() not in given)
            return out
        return make_boxed_func(call)

    def begin():
        marks.append(len(kept))
        for tensor in kept:
            tensor.fill_(torch.nan)
        kept.clear()

    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", begin)
    recipe = dataclasses.replace(recipe, **CALM[type(recipe)])
    micro = {} if recipe is TINY else {"accumulate": 2}
    torch._dynamo.reset()
    eager, _ = trained(recipe, dataset, tmp_path / "eager", **micro)
    assert not marks
    ours, _ = trained(recipe, dataset, tmp_path / "graphs", backend=aot_autograd(fw_compiler=graph), **micro)
    assert len(marks) >= 6 and min(marks[1:]) > 0
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_batch_norms_that_make_no_graph_stay_eager():
    for synchronised, compiles in ((False, True), (True, False)):
        model = SMALL_UP.build()
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model) if synchronised else model
        views = train.views_of(SMALL_UP)
        runs.compile_networks(model, Runtime(backend="eager"))
        assert runs.compiled(views, Runtime(backend="eager")) != views == runs.compiled(views, Runtime())
        assert ["forward_features" in vars(net) for net in runs.networks(model)] == 2 * [compiles]


def test_what_cannot_compile_trains_eager(monkeypatch, dataset, tmp_path, capsys):
    """By default with a WARNING that says why; asked for by --compile in one line. All processes get the same answer."""
    for flags, wanted in (([], None), (["--compile"], True), (["--no-compile"], False)):
        assert train.parse_args(["--device", "cpu", *flags])[0].compile is wanted
    reasons = []
    monkeypatch.setattr(runs, "why_no_graph", lambda device: reasons.append(device) or "no C compiler")
    assert runs.choose_backend(None, "cpu") == runs.choose_backend(False, "cuda") == "" and not reasons    # nothing is tried
    assert runs.choose_backend(None, "cuda:1") == "" and reasons == ["cuda:1"]
    assert "WARNING: no graph can be compiled here (no C compiler): operations are launched one by one" in capsys.readouterr().out
    with pytest.raises(InputError, match="--compile: no graph can be compiled here .no C compiler.; --no-compile"):
        runs.choose_backend(True, "cpu")
    monkeypatch.setattr(runs, "why_no_graph", lambda _: "")
    assert runs.choose_backend(True, "cpu") == runs.choose_backend(None, "cuda") == "inductor"
    monkeypatch.setattr(runs, "all_gather_object", lambda mine: [mine, "an old GPU"])    # another process's
    assert runs.choose_backend(None, "cuda") == "" and "(an old GPU)" in capsys.readouterr().out
    runs.open_run(tmp_path / "run", TINY, dataset, False, Runtime("cpu"))
    assert "; eager: nothing is compiled\n" in capsys.readouterr().out
    runs.open_run(tmp_path / "run", TINY, dataset, False, Runtime("cpu", backend="inductor"))
    assert "; the first step compiles" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_why_no_graph_can_be_compiled(monkeypatch):
    assert "NVIDIA" in runs.why_no_graph("cuda") or "CUDA" in runs.why_no_graph("cuda")

    def fail(*_):
        raise RuntimeError("\n  no compiler of any kind\nand more")

    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fail)
    assert "no compiler of any kind" in runs.why_no_graph("cpu") or "raised" in runs.why_no_graph("cpu")


def test_a_graph_that_fails_later_ends_in_one_line_and_the_run_goes_on_without(dataset, tmp_path, monkeypatch):
    """A network for which the compiler fails, when a checkpoint is there."""
    def backend(module, inputs):
        raise NotImplementedError("no kernel for this")

    recipe = dataclasses.replace(TINY, epochs=1, drop_path=0.0)
    whole, _ = trained(recipe, dataset, tmp_path / "whole")
    trained(recipe, dataset, tmp_path / "run", save_every=1)
    for path in [*(tmp_path / "run").glob("model.pth"), Run(tmp_path / "run", dataclasses.asdict(recipe)).checkpoints()[0]]:
        path.unlink()
    torch._dynamo.reset()
    with pytest.raises(SystemExit, match="^error: a graph cannot be compiled: --no-compile .*a training goes on by the same command"):
        command_line(lambda: trained(recipe, dataset, tmp_path / "run", backend=backend))
    again, _ = trained(recipe, dataset, tmp_path / "run")
    assert same_weights(whole, again)


def test_a_processor_whose_bfloat16_is_wrong_trains_in_float32(dataset, tmp_path, monkeypatch, capsys):
    """Its kernel is made wrong on purpose; probing changes no random number and no running statistic."""
    recipe, real = dataclasses.replace(SMALL_UP, epochs=1), F.conv2d

    def wrong(x, *args, **kwargs):
        y = real(x, *args, **kwargs)
        return y * 1e30 if y.dtype == torch.bfloat16 and x.shape[-2] == 2 else y    # a shape that stripes alone have

    exact, _ = trained(recipe, dataset, tmp_path / "exact")
    monkeypatch.setattr(F, "conv2d", wrong)
    ours, run = trained(dataclasses.replace(recipe, bf16=True), dataset, tmp_path / "run")
    assert "WARNING: bfloat16 is wrong on this processor" in capsys.readouterr().out and same_weights(exact, ours)
    assert json.loads((run.folder / "machine.json").read_text())["bf16"] is False
    Run(run.folder, run.recipe)                                  # on another processor the run may go on: the recipe is asked


@TRAININGS
def test_bfloat16_is_probed_on_all_that_a_run_will_see(dataset, tmp_path, monkeypatch, recipe):
    shapes = []
    monkeypatch.setattr(runs, "bfloat16_is_right", lambda nets, views: shapes.append(
        (len(nets), sorted(tuple(v.flatten(0, -4).shape) for v in views))) or False)
    trained(dataclasses.replace(recipe, epochs=1, bf16=True), dataset, tmp_path / "run")
    assert shapes == [{Recipe: (1, [(6, 3, 32, 16)]), PersonViTRecipe: (2, [(8, 3, 32, 16), (8, 3, 64, 32)]), UPReIDRecipe: (
        2, [(4, 3, 64, 32)] * 3 + [(16, 3, 16, 32)] * 2)}[type(recipe)]]


def test_the_probe_of_bfloat16_sees_wrong_numbers_and_leaves_no_trace():
    class Net(torch.nn.Module):
        error = 2 ** -8                                          # bfloat16's own

        def forward(self, x):
            y = x.flatten(1)
            return y * (1 + self.error) if torch.is_autocast_enabled("cpu") else y

    views, net = [torch.randn(2, 2, 3, 64, 32)], Net()
    assert bfloat16_is_right([net], views)
    for net.error in (math.nan, math.inf, 1e36, 1, -1):
        assert not bfloat16_is_right([Net(), net], views)
    for arch in ("vit_mini", "resnet_tiny"):
        net = build_backbone(arch, (64, 32), drop_path=0.5).train()
        state, random = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
        net.forward_features = torch.compile(net.forward_features, backend=lambda *_: pytest.fail("compiled for a probe"))
        bfloat16_is_right([net], views)
        assert torch.equal(random, torch.get_rng_state())
        assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


@TRAININGS
def test_workers_change_nothing(dataset, tmp_path, recipe):
    short = dataclasses.replace(recipe, epochs=1)
    assert same_weights(*(trained(short, dataset, tmp_path / str(w), workers=w)[0] for w in (0, 2)))


@TRAININGS
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_never_saved(dataset, tmp_path, monkeypatch, recipe, where):
    """The third step goes wrong, also when only the gradient shows it: noticed where a line or checkpoint is due."""
    kind, steps = MODULES[type(recipe)], []
    real = kind.forward

    def forward(self, *args, **kwargs):
        losses = real(self, *args, **kwargs)
        if len(steps) == 2:
            losses["total"] = losses["total"] * (math.nan if where == "loss" else 1)
            if where == "gradient":
                losses["total"].register_hook(lambda g: g * math.inf)
        if len(steps) == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        steps.append(0)
        return losses

    monkeypatch.setattr(kind, "forward", forward)
    monkeypatch.setattr(kind, "stop_at", 99, raising=False)
    saved = "the last good state: .*checkpoint_000000002.pth; start anew with a lower --lr"
    for folder, message, more in (("saves", f"at step 3 or just before; {saved}", dict(save_every=1, log_every=99)),
                                  ("logs", "at step 3 or just before; .*none saved", dict(log_every=3)),
                                  ("stops", "at step 3 or just before; .*000000002", dict(save_every=2, log_every=99))):
        steps.clear()
        monkeypatch.setattr(kind, "stop_at", 2 if folder == "stops" else 99)
        with pytest.raises(InputError, match=f"not finite {message}"):
            trained(recipe, dataset, tmp_path / folder, **more)
        for path in (tmp_path / folder).glob("*.pth"):
            state = torch.load(path, weights_only=True)
            assert state["step"] <= 2 and all(v.isfinite().all() for v in state["model"].values())


@TRAININGS
def test_a_second_interrupt_ends_a_run_at_once(dataset, tmp_path, monkeypatch, recipe, capfd):
    kind = MODULES[type(recipe)]
    real = kind.forward

    def forward(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args, **kwargs)

    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(kind, "forward", forward)
    with pytest.raises(KeyboardInterrupt):
        trained(recipe, dataset, tmp_path / "run")
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    assert capfd.readouterr().err.count("stopping after this step") == 1
    assert not list((tmp_path / "run").glob("*.pth"))


def test_a_training_in_a_thread_cannot_be_asked_to_stop(market, tmp_path, monkeypatch):
    """... as Python lets the main thread alone handle signals; else it is like any other."""
    def forward(self, *args, **kwargs):
        seen.append([signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)])
        return real(self, *args, **kwargs)

    seen, failed, real = [], [], FineTuning.forward
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(FineTuning, "forward", forward)
    monkeypatch.setattr(threading, "excepthook", failed.append)
    argv = ["--dataset", market, "--arch", "vit_mini", "--size", "32x16", "--epochs", 1, "--ids", 4, "--images", 2,
            "--threads", 1, "--workers", 1, "--device", "cpu", "--out", tmp_path / "run"]
    thread = threading.Thread(target=train.main, args=([str(word) for word in argv],))
    thread.start()
    thread.join()
    assert not failed and (tmp_path / "run" / "results.json").exists()
    assert len(seen) == 2 and all(handlers == before for handlers in seen)
    trained(dataclasses.replace(TINY, epochs=1), load_dataset("market1501", market), tmp_path / "main")
    assert not set(seen[-1]) & set(before)                       # in the main thread it is listened to


@pytest.mark.parametrize("recipe", [dataclasses.replace(SMALL, drop_path=0.0),
                                    dataclasses.replace(SMALL_UP, batch=8, groups=4, lr=0.01)],
                         ids=["PersonViT", "UP-ReID"])
def test_split_steps_equal_whole_ones(dataset, tmp_path, monkeypatch, doubles, recipe):
    """Two micro-batches of half the batch: one step of the optimiser, one of teacher, centres and queue."""
    monkeypatch.setattr(UPReID, "shuffle", False)
    one, two = (trained(recipe, dataset, tmp_path / str(n), accumulate=n) for n in (1, 2))
    assert_equal_states(one[0].state_dict(), two[0].state_dict())
    for a, b in zip(*(log_lines(run.folder) for _, run in (one, two)), strict=True):
        for name in COMPARABLE & set(a):
            assert a[name] == b[name], name


# diagnostics of the log are means over the parts of a batch; these are the whole batch's
COMPARABLE = {"total", "cls", "patch", "instance", "global", "local", "id", "triplet", "accuracy", "grad_norm", "lr"}


def assert_equal_states(one: dict, two: dict) -> None:
    """... up to rounding of doubles; running statistics of UP-ReID are those of a part of the batch."""
    assert one.keys() == two.keys()
    for name, value in one.items():
        if "running_" not in name and "tracked" not in name:
            torch.testing.assert_close(two[name], value, rtol=1e-7, atol=1e-8, msg=lambda m: f"{name}: {m}")


def test_broken_images_are_counted_and_too_many_stop_the_run(tmp_path):
    root = market_tree(tmp_path / "market1501", ids=4, images=60)  # 240 images: 2 are below 1 %
    files = sorted((root / "bounding_box_train").iterdir())
    for path in files[:2]:
        path.write_bytes(b"broken")
    recipe = dataclasses.replace(TINY, epochs=1, images=8)
    _, run = trained(recipe, load_dataset("market1501", root), tmp_path / "a")
    assert log_lines(run.folder)[-1]["broken_images"] == 2
    for path in files[2:5]:
        path.write_bytes(b"")
    with pytest.raises(InputError, match="of 240 training images cannot be read, more than 1 %"):
        trained(recipe, load_dataset("market1501", root), tmp_path / "b")


def test_pretraining_ends_in_weights_that_fine_tune(dataset, tmp_path):
    frozen = dataclasses.replace(SMALL, freeze_last_layer=99)
    model, run = trained(frozen, dataset, tmp_path / "a", monitor=dataset, keep_every=2, monitor_every=2)
    assert sorted(p.name for p in run.folder.iterdir()) == [
        "backbone.pth", "backbone_e0002.pth", "checkpoint_000000012.pth", "lock", "log.jsonl", "machine.json",
        "recipe.json"]
    torch.manual_seed(SMALL.seed)
    start = frozen.build()
    for name, p in model.named_parameters():                     # prototypes stood still, the rest moved
        if name.startswith("student") and p.ndim > 1:
            assert torch.equal(p, start.get_parameter(name)) == ("last_layer" in name), name
    lines = log_lines(run.folder)
    assert [line["epoch"] for line in lines if "monitor" in line] == [0, 2, 3] and lines[1]["momentum"] < 1
    assert {"total", "cls", "patch", "entropy", "kl", "prototypes", "feature_std", "grad_norm", "lr", "weight_decay",
            "teacher_temp", "ln_K"} <= set(lines[1])
    still = Recipe(arch="vit_mini", size=(64, 32), epochs=1, ids=3, images=2, lr=0.0)
    tuned, _ = trained(still, dataset, tmp_path / "b", weights=run.folder / "backbone.pth")
    assert same_weights(model.backbone_for_export(), tuned.base)


def test_upreid_ends_in_weights_that_fine_tune(dataset, tmp_path):
    model, run = trained(SMALL_UP, dataset, tmp_path / "a", monitor=dataset, keep_every=2, monitor_every=1)
    lines = log_lines(run.folder)
    assert (run.folder / "backbone_e0002.pth").exists() and len([line for line in lines if "monitor" in line]) == 4
    assert {"total", "instance", "global", "local", "accuracy", "ln_queue", "ln_stripes", "feature_std", "query_std",
            "grad_norm", "lr"} <= set(lines[1])
    assert lines[1]["lr"] == pytest.approx(0.03 * 4 / 256) and model.online["backbone"].training
    again, recipe = load_model(run.folder / "backbone.pth")      # evaluate.py sees what the monitor saw
    assert (tuple(recipe["mean"]), tuple(recipe["std"])) == (LUP_MEAN, LUP_STD)
    assert evaluate(again, dataset, recipe, workers=0)[0].mAP == pytest.approx(lines[-1]["mAP"], abs=1e-5)
    still = Recipe(arch="resnet_tiny", size=(64, 32), epochs=1, ids=3, images=2, lr=0.0)
    tuned, _ = trained(still, dataset, tmp_path / "b", weights=run.folder / "backbone.pth")
    exported = model.backbone_for_export().state_dict()
    assert all(torch.equal(p, exported[name]) for name, p in tuned.base.named_parameters())


@pytest.mark.parametrize("recipe, kind, names", [(SMALL, PersonViT, ("student", "teacher")),
                                                 (SMALL_UP, UPReID, ("online", "momentum"))],
                         ids=["PersonViT", "UP-ReID"])
def test_pretraining_starts_both_networks_from_given_weights(dataset, tmp_path, monkeypatch, recipe, kind, names):
    start, first = build_backbone(recipe.arch, recipe.size), []
    torch.save({"backbone": start.state_dict()}, tmp_path / "start.pth")
    real = kind.forward

    def forward(self, *args, **kwargs):
        first.append([{k: v.clone() for k, v in getattr(self, name)["backbone"].named_parameters()} for name in names])
        return real(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", forward)
    trained(dataclasses.replace(recipe, epochs=1), dataset, tmp_path / "run", weights=tmp_path / "start.pth")
    for network in first[0]:
        assert all(torch.equal(p, start.get_parameter(name)) for name, p in network.items())


def test_weights_given_to_fine_tuning_are_used(dataset, tmp_path):
    start = build_backbone("vit_mini", (32, 16))
    torch.save({"backbone": start.state_dict()}, tmp_path / "start.pth")
    recipe = dataclasses.replace(TINY, lr=0.0, epochs=1)         # at rate 0 the backbone must not move
    model, _ = trained(recipe, dataset, tmp_path / "run", weights=tmp_path / "start.pth")
    assert same_weights(start, model.base)


def test_schedules_reach_optimiser_and_teacher(dataset, tmp_path, monkeypatch):
    recipe, seen = dataclasses.replace(SMALL, weight_decay_end=0.4, epochs=2), []
    momenta, step, real = [], torch.optim.AdamW.step, PersonViT.update_teacher
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (seen.append(
        [(g["lr"], g["weight_decay"]) for g in self.param_groups]), step(self)))
    monkeypatch.setattr(PersonViT, "update_teacher", lambda self, momentum, **more: (
        momenta.append(momentum), real(self, momentum, **more)))
    trained(recipe, dataset, tmp_path / "run")
    rates, now = zip(*(recipe.schedule(n, 4) for n in range(8)))
    assert seen == [[(r["lr"], r["weight_decay"]), (r["lr"], 0.0)] for r in rates]
    assert momenta == [n["momentum"] for n in now]
    seen = []
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: seen.append([g["lr"] for g in self.param_groups]))
    trained(TINY, dataset, tmp_path / "fine")
    assert seen == [[learning_rate(TINY, n // 3), learning_rate(TINY, n // 3, 2.0)] for n in range(6)]


def test_without_masks_no_patch_has_collapsed(dataset, tmp_path, monkeypatch):
    """Their numbers are 0, and no warning; what is judged a collapse stands in the line."""
    judged = []
    monkeypatch.setattr(PersonViT, "warning", lambda self, values: judged.append(values) or "COLLAPSE?" * (len(judged) == 1))
    for masks in (True, False):
        trained(dataclasses.replace(SMALL, masks=masks, epochs=1), dataset, tmp_path / str(masks))
    with_masks, without = judged[0], judged[-1]
    assert min(with_masks[name] for name in ("patch", "patch_mutual_information")) > 0
    assert without["patch"] == without["patch_mutual_information"] == 0
    flags = [line.get("warning") for line in log_lines(tmp_path / "True")]
    assert flags == ["COLLAPSE?"] + [None] * (len(judged) // 2 - 1)
    monkeypatch.undo()
    warning = SMALL.build().warning
    healthy = {"mutual_information": 0.5, "feature_std": 0.5, "entropy": 1.0, "patch_mutual_information": 0.5}
    assert not warning(healthy) and warning(healthy | {"patch_mutual_information": 0.0}) == "COLLAPSE?"
    assert not dataclasses.replace(SMALL, masks=False).build().warning(healthy | {"patch_mutual_information": 0.0})
    assert warning(healthy | {"entropy": math.log(16)}) == "UNIFORM?"
    assert all(warning(healthy | {name: bad}) == "COLLAPSE?" for name in ("mutual_information", "feature_std") for bad in (0.0, math.nan))


def test_the_seed_decides_what_a_training_starts_from(tmp_path, capsys):
    """... and all is in training, on its device; a recipe that does not fit is an error of the user's."""
    one, two, other = [], [], []
    for built, seed in ((one, 0), (two, 0), (other, 1)):
        torch.rand(3)                                            # what was sampled before does not count
        for recipe in (SMALL, SMALL_UP):
            built.append(train.build_objective(dataclasses.replace(recipe, seed=seed), Runtime()))
        built.append(train.build_model(dataclasses.replace(TINY, seed=seed), 7, Runtime(), None))
        assert "WARNING: random weights (no --weights)" in capsys.readouterr().out
    assert [type(module) for module in one] == [PersonViT, UPReID, ReIDModel]
    for a, b, c in zip(one, two, other):
        assert same_weights(a, b) and not same_weights(a, c) and a.training
    for module, momentum in zip(one, ("teacher", "momentum")):
        assert getattr(module, momentum).training
    assert one[2].classifier.weight.shape[0] == 7 and one[2].neck_feat == TINY.neck_feat
    with pytest.raises(InputError, match="by 4 .processes x --accum micro-batches"):
        train.build_objective(SMALL, Runtime(world=2, accumulate=2))


def test_several_processes_share_the_batch_norms_of_a_resnet_alone():
    """Backbone's, as the neck sees all rows anyway; here on a device without memory, for want of several GPUs."""
    model = train.build_model(dataclasses.replace(TINY, arch="resnet_tiny"), 7, Runtime("meta", world=2), None)
    norms = [type(m) for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms == [torch.nn.SyncBatchNorm] * (len(norms) - 1) + [torch.nn.BatchNorm1d] and len(norms) > 5
    model = train.build_model(TINY, 7, Runtime("cpu", world=2), None)
    assert not any(isinstance(m, torch.nn.SyncBatchNorm) for m in model.modules())
    with pytest.raises(InputError, match="batch norm over several processes needs GPUs"):
        train.build_model(dataclasses.replace(TINY, arch="resnet_tiny"), 7, Runtime("cpu", world=2), None)


def test_a_method_sees_what_its_recipe_says():
    assert train.METHODS == {"personvit": PersonViTRecipe, "upreid": UPReIDRecipe}
    recipe = dataclasses.replace(SMALL, local_crops=3, global_scale=(0.3, 0.9), local_scale=(0.1, 0.2), aspect=(0.4, 0.5))
    views = train.views_of(recipe)
    assert (views.size, views.num_local, views.global_scale, views.local_scale, views.aspect) == (
        (64, 32), 3, (0.3, 0.9), (0.1, 0.2), (0.4, 0.5))
    for weights, what in ((dict(), (True, 4)), (dict(weight_global=0.0), (False, 4)), (dict(weight_local=0.0), (True, 0))):
        views = train.views_of(dataclasses.replace(SMALL_UP, **weights))
        assert (views.size, views.original, views.stripes) == ((64, 32), *what)


def test_each_step_of_each_process_has_a_stochastic_depth_of_its_own(dataset, tmp_path, monkeypatch):
    """The same one again in another run; a CPU's generator looks at 32 bits of a seed."""
    found = []
    monkeypatch.setattr(torch, "manual_seed", found.append)
    monkeypatch.setattr(train, "Batches", lambda *args: Batches(*args[:5]))  # a second process, alone
    for recipe, steps in ((SMALL, 8), (dataclasses.replace(TINY, erase="mean"), 6)):
        rows = []
        for again, seed, rank in itertools.product(range(2), (0, 1), (0, 1)):
            found.clear()
            trained(dataclasses.replace(recipe, seed=seed, epochs=2), dataset, tmp_path / f"{again}{seed}{rank}{recipe.arch}{steps}", rank=rank)
            rows.append(found[-steps:])
        assert rows[:4] == rows[4:] and len({value % 2 ** 32 for row in rows for value in row}) == 4 * steps


def test_processes_exchange_gradients_once_in_a_step(dataset, tmp_path, monkeypatch):
    """... with the last micro-batch: what DistributedDataParallel is told."""
    class Distributed(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            told.append(self.require_backward_grad_sync)
            return self.module(*args, **kwargs)

    assert "require_backward_grad_sync" in inspect.getsource(torch.nn.parallel.DistributedDataParallel.no_sync)
    monkeypatch.setattr(runs, "distributed", lambda module, runtime: Distributed(module))
    for accumulate, each in ((1, [True]), (2, [False, True])):
        told = []
        trained(dataclasses.replace(SMALL, epochs=1), dataset, tmp_path / str(accumulate), accumulate=accumulate)
        assert told == each * 4


def test_trainings_that_cannot_be(dataset, tmp_path):
    for recipe, more, message in (
            (dataclasses.replace(SMALL, batch=64), {}, "a batch of 64 needs that many images, the set has 16"),
            (dataclasses.replace(SMALL, size=(32, 16)), {}, "--size 32x16 is too small"),
            (SMALL, {"accumulate": 3}, "--batch 4 cannot be shared evenly, two images at least each, by 3 .processes"),
            (dataclasses.replace(SMALL_UP, groups=3), {}, "--batch 4 cannot be cut into --groups 3"),
            (dataclasses.replace(SMALL_UP, batch=8), {"accumulate": 4}, "--groups 2 must be a multiple of 4"),
            (dataclasses.replace(TINY, ids=9), {}, "needs 9 identities, the training set has 4"),
            (dataclasses.replace(TINY, size=(8, 8)), {}, "--size 8x8: a ViT's patches are of 16 x 16 pixels")):
        with pytest.raises(InputError, match=message):
            trained(recipe, dataset, tmp_path / "run", **more)
    assert not list((tmp_path / "run").iterdir())
    moco = dataclasses.replace(SMALL_UP, weight_local=0, weight_global=0, size=(33, 17), stripes=2, hardest=3, epochs=1,
                               groups=1)
    trained(moco, dataset, tmp_path / "run")                     # without stripes nothing is asked of them


def test_the_meter_and_the_time_of_an_evaluation_is_no_training(dataset, tmp_path, monkeypatch):
    """Speed, waiting and time left by a clock that jumps; and in a run that evaluates for an hour now and then."""
    now = [0.0]
    monkeypatch.setattr(runs.dist, "all_reduce", lambda sums: sums.mul_(2))

    class Objective:
        reference = {"ln_ids": 1.5}

        def warning(self, values):
            judged.append(values)
            return "COLLAPSE?" * (len(judged) == 1)

    def loader():
        for _ in range(4):
            now[0] += 1
            yield {"images": torch.zeros(5, 3, 4, 2), "replaced": [7]}

    judged = []
    with monkeypatch.context() as patch:
        patch.setattr(runs.time, "perf_counter", lambda: now[0])
        meter = Meter(Objective(), [None] * 100, None, Runtime(world=2, rank=1))
        batches = meter.timed(loader())
        # two steps, then one in two micro-batches: a reading starts anew, and a step has one gradient
        for steps, line in ((2, {"total": 0.5, "left": "0:01:00", "warning": "COLLAPSE?"}),
                            (1, {"total": 2.5, "left": "0:02:00"})):
            for n in range(2):
                assert next(batches)["images"].shape == (5, 3, 4, 2)
                now[0] += 1
                meter.add({"total": torch.tensor(line["total"] - 0.5 + n)})
            for _ in range(steps):
                meter.add({"grad_norm": torch.tensor(2.0)})
            assert meter.read(2, 32) == line | {
                "step": 2, "steps": 32, "grad_norm": 2.0, "broken_images": 1, "img_s": 5.0, "wait": 0.5, "ln_ids": 1.5}
        assert judged == [{"total": 0.5, "grad_norm": 2.0}, {"total": 2.5, "grad_norm": 2.0}]
    real, late = runs.time.perf_counter, [0.0]
    monkeypatch.setattr(runs.time, "perf_counter", lambda: real() + late[0])

    def evaluate_slowly(*args, **kwargs):
        late[0] += 3600
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(train, "evaluate", evaluate_slowly)
    _, run = trained(SMALL, dataset, tmp_path / "run", monitor=dataset, monitor_every=1)
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    assert late[0] == 4 * 3600 and all(line["img_s"] > 0.1 for line in lines if "img_s" in line)


# ---- run folders -----------------------------------------------------------------------------


def save_in(run: Run, name: str, content: dict) -> None:
    with run.begin():
        torch.save(content, run.folder / name)


class Part:
    """Something with a state."""

    def __init__(self, state=None):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


CHECKPOINT = {"step": 1, "log_size": 0, "seconds": 1.5, "part": {"a": 2}}


def test_run_folder_of_another_recipe(tmp_path):
    folder = tmp_path / "run"
    save_in(Run(folder, {"lr": 0.1, "size": (4, 2)}), "checkpoint_000000001.pth", CHECKPOINT)
    part = Part()
    assert Run(folder, {"lr": 0.1, "size": (4, 2)}).restore(part=part) == 1 and part.state == {"a": 2}
    with pytest.raises(InputError, match=r"another recipe \(lr: 0.1 there, 0.2 now\).*--out.*--overwrite"):
        Run(folder, {"lr": 0.2, "size": (4, 2)})
    fresh = Run(folder, {"lr": 0.2}, overwrite=True)
    assert (folder / "checkpoint_000000001.pth").exists()                  # looking deletes nothing
    with fresh.begin():
        assert fresh.restore(part=part) == 0
    (folder / "recipe.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        Run(folder, {"lr": 0.2})


def test_a_start_that_fails_leaves_no_trace(dataset, tmp_path):
    """... and above all deletes nothing, though --overwrite was given."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.pth").write_text("hours of work")
    for recipe, weights in ((dataclasses.replace(TINY, ids=100), None), (TINY, "absent.pth"),
                            (dataclasses.replace(TINY, size=(8, 8)), None)):
        with pytest.raises(InputError):
            train.fine_tune_and_evaluate(recipe, dataset, tmp_path / "run", True, weights, Runtime("cpu", 0))
    with pytest.raises(InputError, match="would delete"):
        train.fine_tune_and_evaluate(TINY, dataset, tmp_path / "run", True, tmp_path / "run" / "model.pth", Runtime())
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["model.pth"]


def test_damaged_checkpoints_are_named_and_passed_over(tmp_path, capsys):
    names = [f"checkpoint_00000000{step}.pth" for step in (1, 2, 3)]

    def last_whole(content: bytes | dict, last=names[2]) -> tuple[int, dict]:
        """Steps done and state, where the last file has become this; damaged files are deleted then."""
        if isinstance(content, bytes):
            (run.folder / last).write_bytes(content)
        else:
            save_in(run, last, content)
        part = Part()
        return run.restore(part=part), part.state

    run = Run(tmp_path / "run", {})
    save_in(run, names[0], CHECKPOINT)
    for content in ({}, {"step": 1}, [1]):
        assert last_whole(content, names[1])[0] == 1
        out = capsys.readouterr().out
        assert f"{names[1]} is damaged" in out and f"from {run.folder / names[0]}" in out
    save_in(run, names[1], CHECKPOINT | {"step": 2})
    whole = (run.folder / names[1]).read_bytes()
    for size in (*range(0, len(whole), 97), len(whole) - 1):     # as a power cut may leave it
        assert last_whole(whole[:size])[0] == 2
    for place in range(0, len(whole), 31):                       # a flipped bit is noticed, or does no harm
        step, state = last_whole(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1:])
        assert step == 2 and state == {"a": 2}
    last_whole(whole[:100])
    run.save_checkpoint(2)                                   # goes on from before the damaged one
    assert [path.name for path in run.checkpoints()] == names[1::-1]


def test_a_checkpoint_of_a_run_with_another_recipe_is_refused(tmp_path, capsys):
    """... before it is tried, as it may not fit, and kept under another name; the run goes on from its own."""
    mine, other = (Run(tmp_path / name, {"lr": lr, "size": (4, 2)}) for name, lr in (("mine", 0.1), ("other", 0.2)))
    for run, step in ((mine, 1), (other, 2)):
        run.save_checkpoint(step, part=Part({"a": step}))
    foreign = mine.folder / "checkpoint_000000002.pth"
    shutil.copy(other.folder / foreign.name, foreign)

    class TooSmall(Part):
        def load_state_dict(self, state):
            raise RuntimeError("size mismatch")

    content = foreign.read_bytes()
    for kind in (Part, TooSmall):
        own = mine.folder / "checkpoint_000000001.pth"
        if kind is TooSmall:                                      # nothing of its own is left: it starts anew
            own.unlink()
            foreign.write_bytes(content)
        part = kind()
        assert mine.restore(part=part) == (1 if kind is Part else 0)
        assert part.state == ({"a": 1} if kind is Part else None)
        assert (f"WARNING: {foreign} is of a run with another recipe (lr: 0.2 there, 0.1 now): refused, and renamed to "
                f"{foreign.name}.other") in capsys.readouterr().out
        kept = foreign.with_name(f"{foreign.name}.other")
        assert not foreign.exists() and kept.read_bytes() == content


@pytest.mark.parametrize("recipe", [TINY, dataclasses.replace(TINY, arch="resnet_tiny", erase="mean"), SMALL, SMALL_UP],
                         ids=["fine-tuning", "ResNet", "PersonViT", "UP-ReID"])
def test_a_checkpoint_that_says_of_no_run_is_gone_on_from(dataset, tmp_path, capsys, recipe):
    """Those of versions before did not; a warning says what differs. As it was written here, all is equal."""
    recipe = dataclasses.replace(recipe, epochs=1)
    whole, run = trained(recipe, dataset, tmp_path / "run", save_every=1)
    for path in [run.checkpoints()[0], *run.folder.glob("[bm]*.pth")]:
        path.unlink()
    [last] = run.checkpoints()
    state = torch.load(last, weights_only=True)
    assert state.pop("run") == run.recipe
    torch.save(state, last)
    assert "WARNING: /" not in capsys.readouterr().out
    again, _ = trained(recipe, dataset, tmp_path / "run", save_every=1)
    said = capsys.readouterr().out
    assert f"WARNING: {last} was written by an earlier version" in said and f"going on at step {state['step']} from" in said
    assert same_weights(whole, again)


def test_no_checkpoint_is_whole(tmp_path):
    run = Run(tmp_path / "run", {})
    for step in (1, 2):
        save_in(run, f"checkpoint_00000000{step}.pth", {"step": step})
    with pytest.raises(InputError, match="000000002.pth: no checkpoint is whole .*--overwrite starts"):
        run.restore(part=Part())
    for path in run.checkpoints():
        path.unlink()
    save_in(run, "backbone.pth", b"of a run that was finished")   # its large checkpoints were deleted: it is not begun anew
    with pytest.raises(InputError, match="backbone.pth: no checkpoint is whole .*--overwrite starts"):
        run.restore(part=Part())
    (tmp_path / "run" / "backbone.pth").unlink()
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 20}\n{"step": 40}\n')  # of a run without a checkpoint
    assert run.restore(part=Part()) == 0 and not run.log_file.read_text()


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), MemoryError(), OSError(24, "Too many open files"),
                                   torch.OutOfMemoryError("CUDA out of memory")])
def test_a_checkpoint_that_cannot_be_read_now_is_not_damaged(tmp_path, monkeypatch, error):
    """... and not deleted for an older one."""
    run = Run(tmp_path / "run", {})
    for step in (1, 2):
        save_in(run, f"checkpoint_00000000{step}.pth", CHECKPOINT | {"step": step})
    monkeypatch.setattr(runs, "read_checkpoint", lambda _: raise_(error))
    with pytest.raises(type(error)):
        run.restore(part=Part())
    monkeypatch.setattr(runs, "read_checkpoint", lambda _: raise_(EOFError()))      # but this one is
    with pytest.raises(InputError, match="no checkpoint is whole"):
        run.restore(part=Part())
    monkeypatch.undo()
    assert run.restore(part=Part()) == 2


def raise_(error):
    raise error


def test_the_log_is_cut_to_its_checkpoint(tmp_path):
    run = Run(tmp_path / "run", {})
    with run.begin():
        run.log(step=1, total=0.123456789)
        run.save_checkpoint(1)
        run.log(step=2)
    assert run.log_file.read_text() == '{"step": 1, "total": 0.12346}\n{"step": 2}\n'
    assert run.restore() == 1 and run.log_file.read_text() == '{"step": 1, "total": 0.12346}\n'
    run.log_file.write_text('{"step"')                            # what a power cut has left of it
    assert run.restore() == 1 and run.log_file.read_text() == '{"step"'
    # a person's own lines stay, and make none of the run's unreadable
    run.log_file.write_text('{"step": 1, "total": 0.12346}\nlr was too high\n')
    run.save_checkpoint(2)
    with open(run.log_file, "a") as log:
        log.write('{"step": 3}\n\nnow with --lr 0.1\n  {}\n{"step": 4}\nand a coffee')
    for _ in range(2):
        assert run.restore() == 2
        assert run.log_file.read_text() == ('{"step": 1, "total": 0.12346}\nlr was too high\nnow with --lr 0.1\n  {}\n'
                                            'and a coffee\n')
    run.log(step=3)
    assert run.log_file.read_text().endswith('and a coffee\n{"step": 3}\n')
    run.log_file.write_text('{"step"')
    other = Run(tmp_path / "run", {}, rank=1)                     # other processes than the first write nothing
    other.log(step=3), other.save("model.pth", {}), other.save_checkpoint(3)
    assert sorted(p.name for p in run.folder.iterdir()) == [
        "checkpoint_000000001.pth", "checkpoint_000000002.pth", "lock", "log.jsonl", "recipe.json"]
    assert run.log_file.read_text() == '{"step"'


def test_the_table_of_contents_of_a_checkpoint(tmp_path):
    """PyTorch would read memory as weights where a bit of an entry's attributes has flipped."""
    run, part = Run(tmp_path / "run", {}), torch.nn.Linear(3, 2)
    for step in (1, 2):
        run.save_checkpoint(step, part=part)
    last = run.checkpoints()[0]
    whole = last.read_bytes()
    for place in range(whole.index(b"PK\1\2"), len(whole)):     # of its eight entries each another bit of a byte
        for bit in (place % 8, (place + 3) % 8):
            last.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1:])
            read = torch.nn.Linear(3, 2)
            assert run.restore(part=read) in (1, 2) and torch.equal(read.weight, part.weight)


def test_other_files_are_no_checkpoints(tmp_path):
    run = Run(tmp_path / "run", {})
    (run.folder / "checkpoint_best.pth").write_text("mine")
    (run.folder / "checkpoint_dir.pth").mkdir()
    for step in (1, 2, 3):
        run.save_checkpoint(step)
    with Run(tmp_path / "run", {}, overwrite=True).begin():
        names = sorted(p.name for p in run.folder.iterdir())
    assert names == ["checkpoint_best.pth", "checkpoint_dir.pth", "lock", "recipe.json"]


def test_a_file_called_lock_keeps_its_content(tmp_path):
    (tmp_path / "lock").write_text("precious")
    with Run(tmp_path, {}).begin():
        assert (tmp_path / "lock").read_text() == "precious"


def test_the_last_two_checkpoints_are_kept(tmp_path):
    run = Run(tmp_path / "run", {})
    for step in (5, 10, 99, 100, 1000):
        run.save_checkpoint(step)
    assert [int(path.stem[-9:]) for path in run.checkpoints()] == [1000, 100]


def test_what_a_killed_process_was_writing_is_swept_away(tmp_path):
    run = Run(tmp_path / "run", {})
    for name in ("checkpoint_000000001.pth.77.partial", "model.pth.78.partial", "mine.partial"):
        (run.folder / name).write_text("half")
    with run.begin():
        assert sorted(p.name for p in run.folder.iterdir()) == ["lock", "mine.partial", "recipe.json"]


def test_a_run_that_waited_sees_what_was_trained_meanwhile(tmp_path):
    first, second, third = (Run(tmp_path / "other", {"lr": lr}) for lr in (1, 2, 1))   # all see an empty folder
    with first.begin():
        pass
    with pytest.raises(InputError, match="another recipe .lr: 1 there, 2 now"):
        with second.begin():
            pass
    with third.begin():
        pass


def test_an_evaluation_that_was_interrupted_is_made_up_for(dataset, tmp_path, monkeypatch):
    """All is saved before it: the same command evaluates, and trains nothing anew; the next finds the results."""
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.fine_tune_and_evaluate(TINY, dataset, tmp_path / "run", False, None, Runtime("cpu", 0))
    before = (tmp_path / "run" / "model.pth").read_bytes()
    monkeypatch.setattr(train, "evaluate", evaluate)
    monkeypatch.setattr(FineTuning, "forward", interrupted)
    results = train.fine_tune_and_evaluate(TINY, dataset, tmp_path / "run", False, None, Runtime("cpu", 0))
    assert results["mAP"] > 0 and results["valid"] == results["queries"] == 4
    monkeypatch.setattr(train, "evaluate", interrupted)
    assert train.fine_tune_and_evaluate(TINY, dataset, tmp_path / "run", False, None, Runtime("cpu", 0)) == results
    assert (tmp_path / "run" / "model.pth").read_bytes() == before


def test_a_file_system_without_locks_is_said_not_refused(tmp_path, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr("fcntl.lockf", lockf)
    with Run(tmp_path / "run", {}, False).begin():
        assert "WARNING: no locks in" in (out := capsys.readouterr().out) and "Function not implemented)" in out


def test_other_weights_of_the_same_name_are_another_run(dataset, tmp_path):
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(build_backbone("vit_mini", (32, 16)).state_dict(), tmp_path / "weights.pth")
        arguments = dataclasses.replace(TINY, epochs=1), dataset, tmp_path / "run", False, tmp_path / "weights.pth", Runtime("cpu", 0)
        if seed:
            with pytest.raises(InputError, match="another recipe .weights: weights.pth [0-9a-f]{12} there, weights"):
                train.fine_tune_and_evaluate(*arguments)
        else:
            train.fine_tune_and_evaluate(*arguments)


def test_files_of_the_user_are_kept(tmp_path):
    (tmp_path / "model.pth").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine too")
    with pytest.raises(InputError, match="recipe.json absent or damaged beside model.pth"):
        Run(tmp_path, {})
    with Run(tmp_path, {}, overwrite=True).begin():
        assert (tmp_path / "notes.txt").exists() and not (tmp_path / "model.pth").exists()


def test_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    run = Run(tmp_path / "run", {})
    save_in(run, "checkpoint_000000001.pth", CHECKPOINT)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        run.save_checkpoint(2)
    assert run.restore(part=Part()) == 1
    assert not list(run.folder.glob("*.partial"))


def test_other_data_is_another_run(dataset, tmp_path):
    runtime = Runtime("cpu", 0)
    run = runs.open_run(tmp_path / "run", TINY, dataset, False, runtime)
    with run.begin():
        pass
    runs.open_run(tmp_path / "run", TINY, dataset, False, runtime)
    fewer = dataclasses.replace(dataset, train=dataset.train[1:])
    with pytest.raises(InputError, match="another recipe .data: 16 images"):
        runs.open_run(tmp_path / "run", TINY, fewer, False, runtime)


def test_unlabelled_images_are_no_training_set(tmp_path):
    for name in ("cover.jpg", "back.jpg"):
        stress.write_image(tmp_path / "crops" / name)
    with pytest.raises(InputError, match="without identity"):
        train.fine_tune_and_evaluate(TINY, load_dataset(str(tmp_path / "crops")), tmp_path / "run", False, None, Runtime())


# ---- held-out people -------------------------------------------------------------------------


@TRAININGS
def test_looking_at_held_out_people_changes_nothing(market, tmp_path, recipe):
    """No random number, no running statistic, no mode: the weights are those of a run that does not look."""
    market_tree(market, ids=6)
    held = hold_out(load_dataset("market1501", market), 2)
    watched = dataclasses.replace(held, name="held-out")
    alone, _ = trained(recipe, held, tmp_path / "alone")
    seen, run = trained(recipe, held, tmp_path / "seen", monitor=watched, monitor_every=1)
    assert same_weights(alone, seen)
    lines = [line for line in log_lines(run.folder) if "monitor" in line]
    assert [line["epoch"] for line in lines] == list(range(recipe.epochs + 1))
    assert all(line["monitor"] == "held-out" and 0 < line["mAP"] <= 1 and "rank1" in line for line in lines)
    assert log_lines(tmp_path / "alone") == [line for line in log_lines(run.folder) if "monitor" not in line]


def test_a_fine_tuning_looks_in_training_mode_at_what_evaluation_sees(market, tmp_path, monkeypatch):
    market_tree(market, ids=6)
    held = hold_out(load_dataset("market1501", market), 2)
    modes = []
    usual = FineTuning.forward
    monkeypatch.setattr(FineTuning, "forward", lambda self, *args: modes.append(self.model.training) or usual(self, *args))
    model, run = trained(TINY, held, tmp_path / "run", monitor=held, monitor_every=2)
    assert modes and all(modes)
    result, _, _ = evaluate(model, held, train.stored(TINY, held), workers=0)
    last = log_lines(run.folder)[-1]
    assert last["monitor"] == "market1501" and last["mAP"] == pytest.approx(result.mAP, rel=1e-4)


def test_results_are_of_the_held_out_people(market, tmp_path, capsys, monkeypatch):
    market_tree(market, ids=6)
    sets = []
    monkeypatch.setattr(train, "evaluate", lambda model, dataset, *args, **kwargs: (
        sets.append(dataset), evaluate(model, dataset, *args, **kwargs))[1])
    flags = ["--dataset", str(market), "--arch", "vit_mini", "--size", "32x16", "--epochs", "1", "--warmup", "0", "--ids", "3",
             "--images", "2", "--workers", "0", "--threads", "1", "--device", "cpu"]
    train.main([*flags, "--held-out", "2", "--labelled", "0.75", "--monitor", "held-out", "--out", str(tmp_path / "held")])
    who = "2 held-out training people of market1501"
    results = json.loads((tmp_path / "held" / "results.json").read_text())
    assert results["people"] == results["verification"]["people"] == who and f"read off {who}" in capsys.readouterr().out
    held = hold_out(load_dataset("market1501", market), 2)
    assert len(sets) == 3 and all(part.query == held.query and part.gallery == held.gallery for part in sets)
    assert json.loads((tmp_path / "held" / "recipe.json").read_text())["people"] == who
    content = torch.load(tmp_path / "held" / "model.pth")
    assert content["model"]["classifier.weight"].shape[0] == 3   # three quarters of the four who are left
    assert content["run"]["people"] == who
    with pytest.raises(InputError, match=f"people: {who} there, the test set now"):
        train.main([*flags, "--out", str(tmp_path / "held")])
    train.main([*flags, "--out", str(tmp_path / "whole")])
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert results["people"] == results["verification"]["people"] == "the test set"
    recipe = tmp_path / "whole" / "recipe.json"                  # of a version that held nobody out
    recipe.write_text(json.dumps({k: v for k, v in json.loads(recipe.read_text()).items() if k != "people"}))
    train.main([*flags, "--out", str(tmp_path / "whole")])
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(InputError, match=f"people: the test set there, {who} now"):
        train.main([*flags, "--held-out", "2", "--out", str(tmp_path / "whole")])


def test_weights_that_have_seen_the_held_out_people_are_refused_or_marked(market, tmp_path, capsys):
    market_tree(market, ids=6)
    common = ["--dataset", "market1501", "--data-root", str(market), "--size", "64x32", "--workers", "0", "--threads", "1", "--device", "cpu"]
    pre = [*common, "--pretrain", "upreid", "--arch", "resnet_tiny", "--epochs", "1", "--batch", "4", "--queue", "10", "--groups", "2"]
    for n in (0, 2):
        train.main([*pre, "--held-out", str(n), "--out", str(tmp_path / f"pre{n}")])
        assert f"--held-out {n}" in capsys.readouterr().out.splitlines()[-1] or n == 0
    fine = [*common, "--arch", "resnet_tiny", "--epochs", "0", "--ids", "3", "--images", "2", "--held-out", "2"]

    def people(weights, out: str, *flags) -> str:
        train.main([*fine, *flags, "--weights", str(weights), "--out", str(tmp_path / out)])
        return json.loads((tmp_path / out / "results.json").read_text())["people"]

    good, bad = tmp_path / "pre2" / "backbone.pth", tmp_path / "pre0" / "backbone.pth"
    who = "2 held-out training people of market1501"
    assert people(good, "a") == people(tmp_path / "a" / "model.pth", "b") == who
    for weights, flags in ((bad, []), (good, ["--held-out", "3"])):
        with pytest.raises(InputError, match="it may have seen people who are held out here$"):
            people(weights, "c", *flags)
    assert not (tmp_path / "c").exists()
    content = torch.load(bad)
    del content["run"]                                           # as an earlier version, or somebody else, wrote it
    torch.save(content, tmp_path / "old.pth")
    assert people(tmp_path / "old.pth", "d") == f"{who}, weights trained on unknown data"
    assert people(tmp_path / "d" / "model.pth", "e") == f"{who}, weights trained on unknown data"   # the mark is inherited
    fine[1:4] = str(market), "--data-root", "."                  # a folder: there are many, so that nobody can tell
    assert people(bad, "f") == f"{who}, weights trained on market1501"


# ---- command line ----------------------------------------------------------------------------


@pytest.mark.parametrize("flags, message", [("upreid --stripes 7", "the height cannot be cut into --stripes 7"),
                                            ("upreid --hardest 9", "--hardest 9"), ("personvit --size 8x8", "--size 8x8 is too small"),
                                            ("personvit --batch 1", "--batch 1 cannot be shared")])
def test_no_sheet_of_what_cannot_be_trained(market, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        train.main([*f"--pretrain {flags} --dataset {market} --device cpu --workers 0".split(), "--sheet", str(tmp_path / "s.png")])
    assert not (tmp_path / "s.png").exists()


@pytest.mark.parametrize("flags", [["--arch", "vit_mini", "--ids", "3", "--images", "2", "--labelled", "0.75"],
                                   ["--arch", "vit_mini", "--ids", "3", "--images", "2", "--erase", "mean"],
                                   ["--pretrain", "personvit", "--arch", "vit_mini", "--batch", "6", "--local-crops", "3"],
                                   ["--pretrain", "personvit", "--arch", "vit_mini", "--batch", "6", "--no-masks", "--local-crops", "0"],
                                   ["--pretrain", "upreid", "--arch", "resnet_tiny", "--batch", "8"],
                                   ["--pretrain", "upreid", "--arch", "resnet_tiny", "--batch", "8", "--weight-local", "0"]])
def test_a_sheet_shows_what_the_loop_gets(market, tmp_path, monkeypatch, flags):
    """... to the bit, and no training begins."""
    monkeypatch.chdir(tmp_path)
    flags = [*flags, "--dataset", str(market), "--size", "64x32", "--workers", "0", "--threads", "1", "--device", "cpu", "--no-bf16"]
    drawn = []
    usual = pictures.first_views
    monkeypatch.setattr(pictures, "first_views", lambda *args: drawn.append(usual(*args)) or drawn[0])
    train.main([*flags, "--sheet", "sheet.png"])
    assert [p.name for p in tmp_path.iterdir() if p != market] == ["sheet.png"]
    picture = Image.open("sheet.png")
    seen, shown = [], drawn[0]
    for module in (FineTuning, PersonViT, UPReID):
        monkeypatch.setattr(module, "forward", lambda self, *args, **settings: seen.append(args[0]) or {}["done"])
    with pytest.raises(KeyError, match="done"):
        train.main(flags)
    views = {"augmented": seen[0]} if isinstance(seen[0], torch.Tensor) else seen[0]
    assert shown.keys() - {"image"} == views.keys() and all(torch.equal(view, shown[name]) for name, view in views.items())
    assert ("masks" in views) == ("personvit" in flags)
    assert "masks" not in views or views["masks"].any() == ("--no-masks" not in flags)
    columns = {"augmented": 2, "globals": 2, "locals": len(views.get("locals", ())), "masks": 0}
    columns = sum(columns.get(name, 1) for name in shown)
    assert picture.width >= columns * (pictures.W + pictures.GAP)
    if "augmented" in shown:                                     # the second cell of the first row
        second, norm = shown["augmented"][1], train.NORMS["half"]
    elif "globals" in shown:
        second, norm = shown["globals"][0, 0], train.NORMS["imagenet"]
    else:
        second, norm = shown["first"][0], (LUP_MEAN, LUP_STD)
    mean, std = (torch.tensor(values)[:, None, None] for values in norm)
    wanted = ((second * std + mean).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    x, y = pictures.Sheet(columns, 1, "").place(1, 0)
    found = np.asarray(picture)[y:y + pictures.H:2, x:x + pictures.W:2]      # drawn twice as large as 64 x 32
    same = (np.abs(found.astype(int) - wanted) < 2).all(2)
    masked = np.zeros((64, 32), bool)
    if "masks" in shown:
        masked = np.kron(shown["masks"][0, 0], np.ones((16, 16), bool))
    assert same[~masked].all() and (same & masked).sum() <= masked.sum() / 4


def test_mistakes_get_one_line(tmp_path, monkeypatch):
    market_tree(tmp_path / "market1501")
    (tmp_path / "file").write_text("")
    market = ["--dataset", "market1501", "--data-root", tmp_path]
    for args, words in [(["--dataset", "msmt"], "did you mean msmt17"),
                        (market, "needs 16 identities, the training set has 4"),
                        ([*market, "--ids", 2, "--weights", tmp_path / "no.pth"], "no.pth"),
                        ([*market, "--ids", 2, "--size", "8x8"], "--size 8x8"),
                        ([*market, "--ids", 2, "--out", tmp_path / "file" / "run"], "file"),
                        ([*market, "--pretrain", "personvit", "--batch", 64], "needs that many images, the set has 16"),
                        ([*market, "--pretrain", "upreid", "--batch", 4, "--groups", 3], "be cut into --groups 3")]:
        done = command("--out", tmp_path / "run", "--overwrite", "--threads", 1, *args)
        assert done.returncode == 1 and re.search(words, done.stderr), done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("run/*"))
    done = command(*market, env=os.environ | {"WORLD_SIZE": "2"})
    assert done.returncode == 1 and done.stderr.startswith("error: WORLD_SIZE is set, but not all of torchrun's var")
    torchrun = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "4"}
    for name, value in (("RANK", "x"), ("MASTER_PORT", ""), ("MASTER_ADDR", "")):
        for key in torchrun:
            monkeypatch.setenv(key, value if key == name else torchrun[key])
        with pytest.raises(InputError, match="not all of torchrun's variables"):
            runs.join_processes(Runtime())


@pytest.mark.parametrize("args, words", [
    ("--size 256", "--size"), ("--device tpu", "argument --device"), ("--margin wide", "--margin"),
    ("--workers -1", "--workers -1: must be at least 0"), ("--threads 100000", "--threads 100000: must be"), ("--threads 0", "--threads 0: must be more than 0"),
    ("--save-every 0", "more than 0"), ("--lr nan", "must be"), ("--lr inf", "must be"), ("--out=", "must be"),
    ("--monitor market1501", "are for --pretrain"), ("--accum 2", "are for --pretrain"), ("--keep-every 1", "are for"),
    ("--monitor held-out", "--monitor held-out needs --held-out N"), ("--held-out -1", "--held-out -1: must be at least 0"),
    ("--monitor held-out --pretrain upreid", "needs --held-out N"), ("--sheet a.jpg", "--sheet a.jpg: the file is a PNG"),
    ("--sheet absent/a.png", "--sheet absent/a.png: its folder is absent"),
    ("--accum 0 --pretrain upreid", "--accum 0: must be more than 0"), ("--smoothing 2", "at most 1"), ("--drop-path 1", "at most 0.99"),
    ("--pretrain personvit --aspect 0x1", "--aspect (0, 1): must be more than 0"),
    ("--pretr personvit", "unrecognized arguments: --pretr"),
    ("--optimizer adm", "invalid choice: 'adm'"), ("--arch resnet5", "invalid choice: 'resnet5'"),
    ("--pretrain personvit --arch resnet50", "invalid choice: 'resnet50'"), ("--pretrain dino", "invalid choice"),
    ("--prototypes 9", "unrecognized arguments: --prototypes"), ("--size 64.5x32", "--size (64.5, 32.0): two whole numbers"),
    ("--size 4x4", "from 8 to 4096"), ("--size 8192x64", "from 8 to 4096"), ("--size 64x", "--size: '64x' is not two numbers like 256x128"),
    ("--pretrain upreid --temperature-local 0", "must be more than 0"), ("--pretrain personvit --teacher-temp-end 0", "more than 0")])
def test_mistakes_on_the_command_line(args, words, capsys):
    with pytest.raises(SystemExit) as caught:
        train.parse_args(args.split())
    assert caught.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("missing", ["query", "bounding_box_test"])
def test_what_cannot_be_evaluated_is_trained_all_the_same(market, tmp_path, capsys, missing):
    shutil.rmtree(market / missing)
    done = train.fine_tune_and_evaluate(dataclasses.replace(TINY, epochs=1), load_dataset("market1501", market), tmp_path / "run", False,
                                        None, Runtime("cpu", 0))
    assert done is None and (tmp_path / "run" / "model.pth").exists()
    assert "has no queries, or no gallery, to evaluate it with" in capsys.readouterr().out
    # ... but a monitor must be able to look, which is said before anything is deleted
    with pytest.raises(InputError, match="--monitor .*: it has no queries, or no gallery"):
        train.main(["--pretrain", "personvit", "--arch", "vit_mini", "--dataset", str(market), "--monitor", str(market), "--out",
                    str(tmp_path / "run"), "--overwrite"])
    assert (tmp_path / "run" / "model.pth").exists()


def test_damaged_results_are_measured_again(dataset, tmp_path, capsys):
    def run():
        return train.fine_tune_and_evaluate(dataclasses.replace(TINY, epochs=1), dataset, tmp_path, False, None, Runtime("cpu", 0))

    first = run()
    for content in (b"", b"{\"mAP\": 0.", b"\xff\xfe", b"{}", b"null", b"[]", b"{\"mAP\": NaN}", b"[" * 100_000):
        (tmp_path / "results.json").write_bytes(content)
        capsys.readouterr()
        assert run() == first and "going on at step" in capsys.readouterr().out
    assert run() == first and "is finished; --overwrite starts over" in capsys.readouterr().out


def test_results_of_weights_that_are_gone_are_not_written(dataset, tmp_path, monkeypatch):
    """The same recipe, started over by another process while this one evaluates."""
    def taken_over(*args, **kwargs):
        (tmp_path / "model.pth").unlink()
        return measure(*args, **kwargs)

    measure = train.evaluate
    monkeypatch.setattr(train, "evaluate", taken_over)
    with pytest.raises(FileNotFoundError, match="model.pth"):
        train.fine_tune_and_evaluate(dataclasses.replace(TINY, epochs=1), dataset, tmp_path, False, None, Runtime("cpu", 0))
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("recipe", [dataclasses.replace(TINY, epochs=0), dataclasses.replace(SMALL_UP, epochs=0)], ids=["fine", "pre"])
def test_a_run_of_no_epochs_goes_on_like_any_other(recipe, dataset, tmp_path, capsys):
    """Its weights are written without a checkpoint; and, as here, no results show that it is finished."""
    dataset = dataclasses.replace(dataset, query=[])
    for turn in range(2):
        if recipe.arch == "vit_mini":
            assert train.fine_tune_and_evaluate(recipe, dataset, tmp_path, False, None, Runtime("cpu", 0)) is None
        else:
            run = runs.open_run(tmp_path, recipe, dataset, False, Runtime("cpu", 0), pretrain="upreid")
            train.pretrain(recipe, dataset, run, Runtime("cpu", 0))
        assert len([*tmp_path.glob("[mb]*.pth")]) == 1 and not [*tmp_path.glob("checkpoint*")]


METHODS = pytest.mark.parametrize("flags", [[], ["--pretrain", "personvit"], ["--pretrain", "upreid"]],
                                  ids=["fine-tuning", "PersonViT", "UP-ReID"])


@METHODS
def test_numbers_that_make_no_sense(flags, capsys):
    _, recipe = train.parse_args(flags)
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        numeric = not isinstance(value, (bool, str)) or field.name == "margin"
        for bad in ("nan", "inf", "-1", "-0.5") if numeric else ("ja",):
            bad = f"{bad}x{bad}" if isinstance(value, tuple) else bad
            flag = f"--{field.name.replace('_', '-')}"
            with pytest.raises(SystemExit) as caught:
                train.parse_args([*flags, f"{flag}={bad}"])
            assert caught.value.code == 2 and flag in capsys.readouterr().err.splitlines()[-1]


@METHODS
@pytest.mark.parametrize("line", ["", "--dataset market1501", "--dataset data/luperson", "--dataset lists/luperson.txt",
                                  "--dataset synthetic --device cpu", "--dataset msmt17 --arch {arch}"])
def test_help_shows_the_values_that_the_line_would_get(flags, line, capsys):
    """... each with what it is and, where a paper or code names it, the source; and few flags beside them."""
    kind = train.METHODS.get(flags[-1], Recipe) if flags else Recipe
    arch = "resnet50" if kind is UPReIDRecipe else "vit_base"
    argv = [*flags, *line.format(arch=arch).split()]
    with pytest.raises(SystemExit) as caught:
        train.parse_args([*argv, "--help"])
    assert caught.value.code == 0
    beside, of_recipe = re.split(r"\nrecipe:\n", capsys.readouterr().out)
    assert len(re.findall(r"^  (?:-h, )?--[a-z]", beside, re.M)) <= 20
    shown = dict(re.findall(r"^  --([a-z0-9-]+)\b(.*?)(?=^  --|\Z)", of_recipe, re.M | re.S))
    shown = {name: " ".join(text.split()) for name, text in shown.items()}
    recipe = train.parse_args(argv)[1]
    assert list(shown) == [field.name.replace("_", "-") for field in dataclasses.fields(recipe)]
    for name, text in shown.items():
        value = getattr(recipe, name.replace("-", "_"))
        value = "x".join(map(str, value)) if isinstance(value, tuple) else "none" if value is None else value
        assert text.endswith(f"(default: {value})"), text
        # fine-tuning's are PersonViT's own, as the recipe's first line says, unless another source is named
        source = re.search(r"\[[A-Za-z][^\]]*\]", text) or kind is Recipe and "[PersonViT code]" in kind.__doc__
        assert source or name in ("seed", "bf16"), text
    name = Path((re.findall(r"--dataset (\S+)", line) or ["synthetic"])[0]).stem
    usual = kind.preset(name, arch if "--arch" in line else None)
    assert dataclasses.replace(recipe, bf16=False) == usual
    changed = train.parse_args([*argv, "--seed", "7", "--size", "64x32", "--bf16", "--lr", "0.5"])[1]
    assert changed == dataclasses.replace(usual, seed=7, size=(64, 32), bf16=True, lr=0.5)


# ---- processes -------------------------------------------------------------------------------


def small_run(tmp_path, epochs: int) -> list:
    """Flags of a fine-tuning of 2 steps per epoch."""
    market_tree(tmp_path / "market1501", ids=5, images=3)
    return ["--dataset", tmp_path / "market1501", "--arch", "vit_mini", "--size", "64x32", "--ids", 4, "--images", 4,
            "--workers", 0, "--threads", 1, "--device", "cpu", "--drop-path", 0, "--save-every", 2, "--epochs", epochs]


def test_stops_say_where_the_checkpoint_is_and_the_same_command_goes_on(tmp_path):
    """A stop by Ctrl-C, by SIGTERM, and by both, sent to the workers too; no second process meanwhile."""
    flags = [*small_run(tmp_path, 50_000), "--workers", 1, "--save-every", 5000, "--out", tmp_path / "run"]
    stopped = None
    for signals in ([signal.SIGINT], [signal.SIGTERM], [signal.SIGTERM, signal.SIGINT]):
        process = Script(*flags)
        process.wait_for('"step"')
        assert stopped is None or f"going on at step {stopped:,} from" in process.printed("out")
        if stopped is None:
            second = command(*flags)
            assert second.returncode == 1 and second.stderr.startswith("error: another process is training in")
        for number in signals:
            process.signal(number, group=True)                   # as terminals and schedulers do
        done = process.end()
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert done.stderr.count("stopping after this step") == 1
        found = re.search(r"stopped after step ([\d,]+) of 100,000; .*checkpoint_\d+.pth", done.stderr)
        assert found or len(signals) == 2 and "interrupted" in done.stderr, done.stderr  # the second may come in time
        stopped = int(found[1].replace(",", "")) if found else stopped
    done = command(*flags, "--epochs", 50_001)
    assert done.returncode == 1 and "epochs: 50000 there, 50001 now" in done.stderr


@pytest.mark.parametrize("kind", stress.RUNS)
def test_killed_at_random_moments(tmp_path, kind):
    """`make stress` does the same twenty times; kill_often raises unless all is equal, to the last bit."""
    assert f"{kind}: 3 kills" in stress.kill_often(kind, tmp_path, kills=3, seed=1)


FLAGS = {"PersonViT": ["--pretrain", "personvit", "--arch", "vit_mini", "--batch", 8, "--epochs", 4, "--prototypes", 16,
                       "--hidden", 16, "--bottleneck", 8, "--local-crops", 2, "--drop-path", 0],
         "UP-ReID": ["--pretrain", "upreid", "--arch", "resnet_tiny", "--batch", 8, "--epochs", 4, "--queue", 20,
                     "--groups", 4, "--lr", 0.01],
         "fine-tuning": ["--arch", "vit_mini", "--ids", 4, "--images", 4, "--epochs", 4, "--drop-path", 0]}


@pytest.mark.parametrize("kind", FLAGS)
def test_two_processes_equal_one(tmp_path, kind):
    """The same global batches, one network: all weights, the queue and what is logged, up to rounding; also where a run
    goes on with another number of processes, and in several micro-batches."""
    ids = 5 if kind == "fine-tuning" else 4                      # two steps an epoch
    market = market_tree(tmp_path / "market1501", ids=ids, images=4)
    flags = [*FLAGS[kind], "--dataset", market, "--size", "64x32", "--workers", 0, "--threads", 1, "--device", "cpu",
             "--save-every", 4] + (["--monitor", market] if ids == 4 else [])

    def run(name: str, *more, **how) -> tuple[dict, list]:
        done = command(*flags, *more, "--out", tmp_path / name, script=DOUBLE, **how)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("run ") == done.stdout.count("saved ") == 1       # the first process speaks for all
        if "-" in name:
            assert "going on at step 4 from" in done.stdout
        return torch.load(tmp_path / name / "checkpoint_000000008.pth", weights_only=True), log_lines(tmp_path / name)

    def half(name: str) -> str:
        """A copy of a run as it was after four steps."""
        shutil.copytree(tmp_path / name, tmp_path / f"{name}-half")
        for path in [*tmp_path.glob(f"{name}-half/*8.pth"), *tmp_path.glob(f"{name}-half/results.json")]:
            path.unlink()
        return f"{name}-half"

    one, log = run("one")
    others = [run("two", processes=2), run(half("one"), processes=2), run(half("two"))]
    others += [run("micro", "--accum", 2, processes=2)] if kind == "PersonViT" else []
    for other, other_log in others:
        assert one["step"] == other["step"] == 8
        assert_equal_states(one["model"], other["model"])
        for a, b in zip(log, other_log, strict=True):
            assert all(a[name] == b[name] for name in COMPARABLE & set(a))
    if kind == "fine-tuning":
        results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two", "one-half")]
        assert all(r[key] == results[0][key] for r in results for key in ("mAP", "cmc", "valid", "queries"))


SPLIT = """import sys; sys.path.insert(0, {tests!r})
from double import use_doubles, use_tiny_networks
use_doubles()
use_tiny_networks()
import train, upreid
from extra.files import command_line
upreid.UPReID.shuffle = False
command_line(train.main)
"""


def test_micro_batches_of_several_processes_equal_one_step_of_upreid(tmp_path):
    """... whose keys share batch statistics with other images unless shuffling is off."""
    (tmp_path / "split.py").write_text(SPLIT.format(tests=str(ROOT / "tests")))
    flags = [*FLAGS["UP-ReID"], "--dataset", market_tree(tmp_path / "market1501"), "--size", "64x32", "--workers", 0,
             "--threads", 1, "--device", "cpu", "--batch", 16, "--queue", 48]
    states = []
    for name, more, how in (("one", [], {}), ("four", ["--accum", 2], {"processes": 2})):
        done = command(*flags, *more, "--out", tmp_path / name, script=tmp_path / "split.py", **how)
        assert done.returncode == 0, done.stderr
        states.append(torch.load(tmp_path / name / "checkpoint_000000004.pth", weights_only=True)["model"])
        keys = states[-1].pop("queue").unflatten(0, (3, 16))      # of a step the keys of a micro-batch stand together
        states[-1]["keys"] = torch.stack([step[step[:, 0].argsort()] for step in keys])
    assert_equal_states(*states)


def test_a_port_that_another_run_has_is_said_in_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = command(*small_run(tmp_path, 1), "--out", tmp_path / "run", env=os.environ | {
            "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": port})
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: another run has this port: torchrun --master-port")


@pytest.mark.parametrize("asked", [0, 1])
def test_a_process_that_is_asked_to_stop_stops_all(tmp_path, asked):
    """After the same step, of which the first process saves the state."""
    script = Script(*small_run(tmp_path, 50_000), "--save-every", 5000, "--out", tmp_path / "run", processes=2)
    script.wait_for('"step"')
    script.signal(signal.SIGTERM, asked)
    done = script.end()
    assert done.codes == [1, 1] and "Traceback" not in done.stderr
    stopped = re.search(r"stopped after step ([\d,]+) of 100,000; .*checkpoint_(\d+).pth has it", done.stderr)
    assert int(stopped[1].replace(",", "")) == int(stopped[2])
    assert [int(path.stem[-9:]) for path in (tmp_path / "run").glob("*.pth")] == [int(stopped[2])]


def test_a_resnet_is_not_fine_tuned_in_several_processes_of_a_cpu(tmp_path):
    done = command(*small_run(tmp_path, 1), "--arch", "resnet_tiny", "--out", tmp_path / "run", processes=2)
    lines = done.stderr.splitlines()
    assert done.codes == [1, 1] and len(lines) == 2
    assert all("batch norm over several processes needs GPUs" in line for line in lines)
    assert not list((tmp_path / "run").iterdir())


def test_two_machines_equal_one(tmp_path):
    """Two node agents of torchrun, here on one machine, joined as the README says."""
    flags = small_run(tmp_path, epochs=2)
    assert command(*flags, "--out", tmp_path / "one", script=DOUBLE).returncode == 0
    for attempt in range(3):                                     # another process may take the port meanwhile
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher = ["--nnodes", 2, "--master-addr", "127.0.0.1", "--master-port", port, "--nproc-per-node", 1]
        nodes = [torchrun([*launcher, "--node-rank", n], DOUBLE, [*flags, "--out", tmp_path / f"two{attempt}"])
                 for n in (0, 1)]
        errors = [node.communicate(timeout=PATIENCE)[1] for node in nodes]
        if not any("EADDRINUSE" in error or "address already in use" in error for error in errors):
            break
    assert [node.returncode for node in nodes] == [0, 0], errors
    one, two = (torch.load(tmp_path / name / "checkpoint_000000004.pth", weights_only=True)["model"]
                for name in ("one", f"two{attempt}"))
    assert_equal_states(one, two)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_others(tmp_path, victim):
    """With an error of its own, whether somebody looks after them or not; the last checkpoint goes on."""
    script = Script(*small_run(tmp_path, 50_000), "--out", tmp_path / "run", processes=2)
    script.wait_for('"step": 4,')                                # the state of step 2 is saved
    script.signal(signal.SIGKILL, victim)
    done = script.end()
    assert done.codes[victim] == -signal.SIGKILL and done.codes[1 - victim] not in (0, None)
    again = Script(*small_run(tmp_path, 50_000), "--out", tmp_path / "run")
    again.wait_for("going on at step")
    again.signal(signal.SIGKILL)
    assert again.end().returncode == -signal.SIGKILL


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
def test_torchrun_ends_all_when_a_process_dies(tmp_path):
    """Which of the others has time for a word is not said."""
    agent = torchrun(["--standalone", "--nproc-per-node", 2], ROOT / "train.py",
                     [*small_run(tmp_path, 50_000), "--out", tmp_path / "run"])
    while '"step": 4,' not in agent.stdout.readline():
        assert agent.poll() is None, agent.stderr.read()
    ranks = {}
    for child in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split():
        found = re.search(rb"\0RANK=(\d)\0", Path(f"/proc/{child}/environ").read_bytes())
        if found:
            ranks[int(found[1])] = int(child)
    os.kill(ranks[0], signal.SIGKILL)
    agent.communicate(timeout=PATIENCE)
    assert agent.returncode != 0 and set(ranks) == {0, 1}
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    assert Run(tmp_path / "run", {}, overwrite=True).checkpoints()


SEVERAL = """import sys; sys.path.insert(0, {tests!r})
from double import use_tiny_networks
use_tiny_networks()
import train
for kind in {runs!r}:
    train.main([*kind, "--dataset", {data!r}, "--device", "cpu", "--epochs", "1", *sys.argv[1:3],
                "--out", sys.argv[3] + kind[1]])
"""


def test_seed_decides_alone(tmp_path):
    """Number of workers, hash seed and what the environment says of threads change no bit of a run."""
    data, kinds = market_tree(tmp_path / "market1501", ids=5, images=4), list(stress.RUNS.values())
    (tmp_path / "several.py").write_text(SEVERAL.format(tests=str(ROOT / "tests"), runs=kinds, data=str(data)))
    started = []
    for workers, threads in ((0, "1"), (2, "3")):                # new processes: the environment is read at their start
        surroundings = {"PYTHONHASHSEED": threads, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        started.append(subprocess.Popen(
            [sys.executable, tmp_path / "several.py", "--workers", str(workers), tmp_path / threads], text=True,
            env=os.environ | surroundings, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    for process in started:
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, err
        assert out.count(f"threads={min(runs.cores(), 8)} ") == 3
    for kind in kinds:
        one, two = (tmp_path / f"{threads}{kind[1]}" for threads in "13")
        saved = "backbone.pth" if "--pretrain" in kind else "model.pth"
        assert (one / saved).read_bytes() == (two / saved).read_bytes()
        assert log_lines(one) == log_lines(two) != []


def test_threads_change_rounding_alone(tmp_path):
    """Sums over more threads are rounded otherwise; in double precision nothing else is seen."""
    flags = small_run(tmp_path, epochs=2)
    for threads in "12":
        done = command(*flags, "--out", tmp_path / threads, "--threads", threads, script=DOUBLE)
        assert done.returncode == 0 and f"threads={threads}" in done.stdout, done.stderr
    assert_equal_states(*(torch.load(tmp_path / threads / "checkpoint_000000004.pth", weights_only=True)["model"]
                          for threads in "12"))
    assert log_lines(tmp_path / "1") == log_lines(tmp_path / "2") != []


def test_processes_share_an_evaluation(tmp_path, monkeypatch):
    """Of the same weights the same numbers, to the last bit; one process of three has no batch of its own."""
    monkeypatch.undo()                                           # the weights are for processes of their own
    market_tree(tmp_path / "market1501", ids=131, images=2)      # 131 queries, 262 images: batches of 128 and less
    torch.save(build_backbone("vit_mini", (32, 16)).state_dict(), tmp_path / "weights.pth")
    flags = ["--dataset", tmp_path / "market1501", "--arch", "vit_mini", "--size", "32x16", "--epochs", 0, "--ids", 12,
             "--weights", tmp_path / "weights.pth", "--workers", 0, "--threads", 1, "--device", "cpu"]
    results = []
    for n in (None, 2, 3):
        done = command(*flags, "--out", tmp_path / f"run{n}", processes=n)
        assert done.returncode == 0, done.stderr
        results.append(json.loads((tmp_path / f"run{n}" / "results.json").read_text()) | {"minutes": 0})
    assert results[0] == results[1] == results[2] and results[0]["queries"] == 131
