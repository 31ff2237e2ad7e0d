"""Losses, schedule and three whole steps against the reference; resuming, run folders, command line."""

import dataclasses
import functools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DOUBLE, ROOT, Golden, command, log_lines, market_tree, start_command

import runs
import stress
import train
from data import InputError, load_dataset
from evaluate import evaluate
from weights import ARCHS, ReIDModel, build_backbone
from personvit import VisionTransformer
from runs import Machine, Run, cosine
from train import Recipe, fine_tune, hardest, learning_rate, make_optimizer, recipe_for, triplet_loss

# ---- losses and schedule ---------------------------------------------------------------------


@pytest.mark.parametrize("name, margin", [("triplet_soft", None), ("triplet_margin03", 0.3)])
def test_triplet_equals_reference(name, margin):
    golden = Golden(name)
    features = golden["features"].requires_grad_()
    loss = triplet_loss(features, golden["labels"], margin)
    loss.backward()
    torch.testing.assert_close(loss, golden["loss"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(features.grad, golden["grad"], rtol=1e-4, atol=1e-6)
    d_ap, d_an = hardest(features, golden["labels"])
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
    with pytest.raises(ValueError, match="two identities"):
        triplet_loss(torch.randn(4, 3), torch.zeros(4))


def test_learning_rates_equal_reference():
    golden, recipe = Golden("finetune_3steps"), Recipe()
    for scale, key in ((1.0, "lr_weight"), (recipe.bias_lr, "lr_bias")):
        rates = [learning_rate(recipe, epoch, scale) for epoch in range(120)]
        np.testing.assert_allclose(rates, golden[key], rtol=1e-6)
    samples = {1: 4.0e-6, 2: 2.38e-5, 10: 1.822e-4, 20: 3.802e-4, 21: 3.733e-4, 60: 2.056e-4, 120: 8.68e-7}
    for epoch, rate in samples.items():
        assert learning_rate(recipe, epoch - 1) == pytest.approx(rate, rel=1e-3)


def test_step_schedule_of_bag_of_tricks():
    recipe = recipe_for("market1501", "resnet50")
    rates = [learning_rate(recipe, e) / recipe.lr for e in (0, 5, 10, 39, 40, 69, 70, 119)]
    np.testing.assert_allclose(rates, [0.01, 0.505, 1, 1, 0.1, 0.1, 0.01, 0.01], rtol=1e-9)


def test_three_steps_equal_reference():
    golden, recipe = Golden("finetune_3steps"), Recipe()
    model = ReIDModel(VisionTransformer((64, 32), 16, embed_dim=24, depth=2, num_heads=3), 10)
    model.load_state_dict(golden.state("w."), strict=True)
    optimizer = make_optimizer(recipe, model.train())
    for i in (1, 2, 3):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, i - 1, group["scale"])
        labels = golden[f"y{i}"]
        scores, feature = model(golden[f"x{i}"])
        loss = F.cross_entropy(scores, labels) + triplet_loss(feature, labels)
        torch.testing.assert_close(scores, golden[f"score{i}"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(feature, golden[f"feat{i}"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(loss, golden[f"loss{i}"], rtol=1e-4, atol=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for key, value in golden.state("after.").items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-4, atol=1e-5, msg=key)
    torch.testing.assert_close(model.eval()(golden["x_eval"]), golden["feat_eval"], rtol=1e-4, atol=1e-5)


def test_recipes():
    assert recipe_for("msmt17") == recipe_for("market1501") == Recipe()      # the published ViT-S recipe
    assert recipe_for("msmt17", "vit_base") == Recipe(arch="vit_base")
    assert recipe_for("market1501", "vit_base").warmup == 5
    bot = recipe_for("msmt17", "resnet50")
    assert (bot.smoothing, bot.margin, bot.last_stride, bot.neck_feat) == (0.1, 0.3, 1, "after")
    assert recipe_for("synthetic").size == (128, 64)
    with pytest.raises(InputError, match="did you mean vit_small"):
        train.check_recipe(recipe_for("msmt17", "vit_smal"))


def test_every_default_is_allowed_and_values_outside_are_not():
    for recipe in (recipe_for(d, a) for d in ("synthetic", "market1501", "msmt17") for a in ARCHS):
        train.check_recipe(recipe)
    for change in ({"lr": math.nan}, {"ids": 1}, {"images": 0}, {"epochs": -1}, {"seed": -1}, {"size": (0, 0)},
                   {"drop_path": 1.0}, {"smoothing": -0.1}, {"margin": math.inf}, {"weight_decay": -1.0}):
        with pytest.raises(InputError, match=f"--{next(iter(change)).replace('_', '-')} .*must lie between"):
            train.check_recipe(dataclasses.replace(Recipe(), **change))


# ---- the loop --------------------------------------------------------------------------------

TINY = Recipe(arch="vit_tiny", size=(32, 16), epochs=2, ids=3, images=2, lr=0.01, warmup=1, drop_path=0.3, seed=5)


def tiny_run(dataset, folder, recipe=TINY, weights=None, save_every=500, workers=0):
    run = Run(folder, dataclasses.asdict(recipe))
    return fine_tune(recipe, dataset, run, weights, Machine("cpu", workers, save_every, log_every=2)), run


@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_resumed_run_equals_the_uninterrupted_one(dataset, tmp_path, stop_at, monkeypatch):
    whole, run_whole = tiny_run(dataset, tmp_path / "whole")
    saves = []

    def save_then_die(self, name, content, save=Run.save):
        save(self, name, content)
        saves.append(content["step"])
        if content["step"] == stop_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        tiny_run(dataset, tmp_path / "cut", save_every=1)
    monkeypatch.undo()
    assert saves == list(range(1, stop_at + 1))
    with open(tmp_path / "cut" / "log.jsonl", "a") as log:      # lines of steps after the checkpoint
        log.write('{"step": 999}\n')
    resumed, run_cut = tiny_run(dataset, tmp_path / "cut", save_every=1)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    logs = log_lines(run_whole.folder), log_lines(run_cut.folder)
    assert logs[0][-1] == logs[1][-1] and [line["step"] for line in logs[1]] == sorted(
        {line["step"] for line in logs[1]})


def test_workers_change_nothing(dataset, tmp_path):
    models = [tiny_run(dataset, tmp_path / str(w), workers=w)[0].state_dict() for w in (0, 2)]
    assert all(torch.equal(v, models[1][k]) for k, v in models[0].items())


def test_weights_of_the_recipe_are_used(dataset, tmp_path):
    start = VisionTransformer((32, 16), embed_dim=192, depth=12, num_heads=3)
    torch.save({"backbone": start.state_dict()}, tmp_path / "start.pth")
    recipe = dataclasses.replace(TINY, lr=0.0, epochs=1)         # at rate 0 the backbone must not move
    model, _ = tiny_run(dataset, tmp_path / "run", recipe, weights=tmp_path / "start.pth")
    assert all(torch.equal(v, model.base.state_dict()[k]) for k, v in start.state_dict().items())


def test_broken_images_are_counted_and_too_many_stop_the_run(tmp_path):
    root = market_tree(tmp_path / "market1501", ids=4, images=60)  # 240 images: 2 are below 1 %
    files = sorted((root / "bounding_box_train").iterdir())
    for path in files[:2]:
        path.write_bytes(b"broken")
    recipe = dataclasses.replace(TINY, epochs=1, images=8)
    _, run = tiny_run(load_dataset("market1501", root), tmp_path / "a", recipe)
    assert log_lines(run.folder)[-1]["broken_images"] == 2
    for path in files[2:5]:
        path.write_bytes(b"")
    with pytest.raises(InputError, match="of 240 training images cannot be read, more than 1 %"):
        tiny_run(load_dataset("market1501", root), tmp_path / "b", recipe)


def test_loss_that_is_not_finite_stops_before_the_weights_are_touched(dataset, tmp_path, monkeypatch):
    real, models = train.triplet_loss, []
    monkeypatch.setattr(train, "triplet_loss", lambda *args: real(*args) * torch.nan)
    monkeypatch.setattr(train, "ReIDModel", lambda *args: models.append(ReIDModel(*args)) or models[-1])
    with pytest.raises(InputError, match="loss or its gradient is nan at step 0; nothing was saved yet; start anew with a lower --lr"):
        tiny_run(dataset, tmp_path / "run")
    assert all(p.isfinite().all() for p in models[0].parameters())


def test_the_time_of_an_evaluation_is_no_training(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(runs.time, "perf_counter", lambda: now[0])
    meter = runs.Meter()
    for seconds in (2, 2):
        meter.add(10, total=1.0)
        now[0] += seconds
    with meter.paused():
        now[0] += 3600
    assert meter.read(steps_left=30) == {"total": 1.0, "img_s": 5.0, "wait": 0.0, "left": "0:01:00"}


# ---- run folders -----------------------------------------------------------------------------


def save_in(run: Run, name: str, content: dict) -> None:
    with run.begin():
        run.save(name, content)


class Part:
    """Something with a state."""

    def __init__(self, state=None):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


CHECKPOINT = {"step": 1, "bad": [], "log_size": 0, "seconds": 1.5, "part": {"a": 2}}


def test_run_folder_of_another_recipe(tmp_path):
    folder = tmp_path / "run"
    save_in(Run(folder, {"lr": 0.1, "size": (4, 2)}), "checkpoint_000000001.pth", CHECKPOINT)
    part = Part()
    assert Run(folder, {"lr": 0.1, "size": (4, 2)}).restore({"part": part}) == (1, set()) and part.state == {"a": 2}
    with pytest.raises(InputError, match=r"another recipe \(lr: 0.1 there, 0.2 now\).*--out.*--overwrite"):
        Run(folder, {"lr": 0.2, "size": (4, 2)})
    fresh = Run(folder, {"lr": 0.2}, overwrite=True)
    assert (folder / "checkpoint_000000001.pth").exists()                  # looking deletes nothing
    with fresh.begin():
        assert fresh.restore({"part": part}) == (0, set())
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
            train.fine_tune_and_evaluate(recipe, dataset, tmp_path / "run", True, weights, Machine("cpu", 0))
    with pytest.raises(InputError, match="would delete"):
        train.fine_tune_and_evaluate(TINY, dataset, tmp_path / "run", True, tmp_path / "run" / "model.pth")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["model.pth"]


def test_damaged_checkpoints_are_passed_over(tmp_path, capsys):
    run, names = Run(tmp_path / "run", {}), [f"checkpoint_00000000{step}.pth" for step in (1, 2, 3)]
    save_in(run, names[0], CHECKPOINT)
    for content in ({}, {"step": 1}, CHECKPOINT | {"log_size": "x"}, CHECKPOINT | {"seconds": None}, [1]):
        save_in(run, names[1], content)
        assert run.restore({"part": Part()})[0] == 1
        assert f"{names[1]} is damaged" in (out := capsys.readouterr().out) and f"from {run.folder / names[0]}" in out
    save_in(run, names[1], CHECKPOINT | {"step": 2})
    whole = (run.folder / names[1]).read_bytes()
    for size in (*range(0, len(whole), 97), len(whole) - 1):     # as a power cut may leave it
        (run.folder / names[2]).write_bytes(whole[:size])
        assert run.restore({"part": Part()})[0] == 2
    for place in range(0, len(whole), 31):                       # a flipped bit is noticed, or does no harm
        (run.folder / names[2]).write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1:])
        part = Part()
        assert run.restore({"part": part})[0] in (2, 3) and part.state == {"a": 2}
    run.save_checkpoint(2, {k: v for k, v in CHECKPOINT.items() if k != "step"}, 2)   # goes on from before the damaged
    assert [path.name for path in run.checkpoints()] == names[1::-1]


def test_no_checkpoint_is_whole(tmp_path):
    run = Run(tmp_path / "run", {})
    for step in (1, 2):
        save_in(run, f"checkpoint_00000000{step}.pth", {"step": step})
    with pytest.raises(InputError, match="no checkpoint is whole; delete them"):
        run.restore({"part": Part()})
    for path in run.checkpoints():
        path.unlink()
    (tmp_path / "run" / "log.jsonl").write_text("lines of a run without a checkpoint")
    assert run.restore({"part": Part()}) == (0, set()) and run.log_size() == 0


def test_the_table_of_contents_of_a_checkpoint(tmp_path):
    """PyTorch would read memory as weights where a bit of an entry's attributes has flipped."""
    run, part = Run(tmp_path / "run", {}), torch.nn.Linear(3, 2)
    for step in (1, 2):
        run.save_checkpoint(step, {**CHECKPOINT, "part": part.state_dict()} | {"step": step}, 2)
    last = run.checkpoints()[0]
    whole = last.read_bytes()
    for place in range(whole.index(b"PK\1\2"), len(whole)):
        for bit in range(8):
            last.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1:])
            read = torch.nn.Linear(3, 2)
            assert run.restore({"part": read})[0] in (1, 2) and torch.equal(read.weight, part.weight)


def test_other_files_are_no_checkpoints(tmp_path):
    run = Run(tmp_path / "run", {})
    (run.folder / "checkpoint_best.pth").write_text("mine")
    (run.folder / "checkpoint_dir.pth").mkdir()
    for step in (1, 2, 3):
        run.save_checkpoint(step, {}, 1)
    with Run(tmp_path / "run", {}, overwrite=True).begin():
        names = sorted(p.name for p in run.folder.iterdir())
    assert names == ["checkpoint_best.pth", "checkpoint_dir.pth", "lock", "recipe.json"]


def test_a_file_called_lock_keeps_its_content(tmp_path):
    (tmp_path / "lock").write_text("precious")
    with Run(tmp_path, {}).begin():
        assert (tmp_path / "lock").read_text() == "precious"


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_so_many_checkpoints_are_kept(tmp_path, keep):
    run = Run(tmp_path / "run", {})
    for step in (5, 10, 99, 100, 1000):
        run.save_checkpoint(step, {}, keep)
    assert [int(path.stem[-9:]) for path in run.checkpoints()] == [1000, 100, 99, 10, 5][:keep]


def test_what_a_killed_process_was_writing_is_swept_away(tmp_path):
    run = Run(tmp_path / "run", {})
    for name in ("checkpoint_000000001.pth.77.partial", "model.pth.78.partial", "mine.partial"):
        (run.folder / name).write_text("half")
    with run.begin():
        assert sorted(p.name for p in run.folder.iterdir()) == ["lock", "mine.partial", "recipe.json"]


def test_two_processes_cannot_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "locked", functools.partial(runs.locked, patience=0))
    with Run(tmp_path / "run", {}).begin():
        with pytest.raises(InputError, match="another process is training"):
            with Run(tmp_path / "run", {}).begin():
                pass
    first, second, third = (Run(tmp_path / "other", {"lr": lr}) for lr in (1, 2, 1))   # all see an empty folder
    with first.begin():
        pass
    with pytest.raises(InputError, match="another recipe .lr: 1 there, 2 now"):
        with second.begin():
            pass
    with third.begin():
        pass


def test_a_run_holds_its_folder_and_hears_a_stop_to_the_end(dataset, tmp_path, monkeypatch):
    """... through the last evaluation, which it need not wait for, as all is saved."""
    def evaluate_disturbed(*args, **kwargs):
        with pytest.raises(InputError, match="another process is training"), Run(tmp_path / "run", {}, True).begin():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the evaluation goes on")

    monkeypatch.setattr(runs, "locked", functools.partial(runs.locked, patience=0))
    monkeypatch.setattr(train, "evaluate", evaluate_disturbed)
    with pytest.raises(SystemExit, match="stopped after the last step"):
        train.fine_tune_and_evaluate(TINY, dataset, tmp_path / "run", machine=Machine("cpu", 0))
    monkeypatch.setattr(train, "evaluate", evaluate)
    assert train.fine_tune_and_evaluate(TINY, dataset, tmp_path / "run", machine=Machine("cpu", 0))["mAP"] > 0


def test_a_file_system_without_locks_is_said_not_refused(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr(runs.fcntl, "flock", flock)
    with Run(tmp_path / "run", {}, False).begin():
        assert "has no locks (Function not implemented)" in capsys.readouterr().out


def test_other_weights_of_the_same_name_are_another_run(dataset, tmp_path):
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(build_backbone("vit_tiny", (32, 16)).state_dict(), tmp_path / "weights.pth")
        if seed:
            with pytest.raises(InputError, match="another recipe .weights: weights.pth [0-9a-f]{12} there, weights.pth"):
                train.fine_tune_and_evaluate(TINY, dataset, tmp_path / "run", weights=tmp_path / "weights.pth")
        else:
            train.fine_tune_and_evaluate(TINY, dataset, tmp_path / "run", False, tmp_path / "weights.pth", Machine("cpu", 0))


def test_files_of_the_user_are_kept(tmp_path):
    (tmp_path / "model.pth").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine too")
    with pytest.raises(InputError, match="holds model.pth of something else"):
        Run(tmp_path, {})
    with Run(tmp_path, {}, overwrite=True).begin():
        assert (tmp_path / "notes.txt").exists() and not (tmp_path / "model.pth").exists()


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another folder with --out"):
        Run(tmp_path / "file" / "run", {})


def test_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    run = Run(tmp_path / "run", {})
    save_in(run, "checkpoint_000000001.pth", CHECKPOINT)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        run.save_checkpoint(2, {}, keep=1)
    assert run.restore({"part": Part()})[0] == 1
    assert sorted(p.name for p in run.folder.iterdir()) == ["checkpoint_000000001.pth", "lock", "recipe.json"]


def test_other_data_is_another_run(dataset, tmp_path):
    machine = Machine("cpu", 0)
    run = train.open_run(tmp_path / "run", TINY, dataset, False, machine)
    with run.begin():
        pass
    train.open_run(tmp_path / "run", TINY, dataset, False, machine)
    fewer = dataclasses.replace(dataset, train=dataset.train[1:])
    with pytest.raises(InputError, match="another recipe .data: 16 images"):
        train.open_run(tmp_path / "run", TINY, fewer, False, machine)


def test_unlabelled_images_are_no_training_set(tmp_path):
    market_tree(tmp_path / "crops")
    (tmp_path / "crops" / "bounding_box_train" / "cover.jpg").write_bytes(b"")
    with pytest.raises(InputError, match="without identity, first .*cover.jpg"):
        train.fine_tune_and_evaluate(TINY, load_dataset(str(tmp_path / "crops")), tmp_path / "run")


# ---- command line ----------------------------------------------------------------------------


def test_mistakes_get_one_line(tmp_path):
    market_tree(tmp_path / "market1501")
    for args, words in [(["--dataset", "msmt"], "did you mean msmt17"),
                        (["--arch", "resnet5"], "did you mean resnet50"),
                        (["--optimizer", "adm"], "did you mean adam"),
                        (["--dataset", "market1501"], "needs 16 identities, the training set has 4"),
                        (["--dataset", "market1501", "--ids", 2, "--weights", tmp_path / "no.pth"], "no such weights")]:
        done = command("--data-root", tmp_path, "--out", tmp_path / "run", "--overwrite", *args)
        assert done.returncode == 1 and re.search(words, done.stderr), done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("run/*"))


@pytest.mark.parametrize("args, words", [
    ("--size 256", "write two numbers like 256x128"), ("--device tpu", "argument --device"),
    ("--workers -1", "--workers and --keep-every are at least 0"), ("--threads 0", "at least 1"),
    ("--save-every 0", "at least 1"), ("--margin wide", "neither a number nor 'none'"),
    ("--monitor market1501", "are for --pretrain"), ("--accum 2", "--accum is for --pretrain"),
    ("--pretr personvit", "unrecognized arguments: --pretr"), ("--pretrain upreid --compile", "is for --pretrain personvit"),
    ("--pretrain upreid --weights a.pth", "starts from random weights")])
def test_mistakes_on_the_command_line(args, words, capsys):
    with pytest.raises(SystemExit) as caught:
        train.parse_args(args.split())
    assert caught.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGTERM, signal.SIGINT]])
