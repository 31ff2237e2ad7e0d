"""Folders of images of any kind: which image is of which person, by which camera.

    names that say both    0002_c1s1_000451_03.jpg (Market-1501 and its likes), 0002C1T0001F001.jpg
                           (MARS), 0000_045_12_0303morning_0006_2.jpg (MSMT17)
    a folder for each      anna/1.jpg; folders of cameras, splits and tracklets are no people
    neither                no identities: for pre-training alone
    lists                  MSMT17's four, or paths of millions of unlabelled crops

All is given as plain values, (path, identity, camera); data.py makes records of them. What
contradicts itself raises `InputError`.
"""

import difflib
import itertools
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from extra.files import SUFFIXES, InputError, check_inside, list_images, write_atomic

MARKET_SPLITS = ("bounding_box_train", "query", "bounding_box_test")
PLAIN_SPLITS = ("train", "query", "gallery")

# -1 or 00-1 is junk
NAMED = re.compile(r"(-1|\d+)_c(\d{1,9})(?!\d)|(00-1|\d{4})c(\d)t\d+f\d+|"
                   r"(\d+)_\d{3}_(\d\d)_\d{4}[a-z]", re.IGNORECASE)
# folders that are no person's: cam1, cam_a, camB (but Cami is one), id7_cam1, tracklet_12, train
NO_PERSON = re.compile(
    r"cam(era)?s?([ _-]?\d.*|[ _-].+|[a-h])?|views?[ _-]?(\d+|[a-h])|[ct]\d+|"
    r".+[ _-]c(am(era)?)?[ _-]?\d+|\d+c\d+t\d+|"
    r"(track(let)?|seq(uence)?|video|clip|frame|shot|image|img)s?([ _-]?\d+)*|"
    r"(multi|single)[ _-]?shot|(gt|bbox|bounding_box)?[ _-]?"
    r"(train(ing|val)?|test(ing)?|val(id|idation)?|query|gallery|probe)"
    r"([ _-]?(all|set|images?|imgs?|\d+))?", re.IGNORECASE)


def closest(name: str, names: Sequence[str]) -> str:
    """The names most like a mistyped one, or all of them when none is."""
    return ", ".join(difflib.get_close_matches(name.lower(), names, 3, 0.4) or names)


def find(name: str, root: Path, usual: Sequence[str], *inside: str) -> Path:
    """The first of a set's usual places that holds one of the folders or files `inside`."""
    places = [root]
    for parent in (root, root / name):
        places += [parent / folder for folder in usual]
    for place in places:
        if any((place / part).exists() for part in inside):
            return place
    raise InputError(
        f"{name} not found: no {inside[0]} in {root} nor in {' or '.join(usual)} below it; "
        f"docs/data-and-weights.md says whom to ask for it, --data-root names another folder, and "
        f"--dataset synthetic needs no data")


# ---------------------------------------------------------------------------------------------
# Who is on an image
# ---------------------------------------------------------------------------------------------


def read_labels(paths: Sequence[str], root: Path) -> tuple[list, bool]:
    """(identity, camera) of each image, and whether cameras are known.

    A name that says both wins. Else the folder is the identity, where there are several, and the
    camera is None. Else both are None. Raises InputError where names or folders contradict one
    another.
    """
    matches = [NAMED.match(os.path.basename(path)) for path in paths]
    if any(matches):
        return labels_of_names(paths, matches, root), True
    people = [people_folders(os.path.relpath(path, root)) for path in paths]
    while people and all(people) and len({folders[0] for folders in people}) == 1:
        people = [folders[1:] for folders in people]  # one folder that holds all is no person
    if not any(people):
        return [(None, None)] * len(paths), False
    for path, folders in zip(paths, people):
        if not folders:
            raise InputError(f"{path}: lies beside folders that are identities, in none itself "
                             f"(cameras, splits, tracklets are none); put each image into the "
                             f"folder of its person")
        if len(folders) > 1:
            raise InputError(
                f"{path}: is the person {folders[0]} or, the folder nearest to it, {folders[-1]}? "
                f"Rename the inner folders (tracklet1, cam1) or the outer ones (cam1, train)")
    return [(folders[0], None) for folders in people], False


