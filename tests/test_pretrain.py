"""Pre-training: schedules, the step, resuming, several processes, and that it learns something."""

import dataclasses
import functools
import itertools
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import DOUBLE, Golden, command, log_lines

import augment
import pretrain
import runs
import train
import weights
from data import InputError, load_dataset
from evaluate import evaluate
from personvit import PersonViT, VisionTransformer
from runs import Machine, Run
from synthetic import make_synthetic
from upreid import UPReID

SMALL = pretrain.PersonViTRecipe(arch="vit_mini", size=(64, 32), epochs=3, batch=4, warmup=1, prototypes=16, hidden=16,
                              bottleneck=8, temp_warmup=2, local_crops=2, drop_path=0.2, freeze_last_layer=1)
SMALL_UP = pretrain.UPReIDRecipe(arch="resnet_tiny", size=(64, 32), epochs=3, batch=4, queue=10, groups=2)


def test_schedules_equal_reference():
    golden = Golden("ibot_schedules")
    recipe = dataclasses.replace(pretrain.PersonViTRecipe(), epochs=30, batch=512, lr=5e-4, warmup=10)
    values = [pretrain.personvit_schedule(recipe, step, 7) for step in range(210)]
    for ours, theirs in (("lr", "lr"), ("weight_decay", "wd"), ("momentum", "momentum")):
        np.testing.assert_allclose([v[ours] for v in values], golden[theirs], rtol=1e-6, atol=1e-12)
    temps = [pretrain.personvit_schedule(dataclasses.replace(recipe, temp_warmup=30, epochs=40), e * 7, 7)["teacher_temp"]
             for e in (0, 29, 39)]
    np.testing.assert_allclose(temps, [0.04, 0.07, 0.07])


def test_gradients_are_clipped_per_tensor():
    a, b = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    a.grad, b.grad = torch.tensor([3.0, 4.0]), torch.tensor([0.1, 0.0])
    norm = pretrain.clip_each([a, b, torch.nn.Parameter(torch.zeros(1))], 1.0)
    torch.testing.assert_close(a.grad, torch.tensor([0.6, 0.8]), rtol=1e-5, atol=1e-6)
    assert b.grad.tolist() == pytest.approx([0.1, 0.0]) and norm.item() == pytest.approx((25 + 0.01) ** 0.5)


def test_decay_acts_on_matrices_only():
    model = PersonViT(VisionTransformer((32, 16), 8, embed_dim=8, depth=1, num_heads=2), 5, 8, 4)
    matrices, others = pretrain.matrix_groups(model)
    assert all(p.ndim > 1 for p in matrices["params"]) and all(p.ndim == 1 for p in others["params"])
    assert others["decay"] == 0 and len(matrices["params"]) + len(others["params"]) == sum(
        p.requires_grad for p in model.parameters())


def pretrain_run(dataset, folder, recipe=SMALL, **kwargs):
    run = Run(folder, dataclasses.asdict(recipe))
    machine = Machine("cpu", 0, kwargs.pop("save_every", 500), log_every=2, accumulate=kwargs.pop("accumulate", 1))
    return pretrain.pretrain(recipe, dataset, run, machine, **kwargs), run


@pytest.mark.parametrize("recipe, stop_at", [(SMALL, 1), (SMALL, 4), (SMALL, 6), (SMALL_UP, 1), (SMALL_UP, 6)])
def test_resumed_pretraining_equals_the_uninterrupted_one(dataset, tmp_path, recipe, stop_at, monkeypatch):
    whole, run_whole = pretrain_run(dataset, tmp_path / "whole", recipe)

    def save_then_die(self, name, content, save=Run.save):
        save(self, name, content)
        if content.get("step") == stop_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        pretrain_run(dataset, tmp_path / "cut", recipe, save_every=1)
    monkeypatch.undo()
    resumed, run_cut = pretrain_run(dataset, tmp_path / "cut", recipe, save_every=1)
    for key, value in whole.state_dict().items():                # both networks, centres, the queue
        assert torch.equal(value, resumed.state_dict()[key]), key
    assert log_lines(run_whole.folder)[-1] == log_lines(run_cut.folder)[-1]
    files = [(run.folder / "backbone.pth").read_bytes() for run in (run_whole, run_cut)]
    assert files[0] == files[1]


