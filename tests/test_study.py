"""Studies: which trainings are compared, what they share, tables and pictures."""

import dataclasses
import json
import os
import re

import pytest
from conftest import ROOT, command, market_tree, write_image
from PIL import Image

import study
import train
from data import Dataset, Record, some_identities
from pretrain import PersonViTRecipe, UPReIDRecipe
from runs import Machine

TINY = {"upreid": UPReIDRecipe(arch="resnet_tiny", size=(64, 32), epochs=1, batch=4, lr=0.1, dim=8, queue=10, groups=2),
        "personvit": PersonViTRecipe(arch="vit_mini", size=(64, 32), epochs=1, batch=4, prototypes=16, hidden=16,
                                     bottleneck=8, local_crops=2)}


GIVEN = {"bf16": False}


@pytest.fixture
def tiny(monkeypatch):
    """Networks and recipes for the fabricated set of four people."""
    monkeypatch.setattr(study, "pretrain_recipe_for", lambda method, *_: TINY[method])
    monkeypatch.setattr(study, "recipe_for", lambda dataset, arch="resnet_tiny": train.Recipe(
        arch=arch, size=(64, 32), epochs=1, ids=3, images=2))


def test_few_labels_are_whole_people_numbered_anew_and_nested():
    records = [Record(f"{pid}_{i}.jpg", pid, i) for pid in range(50) for i in range(1 + pid % 4)]
    for seed in range(20):
        few, more = (some_identities(records, share, seed) for share in (0.1, 0.5))
        assert sorted({r.pid for r in few}) == list(range(5)) and sorted({r.pid for r in more}) == list(range(25))
        for r in few:                                             # one number for all images of a person, and only these
            same = {q.path.split("_")[0] for q in few if q.pid == r.pid}
            assert same == {r.path.split("_")[0]}
            assert sum(q.pid == r.pid for q in few) == 1 + int(r.path.split("_")[0]) % 4
        assert {r.path for r in few} < {r.path for r in more}
    assert some_identities(records, 0.1, 0) != some_identities(records, 0.1, 1)
    assert some_identities(records, 1, 7) is records


@pytest.mark.parametrize("name, rows, trained", [("upreid", 5, 4), ("personvit", 5, 4), ("few-shot", 12, 2), ("demo", 4, 2)])
def test_rows(tiny, name, rows, trained):
    """Rows of a network differ in their origin alone; a pre-training is done once for all shares."""
    dataset = Dataset("crowd", None, [Record("", pid, 0) for pid in range(40)], [], [])
    got = study.STUDIES[name](dataset, 3, {"size": (32, 16), "epochs": 2, "pretrain_epochs": 3, "bf16": False})
    assert len(got) == rows == len({(r.group, r.origin) for r in got})
    assert len({r.origin for r in got if r.before}) == trained
    for r in got:
        assert (r.recipe.seed, r.recipe.size, r.recipe.epochs) == (3, (32, 16), 2)
        assert r.before is None or (r.before.seed, r.before.size, r.before.epochs) == (3, (32, 16), 3)
        assert all(q.recipe == r.recipe for q in got if q.group == r.group)
        assert r.recipe.ids <= r.recipe.labelled * 40
    assert sorted({r.recipe.labelled for r in got}) == ([0.1, 0.3, 1.0] if name == "few-shot" else [1.0])


def test_variants_change_what_their_names_say():
    rows = {r.origin: r.before for r in study.STUDIES["upreid"](load_none(), 0, GIVEN)}
    assert [(b.weight_global, b.weight_local) for b in rows.values() if b] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    rows = [r.before for r in study.STUDIES["personvit"](load_none(), 0, GIVEN) if r.before]
    assert [(b.masks, b.local_crops > 0) for b in rows] == [(True, True), (False, True), (True, False), (False, False)]
    assert len({dataclasses.replace(b, masks=True, local_crops=1) for b in rows}) == 1


def load_none():
    return type("Named", (), {"name": "synthetic", "train": []})