def test_a_stop_says_where_the_checkpoint_is_and_the_same_command_goes_on(tmp_path, signals):
    market_tree(tmp_path / "market1501")
    args = ["--dataset", "market1501", "--data-root", tmp_path, "--out", tmp_path / "run", "--arch", "vit_tiny",
            "--size", "32x16", "--ids", "2", "--images", "2", "--workers", "1", "--device", "cpu"]
    process = start_command(*args, "--epochs", 5000)
    while (line := process.stdout.readline()) and '"step"' not in line:
        pass
    for number in signals:
        os.killpg(process.pid, number)                          # as terminals and schedulers do: workers get it too
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in err
    assert err.count("stopping after this step") == 1
    stopped = int(re.search(r"stopped after step ([\d,]+) of 20,000; .*checkpoint_\d+.pth", err)[1].replace(",", ""))
    again = start_command(*args, "--epochs", 5000)
    text = line = again.stdout.readline()
    while line and '"step"' not in line:
        line = again.stdout.readline()
        text += line
    again.send_signal(signal.SIGTERM)
    again.communicate(timeout=60)
    assert f"going on at step {stopped:,}" in text
    done = command(*args, "--epochs", "5001")
    assert done.returncode == 1 and "epochs: 5000 there, 5001 now" in done.stderr


