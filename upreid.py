"""UP-ReID, an interpretation of its abstract: a ResNet, pre-trained on unlabelled crops of people.

"Unleashing the Potential of Unsupervised Pre-Training with Intra-Identity Regularization for Person
Re-Identification", arXiv 2112.00317 and (without "the") CVPR 2022.

Of the paper only the abstract could be consulted. Its announced repository (Frost-Yang-99/UP-ReID)
holds no code. The abstract states: contrastive learning; augmentation can destroy clues that tell
people apart; so an intra-identity regularisation with a global part, consistency between augmented
and original image, and a local part, an intrinsic contrast among local patches of one image. How,
it does not state: U1 to U4 below are this project's reading, tagged [ours]. They extend LUPerson's
MoCo v2, whose code is public [LUP].

    x          person image, as it is                                (B, 3, H, W)     H = 2 W
    x1, x2     two augmentations of x                                (B, 3, H, W)
    q          = f(x1), by the online encoder                        (B, d)           unit vectors
    k, o       = g(x2), g(x), by the momentum encoder, no gradient   (B, d)
    queue      keys of past batches, at first random vectors         (K, d)
    a, b       = f, g of M stripes of x, augmented twice; own head   (B, M, d)
    D, d       width of the ResNet's feature, and of its projection (128)
    n, G       images of all processes (n = B for one), groups of their batch norms
    L_con      q must pick out k among k and the queue               info_nce             [ours U1]
    L_glob     q and o should find the same keys similar             global_consistency   [ours U2]
    L_loc      find stripe m among the stripes of x                  intrinsic_contrast   [ours U3]
    L        = L_con + weight_global L_glob + weight_local L_loc                          [ours U4]

f's backbone is exported. What differs from the ResNet of an ImageNet course: the last stage may
keep its resolution (`last_stride=1`); a batch norm may compute its statistics for groups of the
batch (`GroupedBatchNorm`); a ResNet-50's residual branches start at zero; and there is no
classifier, as identities belong to fine-tuning. Parameter names are torchvision's, so that public
ResNet-50 files load. The same objective, view by view, is `plain_forward` in tests/test_upreid.py.

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


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut; (B, C, h, w) -> (B, 4 width, h/stride, w/stride).

    Source: He et al. 2016. The stride sits on the 3x3 convolution ("v1.5"), as torchvision has it;
    the paper put it on the first 1x1, which skips three quarters of its input. `GroupedBatchNorm`
    is batch norm; `UPReID.encode_keys` says why it has groups.
    """

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        out = 4 * width
        # no bias: the batch norm behind each convolution subtracts the mean and would cancel it
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = GroupedBatchNorm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = GroupedBatchNorm(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = GroupedBatchNorm(out)
        self.downsample = nn.Identity()  # torchvision's name; fits the shortcut to the output
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False),
                                            GroupedBatchNorm(out))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.downsample(x)
        # in place is safe: the backward pass of a batch norm needs its input, not its output
        x = self.bn1(self.conv1(x)).relu_()
        x = self.bn2(self.conv2(x)).relu_()
        x = self.bn3(self.conv3(x))
        x += shortcut
        return x.relu_()  # after the sum, not before: else a block could only increase values


def make_stage(channels: int, width: int, depth: int, stride: int) -> nn.Sequential:
    """`depth` blocks, the first with a stride; (B, channels, h, w) -> (B, 4 width, ...)."""
    first = Bottleneck(channels, width, stride)
    others = [Bottleneck(4 * width, width, 1) for _ in range(depth - 1)]
    return nn.Sequential(first, *others)


class ResNet(nn.Module):
    """Residual network for person images; forward maps (B, 3, H, W) to one feature (B, embed_dim).

    depths: blocks in each of the four stages. width: channels of the stem; the stages have 4, 8,
    16 and 32 times as many. last_stride: 1 keeps the last map at H/16 x W/16 instead of H/32 x
    W/32; the finer map costs no parameters, only time and memory, and keeps more detail [BoT].
    Source: He et al. 2016.
    """

    def __init__(self, depths: tuple[int, ...], width: int = 64, last_stride: int = 1):
        super().__init__()
        assert len(depths) == 4 and min(depths) > 0, f"blocks of four stages, not {depths}"
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = GroupedBatchNorm(width)
        self.layer1 = make_stage(width, width, depths[0], 1)
        self.layer2 = make_stage(4 * width, 2 * width, depths[1], 2)
        self.layer3 = make_stage(8 * width, 4 * width, depths[2], 2)
        self.layer4 = make_stage(16 * width, 8 * width, depths[3], last_stride)
        self.embed_dim = 32 * width
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # keeps the variance of gradients through ReLUs (He et al. 2015)
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            # zero-init of each block's last batch norm (Goyal et al. 2017): blocks add nothing at
            # first. torchvision starts from 1, which trains, too. In the one setting tried here a
            # ResNet-50 learnt less from 1; a network of one block a stage learnt more from 1
            # (docs/choices.md)
            if isinstance(module, Bottleneck) and max(depths) > 1:
                nn.init.zeros_(module.bn3.weight)

    def forward_features(self, x: Tensor) -> Tensor:
        """Last feature map: (B, 3, H, W) -> (B, embed_dim, h, w), h = H/16 for last_stride=1, H/32
        for 2."""
        x = self.bn1(self.conv1(x)).relu_()                   # (B, width, H/2, W/2)
        x = F.max_pool2d(x, 3, stride=2, padding=1)           # (B, width, H/4, W/4)
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
    logits = torch.cat([positive, negatives], dim=1) / temperature           # (B, 1 + K)
    return -logits.log_softmax(1)[:, 0].mean()


