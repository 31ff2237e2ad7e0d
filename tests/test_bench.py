"""Where a step's time goes: that what is measured is a training, and the whole of it."""

import dataclasses

import pytest
import torch

from extra import bench
from personvit import PersonViTRecipe
from train import Recipe
from upreid import UPReIDRecipe


def test_steps_see_views_in_float32_and_stay_finite(monkeypatch):
    """... as those of a training do, also where the networks compute in bfloat16, as on a GPU."""
    monkeypatch.setattr(bench, "half", lambda _: torch.autocast("cpu", torch.bfloat16))
    recipe = PersonViTRecipe(arch="vit_mini", size=(64, 32), batch=4, prototypes=16, hidden=16, bottleneck=8, local_crops=2)
    seen = []
    for plain in (False, True):
        step = bench.training_step("personvit", recipe, "cpu", plain)
        kind = bench.PlainPersonViT if plain else bench.PersonViT

        def forward(self, views, forward=kind.forward, **now):
            seen.append((views["globals"].dtype, forward(self, views, **now)))
            return seen[-1][1]

        monkeypatch.setattr(kind, "forward", forward)
        for _ in range(3):
            step()
    assert len(seen) == 6 and all(dtype == torch.float32 and losses["total"].isfinite() for dtype, losses in seen)


@pytest.mark.parametrize("name, recipe", [
    ("fine-tuning", Recipe(arch="vit_mini", size=(32, 16), ids=3, images=2)),
    ("personvit", PersonViTRecipe(arch="vit_mini", size=(64, 32), batch=4, prototypes=16, hidden=16, bottleneck=8, local_crops=2)),
    ("upreid", UPReIDRecipe(arch="resnet_tiny", size=(64, 32), batch=4, queue=10, groups=2))])
def test_stages_of_a_training(dataset, name, recipe):
    done = bench.staged(name, dataclasses.replace(recipe, epochs=20), dataset, "cpu", 2, "")
    assert list(done.lines) == list(bench.Stages.names)
    phases = {"copy", "views", "forward", "backward", "optimiser"} | ({"clipping", "teacher"} if name != "fine-tuning" else set())
    assert set(done.seconds) == phases and all(seconds > 0 for seconds in done.seconds.values())
    per_step = [done.per_step("phases", seconds) for seconds in done.seconds.values()]
    assert 0 < sum(per_step) < sum(done.seconds.values()) and done.launches() > 200
