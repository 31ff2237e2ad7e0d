"""What surrounds a training, so that the loops of train.py can be read: where it runs, the
processes that share it, its meter, its folder.

    Runtime        the device, workers, intervals, this process among others
    stop_requests  Ctrl-C and SIGTERM end a training between two steps
    Meter          running sums on the device, read when a line of the log is due
    Run            the folder: recipe.json, log.jsonl, checkpoint_<step>.pth, weights

Nothing here knows a paper, a loss or a dataset. Of several processes the first alone writes.
"""

import atexit
import contextlib
import hashlib
import json
import math
import os
import signal
import sys
import threading
import time
import warnings
import zipfile
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from extra.files import InputError, hint, write_atomic

# ---------------------------------------------------------------------------------------------
# Where it runs
# ---------------------------------------------------------------------------------------------


@dataclass
class Runtime:
    """Where and how a run computes. On one kind of device nothing here changes its result beyond
    rounding, with the exceptions of docs/choices.md."""

    device: str = "cpu"
    workers: int = 2          # decoding processes
    save_every: int = 500     # steps between checkpoints
    accumulate: int = 1       # micro-batches of a step of pre-training, for less memory
    keep_every: int = 0       # epochs of pre-training between backbones kept apart, 0: none
    monitor_every: int = 10   # ... and between looks at the mAP of --monitor
    backend: str = ""         # of torch.compile; none: operations are launched one by one
    log_every: int = 20       # steps between log lines
    rank: int = 0             # this process among
    world: int = 1            # ... the processes that share each batch


