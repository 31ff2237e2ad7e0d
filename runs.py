"""One training run, whatever is trained: recipe, run folder, processes, loop, log.

A run lives in its folder under runs/: recipe.json, log.jsonl, checkpoint_<step>.pth, and at the end
its weights. The same command goes on where the folder stopped: all random draws of a step depend on
(seed, step) alone, so a resumed run is the uninterrupted one. Under torchrun several processes
share each batch and average their gradients; the first alone writes. Read `loop`, then `Run`.

Exercises (answers: README). 1. Kill a run (kill -9) and start it again: in which fields does its
log.jsonl differ from that of a run left alone? 2. Fine-tune in two processes (make finetune GPUS=2
FLAGS="--epochs 8 --seed 0", on a CPU too), with and without the call of `average_gradients` in
train.py: does the log show what went wrong, does the mAP?
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import signal
import sys
import time
import zipfile
import zlib
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from augment import step_generator
from data import Images, InputError, closest, cores, write_atomic
from evaluate import quiet_worker
from personvit import gathered_mean
from upreid import gathered, part_of, world_size
from weights import read_checkpoint

# ---------------------------------------------------------------------------------------------
# Recipes: hyper-parameters with their limits
# ---------------------------------------------------------------------------------------------

def option(default, help: str, low: float = -math.inf, high: float = math.inf, choices=None):
    """A recipe's field: a default, what it is, the values it may have. It becomes a flag."""
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high,
                                                        "choices": choices})


def check_recipe(recipe) -> None:
    """Raise InputError, naming the flag, for a value that a field's `option` does not allow."""
    for field in dataclasses.fields(recipe):
        flag, value = "--" + field.name.replace("_", "-"), getattr(recipe, field.name)
        low, high, choices = (field.metadata[key] for key in ("low", "high", "choices"))
        if choices and value not in choices:
            names = [str(c) for c in choices]
            raise InputError(f"{flag} {value}: did you mean {closest(str(value), names)}?")
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(v, (int, float)) and not low <= v <= high for v in numbers):
            raise InputError(f"{flag} {value}: must lie between {low:g} and {high:g}")


def cosine(t: float, start: float, end: float) -> float:
    """From start at t = 0 to end at t = 1 along half a cosine wave; constant outside.

    >>> cosine(0, 1.0, 0.0), cosine(0.5, 1.0, 0.0), cosine(2, 1.0, 0.0)
    (1.0, 0.5, 0.0)
    """
    return end + (start - end) * (1 + math.cos(math.pi * min(max(t, 0), 1))) / 2


# ---------------------------------------------------------------------------------------------
# The run folder
# ---------------------------------------------------------------------------------------------

CHECKPOINT = "checkpoint_" + 9 * "[0-9]" + ".pth"  # the number of steps done
RUN_FILES = ("recipe.json", "log.jsonl", CHECKPOINT, "model.pth", "backbone.pth",
             "backbone_e[0-9][0-9][0-9][0-9].pth", "results.json")


