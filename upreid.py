"""UP-ReID (arXiv 2112.00317): a ResNet, pre-trained on unlabelled crops of people.

Of the paper only the abstract could be consulted, and no code of it is public. The abstract states:
contrastive learning; augmentation can destroy clues that tell people apart; so an intra-identity
regularisation with a global part, consistency between augmented and original image, and a local
part, an intrinsic contrast among local patches of one image. How, it does not state: U1 to U4 below
are this project's reading, tagged [ours]. They extend LUPerson's MoCo v2, which is known [LUP].

    x          person image, as it is                                (B, 3, H, W)     H = 2 W
    x1, x2     two augmentations of x                                (B, 3, H, W)
    q          = f(x1), by the online encoder                        (B, d)           unit vectors
    k, o       = g(x2), g(x), by the momentum encoder, no gradient   (B, d)
    queue      keys of past batches, at first random vectors         (K, d)
    a, b       = f, g of M stripes of x, augmented twice; own head   (B, M, d)
    D, d       width of the ResNet's feature, and of its projection (128)
    L_con      find k among k and the queue by q                     info_nce             [ours U1]
    L_glob     q and o should find the same keys similar             global_consistency   [ours U2]
    L_loc      find stripe m among the stripes of x                  intrinsic_contrast   [ours U3]
    L        = L_con + weight_global L_glob + weight_local L_loc                          [ours U4]

f's backbone is exported. What differs from the ResNet of an ImageNet course: the last stage may
keep its resolution (`last_stride=1`), and there is no classifier: identities are fine-tuning's
business. Parameter names are torchvision's, so that public ResNet-50 files load.

Read `UPReID.forward`, then the three losses, then `ResNet.forward_features`.
"""

import copy
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------
# The backbone
# ---------------------------------------------------------------------------------------------


class GroupedBatchNorm(nn.BatchNorm2d):
    """Batch norm of which, in training, each of `groups` successive, equal parts of the batch has
    statistics of its own, as if it were on a GPU of its own; (B, C, h, w) -> the same shape."""

    groups = 1

    def forward(self, x: Tensor) -> Tensor:
        G, C, share, norm = self.groups, self.num_features, self.momentum, super().forward
        if G == 1 or not self.training:
            return norm(x)
        x = x.unflatten(0, (G, -1))                                          # (G, B/G, C, h, w)
        if not torch.compiler.is_compiling():
            return torch.cat([norm(part) for part in x])
        # in a graph one norm of G C channels; launched alone, its copies cost more than the loop
        x = x.transpose(0, 1).flatten(1, 2)                                  # (B/G, G C, h, w)
        # mean and variance of each group; with a momentum of 1 nothing of the zeros is left
        new = self.running_mean.new_zeros(2, G, C)
        x = F.batch_norm(x, *new.flatten(1), self.weight.repeat(G), self.bias.repeat(G), True, 1.0)
        # the running statistics, as if the groups had come in turn: `share` of each enters, and
        # shrinks with each that follows
        left = (1 - share) ** torch.arange(G - 1, -1, -1, dtype=new.dtype, device=x.device)  # (G,)
        for old, now in zip((self.running_mean, self.running_var), (left[:, None] * new).sum(1)):
            old.mul_((1 - share) ** G).add_(share * now)
        self.num_batches_tracked.add_(G)
        return x.unflatten(1, (G, C)).transpose(0, 1).flatten(0, 1)


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
        self.bn1 = GroupedBatchNorm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = GroupedBatchNorm(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = GroupedBatchNorm(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None  # torchvision's name; it fits the shortcut to the output's shape
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False),
                                            GroupedBatchNorm(out))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        x += shortcut  # safe in place: the backward pass of bn3 needs its input, not this output
        return self.relu(x)  # after the sum, not before: else a block could only ever add


