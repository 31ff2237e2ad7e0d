"""Do trainings learn? On synthetic people, in a minute."""

import dataclasses
import json

from conftest import ROOT, command, log_lines

import train
from personvit import PersonViTRecipe
from train import Machine, Run


def test_a_short_pretraining_learns(people, tmp_path):
    """What the student has yet to learn of the teacher halves, and no collapse is flagged; the loss itself need not fall."""
    recipe = dataclasses.replace(PersonViTRecipe.preset("synthetic"), size=(64, 32), epochs=8, local_crops=2, prototypes=256,
                                 hidden=256, bottleneck=64)
    run = Run(tmp_path / "run", {})
    train.pretrain("personvit", recipe, people, run, Machine("cpu", 0, log_every=99))
    first, *_, last = log_lines(run.folder)
    assert last["kl"] < 0.5 * first["kl"] and last["information"] > 0.1 and "warning" not in last


def test_end_to_end_beats_the_untrained_network(people, tmp_path):
    """Fine-tune and evaluate from the command line; then evaluate the saved file again."""
    common = ["--dataset", "synthetic", "--data-root", people.root, "--workers", 0, "--device", "cpu"]
    results = {}
    for name, epochs in (("untrained", 0), ("trained", 12)):
        done = command(*common, "--epochs", epochs, "--threads", 1, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
        results[name] = json.loads((tmp_path / name / "results.json").read_text())
    assert results["trained"]["mAP"] > results["untrained"]["mAP"] + 0.25, results
    assert results["trained"]["valid"] == results["trained"]["queries"]
    assert results["trained"]["minutes"] > 0
    again = command(*common, "--epochs", 12, "--threads", 1, "--out", tmp_path / "trained")
    assert again.returncode == 0 and '"step"' not in again.stdout  # nothing left to train
    assert json.loads((tmp_path / "trained" / "results.json").read_text()) == results["trained"]
    done = command(*common, "--weights", tmp_path / "trained" / "model.pth", "--ranks", tmp_path / "r.png",
                   script=ROOT / "evaluate.py")
    assert done.returncode == 0 and f"mAP {results['trained']['mAP']:.2%}" in done.stdout, done.stderr
    assert (tmp_path / "r.png").stat().st_size > 10_000
