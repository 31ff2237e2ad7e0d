"""Studies: which trainings are compared, what they share, tables and pictures."""

import dataclasses
import json
import re

import pytest
import torch
from conftest import colour_histograms, market_tree, write_image
from PIL import Image

from data import Dataset, Record, load_dataset, some_identities
from evaluate import build_backbone
from extra import study
from extra.files import InputError
from extra.runs import Runtime
from personvit import PersonViTRecipe
from train import Recipe
from upreid import UPReIDRecipe

TINY = {
    UPReIDRecipe: UPReIDRecipe(arch="resnet_tiny", size=(64, 32), epochs=1, batch=4, lr=0.1, dim=8,
                               queue=10, groups=2),
    PersonViTRecipe: PersonViTRecipe(arch="vit_mini", size=(64, 32), epochs=1, batch=4, hidden=16,
                                     prototypes=16, bottleneck=8, local_crops=2)}
GIVEN = {"bf16": False}


@pytest.fixture
def tiny(monkeypatch):
    """Recipes for fabricated sets of a few people."""
    for kind in TINY:
        monkeypatch.setattr(kind, "preset", classmethod(lambda cls, *_: TINY[cls]))
    monkeypatch.setattr(Recipe, "preset", classmethod(lambda cls, _, arch="resnet_tiny": cls(
        arch=arch, size=(64, 32), epochs=1, ids=3, images=2)))


def crowd(people: int) -> Dataset:
    return Dataset("crowd", None, [Record("", pid, 0) for pid in range(people)], [], [])


def test_few_labels_are_whole_people_numbered_anew_and_nested():
    records = [Record(f"{pid}_{i}.jpg", pid, i) for pid in range(50) for i in range(1 + pid % 4)]
    for seed in range(20):
        few, more = (some_identities(records, share, seed) for share in (0.1, 0.5))
        for part, people in ((few, 5), (more, 25)):
            assert sorted({r.pid for r in part}) == list(range(people))
        for r in few:  # one number for all images of a person, and only these
            same = {q.path.split("_")[0] for q in few if q.pid == r.pid}
            assert same == {r.path.split("_")[0]}
            assert sum(q.pid == r.pid for q in few) == 1 + int(r.path.split("_")[0]) % 4
        assert {r.path for r in few} < {r.path for r in more}
    assert some_identities(records, 0.1, 0) != some_identities(records, 0.1, 1)
    assert some_identities(records, 1, 7) is records


@pytest.mark.parametrize("name, rows, trained, shares", [
    ("upreid", 5, 4, {1.0}), ("personvit", 5, 4, {1.0}), ("few-shot", 12, 2, {0.1, 0.3, 1.0}),
    ("demo", 4, 2, {0.1, 0.3})])
def test_rows(tiny, name, rows, trained, shares):
    """Rows of a network differ in their origin alone; one pre-training is done for all shares."""
    given = {"size": (32, 16), "epochs": 2, "pretrain_epochs": 3, "bf16": False}
    got = study.STUDIES[name](crowd(40), 3, given)
    assert len(got) == rows == len({(r.group, r.origin) for r in got})
    assert len({r.origin for r in got if r.before}) == trained
    for r in got:
        assert (r.recipe.seed, r.recipe.size, r.recipe.epochs) == (3, (32, 16), 2)
        assert r.before is None or (r.before.seed, r.before.size, r.before.epochs) == (
            3, (32, 16), 3)
        assert r.before is None or isinstance(r.before, study.METHODS[r.method])
        assert all(q.recipe == r.recipe for q in got if q.group == r.group)
        assert r.recipe.ids <= r.recipe.labelled * 40
    assert {r.recipe.labelled for r in got} == shares


@pytest.mark.parametrize("name", study.STUDIES)
def test_a_given_share_is_that_of_every_row(tiny, name):
    rows = study.STUDIES[name](crowd(40), 0, GIVEN | {"labelled": [0.2], "weights": "w.pth"})
    assert {(r.recipe.labelled, r.recipe.ids <= 8) for r in rows} == {(0.2, True)}
    assert len({(r.group, r.origin) for r in rows}) == len(rows)


