"""train.py with doubles for floats: without rounding, two ways to compute the same agree to many digits."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def use_doubles():
    """From now on new tensors, and what the code turns into floats, are doubles."""
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double


if __name__ == "__main__":
    use_doubles()
    import data
    import train
    data.command_line(train.main)