class ResNet(nn.Module):
    """Residual network for person images; forward maps (B, 3, H, W) to one feature (B, embed_dim).

    depths: blocks in each of the four stages. width: channels of the stem; the stages have 4, 8,
    16 and 32 times as many. last_stride: 1 keeps the last map at H/16 x W/16 instead of H/32 x
    W/32; the finer map costs no parameters, and details of clothing survive [BoT]. Source: He et
    al. 2016.
    """

    def __init__(self, depths: tuple[int, ...] = (3, 4, 6, 3), width: int = 64,
                 last_stride: int = 1):
        super().__init__()
        if len(depths) != 4 or min(depths) < 1:
            raise ValueError(f"ResNet has four stages of at least one block, got depths={depths}")
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = GroupedBatchNorm(width)
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
            # gradients of a deep network explode unless its blocks add nothing at first (Goyal et
            # al. 2017); with one block a stage it learns less that way (docs/results.md)
            if isinstance(module, Bottleneck) and max(depths) > 1:
                nn.init.zeros_(module.bn3.weight)

    def forward_features(self, x: Tensor) -> Tensor:
        """Last feature map: (B, 3, H, W) -> (B, embed_dim, h, w), h = H/16 for last_stride=1, H/32
        for 2."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))  # (B, width, H/4, W/4)
        x = self.layer1(x)                                    # (B, 4 width, H/4, W/4)
        x = self.layer2(x)                                    # (B, 8 width, H/8, W/8)
        x = self.layer3(x)                                    # (B, 16 width, H/16, W/16)
        return self.layer4(x)                                 # (B, 32 width, h, w)

    def forward(self, x: Tensor) -> Tensor:
        """Global feature, not normalised: (B, 3, H, W) -> (B, embed_dim)."""
        return self.forward_features(x).mean(dim=(2, 3))


def resnet50(last_stride: int = 1) -> ResNet:
    """The backbone of UP-ReID; last_stride=2 is torchvision's network, 1 the usual one for ReID."""
    return ResNet((3, 4, 6, 3), 64, last_stride)


def resnet_tiny(last_stride: int = 1) -> ResNet:
    """One block a stage at half the width, D = 1024: trains on a laptop's CPU in minutes. [ours]"""
    return ResNet((1, 1, 1, 1), 32, last_stride)


RESNETS = {"resnet_tiny": resnet_tiny, "resnet50": resnet50}

# ---------------------------------------------------------------------------------------------
# Losses: pure functions of unit vectors
# ---------------------------------------------------------------------------------------------


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Instance contrast [ours U1; MoCo]: q, k (B, d), queue (K, d) -> scalar.

    L = -mean over the batch of log[ exp(q.k / T) / (exp(q.k / T) + sum_i exp(q.n_i / T)) ], n_i the
    rows of the queue, T the temperature: the cross-entropy of finding k among 1 + K candidates;
    ln(1 + K) when all are equally similar. Source: van den Oord et al. 2018, He et al. 2020.
    """
    positive = (q * k).sum(1, keepdim=True)                                  # (B, 1)
    negatives = q @ queue.T                                                  # (B, K)
    scores = torch.cat([positive, negatives], dim=1) / temperature           # (B, 1 + K)
    return -scores.log_softmax(1)[:, 0].mean()


def global_consistency(q: Tensor, o: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Symmetric KL between what q and o find similar in the queue [ours U2]: (B, d), (B, d), (K, d)
    -> scalar. No gradient through o, the target: else both could agree by forgetting the clues.

    [UP-ReID abstract]: augmented and original image shall agree. The original has all the clues
    that augmentation may destroy; which other people it resembles is a target that contrast alone
    does not give. With P = softmax(q.n_i / T), R = softmax(o.n_i / T) over the queue, L = mean of
    (KL(P||R) + KL(R||P)) / 2. Form after CO2 (arXiv 2010.02217; half the symmetric KL, as lightly
    implements it, which also has the positive among the entries and detaches neither side) [CO2].
    """
    log_p = (q @ queue.T / temperature).log_softmax(1)                       # (B, K)
    # o comes without a gradient; detached all the same, so that this function is right by itself
    log_r = (o.detach() @ queue.T / temperature).log_softmax(1)              # (B, K)
    # KL(P||R) + KL(R||P) = sum P (log P - log R) + R (log R - log P)
    return ((log_p.exp() - log_r.exp()) * (log_p - log_r)).sum(1).mean() / 2


