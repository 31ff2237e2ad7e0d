"""From files on disk to uint8 batches of people: datasets, image reading, sampling.

A ReID set is three lists of `Record(path, pid, camid)`:

    train     images whose identities (pid, relabelled 0, 1, 2 ...) the network may learn
    query     images of other people; each asks "where else was this person seen?"
    gallery   the images to search; some belong to nobody of interest

Two pids of the gallery are special in Market-1501, and beginners mix them up: **-1 is junk** (boxes
neither good nor bad; dropped when the set is read), **0 is a distractor** (a false alarm of the
detector; kept: it can only hurt). camid is the camera's number minus one, never relabelled, because
the protocol compares cameras between query and gallery.

Worker processes only decode and resize. Nothing here is random but the order of images, a function
of (seed, epoch), and which identities are labelled, of the seed. Read `load_dataset`, `PKSampler`,
`Images`.

Exercises (answers: README). 1. How many batches of 64 has an epoch of the synthetic set with P x K
= 16 x 4, and with 4 x 16? Why is the second longer? 2. Fine-tune with P = 2 (--arch vit_mini
--seed 0 --ids 2): what becomes of the hardest negative, and of the mAP?
"""

import argparse
import contextlib
import difflib
import hashlib
import io
import mmap
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from synthetic import make_synthetic


class InputError(ValueError):
    """Something the user can mend: the scripts print it as one line, without a traceback."""

    def __str__(self) -> str:  # a loader's worker wraps the message in its own traceback
        return " ".join(super().__str__().rpartition("data.InputError: ")[2].splitlines())


