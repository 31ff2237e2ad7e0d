"""Pictures, photos and the command line of evaluate.py."""

import dataclasses
import json
import re
import shutil
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import ROOT, write_image
from PIL import Image

import evaluate
from data import Record
from evaluate import ReIDModel, build_backbone
from extra import photos as own_photos
from extra import pictures
from extra.files import InputError
from extra.verification import Verification
from personvit import VisionTransformer


@pytest.fixture
def weights(tmp_path):
    """A small fine-tuned ViT with a file of results beside it."""
    torch.manual_seed(0)
    model = ReIDModel(build_backbone("vit_mini", (64, 32)), 5, "after")
    recipe = {"arch": "vit_mini", "size": (64, 32), "mean": [0.5] * 3, "std": [0.5] * 3, "neck_feat": "after",
              "last_stride": 1}
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save({"format": "reid-model", "recipe": recipe, "model": model.state_dict()}, folder / "model.pth")
    (folder / "results.json").write_text(json.dumps({"similarity": {"same": [0.5, 0.7, 0.9], "other": [-0.1, 0.1, 0.4]},
                                                     "cmc": [0.5, 0.75, 0.875]}))
    return folder / "model.pth"


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for i in range(12):
        write_image(folder / "deep" / f"p{i:02d}.png", i, (40, 20))
    pixels = np.random.default_rng(9).integers(0, 256, (30, 18), dtype=np.uint8)
    for mode in ("L", "1", "P", "RGBA", "LA", "CMYK", "I;16"):     # whatever a phone or a scanner writes
        image = Image.fromarray(pixels.astype(np.uint16) * 256) if mode == "I;16" else Image.fromarray(pixels).convert(mode)
        image.save(folder / f"mode_{mode.replace(';', '')}.{'jpg' if mode == 'CMYK' else 'png'}")
    return folder


def run(*args):
    evaluate.main([str(a) for a in (*args, *([] if "--curves" in args or "--inspect" in args else
                                             ["--workers", 0, "--device", "cpu"]))])


def test_extract_is_deterministic_and_takes_any_mode(weights, photos, tmp_path, capsys):
    for name in ("a", "b"):
        run("--extract", photos, "-o", tmp_path / f"{name}.npz", "--weights", weights)
    a, b = (np.load(tmp_path / f"{name}.npz") for name in ("a", "b"))
    assert len(set(a["paths"])) == 19 and list(a["paths"]) == list(b["paths"])
    assert np.array_equal(a["features"], b["features"])
    np.testing.assert_allclose(np.linalg.norm(a["features"], axis=1), 1, rtol=1e-5)
    assert "19 images, features (19, 128)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run("--extract", photos, "-o", tmp_path / "a.npz", "--weights", weights)   # nothing is overwritten
    assert "a.npz exists; --overwrite replaces it" in capsys.readouterr().err


def test_broken_photos_are_listed_and_left_out_on_request_only(weights, photos, tmp_path, capsys):
    (photos / "broken.jpg").write_bytes(b"no image")
    (photos / "empty.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds 19 images that can be read and 2 that cannot, which --skip-bad leaves out.*broken.jpg"):
        run("--extract", photos, "-o", tmp_path / "a.npz", "--weights", weights)
    assert not (tmp_path / "a.npz").exists()
    run("--extract", photos, "-o", tmp_path / "a.npz", "--weights", weights, "--skip-bad")
    out = capsys.readouterr().out
    assert "left out" in out and "empty.png" in out and len(np.load(tmp_path / "a.npz")["paths"]) == 19
    with pytest.raises(InputError, match="no such folder"):
        run("--extract", photos / "absent", "-o", tmp_path / "b.npz", "--weights", weights)


@pytest.mark.parametrize("trained, flags, used", [(True, [], False), (False, [], False), (None, [], False),
                                                  (True, ["--no-bf16"], False), (False, ["--bf16"], True)])
def test_evaluated_in_float32_on_a_cpu_unless_asked(weights, photos, monkeypatch, trained, flags, used):
    content = torch.load(weights)
    if trained is not None:
        content["recipe"]["bf16"] = trained
    torch.save(content, weights)
    seen = []
    monkeypatch.setattr(own_photos, "extract", lambda *args, bf16, **_: seen.append(bf16) or (torch.eye(2), None))
    run("--compare", photos / "deep" / "p00.png", photos / "deep" / "p01.png", "--weights", weights, "--device",
        "cpu", *flags)
    assert seen == [used]


