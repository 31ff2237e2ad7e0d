"""Parsers on tiny fabricated trees of every dataset, image reading, the samplers, synthetic people."""

import collections
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, command, market_tree, write_image
from PIL import Image

import data
from data import FineTuneTransform, Images, InputError, PathList, PKSampler, Record, ShuffleSampler, load_dataset, read_image
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
    assert "train only" in capsys.readouterr().out
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


def load_tree(root, *names, capsys=None):
    """The dataset of a folder of images with these names, and what was printed of it."""
    for i, name in enumerate(names):
        write_image(root / name, i)
    dataset = load_dataset(str(root))
    return dataset if capsys is None else (dataset, capsys.readouterr().out)


def test_names_that_say_identity_and_camera(tmp_path, capsys):
    market_tree(tmp_path / "a")
    dataset = load_dataset("folder", tmp_path / "a")
    assert dataset.has_cameras and [len(dataset.train), len(dataset.query)] == [16, 4]
    assert load_dataset(str(tmp_path / "a")).train == dataset.train            # any folder, named by its path
    assert dataset.query[0].pid == 1 and dataset.query[0].camid == 0           # numbers stay as they are
    for split in ("train", "query", "gallery"):
        write_image(tmp_path / "c" / split / "0001_c1.jpg")
    assert [len(s) for s in vars(load_dataset("folder", tmp_path / "c")).values() if isinstance(s, list)] == [1, 1, 1]
    for i, name in enumerate(("0003_C2_x.jpg", "0004C1T0002F003.jpg", "12345678901234567890_c3.png", "-1_c1.jpg", "00-1C2T0001F001.jpg",
                              "0005_004_12_0303morning_0006_2.jpg")):
        write_image(tmp_path / "d" / name, i)
    dataset = load_tree(tmp_path / "d")                                        # upper case, tracklets, long numbers, MSMT17's
    assert sorted((r.pid, r.camid) for r in dataset.query) == [(1, 1), (2, 0), (3, 11), (4, 2)]
    capsys.readouterr()
    dataset, out = load_tree(tmp_path / "e", "cam1/0007_c1.jpg", "cam2/0007_c2.jpg", "cam2/0008_c2.jpg", capsys=capsys)
    assert len({r.pid for r in dataset.query}) == 2 and dataset.has_cameras   # names win over folders
    assert "the same images train and test" in out and "for example cam1/0007_c1.jpg: identity 7, camera 1" in out


def test_a_folder_for_each_person(tmp_path, capsys):
    names = [f"person_{i}/{k:03d}.jpg" for i in range(3) for k in (1, 2)]
    dataset, out = load_tree(tmp_path / "a", *names, capsys=capsys)
    assert [r.pid for r in dataset.train] == [0, 0, 1, 1, 2, 2] and not dataset.has_cameras
    assert len({r.camid for r in dataset.query}) == 6 and dataset.query == dataset.gallery
    assert "each folder is an identity" in out and "for example person_0/001.jpg: identity 0, no camera" in out
    dataset = load_tree(tmp_path / "b", "cam1/0001/a.jpg", "cam2/0001/a.jpg", "cam1/0002/a.jpg")
    assert [r.pid for r in dataset.query] == [0, 1, 0]                         # the nearer of two levels
    dataset = load_tree(tmp_path / "c", *(f"{split}/{name}/{k}.jpg" for split in ("train", "query", "gallery") for k in (1, 2)
                                          for name in ("anna", "bert")))
    assert [r.pid for r in dataset.query] == [0, 0, 1, 1] and [r.pid for r in dataset.gallery] == [0, 0, 1, 1]
    assert {r.camid for r in dataset.query}.isdisjoint(r.camid for r in dataset.gallery)