class Run:
    """A folder that holds one run. Opening makes the folder and only looks; `begin` writes, once
    all is in order.

    Raises InputError for a folder that cannot be written, that holds another recipe, or files that
    are no run's, unless `overwrite` allows to start over. Of several processes the first writes.
    """

    def __init__(self, folder: str | Path, recipe: dict, overwrite: bool = False, rank: int = 0,
                 circumstances: dict | None = None):
        self.folder, self.overwrite, self.seconds = Path(folder), overwrite, 0.0
        self.writes, self.circumstances = rank == 0, circumstances or {}
        self.recipe = json.loads(json.dumps(recipe))  # tuples become lists, as when read back
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder}: cannot be used for the results ({error.strerror}); "
                             f"choose another folder with --out") from None
        if not os.access(self.folder, os.W_OK):
            raise InputError(f"{folder}: is read-only; choose another folder with --out")
        present = [path.name for path in self.files()]
        if "recipe.json" in present and not overwrite:
            self.compare()
        elif present and not overwrite:
            raise InputError(f"{folder} holds {', '.join(present)} of something else; choose "
                             f"another folder with --out, or --overwrite to delete them")

    def files(self, suffix: str = "") -> list[Path]:
        """What a run may have left here, and --overwrite deletes."""
        return [p for pattern in RUN_FILES for p in sorted(self.folder.glob(pattern + suffix))]

    def checkpoints(self) -> list[Path]:
        """The latest first."""
        return sorted(self.folder.glob(CHECKPOINT), reverse=True)

    def compare(self) -> None:
        try:
            old = json.loads((self.folder / "recipe.json").read_text())
            changed = [f"{k}: {old.get(k)} there, {self.recipe.get(k)} now"
                       for k in sorted({*old, *self.recipe}) if old.get(k) != self.recipe.get(k)]
        except (ValueError, AttributeError, OSError, RecursionError):
            changed = ["its recipe.json is damaged"]
        if changed:
            raise InputError(f"{self.folder} holds a run with another recipe "
                             f"({'; '.join(changed)}); choose another folder with --out, or start "
                             f"over with --overwrite")

    def results(self) -> dict | None:
        """What a finished run has measured; None before it has, or if --overwrite forgets it."""
        try:
            found = json.loads((self.folder / "results.json").read_text())
            whole = min(found[key] for key in ("mAP", "rank1", "rank5", "rank10")) >= 0
            return found if whole and not self.overwrite else None
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None  # a damaged file is made anew

    @contextlib.contextmanager
    def begin(self):
        """Hold the folder for this run; delete what `overwrite` allows, write recipe.json."""
        wait_for_all()  # everyone has looked at the folder before the first process changes it
        if not self.writes:
            wait_for_all()
            yield
            return
        with open(self.folder / "lock", "a") as handle:
            if not locked(handle):
                raise InputError(f"another process is training in {self.folder}; wait for it, or "
                                 f"choose another folder with --out")
            if not self.overwrite and (self.folder / "recipe.json").exists():
                self.compare()  # another process may have trained here while this one waited
            # with --overwrite everything; else the half-written files of a process that was killed
            for path in self.files("" if self.overwrite else ".*.partial"):
                path.unlink()
            self.overwrite = False
            self.write("recipe.json", json.dumps(self.recipe, indent=1).encode())
            wait_for_all()  # the others may read the folder now
            yield

    def write(self, name: str, content: bytes) -> None:
        if self.writes:
            write_atomic(self.folder / name, lambda handle: handle.write(content))

    def save(self, name: str, content: dict) -> None:
        if self.writes:
            write_atomic(self.folder / name, lambda handle: torch.save(content, handle))

    def save_checkpoint(self, step: int, content: dict, keep: int) -> None:
        """Write the state after `step` steps; of those before it, the latest keep - 1 stay."""
        new = self.folder / f"checkpoint_{step:09d}.pth"
        self.save(new.name, {"format": "reid-checkpoint", "step": step, **content,
                             "circumstances": self.circumstances})
        if self.writes:
            earlier = [path for path in self.checkpoints() if path < new]
            later = [path for path in self.checkpoints() if path > new]  # damaged
            for path in earlier[keep - 1:] + later:
                path.unlink()

    def restore(self, parts: dict) -> tuple[int, set[int]]:
        """Fill parts from the last checkpoint that is whole; (steps done, broken images seen)."""
        found = self.checkpoints()
        for path in found:
            try:
                # PyTorch checks no checksum, and overlooks some flipped bits of the file's table
                with zipfile.ZipFile(path) as content:
                    if content.testzip() or any(entry.external_attr or entry.compress_type
                                                for entry in content.infolist()):
                        raise InputError("a checksum does not match")
                state = read_checkpoint(path)
                for name, part in parts.items():
                    part.load_state_dict(state[name])
                self.cut_log(state["log_size"])
                self.seconds = float(state["seconds"])  # of training, over all starts
                step, bad = int(state["step"]), set(state["bad"])
                print(f"going on at step {step:,} from {path}", flush=True)
                for name, before in state.get("circumstances", {}).items():
                    if before != self.circumstances.get(name, before):
                        print(f"WARNING: {name}: {before} before, {self.circumstances[name]} now; "
                              f"the run goes on, but not to the last bit as it would have")
                return step, bad
            except (InputError, zipfile.BadZipFile, zlib.error, OSError, EOFError, LookupError,
                    TypeError, ValueError, RuntimeError, AttributeError) as error:
                print(f"WARNING: {path} is damaged ({str(error)[:150]})", flush=True)
        if found:
            raise InputError(f"{self.folder}: no checkpoint is whole; delete them to start from "
                             f"the first step")
        self.cut_log(0)
        return 0, set()

    def log(self, **values) -> None:
        """One JSON object per line, to the screen and to log.jsonl."""
        if not self.writes:
            return
        line = json.dumps({k: float(f"{v:.5g}") if isinstance(v, float) else v
                           for k, v in values.items()})
        print(line, flush=True)
        with open(self.folder / "log.jsonl", "a") as handle:
            handle.write(line + "\n")
            handle.flush()
            os.fsync(handle.fileno())  # a checkpoint must not outlive the lines before it

    def log_size(self) -> int:
        path = self.folder / "log.jsonl"
        return path.stat().st_size if path.exists() else 0

    def cut_log(self, size: int) -> None:
        """Forget lines written after the checkpoint: those steps are about to be run again."""
        if self.writes and self.log_size() > size:
            os.truncate(self.folder / "log.jsonl", size)