@pytest.mark.parametrize("kind", stress.RUNS)
def test_killed_at_random_moments(tmp_path, kind):
    """`make stress` does the same twenty times; kill_often raises unless all is equal, to the last bit."""
    assert f"{kind}: 3 kills" in stress.kill_often(kind, tmp_path, kills=3, seed=1)


@pytest.mark.parametrize("arch", ["resnet_tiny", "vit_mini"])
def test_two_processes_equal_one(tmp_path, arch):
    """Losses, weights and running statistics after ten steps, and then the evaluation."""
    market_tree(tmp_path / "market1501", ids=5, images=3)
    flags = ["--dataset", tmp_path / "market1501", "--arch", arch, "--size", "64x32", "--epochs", 5, "--ids", 4,
             "--images", 4, "--workers", 0, "--drop-path", 0, "--save-every", 10]
    for processes in (None, 2):
        done = command(*flags, "--out", tmp_path / f"run{processes}", processes=processes, script=DOUBLE)
        assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved ") == 1                      # the first process speaks for all
    folders = [tmp_path / f"run{processes}" for processes in (None, 2)]
    one, two = (torch.load(folder / "checkpoint_000000010.pth", weights_only=True)["model"] for folder in folders)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-7, atol=1e-8, msg=lambda m: f"{name}: {m}")
    assert log_lines(folders[0]) == log_lines(folders[1]) != []
    results = [json.loads((folder / "results.json").read_text()) for folder in folders]
    assert all(results[0][key] == results[1][key] for key in ("mAP", "cmc", "valid", "queries"))


