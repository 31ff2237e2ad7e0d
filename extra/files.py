"""What the book does with files, made safe: errors in one line, whole files or none, any image.

Nothing here knows of people or networks. Errors that a user can mend are `InputError`;
`command_line` prints them as one line. Images come out as uint8 tensors, lists of millions of paths
as one array.
"""

import contextlib
import hashlib
import io
import itertools
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

# ---------------------------------------------------------------------------------------------
# Errors in one line
# ---------------------------------------------------------------------------------------------


class InputError(ValueError):
    """Something the user can mend: the scripts print it as one line, without a traceback."""

    def __str__(self) -> str:
        # an error of a DataLoader's worker arrives with the worker's traceback before its message
        message = super().__str__().rpartition(f"{__name__}.InputError: ")[2]
        return " ".join(message.splitlines())


# what a machine cannot give, in the words of PyTorch or the system: the way out
HINTS = {
    "shared memory|Bus error": "/dev/shm is full: docker run --shm-size 8g, or --workers 0",
    "killed|exited|abrupt|^EOFE|^Conn": "a worker was killed, for want of memory? fewer --workers",
    "CUDA.*of memory|STATUS_ALLOC": "GPU memory is full: smaller --batch(-size), --ids, --accum 2",
    "allocate mem|to alloc|bad_alloc|^MemoryE": "memory is full: smaller --batch, fewer --workers",
    "Too many open files|ancillary data": "too few files may be open: ulimit -n 4096",
    "invalid device ordinal": "fewer GPUs here than processes: start as many as there are GPUs",
    r"C compiler|C\+\+ compiler": "there is no C compiler: --no-compile",
    "^BackendComp|^Inductor|^Unsupported|riton": "a graph cannot be compiled: --no-compile",
    "new thread|temporarily unavailable": "too few processes may run: ulimit -u, fewer --workers",
    "ddress already in use|EADDRINUSE": "another run has this port: torchrun --master-port 29501",
    "onnection (closed|reset)": "another process of this run has ended, see its message"}


def hint(error: Exception) -> str | None:
    """The way out, if an error says that the machine cannot give something."""
    if isinstance(error, InputError):  # the name of a file may hold such words
        return None
    said = getattr(error, "strerror", None) or error
    text = f"{type(error).__name__}: {said}"  # some say nothing beside their name
    for words, way_out in HINTS.items():
        if re.search(words, text):
            return way_out
    return None


def command_line(main) -> None:
    """Run a script's main function: what the user can mend ends in one line, not a traceback."""
    torch.backends.cudnn.allow_tf32 = False  # --no-bf16 means float32; PyTorch's default is less
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not in a notebook
            stream.reconfigure(errors="backslashreplace")  # a file's name may be no text at all
    try:
        run_and_wait_for_the_reason(main)
    except (InputError, OSError, RuntimeError, MemoryError, EOFError) as error:
        end_in_one_line(error)
    except KeyboardInterrupt:
        sys.exit("interrupted")
    if "WORLD_SIZE" in os.environ:  # torchrun's: all is saved, and threads that PyTorch leaves
        sys.stdout.flush()          # may abort an interpreter that closes in the usual way
        os._exit(0)


def run_and_wait_for_the_reason(main) -> None:
    try:
        main()
    except (EOFError, ConnectionError):
        # a worker is gone; PyTorch's signal that says why may be on its way, and shall not
        # interrupt the last line
        time.sleep(1)
        raise


def end_in_one_line(error: Exception) -> None:
    """Exit with an error's message; a fault of this project's keeps its traceback."""
    way_out = hint(error)
    if way_out:
        detail = str(error).strip() or repr(error)
        detail = detail.splitlines()[-1][:200]  # a worker's error begins with its traceback
        line = f"{way_out} ({detail}); a training goes on by the same command"
    elif isinstance(error, RuntimeError):
        raise error
    else:
        line = str(error)
    rank = os.environ.get("RANK") or "0"  # torchrun's; several processes may see the same error
    who = "error" if rank == "0" else f"error (process {rank})"
    sys.exit(f"{who}: {line}")


# ---------------------------------------------------------------------------------------------
# Whole files
# ---------------------------------------------------------------------------------------------


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
        with contextlib.suppress(OSError):
            partial.unlink()
        cause = error.__context__ or error
        if hint(cause):  # a worker was killed meanwhile
            raise cause
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise InputError(f"{file}: cannot be written ({reason}); is the disk full?") from None


def fingerprint(root: Path, train: Sequence, query: Sequence, gallery: Sequence) -> str:
    """Changes with the names and identities of the images (path, identity, camera), not with the
    place of the folder `root`."""
    if isinstance(train, PathList):
        names = train.names.tobytes()
    else:
        lines = [f"{os.path.relpath(path, root)} {pid}" for path, pid, _ in
                 itertools.chain(train, query, gallery)]
        names = os.fsencode("\n".join(lines))
    return f"{len(train)} images, {hashlib.blake2b(names, digest_size=6).hexdigest()}"


