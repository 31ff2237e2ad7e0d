"""train.py with doubles for floats, on tiny networks: without rounding, two ways to compute the same agree to many digits."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from personvit import VITS, VisionTransformer  # noqa: E402  (these are found through the line above)
from upreid import RESNETS, ResNet  # noqa: E402

# for what does not depend on a network's size
NETWORKS = {"vit_mini": lambda size=(256, 128), **more: VisionTransformer(size, embed_dim=32, depth=2, num_heads=2, **more),
        "resnet_tiny": lambda last_stride=1: ResNet((1, 1, 1, 1), 4, last_stride)}


def use_tiny_networks():
    """... under the names of the smallest."""
    from evaluate import ARCHS
    for table in (VITS, RESNETS, ARCHS):
        table.update({name: NETWORKS[name] for name in NETWORKS.keys() & table.keys()})


def use_doubles():
    """From now on new tensors, and what the code turns into floats, are doubles."""
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double


if __name__ == "__main__":
    use_doubles()
    use_tiny_networks()
    import train
    from extra.files import command_line
    command_line(train.main)
