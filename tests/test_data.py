"""Tiny fabricated trees of every dataset, images of a batch, the samplers, synthetic people."""

import collections
import os
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, command, market_tree, write_image
from PIL import Image

import data
from data import (Batches, FineTuneTransform, InputError, MultiCrop, PKSampler, Record, ShuffleSampler, Unlabelled, hold_out,
                  load_dataset, make_loader, some_identities)
from extra.files import read_image
from extra.people import make_synthetic

# ---- datasets --------------------------------------------------------------------------------


def test_market1501(tmp_path, capsys):
    root = market_tree(tmp_path / "Market-1501-v15.09.15")
    box = root / "bounding_box_test"
    write_image(box / "-1_c1s1_000401_03.jpg")               # junk: dropped
    write_image(box / "0000_c2s1_000001_01.jpg")             # distractor: kept
    write_image(box / "1488_c3s3_070528_01.jpg.jpg".replace(".jpg.jpg", ".jpg"))
    os.rename(box / "1488_c3s3_070528_01.jpg", box / "1488_c3s3_070528_01.jpg.jpg")
    (box / "Thumbs.db").write_bytes(b"thumbs")
    write_image(root / "gt_bbox" / "0001_c1s1_000001_00.jpg")  # not a split
    dataset = load_dataset("market1501", tmp_path)
    assert sorted({r.pid for r in dataset.train}) == [0, 1, 2, 3]  # 2, 4, 6, 8 relabelled
    assert [r.pid for r in dataset.query] == [1, 3, 5, 7]
    assert sorted({r.pid for r in dataset.gallery}) == [0, 1, 3, 5, 7, 1488]
    assert {r.camid for r in dataset.train} == {0, 1} and len(dataset.gallery) == 18
    names = [os.path.basename(r.path) for r in dataset.gallery]
    assert names == sorted(names)
    out = capsys.readouterr().out
    assert "expected 751 / 12,936   DIFFERENT: do not compare with the papers" in out
    assert "  for example query/0001_c1s1_005000_00.jpg: identity 1, camera 1\n" in out
    for same in (root, tmp_path):  # the data folder or the set's own
        assert load_dataset("market1501", same).train == dataset.train


@pytest.mark.parametrize("name, folder, suffix, pattern", [
    ("dukemtmc-reid", "DukeMTMC-reID", ".jpg", "{:04d}_c{}_f{:07d}"),
    ("occluded-duke", "Occluded_Duke", ".jpg", "{:04d}_c{}_f{:07d}"),
    ("personx", "PersonX", ".jpg", "{:04d}_c1{}s1_{:02d}"),
    ("cuhk03-np-labeled", "cuhk03-np/labeled", ".png", "{:04d}_c{}_{}"),
    ("cuhk03-np", "cuhk03-np/labeled", ".png", "{:04d}_c{}_{}"),
    ("cuhk03-np-detected", "cuhk03-np/detected", ".png", "{:04d}_c{}_{}")])
def test_market_style_sets(tmp_path, name, folder, suffix, pattern):
    market_tree(tmp_path / folder, ids=3, images=4, suffix=suffix, name=pattern)
    dataset = load_dataset(name, tmp_path)
    assert [len(s) for s in (dataset.train, dataset.query, dataset.gallery)] == [12, 3, 12]
    cameras = {10, 11} if name == "personx" else {0, 1}      # PersonX: two-digit cameras c11, c12
    assert {r.camid for r in dataset.train} == cameras
    assert sorted({r.pid for r in dataset.train}) == [0, 1, 2]


def msmt17_tree(root, train_dir, test_dir):
    lists = collections.defaultdict(list)
    for split, folder in (("train", train_dir), ("val", train_dir), ("query", test_dir), ("gallery", test_dir)):
        for pid in (0, 1, 7):
            for camera in (1, 12):
                extra = "_ex" if split == "val" else ""
                name = f"{pid:04d}/{pid:04d}_{len(split):03d}_{camera:02d}_0303morning_0006_2{extra}.jpg"
                write_image(root / folder / name)
                lists[split].append(f"{name} {pid}")
    for split, lines in lists.items():
        (root / f"list_{split}.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("folder, dirs, version", [("MSMT17_V1", ("train", "test"), "V1"),
                                                   ("MSMT17_V2", ("mask_train_v2", "mask_test_v2"), "V2")])