def test_what_has_no_identities_serves_pretraining_alone(tmp_path, capsys):
    for names in (("001.jpg", "002.jpg"), ("images/001.jpg", "images/002.jpg")):  # one folder
        dataset, out = load_tree(tmp_path / names[0][0], *names, capsys=capsys)
        assert [r.pid for r in dataset.train] == [-1, -1] and dataset.query == dataset.gallery == []
        assert "no identities, these images serve --pretrain alone: to label them" in out and "no identity" in out


@pytest.mark.parametrize("names, words", [
    (("0001_c1.jpg", "0003_stray.jpg"), "1 of 2 names do not start like 0002_c1, as the others do: .*0003_stray.jpg; rename"),
    (("0003/0004_c1.jpg", "0004/0004_c2.jpg"), "0003/0004_c1.jpg: the name says identity 4, the folder 0003; rename"),
    (("anna/1.jpg", "bert/1.jpg", "2.jpg"), "2.jpg: lies beside folders that are identities"),
    (("train/0001_c1.jpg", "query/anna/1.jpg", "query/bert/1.jpg", "gallery/0001_c2.jpg"), "names do not start like 0002_c1 .* in each of train, query"),
    (("train/anna/1.jpg", "train/bert/1.jpg", "query/1.jpg", "gallery/2.jpg"), "or folders are no identities, in each of train, query"),
    (("train/anna/1.jpg", "train/bert/1.jpg", "query/anna/1.jpg", "gallery/anna/2.jpg", "gallery/bert/2.jpg"), "in each of train")])
def test_contradictions_are_refused(tmp_path, names, words):
    with pytest.raises(InputError, match=words):
        load_tree(tmp_path, *names)


def test_an_empty_training_folder_hinders_no_evaluation(tmp_path):
    root = market_tree(tmp_path / "market1501")
    for path in (root / "bounding_box_train").iterdir():
        path.unlink()
    for dataset in (load_dataset("market1501", tmp_path), load_dataset(str(root))):
        assert (len(dataset.train), len(dataset.query), len(dataset.gallery)) == (0, 4, 16)


def test_files_that_look_like_images_are_read_or_counted(tmp_path, capsys):
    first = write_image(tmp_path / "a" / "0001_c1.jpg")
    for name in ("0001_c2.jfif", "0002_c1.JPE"):                               # Windows' names of JPEG
        (tmp_path / "a" / name).write_bytes(first.read_bytes())
    for name in ("IMG_1.HEIC", "scan.psd"):
        (tmp_path / "a" / name).write_bytes(b"x")
    dataset, out = load_tree(tmp_path / "a", capsys=capsys)
    assert len(dataset.query) == 3 and read_image(dataset.query[1].path, (16, 8), BICUBIC).shape == (3, 16, 8)
    assert re.search("WARNING: 2 files below .* look like images, but cannot be read here, first IMG_1.HEIC: convert", out)


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


@pytest.mark.parametrize("tree", [("person_0/cam1", "person_1/cam1", "person_1/Camera_2"), ("cam1", "cam2"), ("Train", "Query", "Gallery"),
                                  ("val", "test")])
def test_cameras_and_splits_are_no_people(tmp_path, capsys, tree):
    """The folder nearest to an image is its person; where that cannot be meant, the images serve --pretrain alone."""
    for folder in tree:
        write_image(tmp_path / "set" / folder / "1.jpg")
    dataset = load_dataset(str(tmp_path / "set"))
    assert {r.pid for r in dataset.train} == {-1} and not dataset.query and "no identities" in capsys.readouterr().out


def test_cameras_are_numbers_of_a_sane_length(tmp_path):
    write_image(tmp_path / "set" / "0001_c10000000000000000000000001_0.jpg")
    write_image(tmp_path / "set" / "0001_c1_0.jpg")
    with pytest.raises(InputError, match="1 of 2 names do not start like 0002_c1"):
        load_dataset(str(tmp_path / "set"))


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
    assert isinstance(load_dataset(str(tmp_path / "luperson")).train, PathList)  # by its path: not a Record for each
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
    assert len(PathList(tmp_path / "some.txt", tmp_path)) == 1


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