def command_line(main) -> None:
    """Run a script's main: what the user can mend ends in one line, without a traceback."""
    for stream in (sys.stdout, sys.stderr):  # a file's name may be no text at all
        if hasattr(stream, "reconfigure"):   # not in a notebook
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except (InputError, OSError) as error:
        rank = os.environ.get("RANK") or "0"  # torchrun's; several may see the same error
        sys.exit(f"error: {error}" if rank == "0" else f"error (process {rank}): {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
    if "WORLD_SIZE" in os.environ:  # torchrun's: all is saved, and threads that PyTorch leaves
        sys.stdout.flush()          # may abort an interpreter that closes in the usual way
        os._exit(0)


class Record(NamedTuple):
    """One image. pid: identity, -1 when unlabelled. camid: camera, counted from 0."""

    path: str
    pid: int
    camid: int


def closest(name: str, names: Sequence[str]) -> str:
    """The names most like a mistyped one, or all of them when none is."""
    return ", ".join(difflib.get_close_matches(name.lower(), names, 3, 0.4) or names)


@dataclass
class Dataset:
    """Three lists of records. has_cameras: False when each image counts as its own camera."""

    name: str
    root: Path
    train: Sequence[Record]
    query: Sequence[Record]
    gallery: Sequence[Record]
    has_cameras: bool = True
    note: str = ""

    def fingerprint(self) -> str:
        """Changes with the images' names and labels, not with the place of the folder `root`."""
        if isinstance(self.train, PathList):
            names = self.train.text
        else:
            names = "\n".join(f"{os.path.relpath(r.path, self.root)} {r.pid}"
                              for part in (self.train, self.query, self.gallery) for r in part)
            names = names.encode("utf-8", "surrogateescape")
        return (f"{len(self.train)} images, "
                f"{hashlib.blake2b(names, digest_size=6).hexdigest()}")


# ---------------------------------------------------------------------------------------------
# Datasets: what lies on disk, and the published counts it must match
# ---------------------------------------------------------------------------------------------

MARKET_SPLITS = ("bounding_box_train", "query", "bounding_box_test")


class Layout(NamedTuple):
    """Where a public set lies, how its names read, what was published, how to come by it."""

    folders: tuple[str, ...]             # usual names below --data-root
    pattern: str                         # groups: pid, camera
    counts: dict[str, tuple[int, int]]   # split -> (identities, images)
    cameras: int
    ask: str                             # a sentence: nothing is downloaded here


MARKET_NAME, NUMBERED_NAME = r"(-1|\d{4})_c(\d)", r"(-1|\d+)_c(\d+)"

# Counts from the sets' own files or readmes, DukeMTMC-reID's from loaders of it; PersonX's split is
# from memory, its identities are derived: 5,136 queries / 6 cameras = 856 of 1,266 people.
LAYOUTS = {
    "market1501": Layout(
        ("Market-1501-v15.09.15", "market1501", "Market-1501"), MARKET_NAME,
        {"train": (751, 12_936), "query": (750, 3_368), "gallery": (751, 15_913)}, 6,
        "Ask its authors (search 'Market-1501 dataset'); research only"),
    "dukemtmc-reid": Layout(
        ("DukeMTMC-reID", "dukemtmc-reid"), MARKET_NAME,
        {"train": (702, 16_522), "query": (702, 2_228), "gallery": (1_110, 17_661)}, 8,
        "It was withdrawn in 2019 over privacy"),
    "occluded-duke": Layout(
        ("Occluded_Duke", "occluded-duke"), MARKET_NAME,
        {"train": (702, 15_618), "query": (519, 2_210), "gallery": (1_110, 17_661)}, 8,
        "Its lists are at github.com/lightas/Occluded-DukeMTMC-Dataset, its images were withdrawn"),
    "personx": Layout(
        ("PersonX", "personx", "personx/subset1"), NUMBERED_NAME,
        {"train": (410, 9_840), "query": (856, 5_136), "gallery": (856, 30_816)}, 6,
        "See github.com/sxzrt/Instructions-of-the-PersonX-dataset"),
    "cuhk03-np-labeled": Layout(
        ("cuhk03-np/labeled", "cuhk03_np/labeled", "labeled"), NUMBERED_NAME,
        {"train": (767, 7_368), "query": (700, 1_400), "gallery": (700, 5_328)}, 2,
        "See github.com/zhunzhong07/person-re-ranking (new protocol)"),
    "cuhk03-np-detected": Layout(
        ("cuhk03-np/detected", "cuhk03_np/detected", "detected"), NUMBERED_NAME,
        {"train": (767, 7_365), "query": (700, 1_400), "gallery": (700, 5_332)}, 2,
        "See github.com/zhunzhong07/person-re-ranking (new protocol)"),
    "msmt17": Layout(
        ("MSMT17_V1", "MSMT17_V2", "MSMT17", "msmt17"), r"\d+_\d+_(\d+)_",
        {"train": (1_041, 32_621), "query": (3_060, 11_659), "gallery": (3_060, 82_161)}, 15,
        "Ask its owners at pkuvmc.com; research only"),
    "synthetic": Layout(("synthetic",), NUMBERED_NAME, {}, 0,
                        "python data.py --synthetic DIR draws it"),
}
NAMES = sorted([*LAYOUTS, "cuhk03-np", "folder", "luperson"])


def load_dataset(name: str, root: str | Path = "data", train_only: bool = False) -> Dataset:
    """Read one ReID set below `root` (data folder or the set's own), print and check its counts.

    name: one of NAMES, or the path of any folder of crops. "cuhk03-np" is its labeled half,
    "synthetic" is drawn on first use, "folder" is the tree at `root` itself, with Market-style
    names, "luperson" unlabelled crops: a folder, or a text list of paths. train_only: MSMT17
    without the val list.
    Raises InputError when the set is missing, empty, or its names do not parse.
    """
    root = Path(root)
    if name and name not in NAMES and Path(name).exists():
        root = Path(name)
        small = root.is_dir() and not root.name.lower().startswith("lup")  # LUPerson's millions
        name = "folder" if small else "luperson"
    name = {"cuhk03-np": "cuhk03-np-labeled"}.get(name, name)
    if name not in NAMES:
        raise InputError(f"no dataset or folder is called {name!r}; "
                         f"did you mean {closest(name, NAMES)}?")
    if name == "synthetic":
        root = root if root.name == name else root / name
        if not root.exists() or root.is_dir() and not any(root.iterdir()):
            print(f"drawing synthetic people into {root}")
            try:
                make_synthetic(root)
            except OSError:  # unless another process was faster: it has drawn the very same
                if not (root / MARKET_SPLITS[0]).is_dir():
                    raise
    if name == "luperson":
        dataset = load_unlabelled(root)
    elif name == "folder":
        dataset = load_folder(root)
    elif name == "msmt17":
        dataset = load_msmt17(root, train_only)
    else:
        dataset = load_market_style(name, root)
    print(describe(dataset, train_only), flush=True)
    return dataset


def find_folder(name: str, root: Path, inside: str) -> Path:
    """The first usual place that holds the folder or file `inside`, or a helpful error."""
    folders = LAYOUTS[name].folders
    places = [root, *(root / f for f in folders), *(root / name / f for f in folders)]
    for place in places:
        if (place / inside).exists():
            return place
    raise InputError(
        f"{name} not found: no {inside} in {root} nor in {' or '.join(folders)} below it. "
        f"{LAYOUTS[name].ask}. (--dataset synthetic needs no data; --data-root "
        f"names another folder)")


def list_images(folder: Path, recursive: bool = False) -> list[str]:
    """Image paths sorted by file name within a folder, so that no file system decides the order."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    # Market's folders also hold Thumbs.db, those that macOS has touched ._name.jpg
    suffixes = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
    found, seen = [], set()

    def fail(error: OSError):  # os.walk would pass over what it may not read
        raise InputError(f"{error.filename}: cannot be listed ({error.strerror})")

    for here, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(here)
        folders[:] = sorted(folders) if recursive and real not in seen else []  # links may go round
        if real not in seen:
            found += [os.path.join(here, f) for f in sorted(files)
                      if f.lower().endswith(suffixes) and not f.startswith(".")]
        seen.add(real)
    if not found:
        raise InputError(f"{folder}: holds no image ({' '.join(suffixes)})")
    return found


def parse_names(paths: Sequence[str], pattern: str) -> list[Record]:
    """Records from file names by a pattern with the groups pid and camera (counted from 1)."""
    matches = [re.match(pattern, os.path.basename(path)) for path in paths]
    bad = [path for path, match in zip(paths, matches) if match is None]
    if bad:
        raise InputError(f"{len(bad)} of {len(paths)} names do not start like 0002_c1 "
                         f"(identity, camera): {', '.join(bad[:3])}; take them out, or, "
                         f"if no name has a camera, read them by --dataset folder")
    return [Record(p, int(m[1]), int(m[2]) - 1) for p, m in zip(paths, matches)]


def relabel(records: list[Record]) -> list[Record]:
    """Identities become 0, 1, 2 ... in sorted order: the classifier has one output for each."""
    label = {pid: i for i, pid in enumerate(sorted({r.pid for r in records}))}
    return [r._replace(pid=label[r.pid]) for r in records]


def load_market_style(name: str, root: Path) -> Dataset:
    """Market-1501 and the many sets that copied its three folders."""
    root = find_folder(name, root, MARKET_SPLITS[0])
    splits = (parse_names(list_images(root / s), LAYOUTS[name].pattern) for s in MARKET_SPLITS)
    train, query, gallery = ([r for r in records if r.pid != -1] for records in splits)  # -1: junk
    return Dataset(name, root, relabel(train), query, gallery)


def load_msmt17(root: Path, train_only: bool) -> Dataset:
    """MSMT17: four lists of "path pid" lines; folders tell V1 from V2 (faces masked).

    Test identities start again at 0, yet they are other people than the training identities.
    """
    root = find_folder("msmt17", root, "list_train.txt")
    masked = (root / "mask_train_v2").is_dir()
    train_dir, test_dir = ("mask_train_v2", "mask_test_v2") if masked else ("train", "test")

    def read(split: str, folder: str) -> list[Record]:
        file, names, records = root / f"list_{split}.txt", [], []
        for number, line in enumerate(read_text(file).rstrip().splitlines(), 1):
            match = re.fullmatch(r"(\S+) (\d+)\s*", line)
            camera = match and re.match(LAYOUTS["msmt17"].pattern, os.path.basename(match[1]))
            if not camera or int(camera[1]) < 1:
                raise InputError(f"{file} line {number}: {line!r} does not read 'path identity' "
                                 f"with the camera in the third field of the file's name")
            names.append(match[1])
            records.append(Record(str(root / folder / match[1]), int(match[2]), int(camera[1]) - 1))
        if not records:
            raise InputError(f"{file}: the list is empty")
        check_inside(names, file)
        if not os.path.exists(records[0].path):
            raise InputError(f"{records[0].path}: named in {file.name} but missing")
        return records

    # PersonViT and TransReID train on train + val; torchreid and fast-reid on train alone
    train = read("train", train_dir) + ([] if train_only else read("val", train_dir))
    version = "V2 (faces masked)" if masked else "V1"
    return Dataset("msmt17", root, relabel(train),
                   read("query", test_dir), read("gallery", test_dir),
                   note=f"{version}, trained on {'train only' if train_only else 'train + val'}")


def load_folder(root: Path) -> Dataset:
    """Any tree of names like 0001_c2_x.jpg or, without cameras, 0001_x.jpg.

    With sub-folders train/query/gallery or Market's names, these are the splits; else every image
    is in all three and each image queries the others. Without cameras every image becomes a camera
    of its own, so that "same person, same camera" excludes the image itself and nothing more. -1 is
    junk as in Market-1501, but 0 a person like any other: take Market's distractors (0000_) out.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    note = ""
    for names in (MARKET_SPLITS, ("train", "query", "gallery")):
        if (root / names[0]).is_dir() or (root / names[2]).is_dir():
            paths = [list_images(root / n, True) if (root / n).is_dir() else [] for n in names]
            break
    else:
        paths = [list_images(root, True)] * 3
        note = "no train, query, gallery folders: the same images train and test"
    everything = sorted({p for split in paths for p in split})
    bare = [p for p in everything if not re.match(NUMBERED_NAME, os.path.basename(p))]
    has_cameras = not bare
    camera = {p: i for i, p in enumerate(everything)}

    def read(split: list[str]) -> list[Record]:
        if has_cameras:
            return [r for r in parse_names(split, NUMBERED_NAME) if r.pid != -1]
        pids = [re.match(r"(-1|\d+)", os.path.basename(p)) for p in split]
        # names without a number are crops of nobody known: good for pre-training only
        return [Record(p, int(m[1]) if m else -1, camera[p]) for p, m in zip(split, pids)
                if not m or m[1] != "-1"]

    train, query, gallery = map(read, paths)
    named = all(r.pid >= 0 for r in train)
    if not has_cameras:
        some = "WARNING: " if len(bare) < len(everything) else ""
        note += ("; " * bool(note) + some + f"{len(bare):,} of {len(everything):,} names without "
                 f"cameras, first {os.path.basename(bare[0])}: ranking excludes only the image "
                 f"itself, which makes results look better than by Market-1501's protocol")
    return Dataset("folder", root, relabel(train) if named else train,
                   [r for r in query if r.pid >= 0], [r for r in gallery if r.pid >= 0],
                   has_cameras, note)


def describe(dataset: Dataset, train_only: bool = False) -> str:
    """Counts of each split beside the published ones, with a loud line for every difference."""
    layout = LAYOUTS.get(dataset.name)
    lines = [f"{dataset.name} in {dataset.root}" + (f" - {dataset.note}" if dataset.note else "")]
    if isinstance(dataset.train, PathList):
        return f"{lines[0]}\n  {len(dataset.train):,} unlabelled images"
    warnings, cameras = [], set()
    for split in ("train", "query", "gallery"):
        records = getattr(dataset, split)
        ids, cams = len({r.pid for r in records} - {-1}), {r.camid for r in records}
        cameras |= cams
        shown = f"{len(cams):>3} cameras" if dataset.has_cameras else " no cameras"
        line = f"  {split:<8}{ids:>6,} ids {len(records):>7,} images {shown}"
        if layout and layout.counts:
            expected = layout.counts[split]
            if train_only and dataset.name == "msmt17" and split == "train":
                expected = (1_041, 30_248)
            same = (ids, len(records)) == expected
            line += (f"   expected {expected[0]:,} / {expected[1]:,}" +
                     ("" if same else "   DIFFERENT"))
            if not same:
                warnings.append(f"WARNING: {split} has {ids:,} ids and {len(records):,} images "
                                f"where {expected[0]:,} and {expected[1]:,} were expected: "
                                f"results will not compare with the papers'")
        lines.append(line)
    if layout and layout.counts and len(cameras) != layout.cameras:
        warnings.append(f"WARNING: {len(cameras)} cameras where {layout.cameras} were expected")
    return "\n".join(lines + warnings)


# ---------------------------------------------------------------------------------------------
# Unlabelled crops: millions of paths without millions of Python objects
# ---------------------------------------------------------------------------------------------


class PathList(Sequence):
    """A text file of relative paths, memory-mapped; item i is Record(path, -1, -1).

    4.2 M paths as Python objects are about a gigabyte in every worker; here they are the file's
    own pages, shared by all processes, and two arrays of positions. Raises InputError for an empty
    file and for a path that leaves the data folder.
    """

    def __init__(self, file: Path, root: Path):
        self.file, self.root = str(file), str(root)
        if not os.path.getsize(file):
            raise InputError(f"{file}: the list is empty")
        self.text = np.memmap(file, np.uint8, "r")
        start = 3 * (self.text[:3].tobytes() == b"\xef\xbb\xbf")  # a byte order mark, by Windows
        ends = np.flatnonzero(self.text == ord("\n"))
        if self.text[-1] != ord("\n"):
            ends = np.append(ends, len(self.text))
        starts = np.concatenate([[start], ends[:-1] + 1])
        ends = ends - (self.text[np.maximum(ends - 1, 0)] == ord("\r"))       # Windows' line ends
        filled = ends > starts
        self.starts, self.ends = starts[filled], ends[filled]
        with open(file, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as raw:
            if raw.find(b"\0") >= 0:
                raise InputError(f"{file}: not a text file of paths, one per line, in UTF-8")
            if raw[start:start + 1] == b"/" or raw.find(b"\n/") >= 0 or raw.find(b"..") >= 0:
                check_inside([self.line(i) for i in range(len(self))], file)

    def __reduce__(self):  # a worker that is not forked maps the file again; nothing is copied
        return PathList, (Path(self.file), Path(self.root))

    def __len__(self) -> int:
        return len(self.ends)

    def line(self, i: int) -> str:
        return bytes(self.text[self.starts[i]:self.ends[i]]).decode("utf-8", "surrogateescape")

    def __getitem__(self, i):
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        return Record(os.path.join(self.root, self.line(i % len(self))), -1, -1)


def check_inside(paths: list[str], source: Path) -> None:
    """Paths in a list stay below the data folder: a stranger's list could else name any file."""
    for path in paths:
        if os.path.isabs(path) or ".." in Path(path).parts:
            raise InputError(f"{source}: {path!r} leaves the data folder; "
                             f"list paths relative to it")


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error})") from None