def test_msmt17(tmp_path, capsys, folder, dirs, version):
    msmt17_tree(tmp_path / folder, *dirs)
    dataset = load_dataset("msmt17", tmp_path)
    assert [len(s) for s in (dataset.train, dataset.query, dataset.gallery)] == [12, 6, 6]
    assert {r.camid for r in dataset.query} == {0, 11} and {r.pid for r in dataset.query} == {0, 1, 7}
    assert {r.pid for r in dataset.train} == {0, 1, 2} and os.path.exists(dataset.train[0].path)
    assert version in capsys.readouterr().out
    assert len(load_dataset("msmt17", tmp_path, train_only=True).train) == 6
    out = capsys.readouterr().out
    assert "train only" in out and "expected 1,041 / 30,248" in out and "expected 3,060 / 82,161" in out
    other = ("mask_train_v2", "mask_test_v2") if version == "V1" else ("train", "test")
    msmt17_tree(tmp_path / "other", *other)                  # V1 and V2 have the same names
    assert load_dataset("msmt17", tmp_path / "other").fingerprint() != dataset.fingerprint()
    listing = tmp_path / folder / "list_query.txt"
    listing.write_text(listing.read_text() + "\n\n", encoding="utf-8-sig")   # edited under Windows
    assert load_dataset("msmt17", tmp_path).query == dataset.query
    name = "0001_001_02_0303morning_0006_2.jpg"
    for text, words in ((f"0000/../../{name} 1\n", "leaves the data folder"), ("a b c\n", "line 1: .a b c. does not read"),
                        ("", "names none"), ("a_1_00_3.jpg 4\n", "line 1"), (f"0001/{name} 1\n", "missing"),
                        (f"0001/{name} 2\n", "line 1: .* with the same identity"),
                        (f"0001/{name} 11\n", "line 1"), (f"{name} one\n", "line 1")):
        listing.write_text(text)
        with pytest.raises(InputError, match=words):
            load_dataset("msmt17", tmp_path)


def test_an_empty_training_folder_hinders_no_evaluation(tmp_path):
    root = market_tree(tmp_path / "market1501")
    for path in (root / "bounding_box_train").iterdir():
        path.unlink()
    for dataset in (load_dataset("market1501", tmp_path), load_dataset(str(root))):
        assert (len(dataset.train), len(dataset.query), len(dataset.gallery)) == (0, 4, 16)


def test_synthetic_never_takes_another_set_for_its_own(tmp_path, monkeypatch):
    market_tree(tmp_path / "market")
    monkeypatch.setattr("data.make_synthetic", lambda folder: market_tree(folder, ids=2))
    (tmp_path / "market" / "synthetic").mkdir()              # an empty folder is none
    for root in ("market", "market/synthetic", "market"):
        assert load_dataset("synthetic", tmp_path / root).root == tmp_path / "market" / "synthetic"
    assert len({r.pid for r in load_dataset("synthetic", tmp_path / "market").query}) == 2


def test_two_processes_may_draw_the_synthetic_people_at_once(tmp_path, monkeypatch):
    root, real = tmp_path / "synthetic", shutil.rmtree

    def slower(jobs, *_):                                    # the other one was faster
        for split in ("bounding_box_train", "query", "bounding_box_test"):
            (root / split).mkdir(parents=True)
        return iter(())

    monkeypatch.setattr("extra.people.render", lambda job: None)
    monkeypatch.setattr("extra.people.plan", slower)
    assert make_synthetic(root, 1, 1, workers=1) == root and [p.name for p in tmp_path.iterdir()] == ["synthetic"]
    monkeypatch.setattr("extra.people.plan", lambda *_: (root / "notes.txt").write_text("mine") and ())
    real(root), root.mkdir()
    with pytest.raises(OSError):                             # ... but with something else
        make_synthetic(root, 1, 1, workers=1)


def test_files_that_systems_leave_behind_change_nothing(tmp_path):
    root = market_tree(tmp_path / "market1501")
    before = load_dataset("market1501", tmp_path)
    for name in ("._0001_c1s1_000001_00.jpg", ".DS_Store", "Thumbs.db"):     # macOS, Windows
        (root / "query" / name).write_bytes(b"x")
    image = sorted((root / "query").glob("0*.jpg"))[0]
    for name in (".ipynb_checkpoints", ".thumbnails", "@eaDir"):             # Jupyter, desktops, Synology: copies
        (root / "query" / name).mkdir()
        shutil.copy(image, root / "query" / name / image.name)
    (tmp_path / "query").mkdir()                             # a folder of this name makes no set
    assert load_dataset("market1501", tmp_path) == before
    assert load_dataset(str(root)).has_cameras