def test_one_camera_is_told_before_a_training(tmp_path, capsys):
    for pid in range(3):
        for n in range(3):
            write_image(tmp_path / f"{pid:04d}_c1_{n}.jpg")
    load_dataset(str(tmp_path))
    assert "all test images are by one camera: evaluate.py can rank them by --cams none" in capsys.readouterr().out
    write_image(tmp_path / "0001_c2_9.jpg")
    load_dataset(str(tmp_path))
    assert "one camera" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["market1501", "luperson", "folder"])
def test_order_of_the_file_system_changes_nothing(tmp_path, monkeypatch, name):
    market_tree(tmp_path / name)
    where = tmp_path / name if name == "folder" else name
    first, scandir = load_dataset(where, tmp_path), os.scandir
    (tmp_path / "luperson.index.txt").unlink(missing_ok=True)

    class Backwards:
        def __init__(self, *args):
            self.entries = sorted(scandir(*args), key=lambda entry: entry.name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def __next__(self):
            if not self.entries:
                raise StopIteration
            return self.entries.pop()

    monkeypatch.setattr(os, "scandir", Backwards)
    second = load_dataset(where, tmp_path)
    assert first.fingerprint() == second.fingerprint() and list(first.train) == list(second.train) != []
    assert first.query == second.query and first.gallery == second.gallery


def test_links_and_folders_that_cannot_be_listed(tmp_path, monkeypatch):
    write_image(tmp_path / "elsewhere" / "0001_c1.jpg")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "set")
    assert len(load_dataset("folder", tmp_path / "set").train) == 1
    real = os.scandir

    def closed(path):
        if str(path).endswith("elsewhere"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(InputError, match="elsewhere: cannot be listed .Permission denied."):
        load_dataset("folder", tmp_path)


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
    from extra.study import colour_histograms
    args = [x for part in (people.query, people.gallery)
            for x in (colour_histograms(part), [r.pid for r in part], [r.camid for r in part])]
    assert rank_features(*args).cmc[0] < 0.5


# ---- images ----------------------------------------------------------------------------------

BICUBIC = Image.Resampling.BICUBIC


@pytest.mark.parametrize("dtype, top, suffix, mean", [
    (np.float32, 1.0, "tif", 127.5), (np.float32, 255.0, "tif", 127.5), (np.uint16, 65535, "png", 127.5), (np.uint16, 65535, "tif", 127.5),
    (np.int32, 65535, "tif", 127.5), (np.int32, 255, "tif", 127.5), (np.uint16, 4095, "png", None), (np.uint16, 1000, "tif", None),
    (np.float32, 65535.0, "tif", None), (np.int32, 1 << 24, "tif", None)])
def test_pixels_have_a_range(tmp_path, dtype, top, suffix, mean):
    """A ramp of grey becomes one of 0 to 255, or is refused by name: never black."""
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.tile(np.linspace(0, top, 32), (64, 1)).astype(dtype)).save(path)
    if mean is None:
        with pytest.raises(InputError, match=f"{path.name}: cannot be read as an image .its grey levels go from 0 to .*save it with 8 bits"):
            read_image(str(path), (64, 32), BICUBIC)
    else:
        image = read_image(str(path), (64, 32), BICUBIC).float()
        assert image.mean().item() == pytest.approx(mean, abs=1) and image.amin() == 0 and image.amax() == 255


@pytest.mark.parametrize("mode, suffix", [("L", "jpg"), ("RGBA", "png"), ("CMYK", "jpg"), ("P", "png"), ("1", "png"),
                                          ("LA", "png")])
def test_any_image_mode_becomes_rgb(tmp_path, mode, suffix):
    path = str(tmp_path / f"a.{suffix}")
    Image.new("RGB", (9, 20), (200, 30, 60)).convert(mode).save(path)
    image = read_image(path, (16, 8), BICUBIC)
    assert image.shape == (3, 16, 8) and image.dtype == torch.uint8


