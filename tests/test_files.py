"""Files and folders of other people: whose face is on which image, images of any kind, lists of millions."""

import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import market_tree, write_image
from PIL import Image

from data import load_dataset
from extra import files, folders
from extra.files import InputError, PathList, read_image

BICUBIC = Image.Resampling.BICUBIC

# ---- folders ---------------------------------------------------------------------------------


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
    assert "each folder is an identity" in out and "for example person_0/001.jpg: identity person_0, no camera\n" in out
    dataset = load_tree(tmp_path / "b", "cam1/0001/a.jpg", "cam2/0001/a.jpg", "cam1/0002/a.jpg")
    assert [r.pid for r in dataset.query] == [0, 1, 0]                         # a camera's folder is no person's
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
    (("0003/cam1/0004_c2.jpg",), "0003/cam1/0004_c2.jpg: the name says identity 4, the folder 0003; rename"),
    (("0003/0018/0004_c2.jpg",), "the name says identity 4, the folder 0003 or 0018; rename"),
    (("anna/1.jpg", "bert/1.jpg", "2.jpg"), "2.jpg: lies beside folders that are identities"),
    (("anna/1.jpg", "bert/1.jpg", "cam_a/2.jpg"), "cam_a/2.jpg: lies beside folders that are identities, .*cameras, splits, tracklets are none"),
    (("multi_shot/cam_a/person_0001/0001.png", "single_shot/cam_a/person_0001.png"), "single_shot/cam_a/person_0001.png: lies beside"),
    (("anna/0018/1.jpg", "bert/0018/1.jpg"), "anna/0018/1.jpg: is the person anna or, the folder nearest to it, 0018. Rename the inner folders"),
    (("Thermal/1/1.jpg", "Visible/1/1.jpg"), "is the person Thermal or, .* 1. Rename .* or the outer ones .cam1, train"),
    (("gallery/0001_2_25023.jpg", "probe/0001_1_25004.jpg"), "of train, query, gallery the first holds no image, and neither names nor folders"),
    (("train/0001_c1.jpg", "query/anna/1.jpg", "query/bert/1.jpg", "gallery/0001_c2.jpg"), "names do not start like 0002_c1 .* in each of train, query"),
    (("train/anna/1.jpg", "train/bert/1.jpg", "query/1.jpg", "gallery/2.jpg"), "or folders are no identities, in each of train, query"),
    (("train/anna/1.jpg", "train/bert/1.jpg", "query/anna/1.jpg", "gallery/anna/2.jpg", "gallery/bert/2.jpg"), "in each of train")])
def test_contradictions_are_refused(tmp_path, names, words):
    with pytest.raises(InputError, match=words) as caught:
        load_tree(tmp_path, *names)
    assert "\n" not in str(caught.value)


def test_splits_in_capitals_are_splits(tmp_path, capsys):
    names = [f"{split}/{name}/1.jpg" for split in ("Train", "QUERY", "gallery") for name in ("anna", "bert")]
    dataset, out = load_tree(tmp_path, *names, capsys=capsys)
    assert [len(s) for s in (dataset.train, dataset.query, dataset.gallery)] == [2, 2, 2] and "same images" not in out
    assert f"{os.sep}QUERY{os.sep}" in dataset.query[0].path and "not read" not in out


def test_folders_beside_the_splits_are_said_to_be_left_out(tmp_path, capsys):
    names = [f"{split}/{name}/1.jpg" for split in ("train", "test", "val", ".cache") for name in ("anna", "bert")]
    dataset, out = load_tree(tmp_path, *names, capsys=capsys)
    assert len(dataset.train) == 2 and not dataset.query and "not read, as no split has such a name: test, val\n" in out


def test_a_gallery_alone_is_kept(tmp_path):
    dataset = load_tree(tmp_path, "gallery/0001_c1.jpg", "gallery/0002_c2.jpg")
    assert [r.pid for r in dataset.gallery] == [1, 2] and dataset.train == dataset.query == []