def global_consistency(q: Tensor, o: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Symmetric KL between what q and o find similar in the queue [ours U2]: (B, d), (B, d), (K, d)
    -> scalar. o is a target: no gradient goes through it.

    [UP-ReID abstract]: augmented and original image should agree. The original has all the clues
    that augmentation may destroy; which other people it resembles is a target that contrast alone
    does not give. With P = softmax(q.n_i / T), R = softmax(o.n_i / T) over the queue, L = mean of
    (KL(P||R) + KL(R||P)) / 2. The form is that of CO2 (arXiv 2010.02217) [CO2], as the library
    lightly implements it; there, unlike here, P and R also have an entry for the positive, and
    neither is detached.
    """
    log_p = (q @ queue.T / temperature).log_softmax(1)                       # (B, K)
    # o comes without a gradient; detached all the same, so that this function is right by itself
    log_r = (o.detach() @ queue.T / temperature).log_softmax(1)              # (B, K)
    # KL(P||R) + KL(R||P) = sum P (log P - log R) + R (log R - log P)
    kl = ((log_p.exp() - log_r.exp()) * (log_p - log_r)).sum(1)              # (B,)
    return kl.mean() / 2


def intrinsic_contrast(a: Tensor, b: Tensor, temperature: float, hardest: int) -> Tensor:
    """Contrast among the M stripes of one image [ours U3]: a, b (B, M, d) -> scalar.

    [UP-ReID abstract]: an intrinsic contrast among local patches of each image. Stripe m of a must
    find stripe m of b: L = -mean over images and m of
    log[ exp(a_m.b_m / T) / (exp(a_m.b_m / T) + sum over j in H_m of exp(a_m.b_j / T)) ], H_m the
    `hardest` (most similar) of the other M - 1 stripes of the image. ln(1 + hardest) when all are
    equally similar. All stripes of an image have the light and tint of its camera, which should
    therefore help little; what is particular to a part of the body should help.
    """
    M = a.shape[1]
    assert 1 <= hardest < M, f"hardest={hardest} of the {M - 1} other stripes of an image"
    logits = a @ b.mT / temperature                                          # (B, M, M)
    positive = logits.diagonal(dim1=1, dim2=2)[:, :, None]                   # (B, M, 1)
    itself = torch.eye(M, dtype=torch.bool, device=a.device)
    negatives = logits.masked_fill(itself, -torch.inf).topk(hardest).values  # (B, M, hardest)
    logits = torch.cat([positive, negatives], dim=2)                         # (B, M, 1 + hardest)
    return -logits.log_softmax(2)[:, :, 0].mean()


# ---------------------------------------------------------------------------------------------
# The objective
# ---------------------------------------------------------------------------------------------


class UPReID(nn.Module):
    """Online and momentum encoder and the queue; forward gives the losses of one step.

    backbone: the online ResNet; the momentum encoder starts as its copy and follows it. recipe:
    sizes, temperatures and weights of the losses; a loss of weight 0 is not computed. groups: parts
    of this process's batch with batch statistics of their own; `encode_keys` says why. forward
    raises RuntimeError for a batch that cannot be cut into groups.
    """

    shuffle = True  # False lets the statistics leak, for the tests

    def __init__(self, backbone: ResNet, recipe: "UPReIDRecipe", groups: int):
        super().__init__()
        self.recipe = recipe
        self.groups = groups
        # the losses of a network that finds everything equally similar
        self.reference = {"ln_queue": math.log(1 + recipe.queue)}
        D = backbone.embed_dim
        d = recipe.dim
        self.online = nn.ModuleDict({"backbone": backbone, "head": projection_head(D, d)})
        if recipe.weight_local:
            self.online["stripe_head"] = projection_head(D, d)
            self.reference["ln_stripes"] = math.log(1 + recipe.hardest)
        self.momentum = copy.deepcopy(self.online).requires_grad_(False)
        # random at first: k is easy to tell from random vectors, so that L_con starts low and rises
        # until the keys of real images fill the queue
        self.register_buffer("queue", F.normalize(torch.randn(recipe.queue, d), dim=1))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))  # the next key's place
        self.new_keys = []                                       # since the queue last moved
        for module in self.modules():
            if isinstance(module, GroupedBatchNorm):
                module.groups = groups

    def forward(self, views: dict[str, Tensor], **_) -> dict[str, Tensor]:
        """Losses {"total", "instance", "global", "local"} and diagnostics, all scalars.

        views: "first", "second", "original" (B, 3, H, W) and "stripes1", "stripes2" (B, M, 3, H/M,
        W), augmented pixels of the same stripes. What a loss of weight 0 alone needs may be absent.
        """
        recipe = self.recipe
        feature = self.online["backbone"](views["first"])                          # (B, D)
        q = F.normalize(self.online["head"](feature).float(), dim=1)               # (B, d)
        # of all processes, (n, 1 or 2, d): [:, 0] is k and [:, 1] is o, unless U2 is off
        keys = self.encode_keys(views)
        self.new_keys.append(keys[:, 0])
        keys = shard(keys)                                 # of this process, (B, 1 or 2, d)
        k = keys[:, 0]                                                             # (B, d)
        if recipe.weight_local:
            # not shuffled: positive and negatives are of one image, so statistics tell nothing
            a = self.encode(self.online, "stripe_head", views["stripes1"])         # (B, M, d)
            b = self.encode(self.momentum, "stripe_head", views["stripes2"])       # no gradient
        # not in bfloat16: temperatures of 0.1 and 0.05 magnify its rounding 10 and 20 times
        with torch.autocast(q.device.type, enabled=False):
            total = info_nce(q, k, self.queue, recipe.temperature)                 # [ours U4]
            losses = {"instance": total}
            if recipe.weight_global:
                o = keys[:, 1]                                                     # (B, d)
                losses["global"] = global_consistency(q, o, self.queue, recipe.temperature_global)
                total = total + recipe.weight_global * losses["global"]
            if recipe.weight_local:
                losses["local"] = intrinsic_contrast(a, b, recipe.temperature_local, recipe.hardest)
                total = total + recipe.weight_local * losses["local"]
            return {"total": total, **losses, **self.diagnose(feature, q, k)}

    def encode(self, encoder: nn.ModuleDict, head: str, views: Tensor) -> Tensor:
        """Several views of each image in one forward: (B, V, 3, H, W) -> unit vectors (B, V, d)."""
        features = encoder["backbone"](views.flatten(0, 1))                        # (B V, D)
        vectors = F.normalize(encoder[head](features).float(), dim=1)              # (B V, d)
        return vectors.unflatten(0, views.shape[:2])

    @torch.no_grad()
    def encode_keys(self, views: dict[str, Tensor]) -> Tensor:
        """k of the second views and, unless U2 is off, o of the originals: (n, 1 or 2, d), of the n
        images of all processes, in one forward. g has no gradient: it follows f, slowly, so that
        old keys in the queue stay comparable. (In one process n = B, and `all_gather` and `shard`
        return what they are given.)

        If batch norm took statistics over the same images for q and for k, the network could
        recognise the batch instead of the person: the positive is of this batch, the negatives in
        the queue are not. So keys are grouped differently from queries [MoCo: "shuffling BN"].
        Write the n images row by row into a table with G columns, one per group. A group of queries
        is n / G successive images; a group of keys is a column. For n = 4, G = 2:

            0 1     queries in groups (0, 1), (2, 3); keys in groups (0, 2), (1, 3)
            2 3

        Any two groups share about one in G of their images (exactly, where G^2 divides n). Unlike
        MoCo's, the keys' statistics include the originals.
        """
        images = [views["second"]]                                             # (B, 3, H, W)
        if self.recipe.weight_global:
            images.append(views["original"])
        images = all_gather(torch.stack(images, dim=1))     # (n, 1 or 2, 3, H, W), n = B processes
        order = torch.arange(len(images), device=images.device)                # (n,)
        if self.shuffle:
            table = order.unflatten(0, (-1, world_size() * self.groups))       # (n/G, G)
            order = table.T.flatten()
        mine = images[shard(order)]                                            # (B, 1 or 2, ...)
        keys = all_gather(self.encode(self.momentum, "head", mine))            # (n, 1 or 2, d)
        return keys[order.argsort()]                        # in the order of images again

    @torch.no_grad()
    def diagnose(self, feature: Tensor, q: Tensor, k: Tensor) -> dict[str, Tensor]:
        """accuracy: fraction of queries more similar to their key than to all of the queue.
        feature_std, query_std: `spread` of the backbone's features and of q; one may collapse
        without the other."""
        best = (q @ self.queue.T).amax(1)                                          # (B,)
        return {"accuracy": ((q * k).sum(1) > best).float().mean(),
                "feature_std": spread(feature), "query_std": spread(q)}

    def clip_gradients(self, epoch: int) -> Tensor:
        """Nothing is clipped or frozen [LUP]; the norm of all gradients."""
        return nn.utils.get_total_norm([p.grad for p in self.online.parameters()])

    @torch.no_grad()
    def update_teacher(self, momentum: float, **_) -> None:
        """Once per optimiser step. Parameters of g, the momentum encoder (the "teacher" of
        train.py's loop): g = m g + (1 - m) f. New keys replace the oldest in the queue.

        Not in forward: the losses still need the old queue for their gradients. Statistics of batch
        norm are not copied: g has those of its own forwards.
        """
        # g <- m g + (1 - m) f, all parameters in one launch on a GPU
        torch._foreach_lerp_(list(self.momentum.parameters()), list(self.online.parameters()),
                             1 - momentum)
        K = len(self.queue)
        new = torch.cat(self.new_keys)[-K:]                                        # (n, d)
        places = (self.oldest + torch.arange(len(new), device=new.device)) % K
        self.queue[places] = new                                 # in place of the oldest keys
        self.oldest.add_(len(new)).remainder_(K)
        self.new_keys = []

    def warning(self, values: dict[str, float]) -> str:
        """What a line of the log warns of, or nothing. COLLAPSE?: all images have the same feature,
        or the same query."""
        # both are above 0.3 at random weights on images of people; the limit is ours
        if values["feature_std"] > 1e-2 and values["query_std"] > 1e-2:  # NaN fails this, too
            return ""
        return "COLLAPSE?"

    def backbone_for_export(self) -> ResNet:
        """The online encoder's ResNet [LUP]. The running statistics of its batch norms are those of
        whole images and stripes together; fine-tuning finds its own."""
        return self.online["backbone"]


def projection_head(embed_dim: int, dim: int) -> nn.Sequential:
    """(..., embed_dim) -> (..., dim), two layers [MoCo]: contrast discards what augmentation
    changes; a head lets it do so here more than in the backbone."""
    return nn.Sequential(nn.Linear(embed_dim, embed_dim), nn.ReLU(), nn.Linear(embed_dim, dim))


def spread(x: Tensor) -> Tensor:
    """Standard deviation of the unit vectors of x (n, D), sqrt(1 - |their mean|^2): 0 = all in one
    point; 1 = their mean is 0, which even a few clusters can have."""
    return F.normalize(x.float(), dim=1).var(0, correction=0).sum().sqrt()


# ---------------------------------------------------------------------------------------------
# Batch norm in groups ("ghost" batch norm): query and key must not share their statistics
# ---------------------------------------------------------------------------------------------


class GroupedBatchNorm(nn.BatchNorm2d):
    """Batch norm whose statistics, in training, are computed separately for each of `groups` equal
    parts of the batch, as if each part were on a GPU of its own; (B, C, h, w) -> the same shape.
    """

    groups = 1

    def forward(self, x: Tensor) -> Tensor:
        norm = super().forward
        if self.groups == 1 or not self.training:
            return norm(x)
        parts = x.unflatten(0, (self.groups, -1))                            # (G, B/G, C, h, w)
        if torch.compiler.is_compiling():
            return one_norm_for_all_groups(self, parts)
        return torch.cat([norm(part) for part in parts])                     # (B, C, h, w)


def one_norm_for_all_groups(norm: GroupedBatchNorm, parts: Tensor) -> Tensor:
    """Skip at first reading: the loop above in fewer operations, (G, B/G, C, h, w) -> (B, C, h, w).

    In a compiled graph this formula takes a quarter of the launches, and keeps the memory format
    that convolutions like; launched operation by operation, the loop is faster.
    """
    x = parts.to(norm.weight.dtype)                     # statistics are not computed in bfloat16
    variance, mean = torch.var_mean(x, dim=(1, 3, 4), correction=0, keepdim=True)
    scale = norm.weight[:, None, None] * (variance + norm.eps).rsqrt()       # (G, 1, C, 1, 1)
    x = (x - mean) * scale + norm.bias[:, None, None]
    n = parts[0, :, 0].numel()
    variance = variance * n / (n - 1)                   # unbiased
    for m, v in zip(mean.detach().flatten(1), variance.detach().flatten(1)):  # groups in turn
        norm.running_mean.lerp_(m, norm.momentum)
        norm.running_var.lerp_(v, norm.momentum)
    norm.num_batches_tracked.add_(len(parts))
    return x.to(parts.dtype).flatten(0, 1)


# ---------------------------------------------------------------------------------------------
# Several processes: one alone is a world of 1
# ---------------------------------------------------------------------------------------------


def world_size() -> int:
    if dist.is_initialized():
        return dist.get_world_size()
    return 1


def all_gather(x: Tensor) -> Tensor:
    """Rows of all processes, (B, ...) -> (n, ...), in the order of processes; without gradient."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def shard(x: Tensor) -> Tensor:
    """The rows of this process: (n, ...) -> (B, ...)."""
    if world_size() == 1:
        return x
    return x.chunk(world_size())[dist.get_rank()]


# ---------------------------------------------------------------------------------------------
# How it is trained
# ---------------------------------------------------------------------------------------------


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
    LAPTOP: ClassVar = dict(size=(128, 64), epochs=16, batch=64, momentum=0.99, queue=128,
                            groups=4)
    # thousands of images, one machine [ours]
    ONE_GPU: ClassVar = dict(batch=256, queue=4096)

    @classmethod
    def preset(cls, dataset: str, arch: str | None = None) -> "UPReIDRecipe":
        """The recipe for a dataset's name and a backbone; arch=None: the usual one."""
        if arch is None:
            arch = "resnet_tiny" if dataset == "synthetic" else "resnet50"
        values = cls.ONE_GPU
        if dataset == "synthetic" or arch == "resnet_tiny":
            values = cls.LAPTOP
        elif dataset == "luperson":
            values = {}
        return cls(arch=arch, **values)

    def build(self, forwards: int = 1) -> UPReID:
        """The objective with random weights. forwards: forward passes of a step, processes x
        micro-batches. Raises ValueError for values that do not fit together."""
        height, width = self.size
        if self.weight_local and (self.stripes < 1 or height % self.stripes):
            raise ValueError(f"--size {height}x{width}: the height cannot be cut into --stripes "
                             f"{self.stripes}")
        if self.weight_local and not 1 <= self.hardest < self.stripes:
            raise ValueError(f"--hardest {self.hardest}: an image has {self.stripes - 1} other "
                             f"stripes")
        if self.groups < 1 or self.groups % forwards:
            raise ValueError(f"--groups {self.groups} must be a multiple of {forwards} "
                             f"(processes x --accum micro-batches)")
        if world_size() == 1 and self.groups == forwards:  # a micro-batch is one group
            print(f"WARNING: with --groups {self.groups} in as many micro-batches queries and keys "
                  f"share batch statistics: the network may recognise the batch, not people")
        if self.batch % self.groups or self.batch < 2 * self.groups:
            raise ValueError(f"--batch {self.batch} cannot be cut into --groups {self.groups} of "
                             f"at least 2 images")
        backbone = RESNETS[self.arch](self.last_stride)
        return UPReID(backbone, self, self.groups // forwards)

    def optimizer(self, model: UPReID) -> torch.optim.Optimizer:
        """SGD with momentum, all parameters alike [LUP]."""
        groups = [{"params": model.online.parameters(), "decay": 1.0}]
        return torch.optim.SGD(groups, momentum=0.9, fused=True)

    def schedule(self, step: int, steps_per_epoch: int) -> tuple[dict, dict]:
        """Optimiser and model settings for step `step` (counted from 0)."""
        t = step // steps_per_epoch / self.epochs      # constant within an epoch, no warm-up [LUP]
        lr = self.lr * self.batch / 256 * (1 + math.cos(math.pi * t)) / 2
        return {"lr": lr, "weight_decay": self.weight_decay}, {"momentum": self.momentum}

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Nothing is sampled for an image beside its views."""
        return {}


if __name__ == "__main__":  # the file alone, in any folder: one step on noise
    noise = {}
    for name in ("first", "second", "original"):
        noise[name] = torch.randn(4, 3, 128, 64)
    for name in ("stripes1", "stripes2"):
        noise[name] = torch.randn(4, 4, 3, 32, 64)
    model = UPReIDRecipe.preset("synthetic").build()
    losses = model(noise)
    losses["total"].backward()
    print("one step on noise:", {k: round(v.item(), 3) for k, v in losses.items()})