def test_fingerprint_is_of_all_images_wherever_they_lie(tmp_path):
    for copy in ("a", "b"):
        market_tree(tmp_path / copy / "market1501")
    first, same = (load_dataset("market1501", tmp_path / copy) for copy in ("a", "b"))
    assert first.fingerprint() == same.fingerprint()
    next((same.root / "bounding_box_test").glob("0001*")).unlink()           # a gallery that is not whole
    assert load_dataset("market1501", same.root).fingerprint() != first.fingerprint()


def test_only_luperson_s_own_names_stand_for_it(tmp_path):
    for person in ("a", "b"):
        write_image(tmp_path / "lupine" / person / "1.jpg")
    assert len({r.pid for r in load_dataset(str(tmp_path / "lupine")).train}) == 2
    (tmp_path / "LIST.TXT").write_bytes(b"lupine/a/1.jpg  \r\n  \nlupine/b/1.jpg\t\n")       # blanks at the ends of lines
    paths = load_dataset(str(tmp_path / "LIST.TXT")).train
    assert len(paths) == 2 and all(os.path.exists(record.path) for record in paths)


def test_luperson_tree_and_list(tmp_path, capsys):
    for i in range(5):
        write_image(tmp_path / "luperson" / "images" / f"{i // 3:02d}" / f"{i}.jpg")
    first = load_dataset("luperson", tmp_path)
    assert [os.path.relpath(r.path, tmp_path / "luperson") for r in first.train] == [
        "images/00/0.jpg", "images/00/1.jpg", "images/00/2.jpg", "images/01/3.jpg", "images/01/4.jpg"]
    assert first.train[4].pid == -1 and first.train[-1] == first.train[4] and os.path.exists(first.train[0].path)
    with pytest.raises(IndexError):
        first.train[5]
    assert "5 unlabelled images" in capsys.readouterr().out
    write_image(tmp_path / "luperson" / "images" / "new.jpg")
    again = load_dataset("luperson", tmp_path)               # from the cached index: the new file is not seen
    assert len(again.train) == 5 and "listing" not in capsys.readouterr().out
    assert list(pickle.loads(pickle.dumps(again.train))) == list(first.train)  # as a spawned worker gets it
    for text in ("luperson/images/00/1.jpg\nluperson/images/01/4.jpg", "luperson/images/00/1.jpg\r\nb.jpg\r\n"):
        (tmp_path / "some.txt").write_text(text)
        listed = load_dataset(str(tmp_path / "some.txt")).train
        assert len(listed) == 2 and listed[0].path == first.train[1].path
    (tmp_path / "some.txt").write_text("luperson/images/00/1.jpg\n", encoding="utf-8-sig")  # by Windows' Notepad
    assert [r.path for r in load_dataset(str(tmp_path / "some.txt")).train] == [first.train[1].path]
    prints = set()
    for text in ("a.jpg\nb.jpg\n", "b.jpg\na.jpg\n", "a.jpg\nc.jpg\n"):      # other images, or in another order
        (tmp_path / "some.txt").write_text(text)
        prints.add(load_dataset(str(tmp_path / "some.txt")).fingerprint())
    assert len(prints) == 3
    assert isinstance(load_dataset(str(tmp_path / "luperson")).train, Unlabelled)  # by its path: not a Record for each
    (tmp_path / "some.txt").write_text("\n\na.jpg\n\n b.jpg\n\n")
    listed = load_dataset(str(tmp_path / "some.txt")).train
    assert [os.path.basename(r.path) for r in listed] == ["a.jpg", " b.jpg"]  # blank lines are none
    (tmp_path / "some.txt").write_text(" /etc/passwd\n")     # a relative path that begins with a blank
    assert load_dataset(str(tmp_path / "some.txt")).train[0].path.startswith(str(tmp_path))
    with pytest.raises(InputError, match="neither a folder of crops nor a .txt"):
        load_dataset(first.train[0].path)
    for text, words in (("", "empty"), ("a.jpg\n/etc/passwd\n", "leaves"), ("a/../../b.jpg\n", "leaves"),
                        ("a\0b", "not a text file")):
        (tmp_path / "some.txt").write_text(text)
        with pytest.raises(InputError, match=words):
            load_dataset(str(tmp_path / "some.txt"))
    (tmp_path / "some.txt").write_text("a..b.jpg\n")          # two dots in a name are no way out
    assert list(Unlabelled(tmp_path / "some.txt", tmp_path)) == [Record(str(tmp_path / "a..b.jpg"), -1, -1)]