def small_run(tmp_path, epochs: int) -> list[str]:
    """Flags of a fine-tuning of 2 steps per epoch."""
    market_tree(tmp_path / "market1501", ids=5, images=3)
    return list(map(str, ["--dataset", tmp_path / "market1501", "--arch", "vit_mini", "--size", "64x32", "--ids", 4,
                          "--images", 4, "--workers", 0, "--drop-path", 0, "--save-every", 2, "--epochs", epochs]))


def launch(launcher: list, script, flags: list) -> subprocess.Popen:
    """A launcher of processes, as torchrun is."""
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *map(str, launcher), "--", script, *flags],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_machines_equal_one(tmp_path):
    """Two node agents, here on one machine, joined as the README says."""
    flags = small_run(tmp_path, epochs=2)
    assert command(*flags, "--out", tmp_path / "one", script=DOUBLE).returncode == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [launch(["--nnodes", 2, "--node-rank", n, "--master-addr", "127.0.0.1", "--master-port", port,
                     "--nproc-per-node", 1], DOUBLE, [*flags, "--out", tmp_path / "two"]) for n in (0, 1)]
    for node in nodes:
        _, err = node.communicate(timeout=300)
        assert node.returncode == 0, err
    one, two = (torch.load(tmp_path / n / "checkpoint_000000004.pth", weights_only=True)["model"] for n in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-7, atol=1e-8, msg=lambda m: f"{name}: {m}")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_others(tmp_path, victim):
    agent = launch(["--standalone", "--nproc-per-node", 2], ROOT / "train.py",
                   [*small_run(tmp_path, epochs=50_000), "--out", tmp_path / "run"])
    while '"step"' not in agent.stdout.readline():
        assert agent.poll() is None, agent.stderr.read()
    for child in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split():
        if f"\0RANK={victim}\0".encode() in Path(f"/proc/{child}/environ").read_bytes():
            os.kill(int(child), signal.SIGKILL)
    _, err = agent.communicate(timeout=60)
    ours = [line for line in err.splitlines() if "another process has ended" in line]
    assert agent.returncode != 0 and len(ours) == 1 and ours[0].startswith(f"process {1 - victim}: "), err
    assert Run(tmp_path / "run", {}, overwrite=True).checkpoints()