def locked(handle, patience: float = 8.0) -> bool:
    """Lock an open file for this process. Data workers of a process that was just killed hold its
    lock until they notice, which takes them 5 seconds."""
    if not fcntl:  # Windows
        return True
    last = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > last:
                return False
            time.sleep(0.2)
        except OSError as error:
            print(f"WARNING: this file system has no locks ({error.strerror}): see to it yourself "
                  f"that no other process trains in the same folder")
            return True


@contextlib.contextmanager
def stop_requests():
    """Ctrl-C or SIGTERM asks the loop to stop between two steps; a second Ctrl-C kills at once."""
    asked: list[int] = []

    def handler(number, _):
        if not asked and os.environ.get("RANK", "0") == "0":  # print may not be called from here
            os.write(2, b"stopping after this step; Ctrl-C (again) stops at once\n")
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    old = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for s, previous in old.items():
            signal.signal(s, previous)


# ---------------------------------------------------------------------------------------------
# The machine, and the processes that share the work
# ---------------------------------------------------------------------------------------------


@dataclass
class Machine:
    """Where and how a run computes. On one kind of device nothing here changes its result beyond
    rounding, with these exceptions:

        several processes or passes    stochastic depth draws otherwise; the log's diagnostics are
                                       means over the parts of a batch
        several processes              a pre-training saves the first one's running statistics
        several passes                 UP-ReID's keys share batch statistics with other images
    """

    device: str = "cpu"
    workers: int = 2          # decoding processes
    save_every: int = 500     # steps between checkpoints
    checkpoints: int = 2      # of which so many are kept
    log_every: int = 20       # steps between log lines
    accumulate: int = 1       # passes that a step of pre-training is split into, for less memory
    compile: bool = False     # fuse the ViT blocks' small operations with torch.compile
    rank: int = 0             # this process among
    world: int = 1            # ... the processes that share each batch


def default_threads() -> int:
    """Threads of a process for sums on a CPU: its cores, at most 8. Never left to OMP_NUM_THREADS:
    each number of threads rounds sums in its own way."""
    return min(cores(), 8)


@contextlib.contextmanager
def processes(machine: Machine):
    """The machine with rank and world as torchrun sets them; plain `python` is a world of one."""
    if "WORLD_SIZE" not in os.environ:
        yield machine
        return
    try:
        rank, world, local = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except (KeyError, ValueError) as error:
        raise InputError(f"WORLD_SIZE is set, but the rest of torchrun's variables is not ({error})"
                         f"; start with torchrun, or unset WORLD_SIZE") from None
    device, backend = machine.device, "gloo"
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise InputError(f"process {local} of this machine has no GPU of its own, there are "
                             f"{torch.cuda.device_count()}; start fewer processes")
        device, backend = f"cuda:{local}", "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    # an hour: the others wait while the first evaluates
    dist.init_process_group(backend, timeout=timedelta(hours=1))
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(
                nowhere if rank else sys.stdout):
            yield replace(machine, device=device, rank=rank, world=world)
        wait_for_all()  # none hangs up on another that still speaks
    except RuntimeError as error:
        if "onnection" not in str(error):  # gloo: Connection closed by peer, Connection reset
            raise
        sys.exit(f"process {rank}: another process has ended, see its message if it had time for "
                 f"one; the same command, without --overwrite, goes on from the last checkpoint")
    finally:
        dist.destroy_process_group()