def test_compare_says_what_similarities_mean(weights, photos, capsys):
    a, b = photos / "deep" / "p00.png", photos / "deep" / "p01.png"
    run("--compare", a, a, "--weights", weights)
    out = capsys.readouterr().out
    assert "similarity 1.0000" in out and "0.5 .. 0.9" in out and "-0.1 .. 0.4" in out and "calibration" in out
    run("--compare", a, b, "--weights", weights)
    assert float(re.search(r"similarity (-?[\d.]+)", capsys.readouterr().out)[1]) < 1
    results = weights.parent / "results.json"
    for t, words in ((0.3, "at or above it, as did 90.00% of 40 pairs of one person and 20.00% of 1,500 of two"),
                     (1.1, "below it, as did 10.00% of 40 pairs of one person and 80.00% of 1,500 of two")):
        found = Verification(0.15, t, 0.1, 0.2, {"1 %": None}, 40, 1500, "these people")
        results.write_text(json.dumps({"verification": dataclasses.asdict(found)}))
        run("--compare", a, a, "--weights", weights)
        out = capsys.readouterr().out
        assert f"on these people both error rates were nearest at a threshold of {t:.4f} (EER 15.00%)" in out
        assert words in out and "calibration" in out
    assert "pair" not in own_photos.explain_similarity(str(weights)).replace("on pairs of your own", "")    # of none
    results.unlink()
    run("--compare", a, b, "--weights", weights)
    assert "no evaluation of this model is known" in capsys.readouterr().out


def test_query_finds_the_same_picture_first_but_not_its_own_file(weights, photos, tmp_path, capsys):
    query, again = photos / "deep" / "p03.png", photos / "deep" / "again.bmp"
    Image.open(query).save(again)
    run("--query", query, "--gallery", photos, "--weights", weights, "--ranks", tmp_path / "q.png")
    out = capsys.readouterr().out
    ranked = [line for line in out.splitlines() if re.match(r" +\d+  ", line)]
    assert ranked[0].startswith("  1  1.0000") and ranked[0].endswith("again.bmp")
    assert "p03.png is the query's very file" in out and not any(line.endswith("p03.png") for line in ranked)
    assert Image.open(tmp_path / "q.png").width > 800


def test_query_alone_in_the_gallery(weights, photos, tmp_path):
    (tmp_path / "alone").mkdir()
    shutil.copy(photos / "deep" / "p03.png", tmp_path / "alone" / "copy.png")
    with pytest.raises(InputError, match="holds no image but the query"):
        run("--query", photos / "deep" / "p03.png", "--gallery", tmp_path / "alone", "--weights", weights)


def test_pictures_of_a_dataset(weights, market, tmp_path, capsys):
    files = [tmp_path / name for name in ("r.png", "a.png", "c.png", "p.png")]
    run("--dataset", market, "--weights", weights, "--rerank", "--ranks", files[0], "--attention", files[1],
        "--clusters", files[2], "--correspondence", files[3])
    out = capsys.readouterr().out
    assert out.count("mAP") == 2 and "re-ranked" in out and out.count("picture in") == 4
    for file in files:
        image = np.asarray(Image.open(file).convert("RGB"))
        assert image.shape[0] > 100 and len(np.unique(image.reshape(-1, 3), axis=0)) > 50


def test_attention_and_clusters_need_a_vit(market, tmp_path):
    torch.save(build_backbone("resnet_tiny").state_dict(), tmp_path / "r.pth")
    with pytest.raises(InputError, match="weights are of a ResNet"):
        run("--dataset", market, "--weights", tmp_path / "r.pth", "--attention", tmp_path / "a.png")


def test_attention_is_the_softmax_of_the_last_block():
    torch.manual_seed(0)
    vit, x = VisionTransformer((64, 32), 16, embed_dim=24, depth=2, num_heads=3).eval(), torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        attention = pictures.cls_attention(vit, x)
        assert attention.shape == (2, 3, 4, 2)
        # by hand: the first block, then queries and keys of the second
        tokens = torch.cat([vit.cls_token.expand(2, -1, -1), vit.patch_embed["proj"](x).flatten(2).mT], 1) + vit.pos_embed
        h = vit.blocks[1].norm1(vit.blocks[0](tokens))
        qkv = vit.blocks[1].attn.qkv(h).reshape(2, 9, 3, 3, 8)
        for i in range(2):
            for head in range(3):
                scores = qkv[i, 0, 0, head] @ qkv[i, :, 1, head].T / 8 ** 0.5
                torch.testing.assert_close(attention[i, head].flatten(), scores.softmax(0)[1:])


def test_clusters_find_patches_that_are_alike():
    torch.manual_seed(0)
    vit = VisionTransformer((64, 32), 16, embed_dim=24, depth=1, num_heads=3).eval()
    vit.pos_embed.data.zero_()
    x = torch.zeros(3, 3, 64, 32)
    x[:, :, 32:] = 1                                             # two kinds of patches, above and below
    clusters = pictures.patch_clusters(vit, x, count=2)
    assert clusters.shape == (3, 4, 2) and len(clusters[:, :2].unique()) == len(clusters[:, 2:].unique()) == 1
    assert clusters[0, 0, 0] != clusters[0, 3, 0]
    assert torch.equal(clusters, pictures.patch_clusters(vit, x, count=2))


