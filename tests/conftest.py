"""What the tests share: warnings that count as errors, tiny fabricated datasets, the golden files."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from augment import per_channel  # noqa: E402  (found through the line above)
from data import load_dataset  # noqa: E402


def pytest_configure(config):
    for category in ("DeprecationWarning", "FutureWarning"):
        config.addinivalue_line("filterwarnings", f"error::{category}")
    # Python 3.12 warns of every fork of a process with threads; PyTorch's data loader forks
    config.addinivalue_line("filterwarnings", "ignore:.*multi-threaded, use of fork:DeprecationWarning")


class Golden:
    """Arrays of a recorded file as tensors: Golden("name")["key"]."""

    def __init__(self, name: str):
        self.file = np.load(Path(__file__).parent / "golden" / f"{name}.npz")

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.as_tensor(self.file[key])

    def state(self, prefix: str) -> dict[str, torch.Tensor]:
        """The state dict whose keys start with `prefix`."""
        return {k.removeprefix(prefix): self[k] for k in self.file if k.startswith(prefix)}


def write_image(path: Path, seed: int = 0, size=(16, 8)) -> Path:
    """A small noise image, H x W, in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def market_tree(root: Path, ids: int = 4, images: int = 4, suffix=".jpg", name="{:04d}_c{}s1_{:06d}_00") -> Path:
    """A Market-1501 style tree: train ids 2, 4, ... and test ids 1, 3, ..., two cameras."""
    for split, first in (("bounding_box_train", 2), ("query", 1), ("bounding_box_test", 1)):
        for i in range(ids):
            for k in range(1 if split == "query" else images):
                pid, camera = first + 2 * i, 1 + k % 2
                frame = 1000 * len(split) + 10 * i + k
                write_image(root / split / (name.format(pid, camera, frame) + suffix), frame)
    return root


@pytest.fixture
def market(tmp_path) -> Path:
    return market_tree(tmp_path / "market1501")


@pytest.fixture
def dataset(market):
    return load_dataset("market1501", market)


def log_lines(folder: Path) -> list[dict]:
    """The log of a run without what a clock measured."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("img_s", "wait", "left")} for line in lines]


def command(*args, processes=None, script=ROOT / "train.py", **kwargs):
    """train.py with these arguments, in one process or as torchrun starts it in several."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--"] if processes else []
    return subprocess.run([sys.executable, *launcher, script, *map(str, args)], capture_output=True, text=True, **kwargs)


DOUBLE = ROOT / "tests" / "double.py"  # a script for `command`


@pytest.fixture
def doubles(monkeypatch):
    """Doubles for floats, in this process, while a test runs."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    per_channel.cache_clear()
    yield
    torch.set_default_dtype(torch.float32)
    per_channel.cache_clear()


def start_command(*args):
    args = "--threads", "1", *map(str, args)  # a network this small only waits for its second thread
    return subprocess.Popen([sys.executable, ROOT / "train.py", *args], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True)
