"""From files on disk to what the networks see: datasets, images, sampling, views.

A ReID set is three lists of `Record(path, pid, camid)`:

    train     images whose identities (pid, relabelled 0, 1, 2 ...) the network may learn
    query     images of other people; each asks "where else was this person seen?"
    gallery   the images to search; some belong to nobody of interest

Two pids of the gallery are special in Market-1501, and beginners mix them up: **-1 is junk** (boxes
neither good nor bad; dropped when the set is read), **0 is a distractor** (a false alarm of the
detector; kept: it can only hurt). camid is the camera's number minus one, never relabelled, because
the protocol compares cameras between query and gallery.

Of a step of training, worker processes do what is done per image, and draw all that is random but
erasing's noise and stochastic depth (the device's):

    sampler     (step, place in the whole batch, image)        order: a function of (seed, epoch)
    workers     uint8 images, and the numbers of their views   a function of (seed, step, place)
    device      views: crops, colours, blur, erasing           batched, one code for CPU and GPU

So a run that goes on at step n draws what the uninterrupted one drew, 8 processes with 16 workers
what one alone would, and a GPU never waits for a number. Read `Images`, `PKSampler`, then `Draws`
and `MultiCrop`; `load_dataset` when you bring data.
"""

import argparse
import contextlib
import difflib
import hashlib
import io
import itertools
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from extra.people import make_synthetic


class InputError(ValueError):
    """Something the user can mend: the scripts print it as one line, without a traceback."""

    def __str__(self) -> str:  # a loader's worker wraps the message in its own traceback
        return " ".join(super().__str__().rpartition("data.InputError: ")[2].splitlines())


# what a machine cannot give, in the words of PyTorch or the system, and the way out
LIMITS = {
    "shared memory|Bus error": "/dev/shm is full: docker run --shm-size 8g, or --workers 0",
    "killed|exited|abrupt|^EOFE|^Conn": "a worker was killed, for want of memory? fewer --workers",
    "CUDA.*of memory|STATUS_ALLOC": "GPU memory is full: smaller --batch(-size), --ids, --accum 2",
    "allocate mem|to alloc|bad_alloc|^MemoryE": "memory is full: smaller --batch, fewer --workers",
    "Too many open files|ancillary data": "too few files may be open: ulimit -n 4096",
    "invalid device ordinal": "fewer GPUs here than processes: start as many as there are GPUs",
    r"C compiler|C\+\+ compiler": "there is no C compiler: --no-compile",
    "new thread|temporarily unavailable": "too few processes may run: ulimit -u, fewer --workers",
    "onnection (closed|reset)": "another process of this run has ended, see its message"}


def limit_of(error: Exception) -> str | None:
    """The way out, if an error says that the machine cannot give something."""
    # some say nothing beside their name; the name of a file may hold such words
    said = getattr(error, "strerror", None) or error
    text = f"{type(error).__name__}: {said}" if not isinstance(error, InputError) else ""
    return next((way for words, way in LIMITS.items() if re.search(words, text)), None)


def command_line(main) -> None:
    """Run a script's main: what the user can mend ends in one line, without a traceback."""
    torch.backends.cudnn.allow_tf32 = False  # --no-bf16 means float32; PyTorch's default is less
    for stream in (sys.stdout, sys.stderr):  # a file's name may be no text at all
        if hasattr(stream, "reconfigure"):   # not in a notebook
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            main()
        except (EOFError, ConnectionError):  # a worker is gone, and PyTorch's signal that says why
            time.sleep(1)                    # may be on its way: here it interrupts no last line
            raise
    except (InputError, OSError, RuntimeError, MemoryError, EOFError) as error:
        # of a worker's error, which comes with its traceback, the last line
        way, detail = limit_of(error), (str(error).strip() or repr(error)).rpartition("\n")[2][:200]
        if not way and isinstance(error, RuntimeError):
            raise  # a fault of ours, whose traceback is wanted
        line = f"{way} ({detail}); a training goes on by the same command" if way else str(error)
        rank = os.environ.get("RANK") or "0"  # torchrun's; several may see the same error
        sys.exit(f"error: {line}" if rank == "0" else f"error (process {rank}): {line}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
    if "WORLD_SIZE" in os.environ:  # torchrun's: all is saved, and threads that PyTorch leaves
        sys.stdout.flush()          # may abort an interpreter that closes in the usual way
        os._exit(0)


class Record(NamedTuple):
    """One image. pid: identity, -1 when unlabelled (junk, -1 in a file's name, is never a Record).
    camid: camera, counted from 0; -1 in unlabelled lists, the image's own number where cameras are
    unknown."""

    path: str
    pid: int
    camid: int


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
        names = self.train.names.tobytes() if isinstance(self.train, PathList) else os.fsencode(
            "\n".join(f"{os.path.relpath(r.path, self.root)} {r.pid}"
                      for split in (self.train, self.query, self.gallery) for r in split))
        return f"{len(self.train)} images, {hashlib.blake2b(names, digest_size=6).hexdigest()}"


# ---------------------------------------------------------------------------------------------
# Datasets: what lies on disk, and the published counts it must match
# ---------------------------------------------------------------------------------------------

MARKET_SPLITS, PLAIN_SPLITS = ("bounding_box_train", "query", "bounding_box_test"), (
    "train", "query", "gallery")


# Of each public set its usual names below --data-root, and (identities, images) of train, query and
# gallery as published: by the sets' own files or readmes, DukeMTMC-reID's by loaders of it;
# PersonX's split is from memory, its identities are derived: 5,136 queries / 6 cameras = 856 of
# 1,266 people.
LAYOUTS = {
    "market1501": (("Market-1501-v15.09.15", "market1501", "Market-1501"),
                   ((751, 12_936), (750, 3_368), (751, 15_913))),
    "msmt17": (("MSMT17_V1", "MSMT17_V2", "MSMT17", "msmt17"),
               ((1_041, 32_621), (3_060, 11_659), (3_060, 82_161))),
    "cuhk03-np-labeled": (("cuhk03-np/labeled", "cuhk03_np/labeled", "labeled"),
                          ((767, 7_368), (700, 1_400), (700, 5_328))),
    "cuhk03-np-detected": (("cuhk03-np/detected", "cuhk03_np/detected", "detected"),
                           ((767, 7_365), (700, 1_400), (700, 5_332))),
    "dukemtmc-reid": (("DukeMTMC-reID", "dukemtmc-reid"),
                      ((702, 16_522), (702, 2_228), (1_110, 17_661))),
    "occluded-duke": (("Occluded_Duke", "occluded-duke"),
                      ((702, 15_618), (519, 2_210), (1_110, 17_661))),
    "personx": (("PersonX", "personx", "personx/subset1"),
                ((410, 9_840), (856, 5_136), (856, 30_816))),
    "synthetic": (("synthetic",), ())}
NAMES = sorted([*LAYOUTS, "cuhk03-np", "folder", "luperson"])
LUPERSON = re.compile("lup(erson.*)?")  # names of its folder, in small letters


def closest(name: str, names: Sequence[str]) -> str:
    """The names most like a mistyped one, or all of them when none is."""
    return ", ".join(difflib.get_close_matches(name.lower(), names, 3, 0.4) or names)


def load_dataset(name: str, root: str | Path = "data", train_only: bool = False) -> Dataset:
    """Read one ReID set below `root` (data folder or the set's own), print and check its counts.

    name: one of NAMES, or the path of any folder of crops. "cuhk03-np" is its labeled half,
    "synthetic" is drawn on first use, "folder" is the tree at `root` itself, "luperson" unlabelled
    crops: a folder, or a text list of paths. train_only: MSMT17 without the val list.
    Raises InputError when the set is missing, empty, or its names do not parse.
    """
    root = Path(root)
    if name and name not in NAMES and Path(name).exists():
        root = Path(name)
        small = root.is_dir() and not LUPERSON.fullmatch(root.name.lower())  # millions
        name = "folder" if small else "luperson"
    name = {"cuhk03-np": "cuhk03-np-labeled"}.get(name, name)
    if name not in NAMES:
        raise InputError(f"no dataset or folder is called {name!r}; "
                         f"did you mean {closest(name, NAMES)}?")
    if name == "synthetic":
        root = root if root.name == name else root / name
        if not root.exists() or not any(root.iterdir()):
            print(f"drawing synthetic people into {root}")
            make_synthetic(root)
    if name == "luperson":
        dataset = load_unlabelled(root)
    elif name == "msmt17":
        dataset = load_msmt17(find_folder(name, root, ("list_train.txt",)), train_only)
    else:
        dataset = load_splits(name, root if name == "folder" else
                              find_folder(name, root, MARKET_SPLITS))
    print(describe(dataset), flush=True)
    return dataset


def find_folder(name: str, root: Path, inside: Sequence[str]) -> Path:
    """The first usual place that holds one of the folders or files `inside`."""
    folders, _ = LAYOUTS[name]
    places = [root, *(root / f for f in folders), *(root / name / f for f in folders)]
    # `query` alone makes no set: many a folder has one
    found = [p for p in places if any((p / n).exists() for n in inside if n != "query")]
    if not found:
        raise InputError(
            f"{name} not found: no {inside[0]} in {root} nor in {' or '.join(folders)} below it; "
            f"docs/data-and-weights.md says whom to ask for it, --data-root names another folder, "
            f"and --dataset synthetic needs no data")
    return found[0]


# Pillow's other formats stay out: one (EPS) would start another program; older ones lack AVIF
SUFFIXES = {suffix: kind for suffix, kind in Image.registered_extensions().items()
            if kind in ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "AVIF") and kind in Image.OPEN}
