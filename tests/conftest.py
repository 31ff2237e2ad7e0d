"""What the tests share: warnings that count as errors, golden files, tiny data, scripts in processes of their own."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

# Networks this small only wait for a second thread, and for long on a machine that is busy with other things: most
# tests have one thread, and where there are two they do not spin while they wait.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from PIL import Image  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import load_dataset, make_synthetic  # noqa: E402  (these are found through the line above)
from extra.files import read_image  # noqa: E402
from stress import log_lines, market_tree, start_script, write_image  # noqa: E402

__all__ = ["log_lines", "market_tree", "write_image"]


def pytest_configure(config):
    for category in ("DeprecationWarning", "FutureWarning"):
        config.addinivalue_line("filterwarnings", f"error::{category}")
    # Python 3.12 warns of every fork of a process with threads; PyTorch's data loader forks
    config.addinivalue_line("filterwarnings", "ignore:.*multi-threaded, use of fork:DeprecationWarning")
    # PyTorch 2.13's compiler warns of PyTorch's own code
    config.addinivalue_line("filterwarnings", "ignore:.torch.jit:DeprecationWarning")


class Golden:
    """Arrays of a recorded file as tensors: Golden("name")["key"]."""

    def __init__(self, name: str):
        self.file = np.load(Path(__file__).parent / "golden" / f"{name}.npz")

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.as_tensor(self.file[key])

    def state(self, prefix: str) -> dict[str, torch.Tensor]:
        """The state dict whose keys start with `prefix`."""
        return {k.removeprefix(prefix): self[k] for k in self.file if k.startswith(prefix)}


@pytest.fixture
def market(tmp_path) -> Path:
    return market_tree(tmp_path / "market1501")


@pytest.fixture
def dataset(market):
    return load_dataset("market1501", market)


@pytest.fixture(scope="session")
def people(tmp_path_factory):
    """Synthetic people, drawn once: 100 to learn from, 40 others to find again."""
    return load_dataset("synthetic", make_synthetic(tmp_path_factory.mktemp("people") / "synthetic", 100, 40))


@pytest.fixture
def doubles(monkeypatch):
    """Doubles for floats, in this process, while a test runs."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def colour_histograms(records, size=(128, 64), bins: int = 8) -> torch.Tensor:
    """What colour alone can do: (N, bins^3), L2-normalised.

    A joint RGB histogram of the whole image; the square root makes the dot product the
    Bhattacharyya coefficient, under which large plain areas do not drown everything else.
    """
    features = []
    for record in records:
        image = read_image(record.path, size, Image.Resampling.BILINEAR)
        r, g, b = image.long() * bins // 256                                 # (H, W) each
        counts = torch.bincount((r * bins * bins + g * bins + b).flatten(), minlength=bins ** 3)
        features.append(counts.float().sqrt())
    return torch.nn.functional.normalize(torch.stack(features), dim=1)


# ---- scripts in processes of their own -------------------------------------------------------

DOUBLE = ROOT / "tests" / "double.py"  # a script for `command`: train.py with doubles
PATIENCE = 300  # seconds, on a machine that is busy with other things; nothing here takes ten on an idle one


STARTED: list["Script"] = []


@pytest.fixture(autouse=True)
def no_script_outlives_its_test():
    yield
    for script in STARTED:
        script.kill()
    STARTED.clear()


class Script:
    """A script that runs, in one process or in several that share the work as torchrun's do."""

    def __init__(self, *args, script=ROOT / "train.py", processes: int | None = None, env=None):
        self.folder, environments = tempfile.TemporaryDirectory(), [dict(os.environ if env is None else env)]
        if processes:  # the store through which they meet is this process's, as torchrun's agent has it
            self.store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=PATIENCE), wait_for_workers=False)
            shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1",
                      "MASTER_PORT": self.store.port, "TORCHELASTIC_USE_AGENT_STORE": True,
                      "TORCHELASTIC_RESTART_COUNT": 0}
            environments = [environments[0] | {k: str(v) for k, v in {**shared, "RANK": r, "LOCAL_RANK": r}.items()}
                            for r in range(processes)]
        self.children = [start_script(str(script), [*map(str, args)], environment, Path(self.folder.name, str(rank)))
                         for rank, environment in enumerate(environments)]
        STARTED.append(self)

    def kill(self) -> list:
        """Those that still ran."""
        late = [child for child in self.children if child.exitcode is None]
        for child in late:
            os.killpg(child.pid, signal.SIGKILL)
            child.join()
        return late

    def printed(self, kind: str, rank: int | None = None) -> str:
        """What was printed so far, "out" or "err", by one process or by all in their order."""
        files = sorted(Path(self.folder.name).glob(f"{'*' if rank is None else rank}.{kind}"))
        return "".join(file.read_text() for file in files)

    def wait_for(self, text: str) -> None:
        """... to be printed by the first process, which must still run then."""
        last = time.monotonic() + PATIENCE
        while text not in self.printed("out", 0):
            running = self.children[0].exitcode is None
            assert running and time.monotonic() < last, self.printed("out")[-2000:] + self.printed("err")
            time.sleep(0.01)

    def signal(self, number: int, rank: int = 0, group: bool = False) -> None:
        """To one process, or to it and its workers, as terminals and schedulers do."""
        (os.killpg if group else os.kill)(self.children[rank].pid, number)

    def end(self) -> SimpleNamespace:
        """Wait; like what subprocess.run gives, returncode being the first that is not 0."""
        last = time.monotonic() + PATIENCE
        for child in self.children:
            child.join(max(last - time.monotonic(), 0))
        late = self.kill()
        done = SimpleNamespace(stdout=self.printed("out"), stderr=self.printed("err"),
                               codes=[child.exitcode for child in self.children])
        assert not late, f"still running after {PATIENCE} seconds: {done.stdout[-2000:]}{done.stderr}"
        done.returncode = next((code for code in done.codes if code), 0)
        return done


def command(*args, **kwargs) -> SimpleNamespace:
    """train.py (or script=...) with these arguments, to its end."""
    return Script(*args, **kwargs).end()


def torchrun(launcher: list, script, flags: list) -> subprocess.Popen:
    """The real launcher, in new processes."""
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *map(str, launcher), "--", script,
                             *map(str, flags)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