def test_networks_for_one_gpu_come_with_their_recipes():
    market = dataclasses.replace(crowd(100), name="market1501")
    rows = study.rows_of("few-shot", market, 0, GIVEN | {"arch": ["vit_small", "resnet50"]})
    assert {r.recipe.arch for r in rows} == {"vit_small", "resnet50"}
    for r in rows:
        # from random weights the published fine-tuning, by SGD or in steps, would not be fair
        usual = dataclasses.replace(Recipe.preset("market1501", r.recipe.arch), **Recipe.LAPTOP)
        kept = {k: getattr(r.recipe, k) for k in ("labelled", "ids", "bf16", "seed")}
        lr = {"vit_small": 3e-4, "resnet50": 1e-3}[r.recipe.arch]
        assert r.recipe == dataclasses.replace(usual, size=(256, 128), lr=lr, **kept)
        assert r.recipe.ids <= usual.ids
        usual = study.METHODS[r.method].preset("market1501", r.recipe.arch)
        assert r.before in (None, dataclasses.replace(usual, bf16=False, seed=0))
    rows = study.rows_of("few-shot", market, 0, GIVEN | {"arch": ["vit_small"]})
    assert {r.recipe.arch for r in rows} == {"vit_small", "resnet_tiny"}  # the other stays small
    for name, arch in (("upreid", "vit_small"), ("epochs", "resnet50"), ("few-shot", "resnet9")):
        with pytest.raises(InputError, match=f"--arch {arch}: not a network, or not one of this"):
            study.rows_of(name, market, 0, GIVEN | {"arch": [arch]})


def test_variants_change_what_their_names_say():
    rows = {r.origin: r.before for r in study.STUDIES["upreid"](crowd(2), 0, GIVEN)}
    assert [(b.weight_global, b.weight_local) for b in rows.values() if b] == [
        (0, 0), (1, 0), (0, 1), (1, 1)]
    rows = [r.before for r in study.STUDIES["personvit"](crowd(2), 0, GIVEN) if r.before]
    assert [(b.masks, b.local_crops > 0) for b in rows] == [
        (True, True), (False, True), (True, False), (False, False)]
    assert len({dataclasses.replace(b, masks=True, local_crops=1) for b in rows}) == 1


def test_a_study_from_nothing_to_its_table(tiny, dataset, tmp_path, capsys, monkeypatch):
    few = study.variants("upreid", {"U1, instance contrast (MoCo v2)": dict(weight_global=0.0),
                                    "UP-ReID": {}})
    monkeypatch.setitem(study.STUDIES, "upreid", few)
    study.study("upreid", dataset, [0, 1], GIVEN, tmp_path, False, Runtime(workers=0))
    first = capsys.readouterr().out
    for row in study.STUDIES["upreid"](dataset, 0, GIVEN):
        line = rf"^  resnet_tiny, {re.escape(row.origin)} .*\+-"
        assert re.search(line, first, re.M), row.origin
    recipes = [json.loads(p.read_text()) for p in tmp_path.glob("*_pretraining/recipe.json")]
    assert sorted((r["weight_global"], r["seed"]) for r in recipes) == [
        (0, 0), (0, 1), (1, 0), (1, 1)]
    # once more: nothing is trained again, the table is the same
    study.study("upreid", dataset, [0, 1], GIVEN, tmp_path, False, Runtime(workers=0))
    again = capsys.readouterr().out
    assert '"step"' in first and '"step"' not in again and again.count("is finished; --overwrite") == 6
    tables = [text[text.rindex("\nmarket"):].splitlines()[:6] for text in (first, again)]
    assert tables[0] == tables[1]
    assert tables[0][1] == "market1501, 4 queries; seeds 0, 1; labelled: 100% of the identities"