# ---------------------------------------------------------------------------------------------
# Images of any kind
# ---------------------------------------------------------------------------------------------

# Pillow's other formats stay out: one (EPS) would start another program; older ones lack AVIF
KINDS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "AVIF")
SUFFIXES = {suffix: kind for suffix, kind in Image.registered_extensions().items()
            if kind in KINDS and kind in Image.OPEN}
NOT_READ = {".heic", ".heif", ".avif", ".jp2", ".jxl", ".psd", ".dng"} - set(SUFFIXES)
MOST_PIXELS = 1 << 26  # 67 million, more than most phones take; a small file can claim gigapixels


def read_image(path: str, size: tuple[int, int], interpolation: Image.Resampling) -> Tensor:
    """Decode any image mode to RGB and resize: uint8 (3, H, W) for size (H, W). Raises InputError
    that names the file when it cannot be decoded."""
    content = b""
    try:
        if not Path(path).is_fifo():  # a pipe would wait for ever
            content = Path(path).read_bytes()
        image = decode(content)
        image = image.resize((size[1], size[0]), interpolation)  # Pillow: (W, H)
    except Exception as error:  # broken bytes make decoders raise anything at all
        if isinstance(error, (OSError, MemoryError)) and hint(error):
            raise  # no fault of the image's
        reason = getattr(error, "strerror", None) or str(error) or repr(error)
        if isinstance(error, UnidentifiedImageError):
            reason = f"{len(content)} bytes that are none"
        raise InputError(f"{path}: cannot be read as an image ({reason})") from None
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def decode(content: bytes) -> Image.Image:
    """The image in a file's bytes, upright, in RGB."""
    with Image.open(io.BytesIO(content), formats=tuple(SUFFIXES.values())) as image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are too many, at most "
                             f"{MOST_PIXELS:,}")
        if image.mode[0] in "IF":
            image = eight_bits(image)
        ImageOps.exif_transpose(image, in_place=True)  # phones store photos on their side
        return image.convert("RGB")


def eight_bits(image: Image.Image) -> Image.Image:
    """Grey levels as numbers of 16 or 32 bits, to 0 .. 255; Pillow would cut them off at 255. A
    range that could be either of two (12 bits in 16, or a dark image) raises ValueError."""
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    integers = image.mode[0] == "I"
    if low >= 0 and high <= 1 and not integers:
        values = 255 * values
    elif low >= 0 and integers and 2 ** 15 <= high < 2 ** 16:
        values = values / 257
    elif not (low >= 0 and high <= 255):
        raise ValueError(f"its grey levels go from {low:g} to {high:g}, which is no known range; "
                         f"save it with 8 bits a channel")
    return Image.fromarray(values.round().astype(np.uint8))


def list_images(folder: Path) -> list[str]:
    """All images below a folder, sorted by name, so that no file system decides the order."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    found = []
    not_read = []
    seen = set()

    def fail(error: OSError):  # os.walk would pass over what it may not read
        raise InputError(f"{error.filename}: cannot be listed ({error.strerror})")

    for here, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # links may go round
            folders.clear()
            continue
        seen.add(real)
        # hidden folders hold copies (.ipynb_checkpoints, .thumbnails, @eaDir)
        folders[:] = sorted(name for name in folders if name[0] not in ".@")
        for name in sorted(files):
            suffix = os.path.splitext(name)[1].lower()
            # Market's folders also hold Thumbs.db, those that macOS has touched ._name.jpg
            if name.startswith("."):
                continue
            if suffix in SUFFIXES:
                found.append(os.path.join(here, name))
            elif suffix in NOT_READ:
                not_read.append(name)
    if not_read:
        print(f"WARNING: {len(not_read)} files below {folder} look like images, but cannot be "
              f"read here, first {not_read[0]}: convert them to JPEG")
    return found


# ---------------------------------------------------------------------------------------------
# Lists of millions
# ---------------------------------------------------------------------------------------------


class PathList(Sequence):
    """A text file of relative paths, one a line, as a sequence of paths below `root`.

    4.2 M paths as Python strings are half a gigabyte, and in each worker again, as counting
    references writes to them; in one array each takes as much as the longest, and all are shared.
    Raises InputError for an empty file and for a path that leaves the data folder.
    """

    def __init__(self, file: Path, root: Path):
        self.root = root
        content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")  # Windows' mark
        lines = [line.rstrip() for line in content.splitlines()]
        self.names = np.array([line for line in lines if line])
        if not len(self.names) or b"\0" in content:
            raise InputError(f"{file}: empty, or not a text file of paths, one per line, in UTF-8")
        suspects = np.char.startswith(self.names, b"/") | (np.char.find(self.names, b"..") >= 0)
        for i in np.flatnonzero(suspects):
            check_inside(os.fsdecode(self.names[i]), file)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[i]))


def check_inside(path: str, source: Path) -> None:
    """Paths in a list stay below the data folder: a stranger's list could else name any file."""
    if os.path.isabs(path) or ".." in Path(path).parts:
        raise InputError(f"{source}: {path!r} leaves the data folder; list paths relative to it")