def test_photos_stand_upright(tmp_path):
    """A telephone stores the sensor's rows and a note which way is up."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 4, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6                                             # turn by 90 degrees clockwise to see it upright
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    image.save(tmp_path / "b.png")
    a, b = (read_image(str(tmp_path / name), (8, 4), Image.Resampling.BILINEAR) for name in ("a.png", "b.png"))
    assert torch.equal(a, b)


def test_hostile_images_get_one_line_and_start_nothing(tmp_path, monkeypatch):
    (tmp_path / "gs").write_text("#!/bin/sh\ntouch started\n")    # Pillow would call this for PostScript
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n"
    huge = b"P6 60000 60000 255\n"
    bomb = Image.new("1", (20000, 20000))
    bomb.save("bomb.png")
    for content in (eps, huge, Path("bomb.png").read_bytes(), b"", b"text", b"\xff\xd8\xff\xe0" + bytes(99)):
        Path("x.jpg").write_bytes(content)
        with pytest.raises(InputError, match="x.jpg: cannot be read as an image") as caught:
            read_image("x.jpg", (8, 4), BICUBIC)
        assert "\n" not in str(caught.value) and "BytesIO" not in str(caught.value)
    assert not Path("started").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without pipes that have names")
def test_a_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "x.jpg")                             # to open it would be to wait for a writer, for ever
    with pytest.raises(InputError, match="x.jpg: cannot be read as an image .0 bytes that are none"):
        read_image(str(tmp_path / "x.jpg"), (8, 4), BICUBIC)


def test_resize_is_height_by_width(tmp_path):
    array = np.zeros((40, 10, 3), np.uint8)
    array[:20] = 255                                          # top half white
    Image.fromarray(array).save(tmp_path / "a.png")
    image = read_image(str(tmp_path / "a.png"), (8, 4), BICUBIC)
    assert image.shape == (3, 8, 4) and image[:, :3].min() > 200 and image[:, 5:].max() < 50


def broken_set(tmp_path, broken: list[int], n: int = 8):
    records = [Record(str(write_image(tmp_path / f"{i}.png", i)), i // 4, 0) for i in range(n)]
    for k, i in enumerate(broken):
        content = (tmp_path / f"{i}.png").read_bytes()
        (tmp_path / f"{i}.png").write_bytes([b"", content[:60], b"\x00" * 99][k % 3])
    return records


def test_broken_image_is_replaced_by_its_own_identity(tmp_path):
    views, records = FineTuneTransform((16, 8), (0.5,) * 3, (0.5,) * 3), broken_set(tmp_path, [1, 2])
    batch = [(7, place, index) for place, index in enumerate((0, 1, 2, 5))]
    images, drawn = Images(records, views).__getitems__(batch)
    assert drawn["replaced"] == [1, 2] and drawn["pids"].tolist() == [0, 0, 0, 1]
    assert all(torch.equal(images[i], read_image(records[3].path, (16, 8), BICUBIC)) for i in (1, 2))
    whole = Images(broken_set(tmp_path / "a", []), views).__getitems__(batch)[1]
    assert torch.equal(drawn["numbers"], whole["numbers"])   # a substitute keeps its place's numbers
    others = Images(broken_set(tmp_path / "b", [0, 1, 2, 3]), views)
    assert others.__getitems__([(0, 0, 2)])[1]["pids"].tolist() == [1]  # nobody left of that identity: the next one
    with pytest.raises(InputError, match="no readable image was found near it") as caught:
        Images(broken_set(tmp_path / "c", list(range(8))), views).__getitems__([(0, 0, 0)])
    assert str(tmp_path / "c" / "0.png") in str(caught.value)


# ---- sampler ---------------------------------------------------------------------------------


def random_pids(seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(2, 40)
    return rng.permutation(np.repeat(np.arange(ids), rng.integers(1, rng.choice([3, 9, 60]), ids))), ids


def indices(sampler) -> list[list[int]]:
    """Images of each batch; places count up through the whole batch, and each has one step."""
    found = list(sampler)
    for batch in found:
        steps, places, _ = zip(*batch)
        assert len(set(steps)) == 1 and list(places) == list(range(places[0], places[0] + len(places)))
    return [[index for _, _, index in batch] for batch in found]


@pytest.mark.parametrize("seed", range(30))
def test_pk_batches(seed):
    pids, ids = random_pids(seed)
    rng = np.random.default_rng(seed)
    P, K = int(rng.integers(2, min(ids, 12) + 1)), int(rng.integers(1, 6))
    sampler = PKSampler(pids, P, K, seed=seed)
    count = collections.Counter(pids.tolist())
    epochs = []
    for epoch in range(3):
        sampler.epoch = epoch
        placed, batches = list(sampler), indices(sampler)
        assert len(batches) == len(sampler) and [b[0][0] for b in placed] == [epoch * len(sampler) + i for i in range(len(batches))]
        for batch in batches:
            groups = pids[batch].reshape(P, K)
            assert (groups == groups[:, :1]).all() and len(set(groups[:, 0])) == P
            for group in np.asarray(batch).reshape(P, K):      # repeats only when the identity is that small
                assert len(set(group)) == min(K, count[pids[group[0]]])
        assert set(sum(batches, [])) == set(range(len(pids)))  # every image, in every epoch
        assert list(sampler) == placed                         # the same epoch again
        epochs.append(batches)
    assert epochs[0] != epochs[1] or len(pids) < 8
    least = max(-(-n // K) for n in count.values())
    assert len(sampler) == max(least, -(-sum(-(-n // K) for n in count.values()) // P))  # no longer than needed


def test_pk_batches_are_shared_by_processes():
    pids = np.repeat(np.arange(20), 7)
    whole = list(PKSampler(pids, 8, 3, seed=5))
    parts = [list(PKSampler(pids, 8, 3, seed=5, rank=r, world=4)) for r in range(4)]
    assert [sum(p, []) for p in zip(*parts)] == whole
    assert list(PKSampler(pids, 8, 3, seed=6)) != whole


def test_pk_sampler_refuses():
    with pytest.raises(InputError, match="needs 16 identities and one image of each, the training set has 3"):
        PKSampler([0, 0, 1, 2], 16, 4)
    with pytest.raises(InputError, match="needs 2 identities .*, the training set has 1"):
        PKSampler([4, 4, 4], 1, 4)
    with pytest.raises(InputError, match="a batch needs 2 identities"):
        PKSampler([4, 4, 5], 1, 4)                               # no other person in a batch, no triplet
    with pytest.raises(InputError, match="the training set has 0"):
        PKSampler([], 2, 4)
    with pytest.raises(InputError, match="--ids 8 cannot be shared evenly by 3"):
        PKSampler(np.arange(20), 8, 4, world=3)


def test_shuffled_batches():
    sampler = ShuffleSampler(23, 5, seed=1)
    first = indices(sampler)
    assert len(first) == len(sampler) == 4 and len(set(sum(first, []))) == 20
    sampler.epoch = 1
    assert indices(sampler) != first
    whole = list(ShuffleSampler(23, 12, seed=1))
    halves = [list(ShuffleSampler(23, 12, seed=1, rank=r, world=2)) for r in range(2)]
    assert [a + b for a, b in zip(*halves)] == whole                    # the very same places
    passes = [list(ShuffleSampler(23, 12, seed=1, rank=r, world=2, passes=3)) for r in range(2)]
    assert [len(batch) for batch in passes[0]] == [2, 2, 2] and sum(passes[0] + passes[1], []) == whole[0]
    with pytest.raises(InputError, match="a batch of 24 needs that many images, the set has 23"):
        ShuffleSampler(23, 24)