@pytest.mark.parametrize("kind", stress.RUNS)
def test_seed_decides_alone(tmp_path, kind):
    """Number of workers, hash seed and what the environment says of threads change no bit of a run."""
    flags = ["--dataset", market_tree(tmp_path / "market1501", ids=5, images=3), "--device", "cpu", *stress.RUNS[kind]]
    for workers, threads in ((0, "1"), (2, "3")):
        surroundings = {"PYTHONHASHSEED": threads, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        done = command(*flags, "--workers", workers, "--out", tmp_path / threads, env=os.environ | surroundings)
        assert done.returncode == 0 and f"threads={runs.default_threads()}\n" in done.stdout, done.stderr
    saved = "model.pth" if kind == "fine-tuning" else "backbone.pth"
    assert (tmp_path / "1" / saved).read_bytes() == (tmp_path / "3" / saved).read_bytes()
    assert log_lines(tmp_path / "1") == log_lines(tmp_path / "3") != []


def test_threads_change_rounding_alone_and_resuming_says_so(tmp_path):
    """Sums over more threads are rounded otherwise; in double precision nothing else is seen."""
    flags = [*small_run(tmp_path, epochs=3), "--save-every", 4]
    for threads in "12":
        done = command(*flags, "--out", tmp_path / threads, "--threads", threads, script=DOUBLE)
        assert done.returncode == 0 and f"threads={threads}" in done.stdout, done.stderr
    one, two = (torch.load(tmp_path / threads / "checkpoint_000000006.pth", weights_only=True)["model"] for threads in "12")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-7, atol=1e-8, msg=lambda m: f"{name}: {m}")
    assert log_lines(tmp_path / "1") == log_lines(tmp_path / "2") != []
    (tmp_path / "1" / "results.json").unlink()
    again = command(*flags, "--out", tmp_path / "1", "--threads", 2, script=DOUBLE)
    assert again.returncode == 0 and again.stdout.count("WARNING: threads: 1 before, 2 now") == 1