def test_pretraining_ends_in_weights_that_fine_tune(dataset, tmp_path):
    frozen = dataclasses.replace(SMALL, freeze_last_layer=99)
    model, run = pretrain_run(dataset, tmp_path / "a", frozen, keep_every=2, monitor=dataset, monitor_every=3)
    names = sorted(p.name for p in run.folder.iterdir())
    assert names == ["backbone.pth", "backbone_e0002.pth", run.checkpoints()[0].name, "lock", "log.jsonl", "recipe.json"]
    torch.manual_seed(SMALL.seed)
    start = PersonViT(weights.build_backbone("vit_mini", (64, 32), 0.2), 16, 16, 8, norm_last_layer=False)
    for name, p in model.named_parameters():                     # prototypes stood still, the rest moved
        if name.startswith("student") and p.ndim > 1:
            assert torch.equal(p, start.get_parameter(name)) == ("last_layer" in name), name
    lines = log_lines(run.folder)
    assert [line["epoch"] for line in lines if "monitor" in line] == [0, 3] and lines[1]["momentum"] < 1
    assert {"total", "cls", "patch", "entropy", "kl", "prototypes", "feature_std", "grad_norm", "lr", "weight_decay",
            "teacher_temp"} <= set(lines[1])
    still = train.Recipe(arch="vit_mini", size=(64, 32), epochs=1, ids=3, images=2, lr=0.0)
    tuned = train.fine_tune(still, dataset, Run(tmp_path / "b", {}), run.folder / "backbone.pth", Machine("cpu", 0))
    exported = model.backbone_for_export().state_dict()
    assert all(torch.equal(v, exported[k]) for k, v in tuned.base.state_dict().items())


def test_without_masks_the_log_is_silent_on_patches(dataset, tmp_path, monkeypatch):
    """... and calls nothing of theirs a collapse."""
    judged = []
    monkeypatch.setattr(PersonViT, "collapsed", staticmethod(judged.append))
    for masks in (True, False):
        pretrain_run(dataset, tmp_path / str(masks), dataclasses.replace(SMALL, masks=masks, epochs=1))
    with_masks, without = judged[0], judged[-1]
    assert {"patch", "patch_information"} <= set(with_masks) and not {"patch", "patch_information"} & set(without)
    healthy = {"information": 0.5, "feature_std": 0.5}
    monkeypatch.undo()
    assert not PersonViT.collapsed(healthy) and PersonViT.collapsed(healthy | {"patch_information": 0.0})
    assert all(PersonViT.collapsed(healthy | {name: bad}) for name in healthy for bad in (0.0, math.nan))


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_equals_eager(dataset, tmp_path):
    recipe = dataclasses.replace(SMALL, epochs=1, drop_path=0.0, local_crops=0)  # few shapes: each takes seconds
    models = []
    for compile in (False, True):
        machine = Machine("cpu", 0, compile=compile)
        models.append(pretrain.pretrain(recipe, dataset, Run(tmp_path / str(compile), {}), machine).state_dict())
    assert list(models[0]) == list(models[1])
    for name, value in models[0].items():
        torch.testing.assert_close(models[1][name], value, rtol=1e-3, atol=1e-4, msg=lambda m: f"{name}: {m}")


