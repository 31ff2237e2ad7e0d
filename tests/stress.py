"""Kill each of the three trainings at random moments, go on, and compare with one left alone.

    make stress             20 kills of each; now and then the last checkpoint is cut short as well
"""

import argparse
import atexit
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402  (it is found through the line above)

COMMON = ["--size", "64x32", "--epochs", "4", "--save-every", "1", "--drop-path", "0.2"]
RUNS = {"fine-tuning": ["--arch", "vit_mini", "--ids", "4", "--images", "2", *COMMON],
        "PersonViT": ["--pretrain", "personvit", "--arch", "vit_mini", "--batch", "4",
                      "--prototypes", "16", "--hidden", "16", "--bottleneck", "8",
                      "--local-crops", "2", "--keep-every", "2", *COMMON],
        "UP-ReID": ["--pretrain", "upreid", "--arch", "resnet_tiny", "--batch", "4", "--queue",
                    "10", "--groups", "2", "--keep-every", "2", *COMMON[:-2]]}
# ---------------------------------------------------------------------------------------------
# What the tests need too
# ---------------------------------------------------------------------------------------------


def write_image(path: Path, seed: int = 0, size=(16, 8)) -> Path:
    """A small noise image, H x W, in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def market_tree(root: Path, ids: int = 4, images: int = 4, suffix=".jpg",
                name="{:04d}_c{}s1_{:06d}_00") -> Path:
    """A Market-1501 style tree: train ids 2, 4, ... and test ids 1, 3, ..., two cameras."""
    for split, first in (("bounding_box_train", 2), ("query", 1), ("bounding_box_test", 1)):
        for i in range(ids):
            for k in range(1 if split == "query" else images):
                pid, camera = first + 2 * i, 1 + k % 2
                frame = 1000 * len(split) + 10 * i + k
                write_image(root / split / (name.format(pid, camera, frame) + suffix), frame)
    return root


def log_lines(folder: Path) -> list[dict]:
    """The log of a run without what a clock measured."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if k not in ("img_s", "wait", "left")} for x in lines]


# Scripts start as children of a process that has imported what takes long (optimisers import
# torch._dynamo), and has done nothing else: in 0.1 seconds, where a new process takes 4.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train", "torch._dynamo"])


def start_script(script: str, args: list[str], environment: dict, files: Path):
    """A process that runs `python script args`, or `python -m script args` for a module's name; it
    prints into the files <files>.out and <files>.err."""
    process = SERVER.Process(target=run_script, args=(script, args, environment, str(files)))
    process.start()
    return process


def end_with(parent: int) -> None:
    """Leave nothing behind when the process that started this one is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def run_script(script: str, args: list[str], environment: dict, files: str) -> None:
    os.setsid()  # a group of its own, as a shell gives it: signals to it leave others alone
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{files}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [script, *args]
    try:
        (runpy.run_path if script.endswith(".py") else runpy.run_module)(script,
                                                                         run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # as at the end of an interpreter, which a child skips


# ---------------------------------------------------------------------------------------------
# Killing
# ---------------------------------------------------------------------------------------------


def start(kind: str, folder: Path, name: str, workers: int):
    flags = ["--dataset", str(folder / "market1501"), "--out", str(folder / name), "--workers",
             str(workers), "--device", "cpu", "--threads", "1", *RUNS[kind]]
    return start_script(train.__file__, flags, dict(os.environ), folder / name)


def last_step(folder: Path) -> int:
    return max((int(path.stem.split("_")[1]) for path in folder.glob("checkpoint_*.pth")),
               default=0)


def let_run(process, folder: Path, rng: random.Random) -> None:
    """For 0 to 3 more steps and a part of the next, be it computing, logging or saving; or before
    the first of them."""
    goal = last_step(folder) + rng.randrange(4)
    while process.exitcode is None and last_step(folder) < goal:
        time.sleep(0.005)
    process.join(rng.uniform(0, 0.2 if goal else 3))


def cut_short(folder: Path, rng: random.Random) -> bool:
    """What a power cut may do: the last checkpoint loses its end, if there is one before it."""
    found = sorted(folder.glob("checkpoint_*.pth"))
    if len(found) > 1:
        os.truncate(found[-1], rng.randrange(found[-1].stat().st_size))
    return len(found) > 1


def same(one: Path, two: Path) -> None:
    """Raise AssertionError unless two run folders hold the same, but for what a clock measured."""
    def files(folder: Path) -> list[str]:
        return sorted(p.name for p in folder.iterdir())

    assert files(one) == files(two), (files(one), files(two))
    assert log_lines(one) == log_lines(two)
    for name in files(one):
        if name.startswith(("model", "backbone")):
            assert (one / name).read_bytes() == (two / name).read_bytes(), name
        elif name.startswith("checkpoint"):
            a, b = (flat(torch.load(folder / name, weights_only=True)) for folder in (one, two))
            for key in ("seconds", "log_size"):  # the log names speeds, in more or fewer digits
                a.pop(key), b.pop(key)
            assert a.keys() == b.keys()
            for key, value in a.items():
                equal = torch.equal if isinstance(value, torch.Tensor) else lambda x, y: x == y
                assert equal(value, b[key]), (name, key)
        elif name == "results.json":
            a, b = (json.loads((folder / name).read_text()) for folder in (one, two))
            assert a | {"minutes": 0} == b | {"minutes": 0}


def flat(state: dict, prefix: str = "") -> dict:
    """Nested dictionaries as one."""
    found = {}
    for key, value in state.items():
        inner = isinstance(value, dict)
        found |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found


def kill_often(kind: str, folder: Path, kills: int, seed: int = 0) -> str:
    """Kill `kills` times, over as many runs as that takes; what happened, in words. AssertionError
    if a run that was killed differs from the one left alone."""
    rng, begin = random.Random(seed), time.monotonic()
    market_tree(folder / "market1501", ids=5, images=4)
    whole = start(kind, folder, "whole", 0)
    whole.join()
    assert whole.exitcode == 0, (folder / "whole.err").read_text()
    done, cut, runs = 0, 0, 0
    while done < kills:
        shutil.rmtree(folder / "cut", ignore_errors=True)
        runs, process = runs + 1, None
        while process is None or process.exitcode != 0:
            process = start(kind, folder, "cut", workers=done % 2)
            if done < kills:
                let_run(process, folder / "cut", rng)
            else:
                process.join()
            if process.exitcode is None:
                process.kill()
                process.join()
                done += 1
                cut += rng.random() < 0.25 and cut_short(folder / "cut", rng)
            else:
                assert process.exitcode == 0, (folder / "cut.err").read_text()[-2000:]
        same(folder / "whole", folder / "cut")
    resumed = (folder / "cut.out").read_text().count("going on at step")
    return (f"{kind}: {done} kills in {runs} runs, {resumed} times gone on from a checkpoint, "
            f"{cut} of them cut short; all equal to the run left alone; "
            f"{time.monotonic() - begin:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tests/stress.py",
                                     description="Kill trainings at random moments, go on, "
                                                 "compare with one left alone.")
    parser.add_argument("--kills", type=int, default=20, help="of each training")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    if args.kills < 1:
        parser.error("--kills is at least 1")
    for kind in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            print(kill_often(kind, Path(folder), args.kills, args.seed), flush=True)


if __name__ == "__main__":
    main()