def cores() -> int:
    """Cores of this process: those it may use, shared with torchrun's others here; at least 1."""
    n = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # macOS and Windows do not say which it may use
        n = len(os.sched_getaffinity(0))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return max(n // processes, 1)


def choose_backend(wanted: bool | None, device: str) -> str:
    """The backend of torch.compile. None wanted: on a GPU that can compile a tiny graph, else a
    WARNING with the reason; True: raises InputError where it cannot."""
    if wanted is False or wanted is None and device == "cpu":
        return ""
    reasons = [reason for reason in all_gather_object(why_no_graph(device)) if reason]
    if not reasons:
        return "inductor"
    if wanted:
        raise InputError(f"--compile: no graph can be compiled here ({reasons[0]}); --no-compile")
    print(f"WARNING: no graph can be compiled here ({reasons[0]}): operations are launched one by "
          f"one, as by --no-compile, which is slower", flush=True)
    return ""


def why_no_graph(device: str) -> str:
    """The reason why a tiny graph cannot be compiled: no C compiler, no Python.h, no Triton, an old
    GPU; "" if it can."""
    try:
        x = torch.ones(8, device=device)
        torch.compile(lambda x: x.sin() + 1, backend="inductor")(x)
    except Exception as error:  # compilers fail in ways of their own
        said = str(error).strip() or repr(error)
        return next(line for line in said.splitlines() if line.strip())[:150]
    return ""


def networks(module: nn.Module) -> list[nn.Module]:
    """Its backbones: both of a pre-training, the one of a fine-tuning."""
    return [m for m in module.modules() if hasattr(m, "forward_features")]


def compile_networks(module: nn.Module, runtime: Runtime) -> None:
    """Compile each network of a module in place, one graph for each shape of its input: a GPU would
    else wait for Python to launch operation after operation. Heads and losses stay as they are: how
    many patches are masked differs from step to step."""
    if not runtime.backend:
        return
    for net in networks(module):
        # SyncBatchNorm makes no graph (PyTorch's issue 156680)
        if not any(isinstance(m, nn.SyncBatchNorm) for m in net.modules()):
            net.forward_features = compiled(net.forward_features, runtime)


def compiled(function, runtime: Runtime):
    """The function as a graph, where the runtime compiles."""
    if not runtime.backend:
        return function
    return torch.compile(function, backend=runtime.backend, fullgraph=True, dynamic=False)


def usable_bfloat16(wanted: bool, module: nn.Module, batches, run) -> bool:
    """Is bfloat16 wanted, and right for what the networks will see? machine.json says what is used:
    it does not decide whether a run may go on."""
    bf16 = wanted
    device = next(module.parameters()).device
    if wanted and device.type == "cpu":
        batch = batches[0]
        views = batches.transform(batch["images"], batch["params"])
        if isinstance(views, Tensor):
            views = {"image": views}
        bf16 = bfloat16_is_right(networks(module), list(views.values()))
        module.train()
        if not bf16:
            print("WARNING: bfloat16 is wrong on this processor: for a shape of this run features "
                  "differ from float32's by far more than rounding; going on in float32")
    used = {"torch": torch.__version__, "device": str(device), "bf16": bf16}
    run.save("machine.json", json.dumps(used).encode())
    return bf16


@torch.compiler.set_stance("force_eager")  # each view and precision would be a graph
def bfloat16_is_right(nets: list[nn.Module], views) -> bool:
    """Do networks give the same features in both precisions, up to rounding, for views (..., 3, H,
    W)? Some processors' kernels are wrong where a stride of 2 leaves a map one pixel wide (AMX,
    PyTorch 2.14). Takes no random number and changes no running statistics."""
    for net in nets:
        net.eval()
        for view in views:
            x = view.flatten(0, -4)                                          # (n, 3, H, W)
            exact = net(x).detach()
            with torch.autocast("cpu", torch.bfloat16):
                rough = net(x).detach().float()                              # (n, D)
            error = (rough - exact).norm() / exact.norm()
            if not error < 0.3:  # NaN is not
                return False
    return True


# ---------------------------------------------------------------------------------------------
# Processes that share each batch
# ---------------------------------------------------------------------------------------------


def join_processes(runtime: Runtime) -> Runtime:
    """The runtime with rank and world as torchrun sets them; plain `python` is a world of one. Of
    several processes only the first prints."""
    if "WORLD_SIZE" not in os.environ:
        return runtime
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    given = [os.environ.get(name, "") for name in names]
    if not all(map(str.isdecimal, given)) or not os.environ.get("MASTER_ADDR"):
        raise InputError("WORLD_SIZE is set, but not all of torchrun's variables: unset it")
    rank, world, local, _ = map(int, given)
    device, backend = runtime.device, "gloo"
    if device == "cuda":
        device, backend = f"cuda:{local}", "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    # an hour: the others wait while the first evaluates
    dist.init_process_group(backend, timeout=timedelta(hours=1))
    atexit.register(dist.destroy_process_group)
    if rank:
        sys.stdout = open(os.devnull, "w")
    return replace(runtime, device=device, rank=rank, world=world)


def all_gather_object(mine) -> list:
    """The same thing of each process, in their order."""
    if not dist.is_initialized():
        return [mine]
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return parts


def barrier() -> None:
    """Wait until all processes are here."""
    all_gather_object(None)


def distributed(module: nn.Module, runtime: Runtime) -> nn.Module:
    """The module itself, or one that averages its gradients over all processes."""
    if runtime.world == 1:
        return module
    # PyTorch 2.14 has another name for it, 2.6 only this one
    warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
    # inputs stay where they are (masks on the CPU); buffers stay each process's own
    return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)


@contextlib.contextmanager
def stop_requests():
    """Ctrl-C or SIGTERM asks the loop to stop between two steps; a second Ctrl-C kills at once.
    Yields a list that is empty until then. Threads other than the main one cannot be asked."""
    asked: list[int] = []

    def handler(number, _):
        if not asked and os.environ.get("RANK", "0") == "0":  # print may not be called from here
            os.write(2, b"stopping after this step; Ctrl-C (again) stops at once\n")
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    old = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)


def any_process(stop: list) -> bool:
    """Is one of the processes asked to stop? All learn it after the same step."""
    return any(all_gather_object(bool(stop)))


# ---------------------------------------------------------------------------------------------
# What the log says
# ---------------------------------------------------------------------------------------------