def test_patches_that_belong_together_find_each_other():
    """Without positions a ViT sees a set of patches: of the same ones in another order each finds its twin."""
    torch.manual_seed(0)
    vit = VisionTransformer((64, 32), 16, embed_dim=24, depth=1, num_heads=3).eval()
    vit.pos_embed.data.zero_()
    x, order = torch.randn(3, 64, 32), torch.randperm(8)
    patches = x.view(3, 4, 16, 2, 16).permute(1, 3, 0, 2, 4).flatten(0, 1)                   # (8, 3, 16, 16), row by row
    y = patches[order].view(4, 2, 3, 16, 16).permute(2, 0, 3, 1, 4).reshape(3, 64, 32)
    places = pictures.mutual_nearest(vit, x, y)
    assert torch.equal(places, torch.stack([torch.arange(8), order.argsort()], dim=1))
    one = pictures.mutual_nearest(vit, x, torch.zeros(3, 64, 32))                            # all alike: one of them has a twin
    assert len(one) == 1 and one[0, 1] == 0


def test_lines_of_a_pair_end_in_the_patches_that_belong_together(tmp_path):
    images, places = torch.full((2, 3, 64, 32), 255, dtype=torch.uint8), torch.tensor([[0, 7]])
    pictures.correspondence_page(tmp_path / "p.png", "title", [(images, places)], (4, 2))
    page = np.asarray(Image.open(tmp_path / "p.png").convert("RGB")).astype(int)
    sheet = pictures.Sheet(2, 1, "title; at most 12 lines a pair")
    for side, (row, column) in enumerate([(0, 0), (3, 1)]):
        x, y = sheet.place(side, 0)
        x, y = x + round((column + 0.5) * pictures.W / 2), y + round((row + 0.5) * pictures.H / 4)
        assert (page[y, x] == pictures.PALETTE[0]).all()
        assert (page[y + 12, x - 12] == 255).all() or (page[y - 12, x + 12] == 255).all()


def test_each_head_has_its_own_map_and_bright_is_much(tmp_path):
    image, attention = torch.full((1, 3, 128, 64), 100, dtype=torch.uint8), torch.zeros(1, 2, 2, 1)
    attention[0, 0, 0], attention[0, 1, 1] = 1, 1                # head 1 looks up, head 2 down
    pictures.attention_page(tmp_path / "a.png", "title", image, attention)
    page = np.asarray(Image.open(tmp_path / "a.png").convert("L")).astype(int)
    for head, (bright, dark) in ((1, (0, 1)), (2, (1, 0))):
        x, y = pictures.Sheet(3, 1, '').place(head, 0)
        half = [page[y + 64 * part + 10:y + 64 * part + 54, x + 10:x + 54].mean() for part in (bright, dark)]
        assert half[0] > 2 * half[1]


def test_curves_have_the_colours_of_their_names(tmp_path):
    lines = {f"run {i}": ([0, 1, 2], [i, i, i]) for i in range(3)}
    pictures.curve_page(tmp_path / "c.png", [("t", "x", "y", lines)])
    page = np.asarray(Image.open(tmp_path / "c.png"))
    rows = [np.flatnonzero((page[:300] == color).all(2).any(1)).mean() for color in pictures.PALETTE[:3]]
    assert rows[0] > rows[1] > rows[2]                           # larger values stand higher