LOOK_LIKE_IMAGES = tuple({".heic", ".heif", ".avif", ".jp2", ".jxl", ".psd", ".dng"} - {*SUFFIXES})


def list_images(folder: Path) -> list[str]:
    """All images below a folder, sorted by name, so that no file system decides the order."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    found, passed_over, seen = [], [], set()

    def fail(error: OSError):  # os.walk would pass over what it may not read
        raise InputError(f"{error.filename}: cannot be listed ({error.strerror})")

    for here, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(here)
        # links may go round; hidden folders hold copies (.ipynb_checkpoints, .thumbnails, @eaDir)
        folders[:] = [] if real in seen else sorted(f for f in folders if f[0] not in ".@")
        # Market's folders also hold Thumbs.db, those that macOS has touched ._name.jpg
        files = [] if real in seen else sorted(f for f in files if not f.startswith("."))
        found += [os.path.join(here, f) for f in files if f.lower().endswith(tuple(SUFFIXES))]
        passed_over += [f for f in files if f.lower().endswith(LOOK_LIKE_IMAGES)]
        seen.add(real)
    if passed_over:
        print(f"WARNING: {len(passed_over)} files below {folder} look like images, but cannot be "
              f"read here, first {passed_over[0]}: convert them to JPEG")
    return found


# 0002_c1s1_000451_03.jpg; 0002C1T0001F001.jpg as MARS has it; 0000_045_12_0303morning_0006_2.jpg as
# MSMT17; -1 or 00-1 is junk
NAMED = re.compile(r"(-1|\d+)_c(\d{1,9})(?!\d)|(00-1|\d{4})c(\d)t\d+f\d+|"
                   r"(\d+)_\d{3}_(\d\d)_\d{4}[a-z]", re.IGNORECASE)
NO_PERSON = re.compile(r"cam(era)?[ _-]?\d+|train|test|val|query|gallery", re.IGNORECASE)


def read_labels(paths: Sequence[str], root: Path) -> tuple[list, bool]:
    """(identity, camera) of each image, and whether cameras are known.

    A name that says both wins; else, where there are several folders, the nearest one is the
    identity, and each image its own camera; one folder without such names, or folders of cameras
    and splits, have no identities (None, None). Raises InputError where names or folders contradict
    one another.
    """
    matches = [NAMED.match(os.path.basename(p)) for p in paths]
    labels = [[int(g.replace("00-1", "-1")) for g in m.groups() if g] for m in matches if m]
    folders = [os.path.basename(os.path.dirname(os.path.relpath(p, root))) for p in paths]
    unnamed = [p for p, m in zip(paths, matches) if not m]
    if labels and unnamed:
        raise InputError(f"{len(unnamed)} of {len(paths)} names do not start like 0002_c1, as the "
                         f"others do: {', '.join(unnamed[:3])}; rename them or take them out, or "
                         f"pre-train without labels on a .txt list of the paths")
    if labels:
        for path, folder, label in zip(paths, folders, labels):
            if folder.isdecimal() and int(folder) not in label:
                raise InputError(f"{path}: the name says identity {label[0]}, the folder {folder}; "
                                 f"rename the one or the other")
        return labels, True
    several = len(set(folders)) > 1 and not all(map(NO_PERSON.fullmatch, folders))
    if several and "" in folders:
        raise InputError(f"{paths[folders.index('')]}: lies beside folders that are identities; "
                         f"put each image into the folder of its person")
    return [(folder if several else None, None) for folder in folders], False


def load_splits(name: str, root: Path) -> Dataset:
    """Market-1501, the many sets that copied its three folders, and any tree of images.

    With sub-folders train, query, gallery or Market's names, these are the splits; else every image
    is in all three and each image queries the others. Without cameras every image becomes a camera
    of its own, so that "same person, same camera" excludes the image itself and nothing more. -1 is
    junk; in a folder of your own 0 is a person like any other, unlike Market's distractors.
    """
    names = next((names for names in (MARKET_SPLITS, PLAIN_SPLITS)
                  if any((root / names[i]).is_dir() for i in (0, 2))), None)
    folders = [root / n for n in names] if names else [root] * 3
    paths = [list_images(f) if f.is_dir() or not names else [] for f in folders]
    everything = [p for split in paths for p in split]
    if not everything:
        raise InputError(f"{root}: holds no image ({' '.join(SUFFIXES)})")
    found = [read_labels(split, folder) for split, folder in zip(paths, folders)]
    # of each split: are cameras known, are there identities?
    kinds = {(known, labels[0][0] is not None) for labels, known in found if labels}
    cameras = all(known for known, _ in kinds)
    if len(kinds) > 1 or name != "folder" and not cameras:
        raise InputError(f"{root}: names do not start like 0002_c1 (identity, camera), or folders "
                         f"are no identities, in each of {', '.join(f.name for f in folders)}")
    # folders' names, and numbers that no tensor holds, are numbered in their order
    pids = sorted({pid for labels, _ in found for pid, _ in labels if pid is not None})
    small = all(isinstance(pid, int) and pid < 2 ** 62 for pid in pids)
    number = {pid: pid if small else i for i, pid in enumerate(pids)}
    own = {path: i for i, path in enumerate(sorted(set(everything)))}
    train, query, gallery = ([Record(path, number.get(pid, -1), own[path] if camera is None else
                                     camera - 1) for path, (pid, camera) in zip(split, labels)
                              if pid != -1] for split, (labels, _) in zip(paths, found))
    notes = [] if names else ["no train, query, gallery folders: the same images train and test"]
    if not pids:
        notes.append("no identities, these images serve --pretrain alone: to label them, name them "
                     "like 0002_c1 or put each person's into a folder of its own")
        query, gallery = [], []
    elif not cameras:
        notes.append("each folder is an identity, cameras are unknown: ranking excludes only the "
                     "image itself, which looks better than by Market-1501's protocol")
    elif len({r.camid for r in query + gallery}) == 1:
        notes.append("all test images are by one camera: evaluate.py can rank them by --cams none")
    return Dataset(name, root, relabel(train) if pids else train, query, gallery, cameras,
                   "; ".join(notes))


def relabel(records: list[Record]) -> list[Record]:
    """Identities become 0, 1, 2 ... in sorted order: the classifier has one output for each."""
    label = {pid: i for i, pid in enumerate(sorted({r.pid for r in records}))}
    return [r._replace(pid=label[r.pid]) for r in records]


def load_msmt17(root: Path, train_only: bool) -> Dataset:
    """MSMT17: four lists of "path pid" lines; folders tell V1 from V2 (faces masked).

    Test identities start again at 0, yet they are other people than the training identities.
    """
    masked = (root / "mask_train_v2").is_dir()
    train_dir, test_dir = ("mask_train_v2", "mask_test_v2") if masked else ("train", "test")

    def read(split: str, folder: str) -> list[Record]:
        file, paths = root / f"list_{split}.txt", []
        text = file.read_text(encoding="utf-8-sig", errors="replace").rstrip()
        for number, line in enumerate(text.splitlines(), 1):
            match = re.fullmatch(r"((?:\S*/)?0*(\d+)_\S+) \2\s*", line)
            if not match or not NAMED.match(os.path.basename(match[1])):
                raise InputError(f"{file} line {number}: {line!r} does not read 'path identity' "
                                 f"with the same identity, and the camera, in the file's name")
            check_inside(match[1], file)
            paths.append(str(root / folder / match[1]))
        if not paths or not os.path.exists(paths[0]):
            raise InputError(f"{file}: its first image is missing, or it names none")
        labels, _ = read_labels(paths, root / folder)
        return [Record(path, pid, camera - 1) for path, (pid, camera) in zip(paths, labels)]

    # PersonViT and TransReID train on train + val; torchreid and fast-reid on train alone
    train = read("train", train_dir) + ([] if train_only else read("val", train_dir))
    version = "V2 (faces masked)" if masked else "V1"
    return Dataset("msmt17", root, relabel(train),
                   read("query", test_dir), read("gallery", test_dir),
                   note=f"{version}, trained on {'train only' if train_only else 'train + val'}")


def describe(dataset: Dataset) -> str:
    """Counts of each split beside the published ones, a loud line for every difference, and how one
    name was read."""
    lines = [f"{dataset.name} in {dataset.root}" + (f" - {dataset.note}" if dataset.note else "")]
    if isinstance(dataset.train, PathList):
        return f"{lines[0]}\n  {len(dataset.train):,} unlabelled images"
    published = LAYOUTS.get(dataset.name, ((), ()))[1] or (None,) * 3
    for split, expected in zip(PLAIN_SPLITS, published):
        records = getattr(dataset, split)
        counts = len({r.pid for r in records} - {-1}), len(records)
        cameras = len({r.camid for r in records}) if dataset.has_cameras else "no"
        lines.append(f"  {split:<8}{counts[0]:>6,} ids {counts[1]:>7,} images {cameras:>3} cameras")
        if expected:
            lines[-1] += "   expected {:,} / {:,}".format(*expected) + (
                "   DIFFERENT: do not compare with the papers" if counts != expected else "")
    for record in [*dataset.query, *dataset.train][:1]:
        camera = f"camera {record.camid + 1}" if dataset.has_cameras else "no camera"
        lines.append(f"  for example {os.path.relpath(record.path, dataset.root)}: "
                     f"{f'identity {record.pid}' if record.pid >= 0 else 'no identity'}, {camera}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------
# Unlabelled crops: millions of paths without millions of Python objects
# ---------------------------------------------------------------------------------------------


class PathList(Sequence):
    """A text file of relative paths; item i is Record(path, -1, -1).

    4.2 M paths as Python strings are half a gigabyte, and in each worker again, as counting
    references writes to them; in one array each takes as much as the longest, and all are shared.
    Raises InputError for an empty file and for a path that leaves the data folder.
    """

    def __init__(self, file: Path, root: Path):
        self.root = root
        content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")           # Windows' mark
        self.names = np.array([line for line in map(bytes.rstrip, content.splitlines()) if line])
        if not len(self.names) or b"\0" in content:
            raise InputError(f"{file}: empty, or not a text file of paths, one per line, in UTF-8")
        suspects = np.char.startswith(self.names, b"/") | (np.char.find(self.names, b"..") >= 0)
        for i in np.flatnonzero(suspects):
            check_inside(os.fsdecode(self.names[i]), file)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i):
        return Record(os.path.join(self.root, os.fsdecode(self.names[i])), -1, -1)


def check_inside(path: str, source: Path) -> None:
    """Paths in a list stay below the data folder: a stranger's list could else name any file."""
    if os.path.isabs(path) or ".." in Path(path).parts:
        raise InputError(f"{source}: {path!r} leaves the data folder; list paths relative to it")


