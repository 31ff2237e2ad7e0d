"""The ResNet of UP-ReID (arXiv 2112.00317), written out; the pre-training objective will join it.

UP-ReID pre-trains a ResNet-50 by contrastive learning on unlabelled crops of people; after that the
network is fine-tuned for re-identification (ReID). This file has the network alone:

    x    person image                      (B, 3, H, W)     H = 2 W: people are tall
    map  last feature map                  (B, D, h, w)     D = 32 * width
    f    global feature = mean over map    (B, D)           what the ReID losses and the ranking use

What differs from the network one meets in an ImageNet course: the last stage may keep its
resolution (`last_stride=1`), and there is no classifier here: identities are the business of
fine-tuning (`ReIDModel` in evaluate.py). Parameter names are torchvision's, so that a public
ResNet-50 file loads as it is. Read `ResNet.forward_features` first.
"""

import torch
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------
# The backbone
# ---------------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut; (B, C, h, w) -> (B, 4 width, h/stride, w/stride).

    Source: He et al. 2016. The stride sits on the 3x3 convolution ("v1.5"), as torchvision has it;
    the paper put it on the first 1x1, which skips three quarters of its input.
    """

    expansion = 4  # output channels per inner channel

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        out = width * self.expansion
        # no bias: the batch norm behind each convolution subtracts the mean and would cancel it
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None  # torchvision's name; it fits the shortcut to the output's shape
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        x += shortcut  # in place: the batch norm before it keeps its input, not its output
        return self.relu(x)  # after the sum, not before: else a block could only ever add


class ResNet(nn.Module):
    """Residual network for person images; forward maps (B, 3, H, W) to one feature (B, embed_dim).

    depths: blocks in each of the four stages. width: channels of the stem; stage s has
    4 * width * 2^s. last_stride: 1 keeps the last map at H/16 x W/16 instead of H/32 x W/32; the
    finer map costs no parameters, and details of clothing survive [BoT]. Source: He et al. 2016.
    """

    def __init__(self, depths: tuple[int, ...] = (3, 4, 6, 3), width: int = 64,
                 last_stride: int = 1):
        super().__init__()
        if len(depths) != 4 or min(depths) < 1:
            raise ValueError(f"ResNet has four stages of at least one block, got depths={depths}")
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = width
        for stage, (depth, stride) in enumerate(zip(depths, (1, 2, 2, last_stride))):
            blocks = []
            for i in range(depth):
                blocks.append(Bottleneck(channels, width << stage, stride if i == 0 else 1))
                channels = (width << stage) * Bottleneck.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))  # torchvision's names
        self.embed_dim = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # keeps the variance of gradients through ReLUs (He et al. 2015)
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:
        """Last feature map: (B, 3, H, W) -> (B, embed_dim, h, w), h = H/16 for last_stride=1."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))  # (B, width, H/4, W/4)
        x = self.layer1(x)                                    # (B, 4 width, H/4, W/4)
        x = self.layer2(x)                                    # (B, 8 width, H/8, W/8)
        x = self.layer3(x)                                    # (B, 16 width, H/16, W/16)
        return self.layer4(x)                                 # (B, 32 width, H/16, W/16)

    def forward(self, x: Tensor) -> Tensor:
        """Global feature, not normalised: (B, 3, H, W) -> (B, embed_dim)."""
        return self.forward_features(x).mean(dim=(2, 3))


def resnet50(last_stride: int = 1) -> ResNet:
    """The backbone of UP-ReID; last_stride=2 is torchvision's network, 1 the usual one for ReID."""
    return ResNet((3, 4, 6, 3), 64, last_stride)


def resnet_tiny(last_stride: int = 1) -> ResNet:
    """One block a stage at half the width, D = 1024: trains on a laptop's CPU in minutes. [ours]"""
    return ResNet((1, 1, 1, 1), 32, last_stride)


if __name__ == "__main__":  # the file alone, in any folder: shapes and sizes
    for build in (resnet_tiny, resnet50):
        net = build().eval()
        images = torch.randn(2, 3, 256, 128)
        count = sum(p.numel() for p in net.parameters())
        print(f"{build.__name__}: {count:,} parameters, images {tuple(images.shape)} -> "
              f"map {tuple(net.forward_features(images).shape)} -> "
              f"feature {tuple(net(images).shape)}")