def test_upreid_ends_in_weights_that_fine_tune(dataset, tmp_path):
    model, run = pretrain_run(dataset, tmp_path / "a", SMALL_UP, keep_every=2, monitor=dataset, monitor_every=1)
    lines = log_lines(run.folder)
    assert (run.folder / "backbone_e0002.pth").exists() and len([line for line in lines if "monitor" in line]) == 4
    assert {"total", "instance", "global", "local", "accuracy", "ln_queue", "ln_stripes", "feature_std", "query_std",
            "grad_norm", "lr"} <= set(lines[1])
    assert lines[1]["lr"] == pytest.approx(0.03 * 4 / 256) and model.online["backbone"].training
    again, recipe = weights.load_model(run.folder / "backbone.pth")              # evaluate.py sees what the monitor saw
    assert evaluate(again, dataset, recipe, workers=0)[0].mAP == pytest.approx(lines[-1]["mAP"], abs=1e-5)
    still = train.Recipe(arch="resnet_tiny", size=(64, 32), epochs=1, ids=3, images=2, lr=0.0)
    tuned = train.fine_tune(still, dataset, Run(tmp_path / "b", {}), run.folder / "backbone.pth", Machine("cpu", 0))
    exported = model.backbone_for_export().state_dict()
    assert all(torch.equal(p, exported[name]) for name, p in tuned.base.named_parameters())


def test_upreid_trains_as_luperson_does(dataset, tmp_path, monkeypatch):
    """Every number of the recipe arrives where it belongs."""
    recipe = dataclasses.replace(SMALL_UP, epochs=4, lr=0.64, momentum=0.7, temperature=0.3, temperature_global=0.2,
                                 temperature_local=0.4, weight_global=0.5, weight_local=0.25, hardest=1, dim=9)
    method = pretrain.upreid(recipe, Machine())
    model, (group,) = method.model, method.optimizer.param_groups
    assert (model.temperature, model.temperature_global, model.temperature_local) == (0.3, 0.2, 0.4)
    assert (model.weight_global, model.weight_local, model.hardest, model.groups) == (0.5, 0.25, 1, 2)
    assert model.queue.shape == (10, 9) and model.online["backbone"].layer4[0].conv2.stride == (2, 2)
    assert group["momentum"] == 0.9 and not group["nesterov"] and group["decay"] == 1
    assert len(group["params"]) == len(list(model.online.parameters()))
    values = [method.schedule(step, 3) for step in range(12)]    # constant within an epoch, no warm-up
    assert [v["lr"] for v in values[::3]] == pytest.approx([0.01 * f for f in (1, (2 + 2 ** 0.5) / 4, 0.5, (2 - 2 ** 0.5) / 4)])
    assert values[0] == values[2] and values[0]["weight_decay"] == 1e-4 and values[0]["momentum"] == 0.7
    momenta, decays = [], []
    real = UPReID.update_teacher
    monkeypatch.setattr(UPReID, "update_teacher", lambda self, m: (momenta.append(m), real(self, m)))
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: decays.append(self.param_groups[0]["weight_decay"]))
    pretrain_run(dataset, tmp_path / "run", dataclasses.replace(recipe, epochs=1))
    assert momenta == [0.7] * 4 and decays == [1e-4] * 4
    stored = torch.load(tmp_path / "run" / "backbone.pth", weights_only=True)
    assert (tuple(stored["mean"]), tuple(stored["std"])) == (augment.LUP_MEAN, augment.LUP_STD)


@pytest.mark.parametrize("recipe, where", [(SMALL, "loss"), (SMALL, "gradient"), (SMALL_UP, "loss"),
                                           (SMALL_UP, "gradient")])
def test_a_bad_step_of_pretraining_touches_no_weight(dataset, tmp_path, monkeypatch, recipe, where):
    """The third of 12 steps goes wrong, also when only the gradient shows it; no NaN is ever saved."""
    kind = PersonViT if recipe is SMALL else UPReID
    models, steps, real = [], [], kind.forward

    def forward(self, *args, **kwargs):
        models[:] = [self]
        losses = real(self, *args, **kwargs)
        if len(steps) == 2:
            losses["total"] = losses["total"] * (math.nan if where == "loss" else 1)
            if where == "gradient":
                losses["total"].register_hook(lambda g: g * math.inf)
        steps.append(0)
        return losses

    monkeypatch.setattr(kind, "forward", forward)
    with pytest.raises(InputError, match="step 2; the last good state is in .*checkpoint_000000002.pth"):
        pretrain_run(dataset, tmp_path / "run", recipe, save_every=1)
    assert all(p.isfinite().all() for p in models[0].parameters())
    state = torch.load(tmp_path / "run" / "checkpoint_000000002.pth", weights_only=True)
    assert state["step"] == 2 and all(v.isfinite().all() for v in state["model"].values())


