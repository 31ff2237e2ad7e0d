"""Kill each of the three trainings at random moments, start it again, and compare with one left alone.

    make stress                  20 kills of each; now and then the last checkpoint is cut short as well
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import torch  # noqa: E402  (found through the line above)
from conftest import log_lines, market_tree  # noqa: E402

import train  # noqa: E402

COMMON = ["--size", "64x32", "--epochs", "4", "--save-every", "1", "--drop-path", "0.2"]
RUNS = {"fine-tuning": ["--arch", "vit_mini", "--ids", "4", "--images", "2", *COMMON],
        "PersonViT": ["--pretrain", "personvit", "--arch", "vit_mini", "--batch", "4", "--prototypes", "16", "--hidden", "16",
                      "--bottleneck", "8", "--local-crops", "2", "--keep-every", "2", *COMMON],
        "UP-ReID": ["--pretrain", "upreid", "--arch", "resnet_tiny", "--batch", "4", "--queue", "10", "--groups", "2",
                    "--keep-every", "2", *COMMON[:-2]]}
SERVER = multiprocessing.get_context("forkserver")  # children of a process that has imported, and done, nothing else
SERVER.set_forkserver_preload(["train", "conftest"])


def run(kind: str, data: str, out: str, workers: int, log: str) -> None:
    """In a process of its own: train until done or killed."""
    multiprocessing.set_start_method("fork", force=True)  # of the workers, as in a training
    with open(log, "a", buffering=1) as handle, contextlib.redirect_stdout(handle), contextlib.redirect_stderr(handle):
        train.main(["--dataset", data, "--out", out, "--workers", str(workers), "--device", "cpu",
                    "--threads", "1", *RUNS[kind]])


def start(kind: str, folder: Path, name: str, workers: int):
    args = kind, str(folder / "market1501"), str(folder / name), workers, str(folder / f"{name}.txt")
    process = SERVER.Process(target=run, args=args)
    process.start()
    return process


def last_step(folder: Path) -> int:
    return max((int(path.stem.split("_")[1]) for path in folder.glob("checkpoint_*.pth")), default=0)


def let_run(process, folder: Path, rng: random.Random) -> None:
    """For 0 to 3 more steps and a part of the next, be it computing, logging or saving; or before the first of them."""
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
                assert torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key], (name, key)
        elif name == "results.json":
            a, b = (json.loads((folder / name).read_text()) | {"minutes": 0} for folder in (one, two))
            assert a == b


def flat(state: dict, prefix: str = "") -> dict:
    """Nested dictionaries as one."""
    found = {}
    for key, value in state.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def kill_often(kind: str, folder: Path, kills: int, seed: int = 0) -> str:
    """Kill `kills` times, over as many runs as that takes; what happened, in words. AssertionError if a run that was
    killed differs from the one left alone."""
    rng, begin = random.Random(seed), time.monotonic()
    market_tree(folder / "market1501", ids=5, images=4)
    whole = start(kind, folder, "whole", 0)
    whole.join()
    assert whole.exitcode == 0, (folder / "whole.txt").read_text()
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
                assert process.exitcode == 0, (folder / "cut.txt").read_text()[-2000:]
        same(folder / "whole", folder / "cut")
    resumed = (folder / "cut.txt").read_text().count("going on at step")
    return (f"{kind}: {done} kills in {runs} runs, {resumed} times gone on from a checkpoint, {cut} of them cut short; "
            f"all equal to the run left alone; {time.monotonic() - begin:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