def labels_of_names(paths: Sequence[str], matches: list, root: Path) -> list[tuple[int, int]]:
    """(identity, camera) of names that say both."""
    unnamed = [path for path, match in zip(paths, matches) if not match]
    if unnamed:
        raise InputError(f"{len(unnamed)} of {len(paths)} names do not start like 0002_c1, as the "
                         f"others do: {', '.join(unnamed[:3])}; rename them or take them out, or "
                         f"pre-train without labels on a .txt list of the paths")
    labels = []
    for path, match in zip(paths, matches):
        identity, camera = [int(g.replace("00-1", "-1")) for g in match.groups() if g]
        folders = Path(os.path.relpath(path, root)).parts[:-1]
        numbers = {int(folder): folder for folder in folders if folder.isdecimal()}
        if numbers and identity not in numbers and camera not in numbers:
            raise InputError(f"{path}: the name says identity {identity}, the folder "
                             f"{' or '.join(numbers.values())}; rename the one or the other")
        labels.append((identity, camera))
    return labels


def people_folders(path: str) -> list[str]:
    """The folders in an image's relative path that may be a person's, the outermost first."""
    return [name for name in Path(path).parts[:-1] if not NO_PERSON.fullmatch(name)]


# ---------------------------------------------------------------------------------------------
# Trees with or without splits
# ---------------------------------------------------------------------------------------------


def read_splits(root: Path, must_have_cameras: bool) -> tuple[list, bool, str]:
    """Images of train, query and gallery, (path, identity, camera) each, without junk; whether
    cameras are known; and what a reader should know.

    With sub-folders of Market's names, or train, query, gallery, these are the splits; else every
    image is in all three. Raises InputError where splits contradict one another, or nothing can be
    learned from them. Identities are numbers (-1: none), cameras count from 1; without cameras
    every image has one of its own, so that "same person, same camera" excludes the image alone.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    folders = split_folders(root)
    images = {folder: list_images(folder) for folder in sorted(set(folders)) if folder.is_dir()}
    if not any(images.values()):
        raise InputError(f"{root}: holds no image ({' '.join(SUFFIXES)})")
    splits = []
    kinds = set()
    identities = set()
    for folder in folders:
        paths = images.get(folder, [])
        labels, cameras = read_labels(paths, folder)
        splits.append([(path, *label) for path, label in zip(paths, labels)])
        found = {identity for identity, _ in labels}
        identities |= found
        if paths:
            kinds.add((cameras, found != {None}))
    names = ", ".join(folder.name for folder in folders)
    has_cameras = all(cameras for cameras, _ in kinds)
    if len(kinds) > 1 or must_have_cameras and not has_cameras:
        raise InputError(f"{root}: names do not start like 0002_c1 (identity, camera), or folders "
                         f"are no identities, in each of {names}")
    if identities == {None} and not splits[0]:
        raise InputError(f"{root}: of {names} the first holds no image, and neither names nor "
                         f"folders of the others are identities")
    number = number_identities(identities - {None})
    splits = with_numbers(splits, number)
    notes = notes_on(folders, splits, number, has_cameras)
    if not must_have_cameras:  # of a public set, what is none of its splits is known
        notes += not_read(root, folders)
    return splits, has_cameras, "; ".join(notes)


def split_folders(root: Path) -> list[Path]:
    """Folders of train, query and gallery, in small letters or capitals; `query` alone makes no
    set: many a folder has one."""
    below = {path.name.lower(): path for path in sorted(root.iterdir())}
    for names in (MARKET_SPLITS, PLAIN_SPLITS):
        folders = [below.get(name, root / name) for name in names]
        if folders[0].is_dir() or folders[2].is_dir():
            return folders
    return [root, root, root]


def number_identities(identities: set) -> dict:
    """Names of folders, and numbers that no tensor holds, are numbered in their order."""
    ordered = sorted(identities)
    if all(isinstance(identity, int) and identity < 2 ** 62 for identity in ordered):
        return {identity: identity for identity in ordered}
    return {identity: i for i, identity in enumerate(ordered)}


def with_numbers(splits: list, number: dict) -> list:
    """The splits with numbers for identities and cameras, without junk (identity -1)."""
    paths = {path for path, _, _ in itertools.chain(*splits)}
    own_camera = {path: i for i, path in enumerate(sorted(paths), 1)}
    found = []
    for split in splits:
        found.append([])
        for path, identity, camera in split:
            if camera is None:
                camera = own_camera[path]
            if identity != -1:
                found[-1].append((path, number.get(identity, -1), camera))
    return found


def notes_on(folders: list[Path], splits: list, number: dict, has_cameras: bool) -> list[str]:
    """What a reader of results on these splits should know."""
    notes = []
    if folders[0] == folders[1]:
        notes.append("no train, query, gallery folders: the same images train and test")
    test_cameras = {camera for _, _, camera in itertools.chain(*splits[1:])}
    if not number:
        notes.append("no identities, these images serve --pretrain alone: to label them, name them "
                     "like 0002_c1 or put each person's into a folder of its own")
    elif not has_cameras:
        notes.append("each folder is an identity, cameras are unknown: ranking excludes only the "
                     "image itself, which looks better than by Market-1501's protocol")
    elif len(test_cameras) == 1:
        notes.append("all test images are by one camera: evaluate.py can rank them by --cams none")
    return notes


def not_read(root: Path, splits: list[Path]) -> list[str]:
    """A note on folders beside the splits, of which no image is read."""
    if splits[0] == root:
        return []
    beside = {path.name for path in root.iterdir() if path.is_dir() and path not in splits}
    names = sorted(name for name in beside if name[0] not in ".@")
    if not names:
        return []
    return [f"not read, as no split has such a name: {', '.join(names)}"]


# ---------------------------------------------------------------------------------------------
# Lists
# ---------------------------------------------------------------------------------------------


def read_msmt17_list(file: Path, folder: Path) -> list[tuple[str, int, int]]:
    """(path, identity, camera) of MSMT17's lines "0000/0000_045_12_0303morning_0006_2.jpg 0"."""
    text = file.read_text(encoding="utf-8-sig", errors="replace").rstrip()
    paths = []
    for number, line in enumerate(text.splitlines(), 1):
        match = re.fullmatch(r"((?:\S*/)?0*(\d+)_\S+) \2\s*", line)  # the identity stands twice
        if not match or not NAMED.match(os.path.basename(match[1])):
            raise InputError(f"{file} line {number}: {line!r} does not read 'path identity' with "
                             f"the same identity, and the camera, in the file's name")
        check_inside(match[1], file)
        paths.append(str(folder / match[1]))
    if not paths or not os.path.exists(paths[0]):
        raise InputError(f"{file}: its first image is missing, or it names none")
    labels, _ = read_labels(paths, folder)
    return [(path, identity, camera) for path, (identity, camera) in zip(paths, labels)]