class Meter:
    """Means since the last line of the log, broken images, and what a clock measures. Values stay
    on the device: reading them in every step would keep the GPU waiting."""

    def __init__(self, objective, records, run, runtime: Runtime):
        self.objective = objective
        self.records = records
        self.run = run
        self.world = runtime.world
        self.backend = runtime.backend
        self.broken: set[int] = set()
        self.reset()

    def reset(self) -> None:
        self.values: dict[str, list[Tensor]] = {}
        self.images = 0
        self.waited = 0.0
        self.since = time.perf_counter()

    def timed(self, loader):
        """The batches of a loader, one for each step; counts images, and the time that the loop
        waits for them. CUDA graphs, if they are wanted (docs/long-runs.md), are told that they may
        write over the step before."""
        start = time.perf_counter()
        for batch in loader:
            self.waited += time.perf_counter() - start
            self.images += len(batch["images"]) * self.world
            self.broken.update(batch["replaced"])
            if self.backend:
                torch.compiler.cudagraph_mark_step_begin()
            yield batch
            start = time.perf_counter()

    def add(self, values: dict[str, Tensor]) -> None:
        """Scalars of a step or micro-batch; "grad_norm" comes once in a step."""
        for name, value in values.items():
            self.values.setdefault(name, []).append(value.detach())

    def read(self, done: int, last: int) -> dict:
        """Means over steps and processes since the last reading; images per second, share of the
        time spent waiting for data, h:mm:ss to the end; what the objective says of them. Raises
        InputError for a loss or gradient that is not finite, and where more than 1 % of the
        training images are broken."""
        means = torch.stack([torch.stack(found).float().mean() for found in self.values.values()])
        if self.world > 1:
            dist.all_reduce(means)
        values = dict(zip(self.values, (means / self.world).tolist()))
        if not math.isfinite(values["total"] + values["grad_norm"]):
            raise InputError(f"the loss or its gradient is not finite at step {done} or just "
                             f"before; the last good state: {self.run.latest()}; start anew "
                             f"with a lower --lr or --no-bf16, and another --out")
        self.broken = set().union(*all_gather_object(self.broken))
        if len(self.broken) > 0.01 * len(self.records):
            names = ", ".join(self.records[i].path for i in sorted(self.broken)[:3])
            raise InputError(f"{len(self.broken)} of {len(self.records)} training images cannot be "
                             f"read, more than 1 %: {names}; a damaged copy, or of no known kind")
        seconds = time.perf_counter() - self.since
        left = seconds / len(self.values["grad_norm"]) * (last - done)
        line = {"step": done, "steps": last, **values, "broken_images": len(self.broken),
                "img_s": round(self.images / seconds, 1), "wait": round(self.waited / seconds, 3),
                "left": str(timedelta(seconds=round(left))), **self.objective.reference}
        warning = self.objective.warning(values)
        if warning:
            line["warning"] = warning
        self.reset()
        return line


# ---------------------------------------------------------------------------------------------
# The run folder
# ---------------------------------------------------------------------------------------------

CHECKPOINT = "checkpoint_" + 9 * "[0-9]" + ".pth"  # the number of steps done
RUN_FILES = ("recipe.json", "machine.json", "log.jsonl", CHECKPOINT, "model.pth", "backbone.pth",
             "backbone_e[0-9][0-9][0-9][0-9].pth", "results.json")