def test_processes_with_other_flags_or_data(tmp_path):
    flags = small_run(tmp_path, epochs=1)
    script = tmp_path / "differently.py"
    for change in ('["--lr", "0.1"]', f'["--dataset", {str(tmp_path / "other" / "market1501")!r}]'):
        market_tree(tmp_path / "other" / "market1501", ids=5, images=4)
        script.write_text(f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import data, train\n"
                          f"sys.argv += {change} if os.environ['RANK'] == '1' else []\ndata.command_line(train.main)\n")
        done = command(*flags, "--out", tmp_path / "run", processes=2, script=script)
        assert done.returncode != 0 and "the processes were started differently" in done.stderr
    assert not (tmp_path / "run" / "recipe.json").exists()


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_an_evaluation(tmp_path, processes):
    """Of the same weights the same numbers, to the last bit; one process has no batch of its own."""
    market_tree(tmp_path / "market1501", ids=131, images=2)      # 131 queries, 262 images: batches of 128 and less
    model = ReIDModel(build_backbone("resnet_tiny"), 5)
    torch.save(model.base.state_dict(), tmp_path / "weights.pth")
    flags = ["--dataset", tmp_path / "market1501", "--arch", "resnet_tiny", "--size", "32x16", "--epochs", 0,
             "--weights", tmp_path / "weights.pth", "--workers", 0, "--ids", 12]
    for n in (None, processes):
        done = command(*flags, "--out", tmp_path / f"run{n}", processes=n)
        assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / f"run{n}" / "results.json").read_text()) for n in (None, processes))
    one.pop("minutes"), two.pop("minutes")
    assert one == two and one["queries"] == 131