def test_a_stop_saves_no_bad_step(dataset, tmp_path, monkeypatch):
    """... on a GPU either, where the loop looks at the loss only now and then ("cpu:0" is treated as one)."""
    real, steps = UPReID.forward, []

    def forward(self, *args):
        losses = real(self, *args)
        if len(steps) == 3:
            losses["total"] = losses["total"] * math.nan
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        steps.append(0)
        return losses

    monkeypatch.setattr(UPReID, "forward", forward)
    run = Run(tmp_path / "run", {})
    with pytest.raises(InputError, match="nan at step 4; the last good state is in .*checkpoint_000000003.pth"):
        pretrain.pretrain(SMALL_UP, dataset, run, Machine("cpu:0", 0, 3, log_every=99))
    assert [path.name for path in run.checkpoints()] == ["checkpoint_000000003.pth"]


@pytest.mark.parametrize("change, message", [
    ({"stripes": 5}, "--size 64x32: the height cannot be cut into --stripes 5"),
    ({"hardest": 4}, "--hardest 4: an image has 3 other"), ({"groups": 3}, "--batch 4 cannot be cut into --groups 3"),
    ({"groups": 4}, "--groups 4 of at least 2 images")])
def test_upreid_recipes_that_do_not_fit_together(dataset, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        pretrain_run(dataset, tmp_path / "run", dataclasses.replace(SMALL_UP, **change))


def test_upreid_without_stripes_asks_nothing_of_them(dataset, tmp_path, capsys):
    recipe = dataclasses.replace(SMALL_UP, weight_local=0, weight_global=0, size=(33, 17), stripes=2, hardest=3, epochs=1,
                                 groups=1)
    pretrain_run(dataset, tmp_path / "run", recipe)
    out = capsys.readouterr().out
    assert "WARNING: --queue 10 remembers" in out and "WARNING: with --groups 1" in out


def test_pretraining_needs_a_vit_and_enough_images(dataset, tmp_path):
    with pytest.raises(InputError, match="--arch resnet50: did you mean"):
        runs.check_recipe(pretrain.pretrain_recipe_for("personvit", "luperson", "resnet50"))
    with pytest.raises(InputError, match="the set has 16"):
        pretrain_run(dataset, tmp_path / "run", dataclasses.replace(SMALL, batch=64))
    with pytest.raises(InputError, match="32x16 is too small.*need 32 pixels"):
        pretrain_run(dataset, tmp_path / "run", dataclasses.replace(SMALL, size=(32, 16)))
    for method, name in itertools.product(("personvit", "upreid"), ("luperson", "market1501", "synthetic")):
        runs.check_recipe(pretrain.pretrain_recipe_for(method, name))


@pytest.mark.parametrize("method", ["personvit", "upreid"])
def test_two_processes_equal_one(market, tmp_path, method):
    """The same global batches, one network: all weights, the queue and what is logged, up to rounding."""
    flags = ["--pretrain", method, "--dataset", market, "--size", "64x32", "--epochs", 2, "--workers", 0,
             "--save-every", 3, "--monitor", market]
    flags += {"personvit": ["--arch", "vit_mini", "--batch", 4, "--prototypes", 16, "--hidden", 16, "--bottleneck", 8,
                            "--local-crops", 2, "--drop-path", 0],
              "upreid": ["--arch", "resnet_tiny", "--batch", 8, "--queue", 20, "--groups", 2, "--lr", 0.01]}[method]
    for processes in (None, 2):
        done = command(*flags, "--out", tmp_path / f"run{processes}", processes=processes, script=DOUBLE)
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(Run(tmp_path / f"run{p}", {}, True).checkpoints()[0], weights_only=True) for p in (None, 2))
    assert one["step"] == two["step"] == 16 // int(flags[flags.index("--batch") + 1]) * 2
    for name, value in one["model"].items():
        if "running_" not in name and "tracked" not in name:     # each process sees its own part of a batch
            torch.testing.assert_close(two["model"][name], value, rtol=1e-7, atol=1e-8, msg=lambda m: f"{name}: {m}")
    assert done.stdout.count("run ") == 1                        # the first process speaks for all
    logs = [log_lines(tmp_path / f"run{p}")[-1] for p in (None, 2)]
    for name in {"total", "cls", "patch", "instance", "global", "local", "accuracy", "grad_norm", "lr"} & set(logs[0]):
        assert logs[0][name] == logs[1][name], name