def test_bad_datasets_get_one_clear_line(tmp_path):
    for name, words in (("markt1501", "did you mean market1501"), ("msmt", "did you mean msmt17"),
                        ("xyz", "cuhk03-np.*market1501"), ("market1501", "below it; docs/data-and-weights.md says whom to ask"),
                        ("luperson", "no .*luperson/ .any tree of crops., nor .*luperson.txt .*says whom to ask")):
        with pytest.raises(InputError, match=words) as caught:
            load_dataset(name, tmp_path / "nothing")
        assert "\n" not in str(caught.value)
    root = market_tree(tmp_path / "market1501")
    for i in range(4):
        write_image(root / "query" / f"zebra{i}.jpg")
    with pytest.raises(InputError, match="4 of 8 names.*zebra0.jpg.*zebra1.jpg.*zebra2.jpg; rename them or take them out"):
        load_dataset("market1501", root)
    for p in (root / "query").iterdir():
        p.rename(p.with_name(f"x{p.name}"))
    with pytest.raises(InputError, match="names do not start like 0002_c1 .* in each of bounding_box_train, query"):
        load_dataset("market1501", root)
    for p in root.rglob("*.jpg"):
        p.unlink()
    with pytest.raises(InputError, match="market1501: holds no image"):
        load_dataset("market1501", root)