def test_end_to_end_beats_the_untrained_network(tmp_path):
    """Draw people, fine-tune, evaluate, from the command line; then evaluate the saved file again."""
    from synthetic import make_synthetic
    make_synthetic(tmp_path / "synthetic", train_ids=40, test_ids=20)
    common = ["--dataset", "synthetic", "--data-root", tmp_path, "--workers", "0", "--device", "cpu"]
    results = {}
    for name, epochs in (("untrained", 0), ("trained", 12)):
        done = command(*common, "--epochs", epochs, "--out", tmp_path / name, timeout=280)
        assert done.returncode == 0, done.stderr
        results[name] = json.loads((tmp_path / name / "results.json").read_text())
    assert results["trained"]["mAP"] > results["untrained"]["mAP"] + 0.25, results
    assert results["trained"]["valid"] == results["trained"]["queries"]
    assert results["trained"]["minutes"] > 0
    again = command(*common, "--epochs", 12, "--out", tmp_path / "trained")  # nothing left to train
    assert again.returncode == 0
    assert json.loads((tmp_path / "trained" / "results.json").read_text()) == results["trained"]
    done = subprocess.run([sys.executable, ROOT / "evaluate.py", "--dataset", "synthetic", "--data-root", tmp_path,
                           "--weights", tmp_path / "trained" / "model.pth", "--ranks", tmp_path / "r.png",
                           "--workers", "0", "--device", "cpu"], capture_output=True, text=True)
    assert done.returncode == 0 and f"mAP {results['trained']['mAP']:.2%}" in done.stdout, done.stderr
    assert (tmp_path / "r.png").stat().st_size > 10_000


def test_cosine_ends():
    assert cosine(0, 3, 1) == 3 and cosine(1, 3, 1) == 1 and cosine(0.5, 3, 1) == 2 and cosine(9, 3, 1) == 1
