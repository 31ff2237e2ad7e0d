"""Worker processes: whatever ends a script ends them too, at once; what a machine cannot give is one line."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_image
from PIL import Image

import evaluate
from data import InputError, Record, make_loader
from extra.files import command_line, read_image

SCRIPT = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import torch
from data import InputError, make_loader
from extra.files import command_line


class Numbers(torch.utils.data.Dataset):
    def __getitem__(self, i):
        {item}
        return torch.tensor([i])


def main():
    {before}
    for batch in make_loader(Numbers(), range(60), 2):
        print(int(batch), flush=True)
    print("all done")


if __name__ == "__main__":
    {call}
"""


def hear_ctrl_c():
    """What a shell starts in the background is told to ignore it, and so is what that starts: these tests, and the script."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(folder: Path, item="pass", before="pass", call="command_line(main)", printed=("0\n", "1\n")):
    script = folder / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT), item=item, before=before, call=call))
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True, preexec_fn=hear_ctrl_c)
    for line in printed:                                         # both workers are at work
        assert process.stdout.readline() == line
    return process


def ended(process, limit=30) -> tuple[int, str, str]:
    """Exit status and output of a process that ends within the limit and leaves none of its session behind. On an idle
    machine that takes under a second; a worker that is waited for would take a minute."""
    begin = time.monotonic()
    try:
        out, err = process.communicate(timeout=90)
    finally:
        with pytest.raises(ProcessLookupError):                  # else they are ended here
            os.killpg(process.pid, signal.SIGKILL)
    assert time.monotonic() - begin < limit
    return process.returncode, out, err


BUSY = "time.sleep(0.05 if i < 9 else 60)"                # in the middle of a batch for a minute


@pytest.mark.parametrize("call", ["command_line(main)", "main()"])
def test_an_error_ends_the_workers_too(tmp_path, call):
    """An error in one while another is busy, and one line of it, with or without `command_line`."""
    status, _, err = ended(start(tmp_path, f"if i == 8: raise InputError('the eighth is broken')\n        {BUSY}",
                                 call=call))
    assert status == 1 and err.strip().endswith("the eighth is broken")
    assert err == "error: the eighth is broken\n" or call == "main()"


def test_an_error_in_the_main_process_ends_the_workers(tmp_path):
    status, _, err = ended(start(tmp_path, BUSY, "def print(*_, **__): sys.stdout.write('0\\n'); sys.stdout.flush(); "
                                                 "raise InputError('the network')", printed=["0\n"]))
    assert (status, err) == (1, "error: the network\n")


def test_ctrl_c_is_quiet(tmp_path):
    process = start(tmp_path, "time.sleep(0.1)")
    os.killpg(process.pid, signal.SIGINT)
    status, _, err = ended(process)
    assert (status, err) == (1, "interrupted\n")


def test_a_stop_request_to_all_processes_lets_the_main_one_finish(tmp_path):
    """A scheduler tells all at once, and more than once; the main process still needs its workers."""
    before = "[signal.signal(number, lambda *_: print('asked')) for number in (signal.SIGTERM, signal.SIGINT)]"
    process = start(tmp_path, "time.sleep(0.02)", before)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        os.killpg(process.pid, number)
        time.sleep(0.1)
    status, out, err = ended(process, 90)
    assert (status, err) == (0, "") and out.count("asked") == 3 and out.endswith("59\nall done\n")


def test_workers_end_soon_after_their_main_process_was_killed(tmp_path):
    process = start(tmp_path, "time.sleep(0.02)")
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(workers) == 2 and all_end(workers)                # PyTorch has them look every 5 seconds


def fail_beside_a_loader():
    batches = iter(make_loader([{}] * 99, range(99), 1))
    cycle = [next(batches), batches]                             # as an exception of PyTorch's compiler holds it
    cycle.append(cycle)
    raise RuntimeError("of ours")


def test_a_child_process_that_fails_leaves_no_worker_to_wait_for():
    process = multiprocessing.get_context("spawn").Process(target=fail_beside_a_loader)
    process.start()
    process.join(120)
    status = process.exitcode
    process.kill()
    assert status == 1


def all_end(pids, limit=30) -> bool:
    def alive(pid):
        stat = Path(f"/proc/{pid}/stat")
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"

    last = time.monotonic() + limit
    while any(map(alive, pids)) and time.monotonic() < last:
        time.sleep(0.1)
    return not any(map(alive, pids))


def test_a_worker_that_the_system_ends_is_one_line(tmp_path):
    """... at the end: before it a thread of Python's, that was sending to that worker, may complain on its own."""
    process = start(tmp_path, "os.kill(os.getpid(), signal.SIGKILL) if i == 9 else time.sleep(0.02)")
    status, _, err = ended(process)
    last = err.splitlines()[-1]
    assert status == 1 and last.startswith("error: a worker was killed, for want of memory? fewer --workers")
    assert "the same command" in last and any(word in last for word in ("killed by signal", "exited unexpectedly", "EOF", "peer"))


def test_full_shared_memory_is_one_line(tmp_path):
    """It fails in the worker's own loop, from which an error comes through, for each kind of batch."""
    item = """if i == 9:
            def fail(_): raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device")
            torch.Tensor.share_memory_ = fail"""
    status, _, err = ended(start(tmp_path, item))
    assert status == 1 and err.startswith("error: /dev/shm is full: docker run --shm-size") and "--shm-size" in err and err.count("\n") == 1