def test_a_study_from_nothing_to_its_table(tiny, dataset, tmp_path, capsys):
    study.study("upreid", dataset, [0, 1], GIVEN, tmp_path, False, Machine("cpu", 0))
    first = capsys.readouterr().out
    for row in study.STUDIES["upreid"](dataset, 0, GIVEN):
        assert re.search(rf"^  resnet_tiny, {re.escape(row.origin)} .*\+-", first, re.M), row.origin
    weights = [json.loads(p.read_text()) for p in sorted(tmp_path.glob("*_pretraining/recipe.json"))]
    assert sorted((w["weight_global"], w["weight_local"], w["seed"]) for w in weights) == [
        (g, l, seed) for g in (0, 1) for l in (0, 1) for seed in (0, 1)]
    picture = Image.open(tmp_path / "upreid.png")
    assert picture.width > 400 and len(picture.getcolors(100_000)) > 5
    # once more: nothing is trained again, the table is the same
    study.study("upreid", dataset, [0, 1], GIVEN, tmp_path, False, Machine("cpu", 0))
    again = capsys.readouterr().out
    assert '"step"' in first and '"step"' not in again and again.count("is finished: mAP") == 10
    assert first[first.rindex("\nmarket"):].splitlines()[:7] == again[again.rindex("\nmarket"):].splitlines()[:7]


def test_table_means_spreads_and_pairs(capsys):
    def results(*mAPs):
        return [{"mAP": m, "rank1": 0.5, "rank5": 0.75, "rank10": 1.0} for m in mAPs]
    table = {("net", study.RANDOM): results(0.10, 0.30), ("net", "pre"): results(0.15, 0.45),
             ("other", "pre"): results(0.2, 0.2)}
    study.print_table(table, "title")
    lines = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.strip().splitlines()]
    assert lines[1] == ["net, random weights", "20.0 +- 14.1", "50.0 +- 0.0", "75.0 +- 0.0", "100.0 +- 0.0"]
    assert lines[2] == ["net, pre", "30.0 +- 21.2", "50.0 +- 0.0", "75.0 +- 0.0", "100.0 +- 0.0", "10.0 +- 7.1"]
    assert len(lines[3]) == 5                                     # nothing to compare it with


def test_demo_draws_the_rank_list_of_the_best(tiny, dataset, tmp_path, capsys):
    study.study("demo", dataset, [0], GIVEN, tmp_path, False, Machine("cpu", 0))
    out = capsys.readouterr().out
    best = max((json.loads(p.read_text())["mAP"], p.parent.name) for p in tmp_path.glob("*/results.json"))
    name = re.search(r"rank list of (.*) in ", out)[1]
    assert json.loads((tmp_path / study.file_name(f"{name.replace(', ', '_', 1)}_0") / "results.json").read_text())["mAP"] == best[0]
    assert {"colour histogram", "resnet_tiny"} <= set(re.findall(r"no training, (\w+(?: \w+)?)  ", out))
    assert Image.open(tmp_path / "ranks.png").width > 200


def test_mistakes_get_one_line(tmp_path):
    market_tree(tmp_path / "market1501")
    write_image(tmp_path / "crops" / "a.jpg")
    for args, words in [(["upreid"], "64 needs that many images"), (["upreid", "--epochs", "-1"], "--epochs -1"),
                        (["few-shot", "--dataset", "market"], "did you mean market1501"),
                        (["demo", "--dataset", tmp_path / "crops"], "has no queries"),
                        (["few-shot"], "10% of them are 0, a study needs 2")]:
        done = command("--dataset", "market1501", "--data-root", tmp_path, "--out", tmp_path / "out", "--device", "cpu",
                       *args, script=ROOT / "study.py")
        assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        assert re.search(words, done.stderr)
        assert not list(tmp_path.glob("out/*"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "upreid.png").write_text("a picture of the user's")
    done = command("upreid", "--dataset", "market1501", "--data-root", tmp_path, "--out", tmp_path / "mine",
                   script=ROOT / "study.py")
    assert done.returncode == 1 and "mine is no study's folder, and upreid.png in it would be replaced" in done.stderr
    for args, words in ((["everything"], "invalid choice"), (["upreid", "--workers", "-1"], "--workers is at least 0"),
                        (["upreid", "--seeds", "3", "3"], "no seed counts twice")):
        done = command(*args, script=ROOT / "study.py")
        assert done.returncode == 2 and words in done.stderr
    done = command("upreid", script=ROOT / "study.py", env=os.environ | {"WORLD_SIZE": "2"})
    assert done.returncode == 2 and "one process" in done.stderr