def intrinsic_contrast(a: Tensor, b: Tensor, temperature: float, hardest: int) -> Tensor:
    """Contrast among the M stripes of one image [ours U3]: a, b (B, M, d) -> scalar.

    [UP-ReID abstract]: an intrinsic contrast among local patches of each image. Stripe m of a must
    find stripe m of b: L = -mean over images and m of
    log[ exp(a_m.b_m / T) / (exp(a_m.b_m / T) + sum over j in H_m of exp(a_m.b_j / T)) ], H_m the
    `hardest` (most similar) of the other M - 1 stripes of the image. ln(1 + hardest) when all are
    equally similar. As they are of one image, light and tint of the camera, which they share, do
    not help: what is particular to that part of the body must.
    """
    M = a.shape[1]
    assert 1 <= hardest < M, f"hardest={hardest} of the {M - 1} other stripes of an image"
    scores = a @ b.mT / temperature                                          # (B, M, M)
    positive = scores.diagonal(dim1=1, dim2=2)[:, :, None]                   # (B, M, 1)
    itself = torch.eye(M, dtype=torch.bool, device=a.device)
    negatives = scores.masked_fill(itself, -torch.inf).topk(hardest).values  # (B, M, hardest)
    return -torch.cat([positive, negatives], dim=2).log_softmax(2)[:, :, 0].mean()


# ---------------------------------------------------------------------------------------------
# The objective
# ---------------------------------------------------------------------------------------------


def projection_head(embed_dim: int, dim: int) -> nn.Sequential:
    """(..., embed_dim) -> (..., dim), two layers [MoCo]: contrast discards what augmentation
    changes, and should do so here and not in the backbone."""
    return nn.Sequential(nn.Linear(embed_dim, embed_dim), nn.ReLU(), nn.Linear(embed_dim, dim))


