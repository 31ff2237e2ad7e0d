"""Do trainings learn? On synthetic people, in a minute."""

import dataclasses
import json

from conftest import ROOT, command, log_lines

import train
from extra.runs import Run, Runtime
from personvit import VITS, PersonViTRecipe, VisionTransformer


def test_a_short_pretraining_learns(people, tmp_path, monkeypatch):
    """At first the loss falls, then a sharper teacher lifts it; what the student has yet to learn of the teacher halves; no
    warning; and frozen features find people no worse than those of random weights. The limits leave room for rounding: of
    five runs (three seeds, PyTorch 2.6 and 2.14) the loss fell to 0.53 to 0.70 of the first, kl to 0.25 to 0.41, and the
    mAP was 1.02 to 1.38 times that of random weights; so short a training shows no more."""
    monkeypatch.setitem(VITS, "vit_mini", lambda size, **more: VisionTransformer(
        size, embed_dim=64, depth=3, num_heads=2, **more))
    recipe = dataclasses.replace(PersonViTRecipe.preset("synthetic"), epochs=4, batch=16, lr=4e-3, warmup=1, local_crops=2,
                                 prototypes=256, hidden=256, bottleneck=64, drop_path=0.0)
    run = Run(tmp_path / "run", {})
    train.pretrain(recipe, people, run, Runtime("cpu", 0, log_every=34, monitor_every=4), monitor=people)
    untrained, first, *lines, last, trained = log_lines(run.folder)
    assert min(line["total"] for line in lines[:3]) < 0.8 * first["total"] and last["kl"] < 0.5 * first["kl"]
    assert not any("warning" in line for line in (first, *lines, last)) and last["mutual_information"] > 0.1
    assert trained["mAP"] > 0.95 * untrained["mAP"], (trained, untrained)


def test_end_to_end_beats_the_untrained_network(people, tmp_path):
    """Fine-tune and evaluate from the command line; then evaluate the saved file again."""
    common = ["--dataset", "synthetic", "--data-root", people.root, "--workers", 0, "--device", "cpu"]
    few = ["--labelled", 0.4, "--ids", 8, "--lr", 3e-3, "--size", "64x32", "--threads", 1]      # 40 people
    results = {}
    for name, epochs in (("untrained", 0), ("trained", 12)):
        done = command(*common, *few, "--epochs", epochs, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
        results[name] = json.loads((tmp_path / name / "results.json").read_text())
    assert results["trained"]["mAP"] > results["untrained"]["mAP"] + 0.25, results
    assert results["trained"]["valid"] == results["trained"]["queries"]
    assert results["trained"]["minutes"] > 0
    again = command(*common, *few, "--epochs", 12, "--out", tmp_path / "trained")
    assert again.returncode == 0 and '"step"' not in again.stdout  # nothing left to train
    assert json.loads((tmp_path / "trained" / "results.json").read_text()) == results["trained"]
    done = command(*common, "--weights", tmp_path / "trained" / "model.pth", "--ranks", tmp_path / "r.png",
                   script=ROOT / "evaluate.py")
    assert done.returncode == 0 and f"mAP {results['trained']['mAP']:.2%}" in done.stdout, done.stderr
    assert (tmp_path / "r.png").stat().st_size > 10_000
