"""Bytes, names and lists that nobody meant to write: a correct result or one line of InputError, nothing else.

Seeded random cases; FUZZ=1000 in the environment tries so many of each kind instead of the usual number.
"""

import io
import json
import os
import pickle
import random
import warnings
import zipfile

import numpy as np
import pytest
import torch
from conftest import write_image
from PIL import Image

from data import Record, load_dataset
from evaluate import ReIDModel, build_backbone, load_model, load_weights
from extra import formats, photos, pictures
from extra.files import InputError, read_image
from extra.formats import read_weights
from extra.runs import Run

CASES = int(os.environ.get("FUZZ", 150))


def damaged(rng: random.Random, whole: bytes) -> bytes:
    """Cut, flip, repeat, insert or swap a few bytes."""
    b = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        i, n = rng.randrange(len(b) + 1), rng.choice((1, 1, 2, 4, 100))
        kind = rng.randrange(5)
        if kind == 0 and rng.random() < 0.3:
            del b[i:]
        elif kind == 1:
            b[i:i + n] = rng.randbytes(n)
        elif kind == 2:
            b[i:i] = b[i:i + n]
        elif kind == 3:
            b[i:i] = rng.choice((b"\0", b"\xff", b"\xff\xff\xff\xff", b"\n", b"..", b"/"))
        elif i < len(b):
            b[i] ^= 1 << rng.randrange(8)
    return bytes(b)


def inspect(path):
    return formats.describe(path, read_weights(path))


def one_line(error: InputError, path) -> bool:
    return str(path) in str(error) and "\n" not in str(error).replace(str(path), "")


@pytest.mark.filterwarnings("ignore")                            # Pillow's, of damaged TIFF files
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF"])
def test_images(tmp_path, kind):
    rng, handle = random.Random(kind), io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    Image.fromarray(noise).save(handle, kind)
    path, read = tmp_path / "image.jpg", 0
    for _ in range(CASES):
        path.write_bytes(damaged(rng, handle.getvalue()))
        try:
            image = read_image(str(path), (8, 4), Image.Resampling.BILINEAR)
            assert image.shape == (3, 8, 4) and image.dtype == torch.uint8
            read += 1
        except InputError as error:
            assert one_line(error, path), error
    assert 0 < read < CASES                                      # cases of both kinds were tried


def random_name(rng: random.Random) -> str:
    parts = ["0001", "0002", "-1", "0000", "_", "c1", "c2", "c", "s1", ".", "..", " ", "-", "é", "人", "\n", "\udcff", "x" * 60,
             "%s", "$(id)", "9" * 30, "_000151_01", "'", '"', "\\", "*", "\t"]
    return "".join(rng.choice(parts) for _ in range(rng.randrange(1, 6))).strip("/")