def load_unlabelled(root: Path) -> Dataset:
    """LUPerson, or any folder of crops too large to list at every start.

    A folder is listed once into <folder>.index.txt, a plain list of paths; delete that file after
    the folder has changed. LMDB files are not read: decode them to JPEG files first.
    """
    own = root.is_file() or LUPERSON.fullmatch(root.name.lower())  # not the folder it lies in
    places = [root] if own else [root / n for n in ("luperson.txt", "luperson", "LUPerson", "LUP")]
    source = next((p for p in places if p.exists()), None)
    if source is None:
        raise InputError(f"luperson not found: no {root}/luperson/ (any tree of crops), nor "
                         f"{root}/luperson.txt (a path per line); docs/data-and-weights.md says "
                         f"whom to ask for it")
    if source.is_file() and source.suffix.lower() != ".txt":
        raise InputError(f"{source}: neither a folder of crops nor a .txt list of paths")
    if source.is_file():
        return Dataset("luperson", source, PathList(source, source.parent), [], [])
    index = source.with_name(source.name + ".index.txt")
    if not index.exists():
        print(f"listing {source} once ...", flush=True)
        paths = [os.path.relpath(p, source) for p in list_images(source)]
        if not paths or any(re.search("[\r\n]", p) for p in paths):
            raise InputError(f"{source}: holds no image, or one with a line break in its name")
        if not os.access(index.parent, os.W_OK):  # then the list is kept for this run alone
            index = Path(tempfile.mkdtemp()) / index.name
        write_atomic(index, lambda f: f.write(os.fsencode("\n".join([*paths, ""]))))
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
        raise InputError(f"{file}: cannot be written ({reason}); is the disk full?") from None


