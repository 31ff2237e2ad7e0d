"""What worker processes that decode images need beside PyTorch's DataLoader: they hand over memory
where an error can be seen, leave Ctrl-C to the main process, and end when it ends."""

import multiprocessing.util
import signal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


def hand_over(batch):
    """The batch, in a worker moved to shared memory here: where that is full, PyTorch's thread that
    sends batches would print an error, drop the batch, and leave the main process waiting."""
    if torch.utils.data.get_worker_info():
        return tree_map_only(Tensor, Tensor.share_memory_, batch)
    return batch


def quiet_worker(_: int) -> None:
    """Ctrl-C, and SIGTERM to all processes of a job, are for the main process: it finishes its step
    and saves, for which it needs its workers. They end when it does (`end_workers`), or within 5
    seconds of its being killed, which PyTorch lets them look for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_workers_at_exit() -> None:
    """Let this process end its workers when it ends, whatever they are doing. multiprocessing's own
    exit would send them SIGTERM, which they ignore, and wait for ever; finalizers come before."""
    multiprocessing.util.Finalize(None, end_workers, exitpriority=0)


def end_workers() -> None:
    if hasattr(signal, "SIGCHLD"):  # PyTorch would call it an error; not on Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        if worker.daemon:  # as the DataLoader's are
            worker.kill()