def test_a_folder_that_is_not_there_is_said_to_be_none(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        load_dataset("folder", tmp_path / "nowhere")


@pytest.mark.parametrize("tree", [("cam1", "cam2"), ("Train", "Query", "Gallery"), ("val", "test"), ("cam_a", "cam_b"), ("CAMERA A", "camB"),
                                  ("Train/cam1", "Train/cam2"), ("tracklet_1", "tracklet_2"), ("id1_cam1", "id1_cam2"), ("0001_c1", "0001_c2"),
                                  ("0001C1T0001", "0001C2T0001"), ("train_set", "query_images", "testset")])
def test_cameras_splits_and_tracklets_are_no_people(tmp_path, capsys, tree):
    """... and where no other folder can be a person's, the images serve --pretrain alone."""
    for folder in tree:
        write_image(tmp_path / "set" / folder / "person_0001.png")
    dataset = load_dataset(str(tmp_path / "set"))
    assert {r.pid for r in dataset.train} == {-1} and not dataset.query and "no identities" in capsys.readouterr().out


# paths of an image each, and their people
LAYOUTS = {
    "PRID2011": {"cam_a/person_0001/0001.png": "person_0001", "cam_a/person_0002/0001.png": "person_0002",
                 "cam_b/person_0001/0001.png": "person_0001"},
    "PRID2011 from above": {"multi_shot/cam_a/person_0001/0001.png": "person_0001", "multi_shot/cam_b/person_0002/0001.png": "person_0002"},
    "iLIDS-VID": {"images/cam1/person001/cam1_person001.png": "person001",
                  "sequences/cam1/person001/cam1_person001_00317.png": "person001",
                  "sequences/cam2/person002/cam2_person002_00001.png": "person002"},
    "tracklets": {"anna/tracklet_1/1.jpg": "anna", "anna/Track 2/1.jpg": "anna", "bert/seq-001-2/1.jpg": "bert", "bert/TRACKLETS/1.jpg": "bert"},
    "cameras": {"ANNA/CAM_A/1.jpg": "ANNA", "ANNA/cam12/1.jpg": "ANNA", "BERT/Camera 1/1.jpg": "BERT", "BERT/camC/1.jpg": "BERT",
                "BERT/cam_entrance/1.jpg": "BERT"},
    "cameras outside": {"View 1/anna/1.jpg": "anna", "View 2/anna/1.jpg": "anna", "c1/bert/1.jpg": "bert"},
    "splits": {"TRAIN/anna/1.jpg": "anna", "val/anna/2.jpg": "anna", "Testing/bert/1.jpg": "bert", "train_all/cam1/bert/1.jpg": "bert"},
    "names": {f"{name}/1.jpg": name for name in ("Cami", "Camilla", "Test subject", "Trainer", "Valerie", "Queryn", "Shota", "Viewer", "camel", "7")},
    "one folder that holds all": {"my crops/2024/anna/1.jpg": "anna", "my crops/2024/bert/1.jpg": "bert"}}


@pytest.mark.parametrize("people", LAYOUTS.values(), ids=LAYOUTS)
def test_which_folder_is_the_person(people):
    labels, cameras = folders.read_labels([f"/root/{path}" for path in people], Path("/root"))
    assert labels == [(person, None) for person in people.values()] and not cameras


@pytest.mark.parametrize("people", [LAYOUTS["iLIDS-VID"], LAYOUTS["cameras"], LAYOUTS["one folder that holds all"]])
def test_the_example_shows_the_folder_that_was_read(tmp_path, capsys, people):
    dataset, out = load_tree(tmp_path, *people, capsys=capsys)
    first = os.path.relpath(dataset.query[0].path, tmp_path)
    assert f"  for example {first}: identity {people[first]}, no camera\n" in out


NAMED = {"train/0001/0018/0001_C6_F0099_X30823.jpg": (1, 6), "train/0018/0001/0018_C2_F0099_X1.jpg": (18, 2),         # DukeMTMC-VideoReID
         "bbox_test/00-1/00-1C1T0001F001.jpg": (-1, 1), "bbox_test/0000/0000C6T0001F001.jpg": (0, 6),                 # MARS
         "cam1/0007/0007_c1.jpg": (7, 1), "anna/-1_c3s1_2.jpg": (-1, 3), "camera/4/0009_c4.jpg": (9, 4)}


def test_names_win_over_folders_and_agree_with_those_that_are_numbers():
    assert folders.read_labels([f"/root/{path}" for path in NAMED], Path("/root")) == (list(NAMED.values()), True)


def test_cameras_are_numbers_of_a_sane_length(tmp_path):
    write_image(tmp_path / "set" / "0001_c10000000000000000000000001_0.jpg")
    write_image(tmp_path / "set" / "0001_c1_0.jpg")
    with pytest.raises(InputError, match="1 of 2 names do not start like 0002_c1"):
        load_dataset(str(tmp_path / "set"))


def test_one_camera_is_told_before_a_training(tmp_path, capsys):
    for pid in range(3):
        for n in range(3):
            write_image(tmp_path / f"{pid:04d}_c1_{n}.jpg")
    load_dataset(str(tmp_path))
    assert "all test images are by one camera: evaluate.py can rank them by --cams none" in capsys.readouterr().out
    write_image(tmp_path / "0001_c2_9.jpg")
    load_dataset(str(tmp_path))
    assert "one camera" not in capsys.readouterr().out


# ---- listing ---------------------------------------------------------------------------------


def test_files_that_look_like_images_are_read_or_counted(tmp_path, capsys):
    first = write_image(tmp_path / "a" / "0001_c1.jpg")
    for name in ("0001_c2.jfif", "0002_c1.JPE"):                               # Windows' names of JPEG
        (tmp_path / "a" / name).write_bytes(first.read_bytes())
    for name in ("IMG_1.HEIC", "scan.psd"):
        (tmp_path / "a" / name).write_bytes(b"x")
    dataset, out = load_tree(tmp_path / "a", capsys=capsys)
    assert len(dataset.query) == 3 and read_image(dataset.query[1].path, (16, 8), BICUBIC).shape == (3, 16, 8)
    assert re.search("WARNING: 2 files below .* look like images, but cannot be read here, first IMG_1.HEIC: convert", out)


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


# ---- images ----------------------------------------------------------------------------------


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


# ---- lists and whole files -------------------------------------------------------------------


def test_a_list_of_paths(tmp_path):
    file = tmp_path / "some.txt"
    file.write_bytes(b"\xef\xbb\xbfa/1.jpg  \r\n\r\n b.jpg\t\n\n\xff.jpg")  # Windows' mark, blanks, a name that is no text
    paths = PathList(file, tmp_path / "root")
    wanted = [os.path.join(tmp_path, "root", os.fsdecode(name)) for name in (b"a/1.jpg", b" b.jpg", b"\xff.jpg")]
    assert list(paths) == list(pickle.loads(pickle.dumps(paths))) == wanted and paths[-1] == wanted[2]  # as a spawned worker gets it
    with pytest.raises(IndexError):
        paths[3]
    for text, words in (("", "empty"), ("\n \n", "empty"), ("a\0b", "not a text file"), ("a.jpg\n/etc/passwd\n", "'/etc/passwd' leaves"),
                        ("a/../../b.jpg\n", "leaves the data folder")):
        file.write_text(text)
        with pytest.raises(InputError, match=words):
            PathList(file, tmp_path)
    file.write_text("a..b.jpg\n /etc/passwd\n")             # two dots in a name, and a blank first, are no ways out
    assert len(PathList(file, tmp_path)) == 2


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    file = tmp_path / "a.txt"
    files.write_atomic(file, lambda handle: handle.write(b"old"))

    def half(handle):
        handle.write(b"ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="a.txt: cannot be written .No space left on device.; is the disk full"):
        files.write_atomic(file, half)
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]
    files.write_atomic(file, lambda handle: handle.write(b"new"))
    assert file.read_bytes() == b"new" and list(tmp_path.iterdir()) == [file]


def test_a_worker_that_dies_while_a_file_is_written_is_no_full_disk(tmp_path):
    """PyTorch tells of it by an error in the middle of whatever the main process does, which may then fail in its own way."""
    death = "DataLoader worker (pid 7) is killed by signal: Killed. "

    def told(handle):
        raise RuntimeError(death)

    def told_and_failed(handle):
        try:
            raise RuntimeError(death)
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    for write in (told, told_and_failed):
        with pytest.raises(SystemExit, match="error: a worker was killed, for want of memory. fewer --workers"):
            files.command_line(lambda: files.write_atomic(tmp_path / "a.txt", write))
    assert not list(tmp_path.iterdir())


def test_an_error_from_a_worker_is_its_message_alone():
    told = f"Caught InputError in DataLoader worker process 0.\nOriginal Traceback:\n{files.__name__}.InputError: a.jpg:\nbroken\n"
    assert str(InputError(told)) == "a.jpg: broken" and str(InputError("a.jpg")) == "a.jpg"