class UPReID(nn.Module):
    """Online and momentum encoder and the queue; forward gives the losses of one step.

    backbone: the online ResNet; the momentum encoder starts as its copy and follows it. dim d,
    queue_size K [LUP]. Temperatures and weights are of the losses above (sources: `UPReIDRecipe`);
    a loss of weight 0 is not computed. hardest: see `intrinsic_contrast`. groups: parts of
    a forward's batch with batch statistics of their own; of G in all processes, query and key
    share about 1 / G of the images, so one in all would leak (see `encode_keys`). shuffle=False
    lets the statistics leak, for the tests. forward raises RuntimeError for a batch that cannot be
    cut into groups.
    """

    def __init__(self, backbone: ResNet, dim: int = 128, queue_size: int = 65536,
                 temperature: float = 0.1, temperature_global: float = 0.05,
                 temperature_local: float = 0.1, weight_global: float = 1.0,
                 weight_local: float = 1.0, hardest: int = 2, groups: int = 2,
                 shuffle: bool = True):
        super().__init__()
        D = backbone.embed_dim
        self.online = nn.ModuleDict({"backbone": backbone, "head": projection_head(D, dim)})
        if weight_local:  # stripes have a head of their own
            self.online["stripe_head"] = projection_head(D, dim)
        self.momentum = copy.deepcopy(self.online).requires_grad_(False)
        # random at first, which is too easy: L_con starts low and rises until real keys fill it
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))  # the next key's place
        self.new_keys: list[Tensor] = []                         # since the queue last moved
        self.temperature, self.temperature_global = temperature, temperature_global
        self.temperature_local, self.hardest = temperature_local, hardest
        self.weight_global, self.weight_local = weight_global, weight_local
        self.groups, self.shuffle = groups, shuffle
        for norm in (m for m in self.modules() if isinstance(m, GroupedBatchNorm)):
            norm.groups = groups
        # the losses of a network that finds everything equally similar
        self.reference = {"ln_queue": math.log(1 + queue_size)} | (
            {"ln_stripes": math.log(1 + hardest)} if weight_local else {})

    def forward(self, views: dict[str, Tensor], **_) -> dict[str, Tensor]:
        """Losses {"total", "instance", "global", "local"} and diagnostics, all scalars.

        views: "first", "second", "original" (B, 3, H, W) and "stripes1", "stripes2" (B, M, 3, H/M,
        W), augmented pixels of the same stripes. What a loss of weight 0 alone needs may be absent.
        """
        feature = self.online["backbone"](views["first"])                          # (B, D)
        q = self.project(self.online, "head", feature)                             # (B, d)
        k, o = self.encode_keys(views)                                             # (B, d) each
        self.new_keys.append(gathered(k))
        a, b = self.encode_stripes(views) if self.weight_local else (None, None)   # (B, M, d) each
        # not in bfloat16: temperatures of 0.1 and 0.05 magnify its rounding 10 and 20 times
        with torch.autocast(q.device.type, enabled=False):
            losses = {"instance": info_nce(q, k, self.queue, self.temperature)}
            if self.weight_global:
                losses["global"] = global_consistency(q, o, self.queue, self.temperature_global)
            if self.weight_local:
                losses["local"] = intrinsic_contrast(a, b, self.temperature_local, self.hardest)
            total = (losses["instance"] + self.weight_global * losses.get("global", 0)
                     + self.weight_local * losses.get("local", 0))                 # [ours U4]
            return {"total": total, **losses, **self.diagnose(feature, q, k)}

    def project(self, encoder: nn.ModuleDict, head: str, features: Tensor) -> Tensor:
        """Features (..., D) -> unit vectors (..., d) in float32."""
        return F.normalize(encoder[head](features).float(), dim=-1)

    def encode(self, encoder: nn.ModuleDict, head: str, views: Tensor) -> Tensor:
        """Several views of each image in one forward: (B, V, 3, H, W) -> unit vectors (B, V, d)."""
        features = encoder["backbone"](views.flatten(0, 1))                    # (B V, D)
        return self.project(encoder, head, features).unflatten(0, views.shape[:2])

    @torch.no_grad()
    def encode_keys(self, views: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """k of the second views and o of the originals (None when U2 is off), (B, d) each, in one
        forward; no gradient: g follows f slowly, so that old keys in the queue stay comparable.

        Were q and k of an image normalised by the same batch's statistics, the network could
        recognise the batch instead of the person: the queue comes from other batches, the positive
        never does. So keys are grouped differently from queries [MoCo: "shuffling BN"]. Write the
        n images row by row into a table with G columns, one per group of all processes: n / G
        successive images are a group of queries, a column is a group of keys. Any two have about
        one in G of their images in common (exactly, where G^2 divides n). Unlike MoCo's, the keys'
        statistics include the originals.
        """
        names = ("second", "original") if self.weight_global else ("second",)
        images = torch.stack([views[name] for name in names], dim=1)  # (B, 1 or 2, 3, H, W)
        images = gathered(images)                 # (n, 1 or 2, 3, H, W), n = B x processes
        order = torch.arange(len(images), device=images.device)                # (n,)
        if self.shuffle:
            order = order.unflatten(0, (-1, world_size() * self.groups)).T.flatten()
        mine = images[part_of(order)]                             # (B, 1 or 2, 3, H, W)
        keys = gathered(self.encode(self.momentum, "head", mine))              # (n, 1 or 2, d)
        keys = keys[part_of(order.argsort())]     # the inverse permutation:     (B, 1 or 2, d)
        return keys[:, 0], keys[:, 1] if self.weight_global else None

    def encode_stripes(self, views: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """a and b, (B, M, d) each: all stripes of all images, in one forward of each encoder."""
        # no shuffling: positive and negatives are of one image, their statistics tell nothing
        return (self.encode(self.online, "stripe_head", views["stripes1"]),
                self.encode(self.momentum, "stripe_head", views["stripes2"]))  # g takes no gradient

    @torch.no_grad()
    def enqueue(self, k: Tensor) -> None:
        """New keys (n, d) replace the oldest in the queue, around its end if need be."""
        K = len(self.queue)
        k = k[-K:]
        place = (self.oldest + torch.arange(len(k), device=k.device)) % K
        self.queue[place] = k.to(self.queue.dtype)
        self.oldest.copy_((self.oldest + len(k)) % K)

    @torch.no_grad()
    def diagnose(self, feature: Tensor, q: Tensor, k: Tensor) -> dict[str, Tensor]:
        """accuracy: share of queries more similar to their key than to all of the queue.
        feature_std, query_std: `spread` of the backbone's features and of q; one may collapse
        without the other."""
        best = (q @ self.queue.T).amax(1)                                          # (B,)
        return {"accuracy": ((q * k).sum(1) > best).float().mean(),
                "feature_std": spread(feature), "query_std": spread(q)}

    def finish_gradients(self, epoch: int) -> Tensor:
        """Nothing is clipped or frozen [LUP]; the norm of all gradients."""
        return nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])

    @torch.no_grad()
    def update_teacher(self, momentum: float, **_) -> None:
        """Once per optimiser step: parameters of g, the momentum encoder (the "teacher" of
        train.py's loop): g = m g + (1 - m) f; new keys enter the queue.

        Not in forward: the losses still need the old queue for their gradients. Statistics of batch
        norm are not copied: g has those of its own forwards.
        """
        for k in self.new_keys:
            self.enqueue(k)
        self.new_keys.clear()
        ema(self.momentum, self.online, momentum)

    def warning(self, values: dict[str, float]) -> str:
        """What a line of the log warns of, if of anything: all images have the same feature, or the
        same query."""
        # at random weights above 0.3 on images of people; the limit is ours
        spread_out = all(values[name] > 1e-2 for name in ("feature_std", "query_std"))
        return "" if spread_out else "COLLAPSE?"

    def backbone_for_export(self) -> ResNet:
        """The online encoder's ResNet [LUP]. The running statistics of its batch norms are those of
        whole images and stripes together; fine-tuning finds its own."""
        return self.online["backbone"]