def wait_for_all() -> None:
    if world_size() > 1:
        dist.barrier()


def first_then_others(rank: int, action):
    """The result of action(), run by the first process before the others (it may write files)."""
    if rank:
        wait_for_all()
    result = action()
    if not rank:
        wait_for_all()
    return result


def anyone(flag: bool) -> bool:
    """Does any process say so? They must stop after the same step."""
    if world_size() == 1:
        return flag
    flags = torch.tensor(int(flag))  # on the CPU: a GPU is not kept waiting
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def everyones(mine) -> list:
    """The same thing of each process, in their order."""
    parts = [mine]
    if world_size() > 1:
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
    return parts


def check_agreement(mine: dict) -> None:
    """Raise InputError, naming what differs, unless all processes were told the same."""
    first, *others = everyones(mine)
    differ = [f"{k}: {first.get(k)} and {other[k]}" for other in others for k in other
              if other[k] != first.get(k)]
    if differ:
        raise InputError(f"the processes were started differently ({differ[0]}); on every machine "
                         f"the command and the dataset must be the same")


def average_gradients(parameters) -> None:
    """Mean of every gradient over all processes: the gradient of the whole batch's mean loss.

    One message after the backward pass. DistributedDataParallel would send while it still runs, at
    the price of a wrapper around the model; ViT-S with its head has 29 million numbers to send.
    """
    if world_size() > 1:
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = flat.split([g.numel() for g in grads])
        torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads)])


class AllRows(torch.autograd.Function):
    """`all_rows`; backward keeps this process's rows, times the number of processes."""

    @staticmethod
    def forward(_, x: Tensor) -> Tensor:
        return gathered(x)

    @staticmethod
    def backward(_, grad: Tensor) -> Tensor:
        return part_of(grad) * world_size()


def all_rows(x: Tensor) -> Tensor:
    """Rows of all processes, (B, ...) -> (n, ...), for a loss that each computes of all of them.

    Each process computes the whole loss, but back-propagates through its own rows alone: gradients
    of weights must be summed over processes. `average_gradients` takes their mean; multiplying
    here makes it the sum.
    """
    return AllRows.apply(x) if world_size() > 1 else x


class MeanOverAll(torch.autograd.Function):
    """Mean over all processes. Backward takes the mean of the gradients too, as the losses of all
    processes depend on the result."""

    @staticmethod
    def forward(_, x: Tensor) -> Tensor:
        return gathered_mean(x.clone())

    @staticmethod
    def backward(_, grad: Tensor) -> Tensor:
        return gathered_mean(grad.clone())


