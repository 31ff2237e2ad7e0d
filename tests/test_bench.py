"""Speeds and the check of a GPU: that what is measured is a training, and that what is wrong is seen."""

import dataclasses

import pytest
import torch

from extra import bench, runs
from personvit import PersonViTRecipe
from train import Recipe
from upreid import UPReIDRecipe


@pytest.mark.parametrize("method, recipe", [
    ("", Recipe(arch="vit_mini", size=(32, 16), ids=3, images=2)),
    ("personvit", PersonViTRecipe(arch="vit_mini", size=(64, 32), batch=4, prototypes=16, hidden=16, bottleneck=8, local_crops=2)),
    ("upreid", UPReIDRecipe(arch="resnet_tiny", size=(64, 32), batch=4, queue=10, groups=2))])
def test_stages_of_a_training(dataset, method, recipe):
    done = bench.staged(method, dataclasses.replace(recipe, epochs=20), dataset, "cpu", 2, "")
    assert list(done.lines) == list(bench.Stages.names)
    phases = {"views", "forward", "backward", "optimiser"} | ({"clipping", "teacher"} if method else set())
    assert set(done.seconds) == phases and all(seconds > 0 for seconds in done.seconds.values())
    per_step = [done.per_step("phases", seconds) for seconds in done.seconds.values()]
    assert 0 < sum(per_step) < sum(done.seconds.values()) and done.launches() > 200 and done.first_step > 0


def test_rows_are_printed_as_they_are_ready(monkeypatch, capsys):
    monkeypatch.setattr(bench, "in_new_process", lambda function, *args: function(*args))
    monkeypatch.setattr(bench, "whole_loop", lambda name, device, folder, steps, how: f"{name} {how} {steps}")
    monkeypatch.setattr(bench, "load_dataset", lambda *_: None)
    bench.loops(["upreid", "personvit"], "cpu", True)
    assert capsys.readouterr().out.splitlines()[1:] == ["upreid eager 2", "personvit eager 2"]
    bench.loops(["upreid", "personvit"], "cuda", False)        # graphs come last
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]] == ["compiled"] * 2 + ["eager"] * 2 + ["CUDA"] * 2


@pytest.fixture
def cpu_alone(monkeypatch):
    monkeypatch.setattr(runs, "choose_backend", lambda *_: "")


@pytest.mark.parametrize("name", ["personvit", "upreid", "finetune-vit", "finetune-resnet"])
def test_a_cpu_agrees_with_itself(cpu_alone, name, capsys):
    with pytest.raises(SystemExit) as caught:
        bench.check_all([name], "cpu")
    out = capsys.readouterr().out
    assert caught.value.code is None and "differences of cpu from float32" in out and out.endswith("right\n") and "WRONG" not in out
    rows = [line for line in out.splitlines() if "at most" in line]
    assert len(rows) == 13 and all(f"{name} " in row for row in rows)      # 7 in float32, 6 in bfloat16
    exact = [row for row in rows if "float32" in row and "bfloat16" not in row]
    assert len(exact) == 7 and all(" 0.0e+00 " in row for row in exact)    # the same machine: the same numbers


@pytest.mark.parametrize("fault", ["views", "losses", "gradients", "update", "features", "next losses"])
def test_what_is_wrong_is_seen(cpu_alone, monkeypatch, capsys, fault):
    """... where the second network of a check, the device's, makes one mistake."""
    made = []

    class Faulty(bench.SmallStep):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)
            self.steps = 0

        def step(self):
            found = super().step()
            self.steps += 1
            if self is not made[0] and fault == "next losses" and self.steps > 1:
                found["losses"] = found["losses"] * 1.2
            elif self is not made[0] and fault in found:
                found[fault] = found[fault] * (torch.nan if fault == "features" else 1.3)
            return found

    monkeypatch.setattr(bench, "SmallStep", Faulty)
    with pytest.raises(SystemExit, match="WRONG: finetune-vit"):
        bench.check_all(["finetune-vit"], "cpu")
    wrong = [line for line in capsys.readouterr().out.splitlines() if "WRONG" in line]
    assert wrong and all(f" {fault} " in line for line in wrong)