@pytest.mark.parametrize("recipe", [dataclasses.replace(SMALL, drop_path=0.0),
                                    dataclasses.replace(SMALL_UP, batch=8, groups=4, lr=0.01)])
def test_split_steps_equal_whole_ones(dataset, tmp_path, monkeypatch, doubles, recipe):
    """Two passes of half the batch: one step of the optimiser, one of teacher, centres and queue."""
    monkeypatch.setattr(pretrain, "UPReID", functools.partial(UPReID, shuffle=False))
    one, two = (pretrain_run(dataset, tmp_path / str(n), recipe, accumulate=n) for n in (1, 2))
    for name, value in one[0].state_dict().items():
        if "running_" not in name:  # in another order stripes and whole images weigh differently in these
            torch.testing.assert_close(two[0].state_dict()[name], value, rtol=1e-7, atol=1e-8, msg=lambda m: f"{name}: {m}")
    logs = [log_lines(run.folder) for _, run in (one, two)]
    for a, b in zip(*logs, strict=True):
        for name in {"total", "cls", "patch", "instance", "global", "local", "accuracy", "grad_norm"} & set(a):
            assert a[name] == b[name], name


def test_steps_that_cannot_be_split(dataset, tmp_path, capsys):
    with pytest.raises(InputError, match="--batch 4 cannot be shared evenly by 1 processes x --accum 3"):
        pretrain_run(dataset, tmp_path / "a", SMALL, accumulate=3)
    with pytest.raises(InputError, match="--batch 4 leaves one image, and nothing to compare it with, for each of 1 processes x --accum 4"):
        pretrain_run(dataset, tmp_path / "d", SMALL, accumulate=4)
    with pytest.raises(InputError, match="--groups 2 must be a multiple of 4"):
        pretrain_run(dataset, tmp_path / "b", dataclasses.replace(SMALL_UP, batch=8), accumulate=4)
    pretrain_run(dataset, tmp_path / "c", dataclasses.replace(SMALL_UP, epochs=1), accumulate=2)
    assert "WARNING: with --groups 2 --accum 2 queries and keys share" in capsys.readouterr().out


def test_a_short_run_learns(tmp_path):
    """Eight epochs of synthetic people, about a minute: the losses fall, and plain features find people better."""
    make_synthetic(tmp_path / "synthetic")
    dataset = load_dataset("synthetic", tmp_path)
    recipe = dataclasses.replace(pretrain.pretrain_recipe_for("personvit", "synthetic"), epochs=8, local_crops=2,
                                 prototypes=256, hidden=256, bottleneck=64)
    run = Run(tmp_path / "run", {})
    pretrain.pretrain(recipe, dataset, run, Machine("cpu", 0), monitor=dataset, monitor_every=8)
    untrained, *lines, last = log_lines(run.folder)
    # at first the loss falls, then a sharper teacher lifts it; KL, what the student has yet to learn, keeps falling
    assert lines[2]["total"] < 0.6 * lines[0]["total"] and lines[-1]["kl"] < 0.5 * lines[0]["kl"]
    assert not any("warning" in line for line in lines)
    assert last["mAP"] > 1.1 * untrained["mAP"], (last, untrained)


@pytest.mark.parametrize("path", ["data/luperson", "shared/LUPerson", "luperson.txt"])
def test_a_set_is_known_by_name_wherever_it_lies(path):
    for method in ("personvit", "upreid"):
        assert pretrain.pretrain_recipe_for(method, path) == pretrain.pretrain_recipe_for(method, "luperson")
    assert train.recipe_for("sets/market1501", "vit_base") == train.recipe_for("market1501", "vit_base")