def test_people_in_pictures_are_different_people(monkeypatch):
    class Set:
        query = [Record(f"{i}", i // 3, 0) for i in range(30)]

    seen, recipe = [], {"size": (2, 1), "mean": [0] * 3, "std": [1] * 3}
    monkeypatch.setattr(pictures, "read_image", lambda path, *_: seen.append(path) or torch.zeros(3, 2, 1))
    pictures.read_people(Set, 5, recipe)
    assert seen == ["0", "6", "12", "18", "24"]
    assert len(pictures.read_people(Set, 99, recipe)[0]) == 10


def test_curves(weights, tmp_path, capsys):
    log = [{"step": 10 * i, "total": 5 / (i + 1)} for i in range(9)] + [{"epoch": 3, "monitor": "x", "mAP": 0.1}]
    (weights.parent / "log.jsonl").write_text("\n".join([*map(json.dumps, log), '{"step": 90, "to']))  # a power cut
    other = tmp_path / "other"
    other.mkdir()
    (other / "log.jsonl").write_text(json.dumps({"step": 5, "total": 3}) + "\n")
    run("--curves", tmp_path / "c.png", "--runs", weights.parent, other)
    assert Image.open(tmp_path / "c.png").size[0] == 880          # losses and CMC
    with pytest.raises(InputError, match="is no run folder"):
        run("--curves", tmp_path / "d.png", "--runs", tmp_path)


@pytest.mark.parametrize("odd", ["NaN", "1e400", "-1e308", '"x"', "null", "[1]", "{}", 30 * "9"])
def test_odd_numbers_are_no_curves(tmp_path, odd):
    """A picture, or one line of InputError."""
    for step, total, hits in ((odd, 1, "[0.5]"), (1, odd, "[0.5]"), (1, 1, f"[{odd}]"), (1, 1, odd)):
        (tmp_path / "log.jsonl").write_text(f'{{"step": {step}, "total": {total}}}\n{{"step": 3, "total": 2}}\n')
        (tmp_path / "results.json").write_text(f'{{"cmc": {hits}}}')
        try:
            pictures.draw_curves(tmp_path / "c.png", [str(tmp_path)])
            assert Image.open(tmp_path / "c.png").size[0] == (440 if hits == "{}" else 880)
        except InputError as error:
            assert "is no run folder with a readable log.jsonl" in str(error)


@pytest.mark.parametrize("low, high", [(0, 1), (0, 0), (-3.2, 5.7), (0.001, 0.0012), (5, 5), (1e6, 3e6)])
def test_ticks_enclose_and_are_few(low, high):
    ticks = pictures.ticks(low, high)
    assert ticks[0] <= low + 1e-9 and ticks[-1] >= high - 1e-9 and 2 <= len(ticks) <= 8
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])


@pytest.mark.parametrize("args, words", [
    (["--dataset", "x"], "--weights FILE is needed"), (["--query", "a.jpg", "--weights", "w"], "go together"),
    (["--extract", "d", "--weights", "w"], "go together"), (["--curves", "c.png"], "go together"),
    (["--dataset", "x", "--weights", "w", "--ranks", "r.jpg"], "the file is a PNG"),
    (["--dataset", "x", "--extract", "d", "--weights", "w"], "not allowed with"), ([], "required"),
    (["--compare", "a", "b", "--weights", "w", "--rerank"], "goes with --dataset"),
    (["--inspect", "a", "--ranks", "r.png"], "goes with --dataset or --query"), (["--dataset", "", "--weights", "w"], "must be a name"),
    (["--dataset", "x", "--weights", "w", "--batch-size", "0"], "--batch-size 0: must be more than 0, at most 65536"),
    (["--dataset", "x", "--weights", "w", "--batch-size", "65537"], "at most 65536"),
    (["--dataset", "x", "--weights", "w", "--workers", "-1"], "--workers -1: must be at least 0"),
    (["--dataset", "x", "--weights", "w", "--device", "tpu"], "is none of what is here: cpu"),
    (["--extract", "d", "-o", "o.npy", "--weights", "w"], "the file is a NPZ"),
    (["--dataset", "x", "--weights", "w", "--ranks", "no/r.png"], "its folder is absent"),
    (["--dataset", "x", "--weights", "w", "--ranks", "r.png", "--clusters", "r.png"], "into one file")])
def test_mistakes_on_the_command_line(args, words, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(args)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["evaluate", "train", "data", "extra.study", "extra.bench"])
def test_scripts_without_docstrings(name, weights, monkeypatch, capsys):
    """PYTHONOPTIMIZE=2 strips them, as images of containers set it: nothing that is shown may need one."""
    file = ROOT / f"{name.replace('.', '/')}.py"
    script = ModuleType("stripped")
    script.__file__ = str(file)
    monkeypatch.setitem(sys.modules, "stripped", script)
    exec(compile(file.read_text(), str(file), "exec", optimize=2), script.__dict__)
    assert script.__doc__ is None and script.main.__doc__ is None
    monkeypatch.setattr(sys, "argv", [name, "-h"])
    with pytest.raises(SystemExit, match="0"):
        script.main()
    assert "usage: " in capsys.readouterr().out
    if name == "evaluate":
        script.main(["--inspect", str(weights)])
        assert "model of this project" in capsys.readouterr().out


@pytest.mark.parametrize("arch", ["vit_mini", "resnet_tiny"])
def test_model_exports_with_any_batch(arch):
    torch.manual_seed(0)
    model = ReIDModel(build_backbone(arch, (64, 32)), 5, "after").eval()
    any_batch = {"x": {0: torch.export.Dim("batch", max=4096)}}
    program = torch.export.export(model, (torch.randn(3, 3, 64, 32),), dynamic_shapes=any_batch)
    for B in (1, 5):
        x = torch.randn(B, 3, 64, 32)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)