def load_unlabelled(root: Path) -> Dataset:
    """LUPerson, or any folder of crops too large to list at every start.

    A folder is listed once into <folder>.index.txt, a plain list of paths; delete that file after
    the folder has changed. LMDB files are not read: decode them to JPEG files first.
    """
    places = [root / n for n in ("luperson.txt", "luperson", "LUPerson", "LUP")]
    if root.is_file() or root.name.lower().startswith("lup"):
        places = [root]  # the set itself, not the folder it lies in
    source = next((p for p in places if p.exists()), None)
    if source is None:
        raise InputError(f"luperson not found in {root}: expected {root}/luperson/ (any tree of "
                         f"images) or {root}/luperson.txt (a path per line). "
                         f"Ask for the images at: github.com/DengpanFu/LUPerson; "
                         f"any folder of person crops works as well")
    if source.is_file():
        if source.suffix != ".txt":
            raise InputError(f"{source}: neither a folder of crops nor a .txt list of paths")
        return Dataset("luperson", source, PathList(source, source.parent), [], [])
    index = source.with_name(source.name + ".index.txt")
    if not index.exists():
        print(f"listing {source} once ...", flush=True)
        paths = [os.path.relpath(p, source) for p in list_images(source, True)]
        broken = [p for p in paths if "\n" in p or "\r" in p]
        if broken:
            raise InputError(f"{source}: {broken[0]!r} has a line break in its name and cannot be "
                             f"listed; rename it")
        text = "\n".join([*paths, ""])
        if not os.access(index.parent, os.W_OK):
            index = Path(tempfile.mkdtemp()) / index.name
            print(f"WARNING: {source.parent} is not writable, "
                  f"the list is kept in {index} for this run")
        write_atomic(index, lambda f: f.write(text.encode("utf-8", "surrogateescape")))
    return Dataset("luperson", source, PathList(index, source), [], [], note=f"listed in {index}")