@pytest.mark.parametrize("name", ["market1501", "folder", "luperson"])
def test_file_names(tmp_path, name):
    """A folder of odd names is read, every file below it and nothing else, or refused."""
    rng, loaded = random.Random(name), 0
    write_image(tmp_path / "image.jpg")
    content = (tmp_path / "image.jpg").read_bytes()
    for case in range(max(CASES // 5, 10)):
        root = tmp_path / f"{case}" / name
        splits = ("bounding_box_train", "query", "bounding_box_test") if name == "market1501" else ("", "")
        for split in splits:
            (root / split).mkdir(parents=True, exist_ok=True)
            for _ in range(rng.randrange(1, 4)):
                start = rng.choice(("0001_c1", "0002_c3s1_", "0007", "")) if rng.random() < 0.95 else ""
                try:
                    (root / split / f"{start}{random_name(rng)}.jpg").write_bytes(content)
                except OSError:                                  # the file system refuses such a name
                    continue
        try:
            dataset = load_dataset(root if name == "folder" else name, tmp_path / f"{case}")
            for record in [*dataset.train, *dataset.query, *dataset.gallery]:
                assert isinstance(record, Record) and os.path.realpath(record.path).startswith(str(root)), record
                assert os.path.exists(record.path), record
            dataset.fingerprint()
            loaded += 1
        except InputError as error:
            assert str(tmp_path) in str(error) or "names do not start" in str(error)
    assert loaded


def test_list_files(tmp_path):
    """No line of a list leaves the data folder, whatever is written in it."""
    rng, seen = random.Random(0), {"read": 0, "refused": 0}
    parts = [b"a/b.jpg", b"..", b"/", b"//", b"etc/passwd", b"\n", b"\r\n", b"\r", b"\0", b"\xff\xfe", b"./", b"~", b" ",
             b"a/../b.jpg", b"a/../../b.jpg", "é.jpg".encode(), b"\\..\\", b"%2e%2e/", b"C:\\x", b"file:///etc/passwd"]
    (tmp_path / "root").mkdir()
    root = tmp_path / "root"
    for _ in range(CASES * 4):
        (root / "luperson.txt").write_bytes(b"".join(rng.choice(parts) for _ in range(rng.randrange(9))))
        try:
            for record in load_dataset("luperson", root).train:
                real = os.path.realpath(os.fsencode(record.path))
                assert (real + b"/").startswith(os.fsencode(root) + b"/"), record
            seen["read"] += 1
        except InputError as error:
            assert "luperson.txt" in str(error)
            seen["refused"] += 1
    assert min(seen.values()) > CASES // 10, seen


class Bomb:
    """What a hostile file would like to run."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("legacy", [False, True])
def test_checkpoints(tmp_path, legacy):
    """A damaged file of weights is refused, or what it loads into a network is finite."""
    rng, path, sane = random.Random(legacy), tmp_path / "model.pth", 0
    model, net = ReIDModel(build_backbone("resnet_tiny"), 3), build_backbone("resnet_tiny")
    small = {k: v for k, v in model.base.state_dict().items() if v.numel() < 2000}
    for content in (small, {"state_dict": model.base.state_dict(), "epoch": 3}):
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        whole = path.read_bytes()
        for _ in range(CASES // 2):
            if rng.random() < 0.5:                               # near the pickle, where the meaning is
                at = min(whole.find(b"conv1.weight") + rng.randrange(-200, 200), len(whole) - 1)
                path.write_bytes(whole[:max(at, 0)] + damaged(rng, whole[max(at, 0):at + 50]) + whole[at + 50:])
            else:
                path.write_bytes(damaged(rng, whole))
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    load_weights(path, net)
                assert all(v.isfinite().all() for v in net.state_dict().values() if v.is_floating_point())
                sane += 1
            except InputError as error:
                assert str(path) in str(error)
            for action in (load_model, inspect):
                try:
                    action(path)
                except InputError as error:
                    assert str(path) in str(error)
    assert sane


def test_hostile_pickles(tmp_path):
    """Whatever a file asks to be called is not called."""
    target, path, rng = tmp_path / "executed", tmp_path / "model.pth", random.Random(0)
    bombs = [Bomb(target), {"state_dict": Bomb(target)}, {"args": Bomb(target), "model": {}}, [Bomb(target)],
             {Bomb(target): 1}, {"epoch": {"a": (1, Bomb(target))}}]
    for bomb in bombs:
        for protocol in range(0, 6):
            content = pickle.dumps(bomb, protocol)
            files = [content, b"\x80\x02" + content]
            handle = io.BytesIO()
            with zipfile.ZipFile(handle, "w") as archive:        # dressed as a file of torch.save
                archive.writestr("model/data.pkl", content)
                archive.writestr("model/version", "3\n")
                archive.writestr("model/byteorder", "little")
            files += [handle.getvalue(), damaged(rng, handle.getvalue())]
            for bytes_ in files:
                path.write_bytes(bytes_)
                for action in (load_model, inspect):
                    with pytest.raises(InputError, match="nothing was loaded|none of|makes no sense"):
                        action(path)
                assert not target.exists()


def test_files_of_a_run(tmp_path):
    """Of whatever its log, recipe and results have become, a run folder is opened, or refused in one line."""
    rng = random.Random(0)
    whole = {"recipe.json": b'{"lr": 0.1, "size": [64, 32]}', "results.json": json.dumps(RESULTS).encode(),
             "log.jsonl": b'{"step": 20, "total": 3.5}\n{"step": 40, "total": 2.5}\n'}
    seen = set()
    for name in whole:
        for file, content in whole.items():
            (tmp_path / file).write_bytes(content)
        for _ in range(CASES):
            (tmp_path / name).write_bytes(damaged(rng, whole[name]))
            assert isinstance(photos.explain_similarity(str(tmp_path / "model.pth"), 0.5), str)
            try:
                Run(tmp_path, {"lr": 0.1, "size": (64, 32)})
                pictures.draw_curves(tmp_path / "curves.png", [str(tmp_path)])
                seen.add((name, "read"))
            except InputError as error:
                assert one_line(error, tmp_path) and len(str(error)) < 1000
                seen.add((name, "refused"))
    assert len(seen) == 6


RESULTS = {"mAP": 0.5, "rank1": 0.6, "cmc": [0.6, 0.7],
           "verification": {"eer": 0.1, "threshold": 0.5, "false_reject": 0.1, "false_accept": 0.1, "accepted": {"1 %": None},
                            "same_pairs": 10, "other_pairs": 90, "people": "the test set"}}