class SharedBatchNorm(torch.nn.BatchNorm2d):
    """Batch norm (B, C, H, W) by the statistics of all processes' images, as if one had them all.

    torch.nn.SyncBatchNorm does the same on GPUs alone, faster; this one is also tested.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and world_size() > 1):
            return super().forward(x)
        dims, x32 = (0, 2, 3), x.to(torch.promote_types(x.dtype, torch.float32))
        mean = MeanOverAll.apply(x32.mean(dims, keepdim=True))               # (1, C, 1, 1)
        var = MeanOverAll.apply((x32 - mean).square().mean(dims, keepdim=True))
        with torch.no_grad():
            n = x[:, 0].numel() * world_size()
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(var.flatten() * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight[:, None, None] * (var + self.eps).rsqrt()        # (1, C, 1, 1)
        return (x32 * scale + (self.bias[:, None, None] - mean * scale)).to(x.dtype)


def share_batch_norms(net: torch.nn.Module) -> None:
    """Let several processes normalise as one; parameters and names stay."""
    for module in net.modules():
        if world_size() > 1 and isinstance(module, torch.nn.BatchNorm2d):
            module.__class__ = SharedBatchNorm


# ---------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------


def batches(images: Images, sampler, first_step: int, epochs: int, workers: int):
    """uint8 batches (images, asked, used) from a global step to the end of the last epoch."""
    def indices():
        for epoch in range(first_step // len(sampler), epochs):
            sampler.set_epoch(epoch)
            skip = max(first_step - epoch * len(sampler), 0)
            yield from itertools.islice(sampler, skip, None)

    # one loader for all epochs: workers live as long as the run, none starts over at an epoch's end
    return torch.utils.data.DataLoader(images, batch_sampler=indices(), num_workers=workers,
                                       collate_fn=keep, worker_init_fn=quiet_worker,
                                       pin_memory=torch.cuda.is_available())


def keep(batch):
    return batch


def loop(run: Run, images: Images, sampler, recipe, parts: dict, take_step, machine: Machine,
         after_epoch=None, collapsed=None, finish=None) -> None:
    """Run take_step over all batches of all epochs, logging, saving, going on from a checkpoint.

    take_step(step, x, used) -> scalars to log; x is the uint8 batch, used the indices of its
    images. parts: whatever has a state_dict and belongs into the checkpoint. after_epoch(epoch), 0
    before the first. collapsed(values) -> bool judges each log line. finish() makes what the run
    is for, while its folder is still locked. Raises InputError for too many broken images;
    take_step does for a loss that is not finite (`check_finite`).
    """
    last, meter = recipe.epochs * len(sampler), Meter()
    parts = {**parts, "meter": meter}
    with run.begin(), stop_requests() as stop:
        (first, bad), start = run.restore(parts), time.perf_counter()
        if len(set(everyones(first))) > 1:
            raise InputError(f"{run.folder}: not all processes see the same checkpoints; several "
                             f"machines need a folder on a file system that they share")
        loader = batches(images, sampler, first, recipe.epochs, machine.workers)
        if after_epoch and not first:
            after_epoch(0)
        meter.start_clock()
        for step, (x, asked, used) in enumerate(meter.waiting(loader), first):
            bad.update(asked[asked != used].tolist())
            check_broken(bad, images.records)
            x = x.to(machine.device, non_blocking=True)
            # stochastic depth draws from the global generator; a key of its own, as equal keys
            # would tie it to the augmentation's draws
            torch.manual_seed(step_generator(recipe.seed, step, 3, machine.rank).initial_seed())
            meter.add(len(x) * machine.world, **take_step(step, x, used))
            done = step + 1
            logs, saves = (done % n == 0 or done == last for n in (machine.log_every,
                                                                   machine.save_every))
            stopping = anyone(bool(stop))
            if logs or saves or stopping or machine.device == "cpu":  # on a GPU, looking costs time
                check_finite(meter.sums["total"] + meter.sums.get("grad_norm", 0), step, run)
            if logs or saves or stopping:
                bad = set().union(*everyones(bad))
                check_broken(bad, images.records)
            if logs:
                values = meter.read(last - done)
                flag = {"warning": "COLLAPSE?"} if collapsed and collapsed(values) else {}
                run.log(epoch=step // len(sampler) + 1, step=done, steps=last, **values,
                        broken_images=len(bad), **flag)
            if after_epoch and done % len(sampler) == 0:
                with meter.paused():
                    after_epoch(done // len(sampler))
            if saves or stopping:
                run.seconds, start = run.seconds + time.perf_counter() - start, time.perf_counter()
                run.save_checkpoint(done, {"bad": sorted(bad), "log_size": run.log_size(),
                                           "seconds": run.seconds,
                                           **{n: p.state_dict() for n, p in parts.items()}},
                                    machine.checkpoints)
            if stopping:
                stopped(machine, f"after step {done:,} of {last:,}; {run.checkpoints()[0]} has it")
        try:
            for number in (signal.SIGINT, signal.SIGTERM):  # all is saved: no stop need wait now
                signal.signal(number, signal.default_int_handler)
            if anyone(bool(stop)):  # all processes or none: they evaluate together
                raise KeyboardInterrupt
            if finish:
                finish()
        except KeyboardInterrupt:
            stopped(machine, f"after the last step of {run.folder}")


def stopped(machine: Machine, where: str) -> None:
    sys.exit(1 if machine.rank else f"stopped {where}; the same command, without --overwrite, goes "
             f"on from there")


def check_finite(value: Tensor | float, step: int, run: Run) -> None:
    """Stop a run whose loss or gradient is NaN or infinite, its weights being as they were."""
    if not math.isfinite(value):
        saved = run.checkpoints()
        last = f"the last good state is in {saved[0]}" if saved else "nothing was saved yet"
        raise InputError(f"the loss or its gradient is {float(value)} at step {step}; {last}; "
                         f"start anew with a lower --lr or --no-bf16, and another --out")


def check_broken(bad: set[int], records) -> None:
    if len(bad) > 0.01 * len(records):
        names = ", ".join(records[i].path for i in sorted(bad)[:3])
        raise InputError(f"{len(bad)} of {len(records)} training images cannot be read, more than "
                         f"1 %: {names}; the copy of the dataset is damaged")


class Meter:
    """Means between two log lines, images per second, and the share of time spent waiting.

    The sums belong into the checkpoint, so that a line which spans a stop equals the uninterrupted
    run's. What a clock measures begins anew.
    """

    def __init__(self):
        self.sums, self.steps = {}, 0
        self.start_clock()

    def start_clock(self) -> None:
        self.timed, self.images, self.waited, self.since = 0, 0, 0.0, time.perf_counter()

    def state_dict(self) -> dict:
        return {"sums": dict(self.sums), "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.sums, self.steps = dict(state["sums"]), int(state["steps"])

    @contextlib.contextmanager
    def paused(self):
        """Leave out of img_s, wait and left what is no training."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def waiting(self, loader):
        """Pass batches through, counting the time the loop stands still for each."""
        iterator, end = iter(loader), object()
        while True:
            start = time.perf_counter()
            batch = next(iterator, end)
            self.waited += time.perf_counter() - start
            if batch is end:
                return
            yield batch

    def add(self, images: int, **values: Tensor | float) -> None:
        for name, value in values.items():  # summed on the device: reading would wait for the GPU
            value = value.detach() if isinstance(value, Tensor) else value
            self.sums[name] = self.sums.get(name, 0) + value
        self.steps, self.timed, self.images = self.steps + 1, self.timed + 1, self.images + images

    def read(self, steps_left: int) -> dict[str, float | str]:
        values = {name: float(total) / self.steps for name, total in self.sums.items()}
        seconds = time.perf_counter() - self.since
        left = seconds / self.timed * steps_left
        values |= {"img_s": round(self.images / seconds, 1),
                   "wait": round(self.waited / seconds, 3),
                   "left": f"{int(left // 3600)}:{int(left % 3600 // 60):02d}:{int(left % 60):02d}"}
        self.sums, self.steps = {}, 0
        self.start_clock()
        return values