def write_atomic(file: Path, write) -> None:
    """write(handle), flush to disk, rename: `file` is the old or the new one, never half of one."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as handle:
            write(handle)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, file)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        partial.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise InputError(f"{file}: cannot be written ({reason}); is the folder writable, "
                         f"the disk full?") from None


# ---------------------------------------------------------------------------------------------
# Reading images
# ---------------------------------------------------------------------------------------------


FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF")  # others (EPS!) would start other programs
MOST_PIXELS = 1 << 26  # 67 million, more than most phones take; a small file can claim gigapixels


def read_image(path: str, size: tuple[int, int], interpolation: Image.Resampling,
               content: bytes | None = None) -> Tensor:
    """Decode any image mode to RGB and resize: uint8 (3, H, W) for size (H, W).

    content: the file's bytes, when they are at hand. Raises InputError that names the file when
    it cannot be decoded.
    """
    try:
        content = Path(path).read_bytes() if content is None else content
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many, at "
                                 f"most {MOST_PIXELS:,}")
            if image.mode.startswith("I"):  # 16 bits; convert() would cut at 255
                image = image.point(lambda value: value / 256).convert("L")
            ImageOps.exif_transpose(image, in_place=True)  # phones store photos on their side
            image = image.convert("RGB").resize(size[::-1], interpolation)  # Pillow: (W, H)
    except Exception as error:  # broken bytes make decoders raise anything at all
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        if isinstance(error, UnidentifiedImageError):
            reason = f"{len(content)} bytes that are no image"
        raise InputError(f"{path}: cannot be read as an image ({reason})") from None
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Images(torch.utils.data.Dataset):
    """Training images as uint8 batches; a broken image is replaced by another and reported.

    __getitems__(indices) -> images (B, 3, H, W), asked (B,), used (B,): where used differs from
    asked the file was broken, and the next readable image of the same identity (or, failing that,
    of the list) stands in. Resized images are kept in memory if all fit in `cache_bytes` (default:
    a quarter of `memory()`, shared by torchrun's processes): nothing random happens before, so a
    second epoch decodes nothing. Only workers that are not forked (macOS, Python 3.14) decode anew.
    """

    def __init__(self, records: Sequence[Record], size: tuple[int, int],
                 cache_bytes: int | None = None):
        self.records, self.size = records, size
        each = 3 * size[0] * size[1]
        self.cache = self.filled = None
        can_fork = hasattr(os, "fork")
        if cache_bytes is None:
            cache_bytes = memory() // 4 // processes_here() if can_fork else 0
        if can_fork and 0 < len(records) * each <= cache_bytes:
            # anonymous shared memory: forked workers fill one cache, and no /dev/shm limit applies
            self.cache = shared_uint8(len(records) * each).view(len(records), 3, *size)
            self.filled = shared_uint8(len(records))

    def __len__(self) -> int:
        return len(self.records)

    def __getstate__(self):  # shared memory does not survive pickling; such a worker decodes again
        return {**self.__dict__, "cache": None, "filled": None}

    def read(self, i: int) -> Tensor:
        if self.filled is not None and self.filled[i]:
            return self.cache[i]
        image = read_image(self.records[i].path, self.size, Image.Resampling.BICUBIC)
        if self.filled is not None:
            self.cache[i] = image
            self.filled[i] = 1  # after the pixels: another worker must never see half an image
        return image

    def substitutes(self, i: int):
        n, pid = len(self.records), self.records[i].pid
        others = [(i + step) % n for step in range(1, min(n, 1000))]
        return sorted(others, key=lambda j: self.records[j].pid != pid)  # stable: nearest first

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        images, used = [], []
        for i in indices:
            try:
                image, j = self.read(i), i
            except InputError as error:
                for j in self.substitutes(i):
                    try:
                        image = self.read(j)
                        break
                    except InputError:
                        continue
                else:
                    raise InputError(f"{error}; no readable image was found near it") from None
            images.append(image)
            used.append(j)
        return torch.stack(images), torch.tensor(indices), torch.tensor(used)


def memory(control: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> int:
    """Bytes this process may use: the machine's, or less in a container or a batch job (Linux)."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError):
        group = Path(control, Path(own).read_text().rpartition("::")[2].strip().lstrip("/"))
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # no limit here: no file, or "max"
                limits.append(int((folder / "memory.max").read_text()))
    return min(limits)


def processes_here() -> int:
    """Of torchrun's processes, how many run on this machine; 1 without torchrun."""
    here = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(int(here) if here.isdecimal() else 1, 1)


def cores() -> int:
    """Cores of this process: those it may use, shared with torchrun's others here; at least 1."""
    able = hasattr(os, "sched_getaffinity")  # else: macOS, Windows
    usable = len(os.sched_getaffinity(0)) if able else os.cpu_count() or 1
    return max(usable // processes_here(), 1)


def shared_uint8(n: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(-1, n), dtype=torch.uint8)


# ---------------------------------------------------------------------------------------------
# Sampling: P identities x K images, or all images shuffled
# ---------------------------------------------------------------------------------------------


def some_identities(records: Sequence[Record], share: float, seed: int) -> Sequence[Record]:
    """The images of a share of the identities, drawn by the seed and numbered anew; all for 1.

    A smaller share of the same seed is a part of a larger one.
    """
    if share == 1:
        return records
    pids = sorted({r.pid for r in records})
    drawn = np.random.default_rng(seed).permutation(pids)[:round(share * len(pids))]
    number = {pid: i for i, pid in enumerate(sorted(drawn.tolist()))}
    return [r._replace(pid=number[r.pid]) for r in records if r.pid in number]


class PKSampler:
    """Batches of P distinct identities x K images each, for the batch-hard triplet loss.

    An epoch cuts each identity's shuffled images into groups of K (a short group is filled up with
    images of the same identity; an identity with fewer than K repeats them), and every group is
    used once: **every image is seen in every epoch**. An epoch has as many batches as the largest
    identity has groups, or as all groups fill, whichever is more; places left over go to identities
    drawn at random. Epochs have constant length, `len(sampler)` batches. Order is a function of
    (seed, epoch); with several processes, `rank` takes its share of each batch's identities. Raises
    InputError for fewer than P identities or a P that `world` does not divide.

    Differs from TransReID's sampler, which drops short groups and the last identities of an epoch.
    """

    def __init__(self, pids: Sequence[int], num_ids: int = 16, num_images: int = 4, seed: int = 0,
                 rank: int = 0, world: int = 1):
        self.P, self.K, self.seed, self.rank, self.world = num_ids, num_images, seed, rank, world
        self.epoch = 0
        pids = np.asarray(pids)
        order = np.argsort(pids, kind="stable")
        self.members = np.split(order, np.flatnonzero(np.diff(pids[order])) + 1)  # indices per id
        if len(self.members) < max(num_ids, 2):
            raise InputError(f"a batch needs {max(num_ids, 2)} identities, the training set has "
                             f"{len(self.members) if len(pids) else 0}; "
                             f"--ids sets how many, 2 at least, and --labelled takes a share")
        if num_ids % world:
            raise InputError(f"--ids {num_ids}: the identities of a batch cannot be shared evenly "
                             f"by {world} processes")
        groups = np.array([-(-len(m) // num_images) for m in self.members])
        self.length = int(max(groups.max(), -(-groups.sum() // num_ids)))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        groups = []
        for members in self.members:  # np.resize repeats from the start to fill the last group
            shuffled = rng.permutation(members)
            groups.append(list(np.resize(shuffled, (-(-len(shuffled) // self.K), self.K))))
        left = np.array([len(g) for g in groups])
        share = self.P // self.world
        for batches_left in range(self.length, 0, -1):
            # P identities without replacement, in proportion to the groups they have left (the
            # Gumbel-max trick); one that needs every batch to come goes first, so none is left over
            score = np.log(np.maximum(left, 1e-9)) + rng.gumbel(size=len(left))
            score[left == batches_left] = np.inf
            chosen = np.argsort(-score)[:self.P]
            batch = []
            for i in chosen:
                if left[i]:
                    left[i] -= 1
                    batch.append(groups[i].pop())
                else:
                    batch.append(np.resize(rng.permutation(self.members[i]), self.K))
            mine = batch[self.rank * share:(self.rank + 1) * share]
            yield np.concatenate(mine).tolist()


class ShuffleSampler:
    """Batches of shuffled indices without identities; the last, incomplete batch is dropped.

    Order is a function of (seed, epoch); `rank` takes its part of each global batch of
    world * batch_size. Raises InputError when there are fewer images than one global batch.
    """

    def __init__(self, n: int, batch_size: int, seed: int = 0, rank: int = 0, world: int = 1):
        if n < batch_size * world:
            raise InputError(f"a batch of {batch_size * world} needs that many images, "
                             f"the set has {n}; use a smaller --batch")
        self.n, self.batch, self.seed, self.rank, self.world = n, batch_size, seed, rank, world
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n // (self.batch * self.world)

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.n)
        for first in range(0, len(self) * self.batch * self.world, self.batch * self.world):
            first += self.rank * self.batch
            yield order[first:first + self.batch].tolist()


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Count a dataset, or draw synthetic people.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dataset",
                        help="a known set or any folder: counts beside the published ones")
    parser.add_argument("--data-root", default="data", help="folder that holds the datasets")
    parser.add_argument("--train-only", action="store_true", help="MSMT17 without its val list")
    parser.add_argument("--synthetic", metavar="DIR",
                        help="draw the synthetic people into this folder")
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if not args.dataset and not args.synthetic:
        parser.error("nothing to do: give --dataset NAME or --synthetic DIR")
    if args.synthetic:
        print(f"wrote {make_synthetic(args.synthetic)}")
    if args.dataset:
        load_dataset(args.dataset, args.data_root, args.train_only)


if __name__ == "__main__":
    command_line(main)