def spread(x: Tensor) -> Tensor:
    """sqrt(1 - |mean|^2) of the directions of x (n, D): 0 = all in one point; 1 = their mean is 0,
    which even a few clusters can have."""
    return F.normalize(x.float(), dim=1).var(0, correction=0).sum().sqrt()


def ema(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Parameters of the teacher = m teacher + (1 - m) student, in one launch. (In both method
    files, as each stands alone.)"""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


# ---------------------------------------------------------------------------------------------
# Several processes: one alone is a world of 1
# ---------------------------------------------------------------------------------------------


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gathered(x: Tensor) -> Tensor:
    """Rows of all processes, (B, ...) -> (n, ...), in the order of processes; without gradient."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def part_of(x: Tensor) -> Tensor:
    """This process's share of what all have: (n, ...) -> (B, ...)."""
    return x if world_size() == 1 else x.chunk(world_size())[dist.get_rank()]


# ---------------------------------------------------------------------------------------------
# How it is trained
# ---------------------------------------------------------------------------------------------


def cosine(t: float, start: float, end: float) -> float:
    """From start at t = 0 to end at t = 1 along half a cosine wave; constant outside.

    >>> cosine(0, 1.0, 0.0), cosine(0.5, 1.0, 0.0), cosine(2, 1.0, 0.0)
    (1.0, 0.5, 0.0)
    """
    return end + (start - end) * (1 + math.cos(math.pi * min(max(t, 0), 1))) / 2


@dataclass(frozen=True)
class UPReIDRecipe:
    """UP-ReID's pre-training on LUPerson, a line per value: the published ones of LUPerson's own
    MoCo v2 [LUP], on which this project builds its reading of UP-ReID, and what that adds [ours].
    """

    arch: Literal[tuple(RESNETS)] = "resnet50"  # backbone [PLIP]
    size: tuple[int, int] = (256, 128)  # height x width of the views [LUP]
    epochs: int = 200                   # passes over the images [LUP]
    batch: int = 2560                   # images per step, of all processes [LUP]
    lr: float = 0.03                    # learning rate, times batch / 256: 0.3 at 2560 [LUP]
    weight_decay: float = 1e-4          # on every parameter [LUP]
    momentum: float = 0.999             # of the momentum encoder [LUP]
    dim: int = 128                      # d, of queries and keys [LUP]
    queue: int = 65536                  # K, keys of past batches [LUP]
    temperature: float = 0.1            # of the instance contrast [LUP]
    temperature_global: float = 0.05    # of the consistency [CO2]
    temperature_local: float = 0.1      # of the contrast among stripes [ours U3]
    weight_global: float = 1.0          # of the consistency, 0: without [CO2]
    weight_local: float = 1.0           # of the contrast among stripes, 0: without [ours U4]
    stripes: int = 4                    # M, horizontal stripes of an image [ours U3]
    hardest: int = 2                    # most similar other stripes that count [ours U3]
    groups: int = 8                     # parts of the whole batch, own batch norm each [LUP: GPUs]
    last_stride: Literal[1, 2] = 2      # stride of the last ResNet stage [LUP]
    seed: int = 0                       # of everything random
    bf16: bool = False                  # bfloat16 in the networks; on by default on a GPU

    # small images and networks on a CPU; with 512 keys and four times this learning rate one seed
    # in three collapsed, all queries alike [ours]
    LAPTOP: ClassVar = dict(size=(128, 64), epochs=16, batch=64, momentum=0.99, queue=128, groups=4)
    # thousands of images, one machine [ours]
    ONE_GPU: ClassVar = dict(batch=256, queue=4096)

    @classmethod
    def preset(cls, dataset: str, arch: str | None = None) -> "UPReIDRecipe":
        """The recipe for a dataset's name and a backbone; arch=None: the usual one."""
        arch = arch or ("resnet_tiny" if dataset == "synthetic" else "resnet50")
        small = dataset == "synthetic" or arch == "resnet_tiny"
        values = cls.LAPTOP if small else {} if dataset == "luperson" else cls.ONE_GPU
        return cls(arch=arch, **values)

    def build(self, forwards: int = 1) -> UPReID:
        """The objective with random weights. forwards: those that share the images of a step,
        processes x passes. Raises ValueError for values that do not fit together."""
        (H, W), M = self.size, self.stripes
        if self.weight_local and (M < 1 or H % M):
            raise ValueError(f"--size {H}x{W}: the height cannot be cut into --stripes {M}")
        if self.weight_local and not 1 <= self.hardest < M:
            raise ValueError(f"--hardest {self.hardest}: an image has {M - 1} other stripes")
        if self.groups < 1 or self.groups % forwards:
            raise ValueError(f"--groups {self.groups} must be a multiple of {forwards}, "
                             f"processes x --accum passes")
        if world_size() == 1 and self.groups == forwards:  # a pass is one group
            print(f"WARNING: with --groups {self.groups} in as many passes queries and keys share "
                  f"batch statistics: the network may recognise the batch, not people")
        if self.batch % self.groups or self.batch < 2 * self.groups:
            raise ValueError(f"--batch {self.batch} cannot be cut into --groups {self.groups} of "
                             f"at least 2 images")
        backbone = RESNETS[self.arch](self.last_stride)
        return UPReID(backbone, self.dim, self.queue, self.temperature, self.temperature_global,
                      self.temperature_local, self.weight_global, self.weight_local, self.hardest,
                      self.groups // forwards)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """SGD with momentum, all parameters alike [LUP]."""
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.SGD([{"params": trained, "decay": 1.0}], momentum=0.9, fused=True)

    def schedule(self, step: int, steps_per_epoch: int) -> tuple[dict, dict]:
        """Of a 0-based step: what the optimiser takes, what the model takes."""
        t = step // steps_per_epoch / self.epochs      # constant within an epoch, no warm-up [LUP]
        return ({"lr": cosine(t, self.lr * self.batch / 256, 0.0),
                 "weight_decay": self.weight_decay}, {"momentum": self.momentum})

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Beside its views an image needs nothing drawn."""
        return {}


if __name__ == "__main__":  # the file alone, in any folder: sizes, and one step on noise
    net, images = resnet_tiny(), torch.randn(2, 3, 128, 64)
    print(f"resnet_tiny: {sum(p.numel() for p in net.parameters()):,} parameters, map "
          f"{tuple(net.forward_features(images).shape)}, feature {tuple(net(images).shape)}")
    model = UPReID(net, queue_size=256)
    noise = {name: torch.randn(4, 3, 128, 64) for name in ("first", "second", "original")}
    noise |= {name: torch.randn(4, 4, 3, 32, 64) for name in ("stripes1", "stripes2")}
    losses = model(noise)
    losses["total"].backward()
    print("one step on noise:", {k: round(v.item(), 3) for k, v in losses.items()}, model.reference)
