"""The ResNet of upreid.py against torchvision's."""

import subprocess
import sys

import pytest
import torch
import torchvision
from conftest import ROOT

import upreid

# parameters without a classifier; torchvision's resnet50 has 25,557,032 with its fc of 2,049,000
SIZES = {"resnet50": 23_508_032, "resnet_tiny": 2_011_168}


def test_parameter_counts_of_every_model():
    models = {n for n in vars(upreid) if n.startswith("resnet")}
    assert models == set(SIZES)
    for name, size in SIZES.items():
        assert sum(p.numel() for p in getattr(upreid, name)().parameters()) == size


@pytest.mark.parametrize("training", [False, True])
def test_equals_torchvision(training):
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(weights=None)
    theirs.fc = torch.nn.Identity()
    for module in theirs.modules():  # running statistics and scales that are not 0 and 1
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    ours = upreid.resnet50(last_stride=2)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ours.train(training), theirs.train(training)
    x = torch.randn(3, 3, 96, 48, requires_grad=True)
    y, z = x.detach().clone().requires_grad_(), x
    out_ours, out_theirs = ours(y), theirs(z)
    weight = torch.randn_like(out_ours)
    (out_ours * weight).sum().backward()
    (out_theirs * weight).sum().backward()
    torch.testing.assert_close(out_ours, out_theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.grad, z.grad, rtol=1e-3, atol=1e-5)


def test_last_stride_refines_the_map_without_parameters():
    x = torch.randn(2, 3, 128, 64)
    coarse, fine = upreid.resnet_tiny(2).eval(), upreid.resnet_tiny(1).eval()
    assert coarse.forward_features(x).shape == (2, 1024, 4, 2)
    assert fine.forward_features(x).shape == (2, 1024, 8, 4)
    fine.load_state_dict(coarse.state_dict(), strict=True)
    assert fine(x).shape == (2, fine.embed_dim) == (2, 1024)
    torch.testing.assert_close(fine(x), fine.forward_features(x).mean((2, 3)))


@pytest.mark.parametrize("depths", [(1, 1, 1), (1, 1, 0, 1)])
def test_bad_depths_raise(depths):
    with pytest.raises(ValueError, match="four stages"):
        upreid.ResNet(depths)


@pytest.mark.parametrize("module", ["upreid", "personvit"])
def test_file_runs_alone_in_an_empty_folder(module, tmp_path):
    (tmp_path / f"{module}.py").write_text((ROOT / f"{module}.py").read_text())
    done = subprocess.run([sys.executable, "-I", f"{module}.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "parameters" in done.stdout and "feature" in done.stdout