def test_command_line(tmp_path):
    def run(*args):
        return command(*args, script=ROOT / "data.py")

    done = run("--dataset", "market1501", "--data-root", tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: market1501 not found")
    assert done.stderr.count("\n") == 1
    market_tree(tmp_path / "market1501")
    done = run("--dataset", "market1501", "--data-root", tmp_path)
    assert done.returncode == 0 and "16 images" in done.stdout
    done = run()
    assert done.returncode == 2 and "one of the arguments --dataset --synthetic is required" in done.stderr
    with pytest.raises(FileExistsError, match="already holds files"):
        data.main(["--synthetic", ""])


# ---- synthetic people ------------------------------------------------------------------------


def test_synthetic_people_are_a_function_of_the_seed(tmp_path):
    """Byte-equal whatever the number of processes; a real Market tree; never into a used folder."""
    sets = [make_synthetic(tmp_path / name, train_ids=3, test_ids=3, seed=seed, workers=workers)
            for name, seed, workers in (("a", 0, 1), ("b", 0, 2), ("c", 1, 1))]
    contents = [{p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*.jpg"))} for root in sets]
    assert contents[0] == contents[1] and contents[0] != contents[2]
    dataset = load_dataset("folder", tmp_path / "a")
    assert len({r.pid for r in dataset.train}) == 3 and len({r.camid for r in dataset.train}) > 2
    for q in dataset.query:                                      # somebody else's camera saw them too
        assert any(g.pid == q.pid and g.camid != q.camid for g in dataset.gallery)
    assert Image.open(dataset.train[0].path).size == (64, 128)
    with pytest.raises(FileExistsError, match="already holds files"):
        make_synthetic(tmp_path / "a")
    (tmp_path / "d.partial").mkdir()
    make_synthetic(tmp_path / "d", train_ids=1, test_ids=1, workers=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c", "d", "d.partial"]


def test_colour_alone_does_not_find_synthetic_people(people):
    from evaluate import rank_features
    from conftest import colour_histograms
    args = [x for part in (people.query, people.gallery)
            for x in (colour_histograms(part), [r.pid for r in part], [r.camid for r in part])]
    assert rank_features(*args).cmc[0] < 0.5


# ---- images ----------------------------------------------------------------------------------

BICUBIC = Image.Resampling.BICUBIC


def broken_set(tmp_path, broken: list[int], n: int = 8):
    records = [Record(str(write_image(tmp_path / f"{i}.png", i)), i // 4, 0) for i in range(n)]
    for k, i in enumerate(broken):
        content = (tmp_path / f"{i}.png").read_bytes()
        (tmp_path / f"{i}.png").write_bytes([b"", content[:60], b"\x00" * 99][k % 3])
    return records


class Given:
    """A sampler of given batches."""

    def __init__(self, *batches):
        self.order, self.batch = np.array(batches), len(batches[0])

    def __len__(self):
        return len(self.order)

    def shuffle(self, epoch):
        return self.order


def test_broken_image_is_replaced_by_its_own_identity(tmp_path):
    views, records = FineTuneTransform((16, 8), (0.5,) * 3, (0.5,) * 3), broken_set(tmp_path, [1, 2])
    batch = Given([0, 1, 2, 5])
    found = Batches(records, batch, views)[7]
    assert found["replaced"] == [1, 2] and found["pids"].tolist() == [0, 0, 0, 1]
    assert all(torch.equal(found["images"][i], read_image(records[3].path, (16, 8), BICUBIC)) for i in (1, 2))
    whole = Batches(broken_set(tmp_path / "a", []), batch, views)[7]
    assert torch.equal(found["params"], whole["params"])     # a substitute keeps its place's parameters
    others = Batches(broken_set(tmp_path / "b", [0, 1, 2, 3]), Given([2]), views)
    assert others[0]["pids"].tolist() == [1]                 # nobody left of that identity: the next one
    with pytest.raises(InputError, match="no readable image was found near it") as caught:
        Batches(broken_set(tmp_path / "c", list(range(8))), Given([0]), views)[0]
    assert str(tmp_path / "c" / "0.png") in str(caught.value)


def masks(generator):
    return {"masks": torch.rand(2, 4, 2, generator=generator) < 0.5, "ratios": torch.rand(2, generator=generator)}


@pytest.mark.parametrize("draw", [None, masks])
def test_what_is_sampled_for_an_image_depends_on_seed_step_and_place_alone(tmp_path, draw):
    """... not on the image, nor on the other images of the batch, nor on the process that reads it."""
    records, views = broken_set(tmp_path, []), MultiCrop((16, 8), num_local=1)
    one = Batches(records, Given([3, 3, 0, 5]), views, 2, draw)
    found = one[7]
    assert set(found) == {"images", "params", "pids", "replaced"} | ({"masks", "ratios"} if draw else set())
    assert found["images"].shape == (4, 3, 16, 8) and found["images"].dtype == torch.uint8 and found["pids"].tolist() == [0, 0, 0, 1]
    assert found["params"].dtype == torch.float32 and found["replaced"] == []
    for place in range(4):
        torch.testing.assert_close(found["params"][place], torch.tensor(views.draw(random.Random(f"2 7 {place}"))), rtol=0, atol=0)
    random_parts = ["params", *(["masks", "ratios"] if draw else [])]
    if draw:
        assert found["masks"].shape == (2, 4, 4, 2) and found["ratios"].shape == (2, 4)

    def equal(a, b):
        return all(torch.equal(a[name], b[name]) for name in random_parts)

    assert equal(found, Batches(records, Given([1, 1, 1, 1]), views, 2, draw)[7])
    for world in (2, 4):
        parts = [Batches(records, Given([3, 3, 0, 5]), views, 2, draw, rank, world)[7] for rank in range(world)]
        assert equal(found, {name: torch.cat([part[name] for part in parts], dim=int(name != "params")) for name in random_parts})
        assert torch.equal(torch.cat([part["images"] for part in parts]), found["images"])
    with pytest.raises(InputError, match="a batch of 4 images cannot be shared evenly by 3 processes; see --batch"):
        Batches(records, Given([3, 3, 0, 5]), views, world=3)
    later = Batches(records, Given([0, 1, 2, 3, 3, 3, 0, 5]), views, 2, draw, 1, 2)[7]      # places 4 to 7
    for other in (Batches(records, Given([3, 3, 0, 5]), views, 3, draw)[7], one[8], later):
        assert not any(torch.equal(found[name], other[name]) for name in random_parts)
    assert len(found["params"].flatten(1).unique(dim=0)) == 4          # image 3 twice, with other parameters
    for workers in (0, 2):
        loaded = list(make_loader(one, range(7, 10), workers))
        assert len(loaded) == 3 and equal(loaded[0], found) and torch.equal(loaded[0]["images"], found["images"])
        assert loaded[0]["replaced"] == []


def test_an_epoch_is_shuffled_once_in_whatever_order_of_steps(tmp_path):
    records, views = broken_set(tmp_path, []), MultiCrop((16, 8), num_local=0)
    sampler, calls = ShuffleSampler(8, 2, seed=3), []
    images = Batches(records, sampler, views)
    first = [images[step]["images"] for step in range(12)]
    real = sampler.shuffle
    sampler.shuffle = lambda epoch: calls.append(epoch) or real(epoch)
    images = Batches(records, sampler, views)
    for step in (1, 3, 4, 7, 11, 0):
        assert torch.equal(images[step]["images"], first[step])
    assert calls == [0, 1, 2, 0]
    assert len({float(x.double().sum()) for x in first[:4]}) == 4


# ---- sampler ---------------------------------------------------------------------------------


def random_pids(seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(2, 40)
    return rng.permutation(np.repeat(np.arange(ids), rng.integers(1, rng.choice([3, 9, 60]), ids))), ids


@pytest.mark.parametrize("seed", range(30))
def test_pk_batches(seed):
    pids, ids = random_pids(seed)
    rng = np.random.default_rng(seed)
    P, K = int(rng.integers(2, min(ids, 12) + 1)), int(rng.integers(1, 6))
    sampler = PKSampler(pids, P, K, seed=seed)
    count = collections.Counter(pids.tolist())
    epochs = []
    for epoch in range(3):
        batches = sampler.shuffle(epoch).tolist()
        assert len(batches) == len(sampler) and sampler.batch == P * K
        for batch in batches:
            groups = pids[batch].reshape(P, K)
            assert (groups == groups[:, :1]).all() and len(set(groups[:, 0])) == P
            for group in np.asarray(batch).reshape(P, K):      # repeats only when the identity is that small
                assert len(set(group)) == min(K, count[pids[group[0]]])
        assert set(sum(batches, [])) == set(range(len(pids)))  # every image, in every epoch
        assert sampler.shuffle(epoch).tolist() == batches      # the same epoch again
        epochs.append(batches)
    assert epochs[0] != epochs[1] or len(pids) < 8
    least = max(-(-n // K) for n in count.values())
    assert len(sampler) == max(least, -(-sum(-(-n // K) for n in count.values()) // P))  # no longer than needed


def test_pk_batches_differ_by_seed():
    pids = np.repeat(np.arange(20), 7)
    assert PKSampler(pids, 8, 3, seed=6).shuffle(0).tolist() != PKSampler(pids, 8, 3, seed=5).shuffle(0).tolist()


def test_pk_sampler_refuses():
    with pytest.raises(InputError, match="a batch needs 16 identities, the training set has 3; see --ids, --labelled, --held-out"):
        PKSampler([0, 0, 1, 2], 16, 4)
    with pytest.raises(InputError, match="needs 2 identities, the training set has 1"):
        PKSampler([4, 4, 4], 2, 4)
    for ids, images in ((1, 4), (0, 4), (2, 0)):                 # no other person in a batch, no triplet
        with pytest.raises(InputError, match=f"--ids {ids} --images {images}: the triplet loss needs two identities"):
            PKSampler([4, 4, 5], ids, images)
    with pytest.raises(InputError, match="the training set has 0"):
        PKSampler([], 2, 4)


def test_shuffled_batches():
    sampler = ShuffleSampler(23, 5, seed=1)
    first = sampler.shuffle(0)
    assert first.shape == (len(sampler), 5) == (4, 5) and len(set(first.flatten().tolist())) == 20
    assert sampler.shuffle(1).tolist() != first.tolist() == ShuffleSampler(23, 5, seed=1).shuffle(0).tolist()
    assert ShuffleSampler(23, 5, seed=2).shuffle(0).tolist() != first.tolist()
    with pytest.raises(InputError, match="a batch of 24 needs that many images, the set has 23"):
        ShuffleSampler(23, 24)


def test_identities_are_chosen_in_proportion_to_the_groups_they_have_left():
    """One of 8 groups beside sixteen of 1, in batches of 2: first as often as 8 of 24 places say, and its last groups in time."""
    pids = np.concatenate([np.zeros(8, int), np.arange(1, 17)])
    firsts = collections.Counter()
    for seed in range(2000):
        sampler = PKSampler(pids, 2, 1, seed=seed)
        firsts.update(pids[sampler.shuffle(0)[0]].tolist())
    # with the other one, a second draw: 8/24 + sum over the first of 1/24 * 8/23
    wanted = 8 / 24 + 16 / 24 * 8 / 23
    assert len(sampler) == 12 and abs(firsts[0] / 2000 - wanted) < 0.035
    rates = [firsts[pid] / 2000 for pid in range(1, 17)]
    assert min(rates) > 0.06 and max(rates) < 0.12               # all others alike


def test_identities_need_not_be_numbered_from_0():
    pids = np.array([40, -7, 40, 10 ** 12, -7, 40])
    sampler = PKSampler(pids, 3, 2)
    assert sampler.members == {40: [0, 2, 5], -7: [1, 4], 10 ** 12: [3]}
    assert [sorted(pids[batch].tolist()) for batch in sampler.shuffle(0)] == [[-7, -7, 40, 40, 10 ** 12, 10 ** 12]] * 2


def test_a_smaller_share_of_the_identities_is_a_part_of_a_larger_one():
    records = [Record(f"{pid}/{i}.jpg", 3 * pid, i) for pid in range(20) for i in range(2)]
    assert some_identities(records, 1, 0) is records
    kept = {}
    for share, n in ((0.1, 2), (0.5, 10)):
        some = some_identities(records, share, 4)
        assert sorted({r.pid for r in some}) == list(range(n)) and len(some) == 2 * n      # relabelled
        kept[share] = {r.path for r in some}
    assert kept[0.1] < kept[0.5] and {r.path for r in some_identities(records, 0.5, 5)} != kept[0.5]


# ---- held-out people -------------------------------------------------------------------------


def test_lmdb_is_said_not_to_be_read(tmp_path):
    (tmp_path / "LUP" / "lmdb").mkdir(parents=True)
    (tmp_path / "LUP" / "lmdb" / "data.mdb").write_bytes(b"x")
    with pytest.raises(InputError, match="LUP: holds no image .LMDB files are not read."):
        load_dataset("luperson", tmp_path)


def test_held_out_people_are_no_training_people_any_more(tmp_path):
    dataset = load_dataset("market1501", market_tree(tmp_path / "market1501", ids=12, images=6))
    before = {r.path: r.pid for r in dataset.train}
    sampled = {}
    for n in (1, 4, 11):
        random.seed(n)                                           # its seed is its own
        held = hold_out(dataset, n)
        shown = held.query + held.gallery
        assert sorted(r.path for r in held.train + shown) == sorted(before) and held.name == dataset.name
        sampled[n] = {r.pid for r in shown}
        assert len(sampled[n]) == n and not sampled[n] & {before[r.path] for r in held.train}
        assert {r.pid for r in held.train} == set(range(12 - n))   # relabelled, in the old order
        assert [before[r.path] for r in held.train] == sorted(before[r.path] for r in held.train)
        assert all(before[r.path] == r.pid for r in shown)
        asking = collections.Counter((r.pid, r.camid) for r in held.query)
        assert asking == {(pid, camera): 1 for pid in sampled[n] for camera in (0, 1)}
        assert held.people == f"{n} held-out training people of market1501" and dataset.people == "the test set"
        again = hold_out(dataset, n)
        assert (again.train, again.query, again.gallery) == (held.train, held.query, held.gallery)
    assert sampled[1] < sampled[4] < sampled[11]
    assert {r.path: r.pid for r in dataset.train} == before      # the dataset itself is as it was


def test_who_cannot_be_held_out(tmp_path):
    root = market_tree(tmp_path / "market1501")
    for path in (root / "bounding_box_train").glob("000[24]_c2*"):
        path.unlink()                                            # two of four people have one camera left
    dataset = load_dataset("market1501", root)
    assert {r.pid for r in hold_out(dataset, 2).query} == {2, 3}
    with pytest.raises(InputError, match="^--held-out 3: of the people to train on 2 have images from two cameras$"):
        hold_out(dataset, 3)
    for i in range(4):
        write_image(tmp_path / "crops" / f"{i}.jpg", i)
    with pytest.raises(InputError, match="--held-out 1"):
        hold_out(load_dataset(str(tmp_path / "crops")), 1)       # nobody knows who they are


def test_held_out_people_without_cameras(tmp_path):
    for i in range(12):
        write_image(tmp_path / "people" / f"anna_{i // 3}" / f"{i}.jpg", i)
    held = hold_out(load_dataset(str(tmp_path / "people")), 2)
    assert len(held.query) == 2 and len(held.gallery) == 4 and len(held.train) == 6
    assert not set(held.query) & set(held.gallery)