def test_one_pretraining_serves_all_epochs(tiny, dataset, tmp_path):
    study.study("epochs", dataset, [0], GIVEN | {"pretrain_epochs": 2}, tmp_path, False, Runtime(workers=0))
    (folder,) = {p.parent for p in tmp_path.glob("*_pretraining/recipe.json")}
    assert {p.name for p in folder.glob("backbone_e*")} == {"backbone_e0001.pth", "backbone_e0002.pth"}
    starts = {json.loads(p.read_text())["weights"] for p in tmp_path.glob("vit_mini_*/recipe.json")}
    assert {start and start.split()[0] for start in starts} == {None, "backbone_e0001.pth", "backbone_e0002.pth"}
    assert torch.load(folder / "backbone_e0001.pth")["epoch"] == 1


def test_fewer_images_are_seen_in_as_many_steps(tiny):
    rows = study.STUDIES["data"](crowd(1000), 0, GIVEN | {"pretrain_epochs": 30})
    images = [study.some_images(crowd(1000).train, row.share, 0) for row in rows[1:]]
    assert [len(part) for part in images] == [30, 250, 500, 1000]
    assert all({r.pid for r in few} < {r.pid for r in more} for few, more in zip(images, images[1:]))
    for row, part in zip(rows[1:], images):
        steps = row.before.epochs * (len(part) // row.before.batch)
        assert row.before.batch <= len(part) and 0.95 * 7500 < steps <= 7500
    tiny_set = study.STUDIES["data"](crowd(60), 0, GIVEN)                    # 3 % are two images
    assert tiny_set[1].before.batch == 2


def test_initialisation_starts_from_given_weights(tiny, dataset, tmp_path):
    with pytest.raises(InputError, match="w.pth: no such weights file"):     # before anything is trained
        study.study("initialisation", dataset, [0], GIVEN | {"weights": str(tmp_path / "w.pth")}, tmp_path / "out", False,
                    Runtime(workers=0))
    assert not (tmp_path / "out").exists()
    torch.save(build_backbone("vit_mini", (64, 32)).state_dict(), tmp_path / "w.pth")
    study.study("initialisation", dataset, [0], GIVEN | {"weights": str(tmp_path / "w.pth")}, tmp_path / "out", False,
                Runtime(workers=0))
    starts = {p.parent.name: json.loads(p.read_text())["weights"] for p in (tmp_path / "out").glob("*/recipe.json")}
    given = {name for name, start in starts.items() if start and start.startswith("w.pth")}
    assert given == {"PersonViT_from_given_weights_0_pretraining", "vit_mini_given_weights_0"} and len(starts) == 6


def test_evidence_at_each_learning_rate(tiny, dataset):
    rows = study.STUDIES["evidence"](dataset, 0, GIVEN)
    assert [(r.origin, r.before and r.before.epochs, r.recipe.epochs) for r in rows] == [
        ("random weights", None, 20), ("PersonViT", 25, 20)]
    twice = study.rows_of("evidence", dataset, 0, GIVEN | {"rates": [1e-3, 0.002]})
    assert [(r.group, r.recipe.lr) for r in twice] == [("vit_mini, rate 0.001", 1e-3)] * 2 + [("vit_mini, rate 0.002", 2e-3)] * 2
    assert [dataclasses.replace(r, rate="", recipe=rows[0].recipe) for r in twice] == 2 * rows


def test_table_means_spreads_and_pairs(capsys):
    def results(*mAPs):
        return [{"mAP": m, "rank1": 0.5, "rank5": 0.75, "rank10": 1.0} for m in mAPs]
    table = {("net", study.RANDOM): results(0.10, 0.30), ("net", "pre"): results(0.15, 0.45),
             ("other", "pre"): results(0.2, 0.2)}
    study.print_table(table, "title")
    lines = capsys.readouterr().out.strip().splitlines()
    lines = [re.split(r"  +", line.strip()) for line in lines]
    assert lines[0] == ["title"] and lines[1][0] == "mAP"
    ranks = ["50.0 +- 0.0", "75.0 +- 0.0", "100.0 +- 0.0"]
    assert lines[2] == ["net, random weights", "20.0 +- 14.1", *ranks]
    assert lines[3] == ["net, pre", "30.0 +- 21.2", *ranks, "10.0 +- 7.1"]
    assert len(lines[4]) == 5  # nothing to compare it with


def test_demo_says_what_it_shows_and_draws_the_rank_list_of_the_best(tiny, tmp_path, capsys):
    dataset = load_dataset("market1501", market_tree(tmp_path / "data", ids=20, images=2))
    given = GIVEN | {"pretrain_epochs": 1}
    study.study("demo", dataset, [3], given, tmp_path, False, Runtime(workers=0))
    out = capsys.readouterr().out
    assert "\nmarket1501, 20 queries; seeds 3; labelled: 10%, 30% of the identities\n" in out
    results = {p.parent.name: json.loads(p.read_text()) for p in tmp_path.glob("*/results.json")}
    assert len(results) == 4
    *network, origin = re.search(r"rank list of (.*)\n", out)[1].split(", ")
    name = study.file_name(f"{', '.join(network)}_{origin}_3")
    assert results[name]["mAP"] == max(r["mAP"] for r in results.values())
    assert Image.open(tmp_path / name / "ranks.png").width > 200


def test_colour_histograms_know_colours_and_nothing_else(tmp_path):
    for name, colour in (("a", (200, 0, 0)), ("b", (0, 0, 200))):
        Image.new("RGB", (8, 16), colour).save(tmp_path / f"{name}.png")
    noise = write_image(tmp_path / "c.png")
    Image.open(noise).transpose(Image.Transpose.ROTATE_180).save(tmp_path / "d.png")
    features = colour_histograms([Record(str(tmp_path / f"{n}.png"), 0, 0) for n in "abcd"],
                                       size=(16, 8))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
    similar = features @ features.T
    assert similar[0, 1] == 0 and similar[2, 3] > 0.999 and similar[0, 2] < 0.5


def test_mistakes_are_found_before_anything_is_trained(tmp_path, capsys):
    market_tree(tmp_path / "market1501")
    write_image(tmp_path / "crops" / "a.jpg")
    for name in ("0001_c1s1_1.jpg", "0001_c1s1_2.jpg", "0002_c1s1_1.jpg", "0003_c2s1_1.jpg"):
        write_image(tmp_path / "one" / name)                                 # a camera for each person
    usual = ["--dataset", "market1501", "--data-root", str(tmp_path), "--out",
             str(tmp_path / "out"), "--device", "cpu", "--threads", str(torch.get_num_threads())]
    for args, words in (
            (["upreid"], "64 needs that many images"),
            (["personvit", "--size", "16x16"], "is too small"),
            (["personvit", "--size", "8x8"], "patches are of 16 x 16"),
            (["few-shot"], "--labelled: 2 people at least, 10.0% of 4 are 0"),
            (["few-shot", "--dataset", "market"], "did you mean market1501"),
            (["data"], "--batch 1 cannot be shared evenly"),               # 3 % of so few images
            (["demo", "--dataset", str(tmp_path / "crops")], "no query has a correct match from another camera"),
            (["demo", "--dataset", str(tmp_path / "one")], "no query has a correct match from another camera")):
        with pytest.raises(InputError, match=words):
            study.main([args[0], *usual, *args[1:]])
        assert not list(tmp_path.glob("out/*"))
    for args, words in ((["everything"], "invalid choice"),
                        (["upreid", "--workers", "-1"], "--workers -1: must be at least 0"),
                        (["upreid", "--epochs", "-1"], "--epochs"),
                        (["upreid", "--seeds", "9" * 20], "--seeds"),
                        (["upreid", "--rates", "nan"], "--rates"),
                        (["upreid", "--size", "64.5x32"], "two whole numbers"),
                        (["upreid", "--labelled", "1.5"], "more than 0, at most 1"),
                        (["initialisation"], "--weights FILE"), (["upreid", "--weights", "w"], "--weights FILE"),
                        (["initialisation", "--weights", "w", "--overwrite"], "without --overwrite")):
        with pytest.raises(SystemExit, match="2"):
            study.main(args)
        assert words in capsys.readouterr().err


def test_several_processes_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="2"):
        study.main(["upreid"])
    assert "one process" in capsys.readouterr().err