LUPERSON = re.compile("lup(erson.*)?")  # names of its folder, in small letters


def find_unlabelled(root: Path) -> tuple[Path, Path, Path, str]:
    """Where LUPerson is, or another set of crops too large to list at every start: the folder or
    list, a list of paths, the folder that they are relative to, and a note.

    A folder is listed once into <folder>.index.txt; delete that file after the folder has changed.
    LMDB files are not read: decode them to JPEG files first.
    """
    places = [root / name for name in ("luperson.txt", "luperson", "LUPerson", "LUP")]
    if root.is_file() or LUPERSON.fullmatch(root.name.lower()):
        places = [root]  # the set itself, not the folder that it lies in
    source = next((place for place in places if place.exists()), None)
    if source is None:
        raise InputError(f"luperson not found: no {root}/luperson/ (any tree of crops), nor "
                         f"{root}/luperson.txt (a path per line); docs/data-and-weights.md says "
                         f"whom to ask for it")
    if source.is_dir():
        index = list_once(source)
        return source, index, source, f"listed in {index}"
    if source.suffix.lower() != ".txt":
        raise InputError(f"{source}: neither a folder of crops nor a .txt list of paths")
    return source, source, source.parent, ""


def list_once(folder: Path) -> Path:
    """The list of a folder's images; made, if it is not there."""
    index = folder.with_name(folder.name + ".index.txt")
    if index.exists():
        return index
    print(f"listing {folder} once ...", flush=True)
    paths = [os.path.relpath(path, folder) for path in list_images(folder)]
    if not paths or any(re.search("[\r\n]", path) for path in paths):
        raise InputError(f"{folder}: holds no image (LMDB files are not read), or one with a line "
                         f"break in its name")
    if not os.access(index.parent, os.W_OK):  # then the list is kept for this run alone
        index = Path(tempfile.mkdtemp()) / index.name
    text = "\n".join([*paths, ""])
    write_atomic(index, lambda handle: handle.write(os.fsencode(text)))
    return index