MOST_PIXELS = 1 << 26  # 67 million, more than most phones take; a small file can claim gigapixels


def read_image(path: str, size: tuple[int, int], interpolation: Image.Resampling) -> Tensor:
    """Decode any image mode to RGB and resize: uint8 (3, H, W) for size (H, W). Raises InputError
    that names the file when it cannot be decoded."""
    try:
        content = b"" if Path(path).is_fifo() else Path(path).read_bytes()  # a pipe would wait
        with Image.open(io.BytesIO(content), formats=tuple(SUFFIXES.values())) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many, at "
                                 f"most {MOST_PIXELS:,}")
            image = eight_bits(image) if image.mode[0] in "IF" else image
            ImageOps.exif_transpose(image, in_place=True)  # phones store photos on their side
            image = image.convert("RGB").resize(size[::-1], interpolation)  # Pillow: (W, H)
    except Exception as error:  # broken bytes make decoders raise anything at all
        if isinstance(error, (OSError, MemoryError)) and limit_of(error):
            raise  # no fault of the image's
        none = isinstance(error, UnidentifiedImageError) and f"{len(content)} bytes that are none"
        reason = none or getattr(error, "strerror", None) or str(error) or repr(error)
        raise InputError(f"{path}: cannot be read as an image ({reason})") from None
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def eight_bits(image: Image.Image) -> Image.Image:
    """Grey levels as numbers of 16 or 32 bits, to 0 .. 255; Pillow would cut them off at 255. A
    range that could be either of two (12 bits in 16, or a dark image) raises ValueError."""
    values = np.asarray(image).astype(np.float64)
    low, high, whole = values.min(), values.max(), image.mode[0] == "I"
    scale = 255 if high <= 1 and not whole else 1 if high <= 255 else 1 / 257
    if not (low >= 0 and (high <= 255 or whole and 2 ** 15 <= high < 2 ** 16)):
        raise ValueError(f"its grey levels go from {low:g} to {high:g}, which is no known range; "
                         f"save it with 8 bits a channel")
    return Image.fromarray((values * scale).round().astype(np.uint8))


class Images(torch.utils.data.Dataset):
    """Training images as uint8 batches, with all that their views need drawn.

    PyTorch's loader calls `__getitems__` with a batch [(step, place, index), ...] of a sampler ->
    images (B, 3, H, W) and a dictionary:
    "numbers" (B, ...) as `views` takes them, "pids" (B,), "replaced": the indices of broken files,
    in whose place stands the next readable image of the same identity (or, failing that, of the
    list); "others": what `draw(generator)` gives for each image, (2, ...) -> (2, B, ...).
    """

    def __init__(self, records: Sequence[Record], views, seed: int = 0, draw=None):
        self.records, self.views, self.seed, self.draw = records, views, seed, draw

    def read(self, i: int) -> Tensor:
        return read_image(self.records[i].path, self.views.size, Image.Resampling.BICUBIC)

    def read_or_replace(self, i: int) -> tuple[Tensor, int]:
        """The image, or that of another which can be read, and its index."""
        try:
            return self.read(i), i
        except InputError as error:
            n, pid = len(self.records), self.records[i].pid
            others = [(i + step) % n for step in range(1, min(n, 1000))]
            # the sort is stable: of the same identity, and of all others, the nearest first
            for j in sorted(others, key=lambda j: self.records[j].pid != pid):
                with contextlib.suppress(InputError):
                    return self.read(j), j
            raise InputError(f"{error}; no readable image was found near it") from None

    def __getitems__(self, batch: list[tuple[int, int, int]]) -> tuple[Tensor, dict]:
        images, used = zip(*(self.read_or_replace(index) for _, _, index in batch))
        generators = [step_generator(self.seed, step, place) for step, place, _ in batch]
        uniforms = torch.stack([torch.rand(self.views.uniforms, generator=g) for g in generators])
        drawn = {"numbers": self.views.draw(uniforms),
                 "pids": torch.tensor([self.records[j].pid for j in used]),
                 "replaced": [i for (_, _, i), j in zip(batch, used) if i != j]}
        others = [self.draw(g) if self.draw else {} for g in generators]
        drawn["others"] = {k: torch.stack([other[k] for other in others], dim=1) for k in others[0]}
        return torch.stack(images), drawn