class Run:
    """A folder that holds one run. Opening makes the folder and only looks; `begin` writes, once
    all is in order.

    Raises InputError for a folder that cannot be made, that holds another recipe, or files that
    are no run's, unless `overwrite` allows to start over. Of several processes the first writes.
    """

    def __init__(self, folder: str | Path, recipe: dict, overwrite: bool = False, rank: int = 0):
        self.folder = Path(folder)
        self.overwrite = overwrite
        self.writes = rank == 0
        self.recipe = json.loads(json.dumps(recipe))  # tuples become lists, as when read back
        self.log_file = self.folder / "log.jsonl"
        self.seconds = 0.0
        self.since = time.perf_counter()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.compare()

    def files(self, suffix: str = "") -> list[Path]:
        """What a run may have left here, and --overwrite deletes."""
        found = []
        for pattern in RUN_FILES:
            found += sorted(self.folder.glob(pattern + suffix))
        return found

    def checkpoints(self) -> list[Path]:
        """States of this run, the latest first."""
        return sorted(self.folder.glob(CHECKPOINT), reverse=True)

    def latest(self) -> str:
        """Where the latest state is."""
        return str((self.checkpoints() or ["none saved"])[0])

    def compare(self) -> None:
        """Raise InputError unless the folder is empty, this run's, or may be overwritten."""
        present = [path.name for path in self.files()]
        if not present or self.overwrite:
            return
        changed = [f"recipe.json absent or damaged beside {', '.join(present)}"]
        with contextlib.suppress(ValueError, AttributeError, TypeError, OSError, RecursionError):
            changed = self.changes(json.loads((self.folder / "recipe.json").read_text()))
        if changed:
            raise InputError(f"{self.folder} holds a run with another recipe ({'; '.join(changed)}"
                             f"); take another folder by --out, or start over with --overwrite")

    def changes(self, old: dict) -> list[str]:
        """How a recipe differs from this run's."""
        usual = {"people": "the test set"}  # of earlier versions, which held nobody out
        old = usual | old
        new = usual | self.recipe
        return [f"{key}: {old.get(key)} there, {new.get(key)} now"
                for key in sorted({*old, *new}) if old.get(key) != new.get(key)]

    @contextlib.contextmanager
    def begin(self):
        """Hold the folder for this run; delete what `overwrite` allows, write recipe.json."""
        barrier()  # all have looked at the folder before the first process changes it
        lock_file = self.folder / "lock"
        if not self.writes:
            lock_file = os.devnull
        with open(lock_file, "a") as handle:
            if self.writes:
                self.lock(handle)
                self.compare()  # another process may have trained here while this one waited
                suffix = ".*.partial"  # half-written files of a process that was killed
                if self.overwrite:
                    suffix = ""
                for path in self.files(suffix):
                    path.unlink()
                self.overwrite = False
                self.save("recipe.json", json.dumps(self.recipe, indent=1).encode())
            barrier()  # the others may read the folder now
            yield

    def lock(self, handle) -> None:
        """Keep other processes out until this one ends. A record lock: data workers, which may
        outlive a process that is killed by seconds, do not inherit it."""
        try:
            import fcntl  # not on Windows
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise InputError(f"another process is training in {self.folder}; wait for it, or take "
                             f"another folder by --out") from None
        except (ImportError, OSError) as error:
            print(f"WARNING: no locks in {self.folder} ({error}): let no other process train there")

    def save(self, name: str, content: dict | bytes) -> None:
        """A file that is there as a whole, or as it was before."""
        def write(handle) -> None:
            if isinstance(content, bytes):
                handle.write(content)
            else:
                torch.save(content | {"run": self.recipe}, handle)  # what it was made by

        if self.writes:
            write_atomic(self.folder / name, write)

    def save_checkpoint(self, step: int, **parts) -> None:
        """Write the state of model=, optimizer= after `step` steps; the one before stays, too."""
        self.seconds += time.perf_counter() - self.since
        self.since = time.perf_counter()
        size = 0
        if self.log_file.exists():
            size = self.log_file.stat().st_size
        states = {name: part.state_dict() for name, part in parts.items()}
        self.save(f"checkpoint_{step:09d}.pth", {
            "format": "reid-checkpoint", "step": step, "seconds": self.seconds, "log_size": size,
            **states})
        if self.writes:
            for path in self.checkpoints()[2:]:
                path.unlink()

    def restore(self, **parts) -> int:
        """Fill parts from the last checkpoint that is whole; the number of steps done."""
        state, damaged = self.newest_readable(parts)
        made = [*self.checkpoints(), *self.folder.glob("backbone.pth"),
                *self.folder.glob("model.pth")]
        if made and not state and self.recipe.get("epochs", 1):
            raise InputError(f"{made[0]}: no checkpoint is whole from which the run could go on; "
                             f"--overwrite starts from the first step")
        step = state.get("step", 0)
        if len(set(all_gather_object(step))) > 1:
            raise InputError(f"{self.folder}: processes see other checkpoints; several machines "
                             f"need a folder that they share")
        self.seconds = state.get("seconds", 0.0)
        if self.writes:
            for path in damaged:
                path.unlink()
            self.cut_log(state.get("log_size", 0))
        return step

    def newest_readable(self, parts: dict) -> tuple[dict, list[Path]]:
        """The last state that is whole, in `parts` and as a dictionary, which is empty if there is
        none; and the files after it, which are damaged. A state of a run with another recipe is
        refused, and moved out of the way."""
        damaged = []
        for path in self.checkpoints():
            try:
                state = read_checkpoint(path)
                changed = self.changes(state.get("run", self.recipe))
                if not changed:  # else it may not even fit
                    for name, part in parts.items():
                        part.load_state_dict(state[name])
                    int(state["step"]), int(state["log_size"]), float(state["seconds"])
            except Exception as error:  # damaged bytes make readers raise anything at all
                limit = hint(error) and not isinstance(error, EOFError)
                if isinstance(error, PermissionError) or limit:
                    raise  # no fault of the file's
                print(f"WARNING: {path} is damaged ({str(error)[:150]})", flush=True)
                damaged.append(path)
                continue
            if changed:
                print(f"WARNING: {path} is of a run with another recipe ({'; '.join(changed)}): "
                      f"refused, and renamed to {path.name}.other", flush=True)
                if self.writes:
                    path.rename(f"{path}.other")
                continue
            if "run" not in state:
                print(f"WARNING: {path} was written by an earlier version, which does not say by "
                      f"which recipe, and shuffled and augmented by other random numbers")
            print(f"going on at step {state['step']:,} from {path}", flush=True)
            return state, damaged
        return {}, damaged

    def cut_log(self, size: int) -> None:
        """Steps after the checkpoint come again: their lines go, but not what a person wrote."""
        with open(self.log_file, "a+b") as handle:
            handle.seek(min(size, handle.tell()))
            lines = handle.read().splitlines()
            kept = [line + b"\n" for line in lines if line.strip() and not line.startswith(b"{")]
            handle.truncate(min(size, self.log_file.stat().st_size))
            handle.writelines(kept)

    def log(self, **values) -> None:
        """One JSON object per line, to the screen and to log.jsonl."""
        if not self.writes:
            return
        for key, value in values.items():
            if isinstance(value, float):
                values[key] = float(f"{value:.5g}")
        line = json.dumps(values)
        print(line, flush=True)
        with open(self.log_file, "a") as handle:
            handle.write(line + "\n")

    def results(self) -> dict | None:
        """What an evaluation found, if the run is finished; if the file is damaged, it is not."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            results = json.loads((self.folder / "results.json").read_text())
            if 0 <= results["mAP"] <= 1:
                return results
        return None

    def save_results(self, results: dict) -> None:
        """Write results.json, unless the folder was taken over while the model was evaluated."""
        self.compare()
        (self.folder / "model.pth").stat()  # by the same recipe with --overwrite: it is gone
        self.save("results.json", json.dumps(results, indent=1).encode())

    def stop(self, done: int, last: int) -> None:
        """End the process, as it was asked to."""
        barrier()  # torchrun ends all soon after one has gone
        if not self.writes:
            sys.exit(1)
        sys.exit(f"stopped after step {done:,} of {last:,}; {self.latest()} has it; the same "
                 f"command, without --overwrite, goes on from there")


def read_checkpoint(path: Path) -> dict:
    """A state as it was saved. PyTorch checks no checksum, and overlooks some flipped bits of the
    file's table."""
    with zipfile.ZipFile(path) as content:
        if content.testzip() or any(entry.external_attr or entry.compress_type
                                    for entry in content.infolist()):
            raise InputError("a checksum does not match")
    return torch.load(path, map_location="cpu", weights_only=True)


def open_run(out, recipe, dataset, overwrite: bool, runtime: Runtime, weights=None, **more) -> Run:
    """The run folder for a recipe and the data it is about to see; prints both."""
    if weights and overwrite and Path(weights).resolve().parent == Path(out).resolve():
        raise InputError(f"--overwrite would delete {weights}; choose another folder with --out")
    if weights and os.path.isfile(weights):  # else loading them will say so
        content = hashlib.blake2b(Path(weights).read_bytes(), digest_size=6)
        weights = f"{Path(weights).name} {content.hexdigest()}"
    described = asdict(recipe) | {"dataset": dataset.name, **more, "weights": weights,
                                  "data": dataset.fingerprint(), "people": dataset.people}
    run = Run(out, described, overwrite, runtime.rank)
    print(f"run {run.folder}:", *(f"{key}={value}" for key, value in described.items()))
    compiling = "eager: nothing is compiled"
    if runtime.backend:
        compiling = "the first step compiles, for minutes if the machine has not done so before"
    print(f"  torch={torch.__version__} threads={torch.get_num_threads()} {runtime}; {compiling}")
    return run