def open_run(out, recipe, dataset, overwrite: bool, machine: Machine, **more) -> Run:
    """The run folder for a recipe and the data it is about to see; prints both."""
    check_recipe(recipe)
    if more.get("weights") and os.path.isfile(more["weights"]):  # else `load_weights` will say so
        content = Path(more["weights"]).read_bytes()
        more["weights"] = (f"{Path(more['weights']).name} "
                           f"{hashlib.blake2b(content, digest_size=6).hexdigest()}")
    described = dataclasses.asdict(recipe) | {"dataset": dataset.name, **more,
                                              "data": dataset.fingerprint()}
    check_agreement(described | {"--accum": machine.accumulate, "--save-every": machine.save_every})
    circumstances = {"torch": str(torch.__version__), "device": machine.device.split(":")[0],
                     "processes": machine.world, "--accum": machine.accumulate,
                     "threads": torch.get_num_threads()}
    run = Run(out, described, overwrite, machine.rank, circumstances)
    for start, what in ((f"run {run.folder}:", described), (" ", circumstances)):
        print(start, *(f"{k}={v}" for k, v in what.items()))
    if 0 < recipe.epochs <= getattr(recipe, "warmup", 0):
        print(f"WARNING: warm-up takes all {recipe.epochs} epochs; --warmup shortens it")
    return run