def cores() -> int:
    """Cores of this process: those it may use, shared with torchrun's others here; at least 1."""
    # macOS and Windows do not say which it may use
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(n // int(os.environ.get("LOCAL_WORLD_SIZE") or 1), 1)


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
    drawn = set(np.random.default_rng(seed).permutation(pids)[:round(share * len(pids))].tolist())
    return relabel([r for r in records if r.pid in drawn])


class PKSampler:
    """Batches of P distinct identities x K images each, for the batch-hard triplet loss.

    An epoch cuts each identity's shuffled images into groups of K (a short group is filled up with
    images of the same identity; an identity with fewer than K repeats them), and every group is
    used once: **every image is seen in every epoch**. An epoch has as many batches as the largest
    identity has groups, or as all groups fill, whichever is more; places left over go to identities
    drawn at random. Epochs have constant length, `len(sampler)` batches. Order is a function of
    `seed` and the attribute `epoch`; with several processes, `rank` takes its share of each batch's
    identities. Raises InputError for fewer than P identities or a P that `world` does not divide.

    Differs from TransReID's sampler, which drops short groups and the last identities of an epoch.
    """

    def __init__(self, pids: Sequence[int], num_ids: int = 16, num_images: int = 4, seed: int = 0,
                 rank: int = 0, world: int = 1):
        self.P, self.K, self.seed, self.rank, self.world = num_ids, num_images, seed, rank, world
        self.epoch = 0
        pids = np.asarray(pids)
        order = np.argsort(pids, kind="stable")
        self.members = np.split(order, np.flatnonzero(np.diff(pids[order])) + 1)  # indices per id
        if len(self.members) < max(num_ids, 2) or min(num_ids - 1, num_images) < 1:
            raise InputError(f"a batch needs {max(num_ids, 2)} identities and one image of each, "
                             f"the training set has {len(np.unique(pids))}; see --ids, --labelled")
        if num_ids % world:
            raise InputError(f"--ids {num_ids} cannot be shared evenly by {world} processes")
        groups = np.array([-(-len(m) // num_images) for m in self.members])
        self.length = int(max(groups.max(), -(-groups.sum() // num_ids)))

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        # np.resize repeats from the start to fill the last group
        groups = [list(np.resize(rng.permutation(m), (-(-len(m) // self.K), self.K)))
                  for m in self.members]
        left, share = np.array([len(g) for g in groups]), self.P // self.world
        for i in range(self.length):
            # P identities without replacement, in proportion to the groups they have left (the
            # Gumbel-max trick); one that needs every batch to come goes first, so none is left over
            score = np.log(np.maximum(left, 1e-9)) + rng.gumbel(size=len(left))
            score[left == self.length - i] = np.inf
            batch = []
            for pid in np.argsort(-score)[:self.P]:
                if not groups[pid]:
                    groups[pid].append(np.resize(rng.permutation(self.members[pid]), self.K))
                batch.append(groups[pid].pop())
                left[pid] = len(groups[pid])
            mine = np.concatenate(batch[self.rank * share:(self.rank + 1) * share])
            yield placed(self.epoch * self.length + i, self.rank * len(mine), mine)


class ShuffleSampler:
    """Batches of shuffled images without identities; the last, incomplete one is dropped.

    Order is a function of `seed` and the attribute `epoch`. Of each step's `batch` images `rank`
    takes its part of `world`, cut into `passes`, which are yielded one after another. Raises
    InputError when there are fewer images than one batch.
    """

    def __init__(self, n: int, batch: int, seed: int = 0, rank: int = 0, world: int = 1,
                 passes: int = 1):
        if n < batch:
            raise InputError(f"a batch of {batch} needs that many images, the set has {n}; use a "
                             f"smaller --batch")
        self.n, self.batch, self.seed, self.rank, self.passes = n, batch, seed, rank, passes
        self.part = batch // (world * passes)
        self.epoch = 0

    def __len__(self) -> int:
        return self.n // self.batch

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.n)
        for i in range(len(self)):
            whole = order[i * self.batch:(i + 1) * self.batch]
            for part in range(self.rank * self.passes, (self.rank + 1) * self.passes):
                first = part * self.part
                yield placed(self.epoch * len(self) + i, first, whole[first:first + self.part])


def placed(step: int, first: int, indices: np.ndarray) -> list[tuple[int, int, int]]:
    """(step, place in the whole batch, image) of images that follow one another in a batch."""
    return [(step, first + i, int(index)) for i, index in enumerate(indices)]


def from_step(sampler: PKSampler | ShuffleSampler, first: int, last: int):
    """The batches of a sampler from step `first` on, until `last` steps, whole epochs, are done."""
    for epoch in range(first // len(sampler), last // len(sampler)):
        sampler.epoch = epoch
        yield from (batch for batch in sampler if batch[0][0] >= first)


# ---------------------------------------------------------------------------------------------
# Random numbers of views, drawn by the workers
# ---------------------------------------------------------------------------------------------

def step_generator(*key: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator set by the key alone, so that going on at a step needs no stored state.

    Keys in use, so that none shares another's numbers but by chance (a CPU's generator keeps 32
    bits): (seed, step, place) views and masks; (seed, step, 0, 1) noise of erasing; (seed, step,
    process, 2) stochastic depth.
    """
    state = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(state)


def erasing_noise(images: Tensor, seed: int, step: int, rank: int, world: int) -> Tensor:
    """Noise for erased pixels of images (B, 3, H, W), drawn where it is needed: for the images of
    all processes, as one would draw it, of which each takes its own."""
    generator = step_generator(seed, step, 0, 1, device=images.device)
    shape = len(images) * world, *images.shape[1:]
    return torch.randn(shape, device=images.device, generator=generator).chunk(world)[rank]


class Draws:
    """Rows of uniform numbers (..., U), used up from left to right by what they decide.

    A row decides one image or one view. Shapes below leave out the leading dimensions `...`; a
    probability may be a tensor over the last of these, one for each view.
    """

    def __init__(self, uniforms: Tensor):
        self.uniforms, self.used = uniforms, 0

    def uniform(self, low: float, high: float, n: int) -> Tensor:
        """(n,) from U(low, high)."""
        self.used += n
        assert self.used <= self.uniforms.shape[-1], "more numbers than a row has"
        return low + (high - low) * self.uniforms[..., self.used - n:self.used]

    def chance(self, p: float | Tensor) -> Tensor:
        """() a boolean, True with probability p."""
        return self.uniform(0, 1, 1)[..., 0] < p

    def rectangles(self, H: int, W: int, area: tuple[float, float], aspect: tuple[float, float],
                   whole: bool, log: bool = True) -> tuple[Tensor, Tensor]:
        """(4,) top, left, height, width, and () whether one was found; area as a share of H W.

        aspect = height / width, log-uniform or uniform. One that does not fit is drawn again, ten
        draws at most; `whole` allows sides as long as the image's. Takes 22 numbers.
        """
        areas = self.uniform(*area, 10) * H * W
        aspects = (self.uniform(math.log(aspect[0]), math.log(aspect[1]), 10).exp() if log else
                   self.uniform(*aspect, 10))
        h, w = (areas * aspects).sqrt().round(), (areas / aspects).sqrt().round()    # (10,)
        # True is 1: a side may equal the image's if `whole`
        fits = (h < H + whole) & (w < W + whole) & (h > 0) & (w > 0)
        first = fits.int().argmax(-1, keepdim=True)
        h, w = h.gather(-1, first)[..., 0], w.gather(-1, first)[..., 0]
        top, left = self.uniform(0, 1, 2).unbind(-1)
        top, left = (top * (H - h + 1)).floor(), (left * (W - w + 1)).floor()
        return torch.stack([top, left, h, w], dim=-1), fits.any(-1)

    def crops(self, H: int, W: int, area: tuple[float, float],
              aspect: tuple[float, float]) -> Tensor:
        """(4,) top, left, height, width of random crops; aspect = width / height, and the whole
        image where no crop fits. Takes 22 numbers."""
        boxes, found = self.rectangles(H, W, area, (1 / aspect[1], 1 / aspect[0]), whole=True)
        return torch.where(found[..., None], boxes, torch.tensor([0.0, 0.0, H, W]))

    def erasures(self, H: int, W: int, area: tuple[float, float], log: bool = True) -> Tensor:
        """(4,) top, left, height, width to erase, with probability 0.5, else all 0. Takes 23."""
        boxes, found = self.rectangles(H, W, area, (0.3, 1 / 0.3), whole=False, log=log)
        return boxes * (self.chance(0.5) & found)[..., None]

    def view(self, H: int, W: int, area: tuple[float, float], aspect: tuple[float, float],
             blurred: float | Tensor) -> Tensor:
        """(7,) a crop's top, left, height, width; flip 0.5, greyscale 0.2, and the sigma of a blur
        of that probability. Takes 26."""
        box, flip, colourless = self.crops(H, W, area, aspect), self.chance(0.5), self.chance(0.2)
        sigma = torch.where(self.chance(blurred), self.uniform(0.1, 2, 1)[..., 0], 0.01)
        return torch.cat([box, torch.stack([flip, colourless, sigma], dim=-1)], dim=-1)

    def colours(self, strengths: tuple[float, ...], p: float) -> Tensor:
        """(13,) for `colour_jitter`, with probability p: kinds of six blends, -1 for none, their
        factors, the turn of the hue; in an order of the four that is drawn too. Takes 6.

        Whatever the order, the hue is turned once, with what comes before it among the first three
        blends and what comes after among the last three: one road for a whole batch.
        """
        change = self.uniform(-1, 1, 4) * torch.tensor(strengths) * self.chance(p)[..., None]
        order = ORDERS[self.uniform(0, len(ORDERS), 1)[..., 0].long()]               # (4,)
        place, hue = torch.arange(4), (order == HUE).int().argmax(-1, keepdim=True)  # (4,), (1,)
        kinds = torch.cat([torch.where(place < hue, order, -1)[..., :3],
                           torch.where(place > hue, order, -1)[..., 1:]], dim=-1)    # (6,)
        factors = 1 + change.gather(-1, kinds.clamp(min=0)) * (kinds >= 0)
        return torch.cat([kinds, factors, change[..., HUE:]], dim=-1)


BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ORDERS = torch.tensor(list(itertools.permutations(range(4))))                        # (24, 4)

# ---------------------------------------------------------------------------------------------
# Pixels of views, changed on the device
# ---------------------------------------------------------------------------------------------

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LUP_MEAN, LUP_STD = (0.3525, 0.3106, 0.3140), (0.2660, 0.2522, 0.2505)  # of LUPerson [LUP]
LUMA = (0.299, 0.587, 0.114)  # of ITU-R 601, as Pillow and torchvision have it


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8, or floats in [0, 1], (B, 3, H, W) -> float32 of about zero mean, unit variance."""
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    # by numbers, as tensors of them would have to be copied to a GPU in every step
    return torch.stack([(x - m) / s for x, m, s in zip(images.unbind(1), mean, std)], dim=1)


def inside(boxes: Tensor, H: int, W: int) -> Tensor:
    """(n, 4) top, left, height, width -> (n, 1, H, W), True inside the box."""
    top, left, h, w = boxes.T[:, :, None]                                    # (n, 1) each
    y, x = torch.arange(H, device=boxes.device), torch.arange(W, device=boxes.device)
    rows, columns = (y >= top) & (y < top + h), (x >= left) & (x < left + w)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def resize_matrix(start: Tensor, length: Tensor, n: int, out: int,
                  flip: Tensor | None = None) -> Tensor:
    """Bicubic, antialiased resampling of [start, start + length) of n pixels to `out`, as matrices.

    start, length (B,) -> (B, out, n), rows summing to 1; flip (B,) reverses the result. A resize is
    linear and separable: rows @ image @ columns^T crops, resizes and flips a whole batch at once.
    Source: Pillow's rule (support grows with the scale, nothing outside the crop is seen).
    """
    start, length = start[:, None, None], length[:, None, None]
    scale = length / out
    wide = scale.clamp(min=1)                                                # shrinking: antialias
    centre = start + (torch.arange(out, device=start.device)[None, :, None] + 0.5) * scale
    pixel = torch.arange(n, device=start.device)[None, None, :] + 0.5
    x = ((pixel - centre) / wide).abs()                                      # (B, out, n)
    # Keys' cubic with a = -0.5, the only one of them that reproduces straight lines
    weight = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)
    weight = weight * ((x < 2) & (pixel > start) & (pixel < start + length))
    weight = weight / weight.sum(2, keepdim=True)
    return weight if flip is None else torch.where(flip[:, None, None], weight.flip(1), weight)


def crop_resize(x: Tensor, boxes: Tensor, flip: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut out boxes (n, 4), resize, mirror where flip (n,): (n, 3, H, W) -> (n, 3, *size)."""
    (H, W), (top, left, h, w) = x.shape[2:], boxes.unbind(1)
    rows = resize_matrix(top, h, H, size[0])                                 # (n, size[0], H)
    columns = resize_matrix(left, w, W, size[1], flip > 0)                   # (n, size[1], W)
    return (rows[:, None] @ x @ columns[:, None].mT).clamp(0, 1)


def blur_matrix(sigma: Tensor, n: int) -> Tensor:
    """Gaussian blur along n pixels, mirrored at the ends: sigma (B,) in pixels -> (B, n, n)."""
    offset = torch.arange(-6, 7, device=sigma.device)  # 3 times the largest sigma, 2 [ours]
    weight = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)                # (B, 13)
    weight = weight / weight.sum(1, keepdim=True)
    source = torch.arange(n, device=sigma.device)[:, None] + offset          # (n, 13)
    source = (n - 1 - (n - 1 - source.abs()).abs()).clamp(0, n - 1)
    matrix = torch.zeros(len(sigma), n, n, device=sigma.device)
    return matrix.scatter_add_(2, source.expand(len(sigma), -1, -1),
                               weight[:, None, :].expand(-1, n, -1).contiguous())


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of images (n, 3, h, w) by sigma (n,) in pixels."""
    vertical, horizontal = (blur_matrix(sigma, n)[:, None] for n in x.shape[2:])
    return vertical @ x @ horizontal.mT


def grey(images: Tensor) -> Tensor:
    """(B, 3, h, w) -> (B, 1, h, w)."""
    r, g, b = images.split(1, dim=1)
    return LUMA[0] * r + LUMA[1] * g + LUMA[2] * b


def blend(images: Tensor, kind: Tensor, factor: Tensor) -> Tensor:
    """Images (n, 3, h, w) in [0, 1] -> other + factor (images - other), where `other` is, by kind
    (n, 1, 1, 1): black for BRIGHTNESS, the mean grey for CONTRAST, the pixel's for SATURATION."""
    pixel = grey(images)                                                     # (n, 1, h, w)
    other = torch.where(kind == CONTRAST, pixel.mean((2, 3), keepdim=True), pixel)
    other = torch.where(kind <= BRIGHTNESS, 0, other)
    return torch.lerp(other, images, factor).clamp_(0, 1)


def shift_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Rotate the hue of RGB in [0, 1] by `turn` (B, 1, 1, 1) of the colour circle, through HSV."""
    high, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = high - low
    r, g, b = images.split(1, dim=1)
    safe = torch.where(chroma == 0, 1, chroma)
    hue = torch.where(high == r, (g - b) / safe, torch.where(high == g, 2 + (b - r) / safe,
                                                             4 + (r - g) / safe))  # in sixths
    sixth = torch.cat([hue + 6 * turn + k for k in (5, 3, 1)], dim=1) % 6
    return high - chroma * torch.minimum(sixth, 4 - sixth).clamp(0, 1)       # (B, 3, h, w)


def colour_jitter(images: Tensor, numbers: Tensor) -> Tensor:
    """Images (n, 3, h, w) in [0, 1], numbers (n, 13) of `Draws.colours`: three blends, a turn of
    the hue, three blends. Factors of 1 and a turn of 0 change nothing."""
    kinds, factors, turn = numbers[..., None, None, None].split((6, 6, 1), dim=1)
    for i in range(6):
        images = shift_hue(images, turn[:, 0]) if i == 3 else images
        images = blend(images, kinds[:, i], factors[:, i])
    return images


def render(x: Tensor, numbers: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (n, 3, H, W) in [0, 1] -> (n, 3, *size): crop, resize, flip, change colours, turn
    grey, blur. numbers (n, 7) of `Draws.view`, or (n, 20) with those of `Draws.colours`."""
    boxes, (flip, colourless, sigma) = numbers[:, :4], numbers[:, 4:7].T
    x = crop_resize(x, boxes, flip, size)
    x = colour_jitter(x, numbers[:, 7:]) if numbers.shape[1] > 7 else x
    x = torch.where(colourless.view(-1, 1, 1, 1) > 0, grey(x), x)
    return blur(x, sigma)


class FineTuneTransform:
    """Flip, pad + random crop, normalise, random erasing: uint8 -> float32, both (B, 3, H, W).

    In the order of the reference pipeline (PersonViT's fine-tuning; images come resized to `size`):
    flip with probability 0.5; pad 10 black pixels, crop back at a random place; normalise; with
    probability 0.5 erase a rectangle of at least 2 % of the image, of aspect 0.3 to 1/0.3
    (timm's defaults [from memory]). noise: of up to a third, filled with normal noise per pixel
    [PersonViT code]; else of up to 40 %, filled with the mean colour, 0 after normalisation [BoT],
    whose code erases after normalising, with the mean as it is before [secondary].
    """

    uniforms = 26  # numbers of an image

    def __init__(self, size: tuple[int, int], mean: Sequence[float], std: Sequence[float],
                 noise: bool = True, pad: int = 10):
        self.size, self.mean, self.std, self.noise, self.pad = size, mean, std, noise, pad

    def draw(self, uniforms: Tensor) -> Tensor:
        """(B, 26) -> (B, 7): flip, top and left of the crop; top, left, height, width erased."""
        draws = Draws(uniforms)
        flip, crop = draws.chance(0.5), draws.uniform(0, 2 * self.pad + 1, 2).floor()
        erased = draws.erasures(*self.size, (0.02, 1 / 3 if self.noise else 0.4))
        return torch.cat([flip[:, None], crop, erased], dim=1)

    def __call__(self, images: Tensor, numbers: Tensor, noise: Tensor | None = None) -> Tensor:
        """noise (B, 3, H, W): what erasing leaves; None: the mean colour."""
        (_, _, H, W), device, margin = images.shape, images.device, 2 * self.pad
        (flip, top, left), erased = numbers[:, :3].T, inside(numbers[:, 3:], H, W)
        rows = top.long()[:, None] + torch.arange(H, device=device)          # (B, H)
        columns = left.long()[:, None] + torch.arange(W, device=device)      # (B, W)
        columns = torch.where(flip[:, None] > 0, W + margin - 1 - columns, columns)  # flip first
        x = F.pad(images, [self.pad] * 4)                                    # (B, 3, H+20, W+20)
        x = x.gather(2, rows[:, None, :, None].expand(-1, 3, -1, W + margin))
        x = x.gather(3, columns[:, None, None, :].expand(-1, 3, H, -1))      # (B, 3, H, W)
        x = normalize(x, self.mean, self.std)
        return torch.where(erased, 0 if noise is None else noise, x)


class MultiCrop:
    """Two global and L local views for self-distillation: uint8 (B, 3, H, W) -> dict of float32.

    "globals" (2, B, 3, *size) and "locals" (L, B, 3, size / 2). Each view: random resized crop
    (scales are shares of the image's area, aspects width / height), flip 0.5, colour jitter
    (brightness 0.4, contrast 0.4, saturation 0.2, hue 0.1) with probability 0.8, greyscale 0.2,
    Gaussian blur of sigma U(0.1, 2) with probability 1, 0.1, 0.5 (first global, second, local),
    solarisation 0.2 on the second global, ImageNet statistics [iBOT, DINO]. Scales and aspects: see
    `PersonViTRecipe`. Ours: images come resized to `size`, where iBOT crops the original file; a
    crop that fits nowhere is the whole image.
    """

    mean, std = IMAGENET_MEAN, IMAGENET_STD
    each = 33  # uniform numbers of a view

    def __init__(self, size: tuple[int, int] = (256, 128), num_local: int = 8,
                 global_scale: tuple[float, float] = (0.4, 1.0),
                 local_scale: tuple[float, float] = (0.05, 0.8),
                 aspect: tuple[float, float] = (0.375, 0.667)):
        self.size, self.local_size, self.num_local = size, (size[0] // 2, size[1] // 2), num_local
        self.global_scale, self.local_scale, self.aspect = global_scale, local_scale, aspect
        self.uniforms = (2 + num_local) * self.each

    def draw(self, uniforms: Tensor) -> Tensor:
        """(B, uniforms) -> (B, 2 + L, 21), the numbers that `show` takes."""
        uniforms = uniforms.unflatten(1, (-1, self.each))                    # (B, 2 + L, 33)
        whole = self.draw_views(uniforms[:, :2], self.global_scale, (1.0, 0.1), (0.0, 0.2))
        local = self.draw_views(uniforms[:, 2:], self.local_scale, (0.5,), (0.0,))
        return torch.cat([whole, local], dim=1)

    def draw_views(self, uniforms: Tensor, scale: tuple[float, float], blurs: tuple[float, ...],
                   solarizes: tuple[float, ...]) -> Tensor:
        """(B, V, 33) -> (B, V, 21); probabilities of blur and solarisation by view."""
        draws = Draws(uniforms)
        view = draws.view(*self.size, scale, self.aspect, torch.tensor(blurs))
        colours = draws.colours((0.4, 0.4, 0.2, 0.1), 0.8)
        inverted = draws.chance(torch.tensor(solarizes))                     # (B, V)
        return torch.cat([view, colours, inverted[..., None]], dim=-1)

    def __call__(self, images: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        """numbers (B, 2 + L, 21), on the images' device."""
        x, numbers = images.float() / 255, numbers.transpose(0, 1)           # (2 + L, B, 21)
        return {"globals": self.show(x, numbers[:2], self.size),
                "locals": self.show(x, numbers[2:], self.local_size)}

    def show(self, x: Tensor, numbers: Tensor, size: tuple[int, int]) -> Tensor:
        """V views of images (B, 3, H, W) in [0, 1], numbers (V, B, 21) -> (V, B, 3, *size)."""
        V, B, _ = numbers.shape
        numbers = numbers.flatten(0, 1)                                      # (V B, 21)
        x = render(x.repeat(V, 1, 1, 1), numbers[:, :20], size)              # (V B, 3, *size)
        x = torch.where((numbers[:, 20].view(-1, 1, 1, 1) > 0) & (x >= 0.5), 1 - x, x)
        return normalize(x, self.mean, self.std).unflatten(0, (V, B))


class ContrastViews:
    """UP-ReID's views: uint8 (B, 3, H, W) -> dict of float32.

    "first", "second" (B, 3, H, W): the image, augmented twice. "original": the image as it is, if
    wanted. "stripes1", "stripes2" (B, M, 3, H / M, W), for M > 0: its M horizontal stripes, each
    augmented twice like an image of its own. Cut first: crops cut later would pair a head with a
    knee [ours U3].

    Augmentation as LUPerson's ori-cj+sre [LUP]: random resized crop of 20 % to all of the area,
    width / height 3/4 to 4/3 (torchvision's default, not adapted to people: those of more than two
    thirds of a 2:1 image never fit, and all are stretched about twofold), greyscale 0.2, blur 0.5
    with sigma U(0.1, 2), flip 0.5, normalisation with LUPerson's statistics, with probability 0.5 a
    rectangle of 2 to 60 % of the area set to the mean colour. No colour jitter: colours of clothes
    tell people apart. Ours: images come resized, where LUPerson crops the file; bicubic
    (torchvision's default is bilinear); a crop that fits nowhere is the whole image; an erasure is
    tried 10 times, not 100.
    """

    mean, std = LUP_MEAN, LUP_STD
    each = 49  # uniform numbers of a view

    def __init__(self, size: tuple[int, int] = (256, 128), original: bool = True,
                 stripes: int = 4):
        self.size, self.original, self.stripes = size, original, stripes
        self.uniforms = (2 + 2 * stripes) * self.each

    def draw(self, uniforms: Tensor) -> Tensor:
        """(B, uniforms) -> (B, 2 + 2 M, 11), the numbers that `augment` takes: of the two views of
        the image, then of its stripes, first and second views."""
        uniforms, (H, W) = uniforms.unflatten(1, (-1, self.each)), self.size
        return torch.cat([self.draw_views(uniforms[:, :2], H, W),
                          self.draw_views(uniforms[:, 2:], H // max(self.stripes, 1), W)], dim=1)

    def draw_views(self, uniforms: Tensor, h: int, w: int) -> Tensor:
        """(B, V, 49) -> (B, V, 11) for images of h x w."""
        draws = Draws(uniforms)
        view = draws.view(h, w, (0.2, 1.0), (3 / 4, 4 / 3), 0.5)             # (B, V, 7)
        return torch.cat([view, draws.erasures(h, w, (0.02, 0.6), log=False)], dim=-1)

    def __call__(self, images: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        """numbers (B, 2 + 2 M, 11), on the images' device."""
        x, M = images.float() / 255, self.stripes
        views = {"first": self.augment(x[:, None], numbers[:, :1])[:, 0],    # (B, 3, H, W)
                 "second": self.augment(x[:, None], numbers[:, 1:2])[:, 0]}
        if self.original:
            views["original"] = normalize(x, self.mean, self.std)
        if M:
            stripes = x.unflatten(2, (M, -1)).transpose(1, 2)                # (B, M, 3, H/M, W)
            views["stripes1"] = self.augment(stripes, numbers[:, 2:2 + M])
            views["stripes2"] = self.augment(stripes, numbers[:, 2 + M:])
        return views

    def augment(self, x: Tensor, numbers: Tensor) -> Tensor:
        """V images or stripes of B people, (B, V, 3, h, w) in [0, 1], numbers (B, V, 11) -> the
        same shape."""
        (B, V, _, h, w), numbers = x.shape, numbers.flatten(0, 1)            # (B V, 11)
        x = normalize(render(x.flatten(0, 1), numbers[:, :7], (h, w)), self.mean, self.std)
        return x.masked_fill(inside(numbers[:, 7:], h, w), 0).unflatten(0, (B, V))


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Count a dataset, or draw synthetic people.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--dataset", help="a known set or any folder: counts beside published ones")
    what.add_argument("--synthetic", metavar="DIR", help="draw the synthetic people into a folder")
    parser.add_argument("--data-root", default="data", help="folder that holds the datasets")
    parser.add_argument("--train-only", action="store_true", help="MSMT17 without its val list")
    args = parser.parse_args(argv)
    if args.synthetic is not None:
        print(f"wrote {make_synthetic(args.synthetic)}")
    else:
        load_dataset(args.dataset, args.data_root, args.train_only)


if __name__ == "__main__":
    command_line(main)