class Nested(torch.utils.data.Dataset):
    def __getitem__(self, i):
        return {"x": torch.tensor([i]), "more": (torch.ones(1), [torch.ones(2), "text"])}


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_the_same_from_workers(workers):
    batches = list(make_loader(Nested(), range(3, 5), workers))
    assert [b["x"].tolist() for b in batches] == [[3], [4]] and batches[0]["more"][1][1] == "text"
    assert batches[0]["more"][0].is_shared() == bool(workers)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files where Linux lists them")
def test_extraction_keeps_no_file_open(tmp_path, monkeypatch):
    """A tensor from a worker is an open file: 256 of them are macOS's limit, 1,024 Linux's."""
    records = [Record(str(write_image(tmp_path / f"{i}.png", i)), -1, 0) for i in range(40)]
    most = []

    class Counts(torch.nn.Module):
        def forward(self, x):
            most.append(len(os.listdir("/proc/self/fd")))
            return x.mean((2, 3)) + 0.1

    features, numbers = evaluate.extract(Counts(), records, (16, 8), [0.5] * 3, [0.5] * 3, batch_size=1, workers=1)
    assert len(numbers.unique()) == 40 and most[-1] <= most[5] + 3


LIMITS = [
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are "
                  "out of shared memory."), "--shm-size"),
    (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "fewer --workers"),
    (EOFError(), "a worker was killed"),                         # what reading from it may raise, and
    (ConnectionResetError(104, "Connection reset by peer"), "a worker was killed"),
    (RuntimeError("[pair.cc:547] Connection closed by peer [127.0.0.1]:4"), "another process of this run has ended"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.25 GiB"),
     "smaller --batch"),
    (RuntimeError("cuBLAS error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "GPU memory is full"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
                  "allocate 99 bytes. Error code 12 (Cannot allocate memory)"), "memory is full"),
    (MemoryError(), "memory is full"), (OSError(12, "Cannot allocate memory"), "memory is full"),
    (OSError(24, "Too many open files"), "ulimit -n"),
    (RuntimeError("received 0 items of ancillary data"), "ulimit -n"),
    (RuntimeError("can't start new thread"), "ulimit -u"),
    (RuntimeError("The server socket has failed to listen on any local network address. port: 29500, useIpv6: false, code: -98, name: "
                  "EADDRINUSE, message: address already in use"), "torchrun --master-port"),
    (OSError(98, "Address already in use"), "another run has this port"),
    (RuntimeError("Failed to find C compiler. Please specify via CC environment variable or set triton.knobs.build.impl."),
     "--no-compile"), (RuntimeError("InvalidCxxCompiler: No working C++ compiler found in torch._inductor"), "--no-compile"),
    (RuntimeError("CUDA error: invalid device ordinal\nGPU device may be out of range, do you have enough GPUs?\n"),
     "fewer GPUs here than processes"),
    (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
                  "  File\nRuntimeError: unable to mmap 99 bytes from file </torch_1>: Cannot allocate memory (12)\n"),
     "memory is full")]


@pytest.mark.parametrize("error, way_out", LIMITS)
def test_limits_of_the_machine_are_one_line_with_a_way_out(error, way_out):
    def fail():
        raise error

    with pytest.raises(SystemExit) as caught:
        command_line(fail)
    assert way_out in str(caught.value) and str(caught.value).startswith("error: ") and "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value) and len(str(caught.value)) < 450


def test_a_file_s_name_is_no_limit_of_the_machine(tmp_path, monkeypatch):
    """... and too many open files are no fault of the image that was to be opened."""
    with pytest.raises(SystemExit, match="^error: /data/shared memory/new thread.jpg: cannot be read"):
        command_line(lambda: raise_(InputError("/data/shared memory/new thread.jpg: cannot be read")))
    with pytest.raises(SystemExit, match="^error: .*No such file"):
        command_line(lambda: open("/absent/killed.pth"))
    path = write_image(tmp_path / "a.jpg")
    monkeypatch.setattr(Path, "read_bytes", lambda _: raise_(OSError(24, "Too many open files")))
    with pytest.raises(SystemExit, match="^error: too few files may be open: ulimit -n"):
        command_line(lambda: read_image(str(path), (8, 8), Image.Resampling.NEAREST))
    monkeypatch.setattr(Path, "read_bytes", lambda _: raise_(MemoryError()))
    with pytest.raises(SystemExit, match="^error: memory is full"):
        command_line(lambda: read_image(str(path), (8, 8), Image.Resampling.NEAREST))


def raise_(error):
    raise error


def drawing(tmp_path):
    """A process that is drawing people, and its workers."""
    process = subprocess.Popen([sys.executable, ROOT / "data.py", "--synthetic", tmp_path / "people"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    children, last = Path(f"/proc/{process.pid}/task/{process.pid}/children"), time.monotonic() + 60
    while not list(tmp_path.glob("people.*/*/*.jpg")) and time.monotonic() < last:
        time.sleep(0.05)
    return process, [int(pid) for pid in children.read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds worker processes where Linux lists them")
def test_a_killed_worker_ends_the_drawing_of_people(tmp_path):
    process, workers = drawing(tmp_path)
    os.kill(workers[0], signal.SIGKILL)
    status, _, err = ended(process)
    assert status == 1 and err.startswith("error: a worker was killed") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())                          # no half-drawn set


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds worker processes where Linux lists them")
def test_nobody_goes_on_drawing_for_a_process_that_was_killed(tmp_path):
    process, workers = drawing(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert workers and all_end(workers)


def test_a_fault_of_ours_keeps_its_traceback():
    def fail():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        command_line(fail)


def test_scripts_compute_in_float32_where_they_say_so(monkeypatch):
    """PyTorch's default for convolutions on a GPU is TF32, of 10 bits where float32 has 23."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen = []
    command_line(lambda: seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)))
    assert seen == [(False, False)]
