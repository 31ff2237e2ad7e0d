"""The ViT of personvit.py against recorded outputs of the reference, PyTorch's attention, and itself."""

import pytest
import torch
from conftest import Golden

import personvit
from personvit import Attention, Block, VisionTransformer, resize_pos_embed

SIZES = {"vit_tiny": 5_511_360, "vit_small": 21_639_552, "vit_base": 85_746_432}


def test_parameter_counts_of_every_model():
    assert {n for n in vars(personvit) if n.startswith("vit_")} == set(SIZES)
    for name, size in SIZES.items():
        net = getattr(personvit, name)()
        assert sum(p.numel() for p in net.parameters()) == size
        assert len(net.state_dict()) == 150


@pytest.mark.parametrize("name, stride, size", [("vit_stride16", 16, (64, 32)), ("vit_stride12", 12, (64, 40))])
def test_equals_reference(name, stride, size):
    golden = Golden(name)
    net = VisionTransformer(size, 16, stride, embed_dim=24, depth=2, num_heads=3).eval()
    net.load_state_dict(golden.state("w."), strict=True)
    assert net.grid == (int(golden["num_y"]), int(golden["num_x"]))
    x = golden["x"].requires_grad_()
    cls = net(x)
    (cls * torch.arange(24)).sum().backward()
    torch.testing.assert_close(cls, golden["cls"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad, golden["grad_x"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, source, target", [("pos_197_to_16x8", (14, 14), (16, 8)),
                                                  ("pos_129_to_24x8", (16, 8), (24, 8)),
                                                  ("pos_129_to_21x10", (16, 8), (21, 10))])
def test_position_resize_equals_reference(name, source, target):
    golden = Golden(name)
    assert target == (int(golden["height"]), int(golden["width"]))
    torch.testing.assert_close(resize_pos_embed(golden["src"], source, target), golden["out"], rtol=1e-4, atol=1e-5)


def test_position_resize_keeps_equal_grids_and_orientation():
    pos = torch.randn(1, 129, 5)
    assert resize_pos_embed(pos, (16, 8), (16, 8)) is pos
    rows = torch.arange(16.0).repeat_interleave(8)               # every patch says its row
    pos = torch.cat([torch.tensor([99.0]), rows])[None, :, None]
    out = resize_pos_embed(pos, (16, 8), (8, 4))
    grid = out[0, 1:, 0].view(8, 4)
    assert out[0, 0, 0] == 99                                    # [CLS] untouched
    assert torch.equal(grid, grid[:, :1].expand(8, 4)) and (grid[1:] > grid[:-1]).all()
    with pytest.raises(ValueError, match="128 patch positions.*needs 121"):
        resize_pos_embed(torch.randn(1, 129, 5), (11, 11), (16, 8))


def test_attention_equals_pytorch():
    torch.manual_seed(0)
    B, N, D, heads = 2, 7, 12, 3
    ours, theirs = Attention(D, heads), torch.nn.MultiheadAttention(D, heads, batch_first=True)
    ours.qkv.load_state_dict({"weight": theirs.in_proj_weight, "bias": theirs.in_proj_bias})
    ours.proj.load_state_dict(theirs.out_proj.state_dict())
    x = torch.randn(B, N, D)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0], rtol=1e-5, atol=1e-6)


def test_stochastic_depth_drops_whole_images_and_keeps_the_mean():
    torch.manual_seed(0)
    block = Block(8, 2, 4, drop_path=0.25)
    branch = torch.rand(20_000, 3, 8) + 1
    dropped = block.train().drop(branch)
    share = dropped / branch                                     # 0 or 1 / 0.75, the same for a whole image
    assert torch.equal(share.round(decimals=3), share[:, :1, :1].round(decimals=3).expand_as(share))
    assert abs((share[:, 0, 0] == 0).float().mean() - 0.25) < 0.01
    assert abs(share.mean() - 1) < 0.02
    assert torch.equal(block.eval().drop(branch), branch)


def test_depth_of_dropping_grows_linearly():
    net = VisionTransformer((32, 16), 8, depth=5, embed_dim=8, num_heads=2, drop_path=0.2)
    assert [round(b.drop_path, 3) for b in net.blocks] == [0, 0.05, 0.1, 0.15, 0.2]


def test_other_image_sizes_and_shapes():
    net = VisionTransformer((64, 32), 16, embed_dim=8, depth=1, num_heads=2).eval()
    assert net.forward_features(torch.randn(3, 3, 64, 32)).shape == (3, 9, 8)
    assert net.forward_features(torch.randn(3, 3, 96, 48)).shape == (3, 19, 8)   # interpolated positions
    assert net(torch.randn(3, 3, 64, 32)).shape == (3, net.embed_dim)
    with pytest.raises(ValueError, match="holds no patch"):
        net(torch.randn(1, 3, 15, 32))
    with pytest.raises(ValueError, match="multiple of num_heads"):
        VisionTransformer(embed_dim=10, num_heads=3)
