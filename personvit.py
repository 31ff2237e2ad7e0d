"""PersonViT: a plain ViT, pre-trained on unlabelled crops of people.

"PersonViT: Large-scale Self-supervised Vision Transformer for Person Re-Identification",
arXiv 2408.05398, Machine Vision and Applications 2025.

Two networks of one shape see the same people. The student learns to predict the teacher's output:
for whole people, from other crops of them (DINO), and for patches that are masked in the student's
input (iBOT). The teacher is a moving average of the student. No labels are used.

    globals  G = 2 crops of each of B person images       (G, B, 3, H, W)    H x W = 256 x 128
    locals   L smaller crops                              (L, B, 3, H/2, W/2)
    tokens   [CLS] and N patches of each view             (B, 1 + N, D)      N = 16 x 8, a tall grid
    t        teacher's logits over K prototypes           (G, B, K) of [CLS], (M, K) of patches
    s        student's logits, of all V = G + L views     (V, B, K) of [CLS], (M, K) of patches
    p      = softmax((t - c) / T_t), the target distribution; the centre c is a moving average of
             the teacher's logits, one of [CLS] [DINO] and one of all patches, masked or not [iBOT]
    CE     = -sum over K of p log softmax(s / T_s), the cross-entropy of target and prediction
    L_cls    CE of [CLS], across different views                                 [PersonViT Eq. 4]
    L_patch  CE of masked patches, in the same view                              [PersonViT Eq. 7]
    total  = L_cls + L_patch                                                     [PersonViT Eq. 8]

M patches of a batch are masked; D is the width of the network, d of the bottleneck before the
prototypes; T_t, T_s are temperatures; m is the teacher's momentum.

The authors' pre-training code is not public. Equations and structure are read from notes on the
paper, details from iBOT's code, tagged [iBOT]. Three recorded steps of that code, on square and on
tall images, give the same numbers here (tests/golden; without stochastic depth and interpolated
positions). The exported feature is the teacher's [CLS]. What differs from the ViT of an ImageNet
course: the grid is a rectangle (code that takes sqrt(N) fails for people) and patches may overlap
(`stride`). Parameter names are timm's, as in DINO, iBOT, TransReID, so that their files load. The
same objective with loops over views is `plain_forward` in tests/test_personvit.py.

Other tags: [PersonViT code] its published fine-tuning, [DINO], [TransReID], [SOLIDER] their code,
[DINO for ReID] a recipe for people with it; [inferred], [secondary], [from memory]: not read in the
source itself; [ours]: a choice of this project. docs/paper-to-code.md has them all.

Read `VisionTransformer.forward_features`, then `PersonViT.forward`.
"""

import copy
import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.special import entr  # entr(p) = -p log p

# ---------------------------------------------------------------------------------------------
# The backbone
# ---------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head self-attention, (B, S, D) -> (B, S, D), S tokens. Source: Vaswani et al. 2017."""

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        B, S, D = x.shape
        qkv = self.qkv(x).reshape(B, S, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                    # each (B, heads, S, D/heads)
        # = softmax(q k^T / sqrt(D/heads)) v; a fused kernel, where there is one, never stores the
        # (S, S) matrix
        x = F.scaled_dot_product_attention(q, k, v)             # (B, heads, S, D/heads)
        x = x.transpose(1, 2).reshape(B, S, D)                  # the heads side by side
        return self.proj(x)


class Block(nn.Module):
    """Pre-norm transformer block with stochastic depth, (B, S, D) -> (B, S, D).

    drop_path: probability that an image skips a branch in training (Huang et al. 2016); it
    regularises like dropout, but what remains is always a ViT, with fewer branches.
    """

    def __init__(self, embed_dim: int, num_heads: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        hidden = int(embed_dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn = Attention(embed_dim, num_heads)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(                   # on each token separately
            fc1=nn.Linear(embed_dim, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, embed_dim)))
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        for norm, branch in ((self.norm1, self.attn), (self.norm2, self.mlp)):
            update = branch(norm(x))                            # (B, S, D)
            if self.training and self.drop_path > 0:            # stochastic depth
                keep = 1 - self.drop_path
                kept = torch.rand(len(x), 1, 1, device=x.device) < keep
                update = update * (kept / keep).to(x.dtype)     # / keep: the mean stays the same
            x = x + update
        return x


class VisionTransformer(nn.Module):
    """Plain ViT on a rectangular grid; (B, 3, H, W) -> the [CLS] feature (B, embed_dim).

    img_size: (height, width) the position embeddings belong to; at other sizes they are
    interpolated. stride: of the patches, `patch_size` unless they overlap [TransReID]. drop_path:
    rate of the last block, growing linearly from 0 at the first (early blocks carry everything
    after them). forward raises RuntimeError when no patch fits. Source: Dosovitskiy et al. 2021;
    names and LayerNorm eps as timm.
    """

    def __init__(self, img_size: tuple[int, int] = (256, 128), patch_size: int = 16,
                 stride: int | None = None, embed_dim: int = 384, depth: int = 12,
                 num_heads: int = 6, mlp_ratio: float = 4.0, drop_path: float = 0.0):
        super().__init__()
        self.patch_size = patch_size
        self.stride = patch_size if stride is None else stride
        self.embed_dim = embed_dim
        self.grid = self.grid_of(*img_size)
        positions = 1 + math.prod(self.grid)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, positions, embed_dim))
        # cutting into patches and projecting each is one convolution
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, embed_dim, patch_size, self.stride)})
        self.blocks = nn.ModuleList()
        for rate in torch.linspace(0, drop_path, depth).tolist():
            self.blocks.append(Block(embed_dim, num_heads, mlp_ratio, rate))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_linear)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in an image of this size; pixels left over are not seen."""
        rows = (height - self.patch_size) // self.stride + 1
        columns = (width - self.patch_size) // self.stride + 1
        return rows, columns

    def forward_features(self, x: Tensor, mask: Tensor | None = None,
                         mask_token: Tensor | None = None) -> Tensor:
        """All tokens after the last LayerNorm: (B, 3, H, W) -> (B, 1 + N, D), [CLS] first.

        mask (B, rows, columns), True = masked: mask_token (1, D) stands for the patch, before
        positions are added, so that the network still knows where the hole is [iBOT].
        """
        x = self.patch_embed["proj"](x)                                 # (B, D, rows, columns)
        B, D, rows, columns = x.shape
        x = x.flatten(2).mT                                             # (B, N, D), row by row
        if mask is not None:
            masked = mask.flatten(1)[:, :, None]                        # (B, N, 1)
            x = torch.where(masked, mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(B, 1, D), x], dim=1)       # (B, 1 + N, D)
        # a smaller crop has fewer patches than there are positions
        x = x + resize_pos_embed(self.pos_embed, self.grid, (rows, columns), "bicubic")
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        """[CLS] feature, not normalised: (B, 3, H, W) -> (B, D)."""
        return self.forward_features(x)[:, 0]


def resize_pos_embed(pos_embed: Tensor, source_grid: tuple[int, int], target_grid: tuple[int, int],
                     mode: str = "bilinear") -> Tensor:
    """Carry position embeddings to another patch grid: (1, 1 + h w, D) -> (1, 1 + h' w', D).

    Grids are (rows, columns). The [CLS] position is kept; equal grids return the input itself.
    mode: bilinear when a file is loaded [TransReID], bicubic in forward. Raises RuntimeError when
    tokens do not fill source_grid.

    >>> resize_pos_embed(torch.randn(1, 197, 8), (14, 14), (16, 8)).shape      # ImageNet -> people
    torch.Size([1, 129, 8])
    """
    if source_grid == target_grid:
        return pos_embed
    grid = pos_embed[:, 1:].mT.unflatten(2, source_grid)                       # (1, D, h, w)
    # an explicit size, so that no row is rounded away; DINO and iBOT pass a scale factor, which
    # gives slightly different numbers (docs/choices.md)
    grid = F.interpolate(grid, size=target_grid, mode=mode)
    return torch.cat([pos_embed[:, :1], grid.flatten(2).mT], dim=1)            # (1, 1 + h' w', D)


def init_linear(module: nn.Module) -> None:
    """Small weights and no biases in linear layers, as timm has it."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def vit_mini(img_size=(256, 128), **kwargs) -> VisionTransformer:
    """Six blocks of width 128: trains on a laptop's CPU in minutes. [ours]"""
    return VisionTransformer(img_size, embed_dim=128, depth=6, num_heads=4, **kwargs)


def vit_tiny(img_size=(256, 128), **kwargs) -> VisionTransformer:
    """ViT-Ti/16 (192 wide), between vit_mini and vit_small; the paper does not use it."""
    return VisionTransformer(img_size, embed_dim=192, depth=12, num_heads=3, **kwargs)


def vit_small(img_size=(256, 128), **kwargs) -> VisionTransformer:
    """ViT-S/16, the paper's small model: 21.6 M parameters at 256 x 128."""
    return VisionTransformer(img_size, embed_dim=384, depth=12, num_heads=6, **kwargs)


def vit_base(img_size=(256, 128), **kwargs) -> VisionTransformer:
    """ViT-B/16, the paper's best model: 85.7 M parameters at 256 x 128."""
    return VisionTransformer(img_size, embed_dim=768, depth=12, num_heads=12, **kwargs)


VITS = {"vit_mini": vit_mini, "vit_tiny": vit_tiny, "vit_small": vit_small, "vit_base": vit_base}

# ---------------------------------------------------------------------------------------------
# The head: from a token to logits over prototypes
# ---------------------------------------------------------------------------------------------


class ProjectionHead(nn.Module):
    """Three-layer MLP, unit sphere, prototypes [DINO]. forward gives unit vectors; `last_layer`
    ([CLS]) or `last_layer2` (patches) makes logits of them, where they are needed.

    The notes on the paper name two, MLP1 for [CLS] (Eq. 4) and MLP2 for patches (Eq. 6). Here, as
    in iBOT, both use one MLP. shared: they use the same prototypes too, so patches are sorted into
    the same K classes as whole people [iBOT]. Else patches have `last_layer2` of their own.
    """

    def __init__(self, embed_dim: int, num_prototypes: int, hidden: int, bottleneck: int,
                 shared: bool, norm_last_layer: bool):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(embed_dim, hidden), nn.GELU(),
                                 nn.Linear(hidden, hidden), nn.GELU(),
                                 nn.Linear(hidden, bottleneck))
        self.apply(init_linear)
        self.last_layer = Prototypes(bottleneck, num_prototypes, norm_last_layer)
        self.last_layer2 = self.last_layer
        if not shared:
            self.last_layer2 = Prototypes(bottleneck, num_prototypes, norm_last_layer)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., D) -> unit vectors (..., bottleneck)."""
        return F.normalize(self.mlp(tokens).float(), dim=-1)


class Prototypes(nn.Module):
    """Logits of unit vectors against K prototypes, (..., d) -> (..., K): cosines times weight_g.

    A prototype is a learnt unit vector that stands for one of K classes, which nobody has named.
    weight_g is weight normalisation's g, one for each. Fixed at 1 (`norm_last_layer`), no prototype
    gets large logits for every image merely by being long. The names are those of PyTorch's old
    weight_norm, as found in DINO's and iBOT's files.
    """

    def __init__(self, dim: int, num_prototypes: int, norm_last_layer: bool):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(num_prototypes, 1),
                                     requires_grad=not norm_last_layer)
        self.weight_v = nn.Parameter(torch.empty(num_prototypes, dim))
        nn.init.kaiming_uniform_(self.weight_v, math.sqrt(5))    # as nn.Linear starts [iBOT]

    def forward(self, z: Tensor) -> Tensor:
        # not in bfloat16: a temperature of 0.04 magnifies its rounding of a cosine 25 times
        with torch.autocast(z.device.type, enabled=False):
            prototypes = self.weight_g * F.normalize(self.weight_v, dim=1)       # (K, d)
            return F.linear(z, prototypes)


# ---------------------------------------------------------------------------------------------
# Losses: pure functions
# ---------------------------------------------------------------------------------------------


def cls_loss(p: Tensor, log_s: Tensor) -> Tensor:
    """[CLS] self-distillation across views [PersonViT Eq. 4]: the teacher's probabilities p
    (G, B, K), the student's log-probabilities log_s (V, B, K) -> scalar.

    The first G student views are the teacher's. Mean of the cross-entropy over images, and over all
    pairs of a teacher's view and another view of the student: one and the same view would be too
    easy to match. Cross-entropy = KL(teacher || student) + entropy(teacher). The entropy has no
    gradient, yet it changes as the teacher does: this loss may rise while the student follows the
    teacher ever better.
    """
    B = p.shape[1]
    # pairs[g, v] = mean over images of -sum over k of p[g, :, k] log_s[v, :, k]
    pairs = -torch.einsum("gbk,vbk->gv", p, log_s) / B                       # (G, V)
    G, V = pairs.shape
    assert V > 1, "one view alone has no other view to be compared with"
    # the diagonal holds the pairs of equal views
    return (pairs.sum() - pairs.diagonal().sum()) / (G * (V - 1))


def patch_loss(p: Tensor, log_s: Tensor, masks: Tensor, indices: Tensor) -> Tensor:
    """Masked-patch distillation [PersonViT Eq. 7]: the teacher's probabilities p (M, K), the
    student's log-probabilities log_s (M, K), masks (G, B, rows, columns), indices (M,) -> scalar.

    The M rows are all masked patches of the batch, of the same view in both networks; indices say
    where they are among the G B N patches. Mean over the masked patches of a view, then over views:
    each view counts alike, and one without masked patches counts 0 and not NaN. As that is every
    second view, this loss is about half the cross-entropy of a masked patch.
    """
    G, B, rows, columns = masks.shape
    cross_entropy = -(p * log_s).sum(-1)                                     # (M,)
    masked = masks.sum((2, 3)).flatten()           # number of masked patches, of each of G B views
    view = indices // (rows * columns)             # to which a patch belongs (M,)
    return (cross_entropy / masked[view]).sum() / (G * B)


# ---------------------------------------------------------------------------------------------
# The objective
# ---------------------------------------------------------------------------------------------


class PersonViT(nn.Module):
    """Student and teacher, each a ViT with a head; forward gives the losses of one step.

    backbone: the student's ViT; the teacher starts as its copy, follows it as a moving average, and
    is what gets exported. recipe: sizes of the head, the student's temperature, clipping.
    """

    center_momentum = 0.9  # of the centres' moving average [iBOT]

    def __init__(self, backbone: VisionTransformer, recipe: "PersonViTRecipe"):
        super().__init__()
        D = backbone.embed_dim
        K = recipe.prototypes
        self.recipe = recipe
        head = ProjectionHead(D, K, recipe.hidden, recipe.bottleneck, recipe.shared_head,
                              recipe.norm_last_layer)
        self.student = nn.ModuleDict({"backbone": backbone, "head": head})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        for block in self.teacher["backbone"].blocks:
            block.drop_path = 0.0                                # the teacher uses all its layers
        self.mask_token = nn.Parameter(torch.zeros(1, D))        # the student's alone
        self.reference = {"ln_K": math.log(K)}                   # `cls`, if all outputs are uniform
        for name in ("center", "patch_center", "new_center", "new_patch_center"):
            self.register_buffer(name, torch.zeros(K))
        self.forwards = 0                                        # how many, since centres moved

    def forward(self, views: dict[str, Tensor], teacher_temp: float, patch_temp: float,
                **_) -> dict[str, Tensor]:
        """Losses {"total", "cls", "patch"} and diagnostics of one batch, all scalars.

        views: "globals" (G, B, 3, H, W), G = 2; "locals" (L, B, 3, h, w); "masks" (G, B, rows,
        columns), True = masked, on the CPU: the number of masked patches is needed here, and would
        have to be waited for on a GPU. Temperatures as scheduled.
        """
        masks = views["masks"]
        shape = (*views["globals"].shape[:2], *self.student["backbone"].grid)
        assert masks.shape == shape, f"masks of shape {tuple(masks.shape)}, not {shape}"
        indices = masks.flatten().nonzero().flatten()                 # (M,), of G B N patches
        device = self.center.device
        if device.type != "cpu":  # from pinned memory, which is copied without waiting for the GPU
            masks = masks.pin_memory().to(device, non_blocking=True)
            indices = indices.pin_memory().to(device, non_blocking=True)
        # logits of [CLS] (G, B, K) and of patches (M, K), features (G B, D)
        t_cls, t_patch, features = self.teacher_forward(views["globals"], indices)
        s_cls, s_patch = self.student_forward(views, masks, indices)  # (V, B, K), (M, K)
        with torch.autocast(device.type, enabled=False):  # not in bfloat16, as in `Prototypes`
            # against collapse: subtracting the centre alone would lead to uniform targets, a low
            # temperature alone to one prototype for all images [DINO]
            p_cls = ((t_cls - self.center) / teacher_temp).softmax(-1)           # (G, B, K)
            p_patch = ((t_patch - self.patch_center) / patch_temp).softmax(-1)   # (M, K)
            log_cls = (s_cls / self.recipe.student_temp).log_softmax(-1)         # (V, B, K)
            log_patch = (s_patch / self.recipe.student_temp).log_softmax(-1)     # (M, K)
            cls = cls_loss(p_cls, log_cls)
            patch = patch_loss(p_patch, log_patch, masks, indices)
            losses = {"total": cls + patch, "cls": cls, "patch": patch}          # [PersonViT Eq. 8]
            losses |= self.diagnose(features, p_cls, p_patch, cls)
        return losses

    @torch.no_grad()
    def teacher_forward(self, views: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Teacher's logits of unmasked views (G, B, 3, H, W): of [CLS] (G, B, K) and of the patches
        that are masked in the student's input (M, K) [PersonViT Eq. 6]; and its features (G B, D).
        Adds the mean logits to new_center and new_patch_center, for `update_teacher`.

        No gradient: if the teacher were trained as well, both could lower the loss by giving every
        image the same output.
        """
        backbone = self.teacher["backbone"]
        head = self.teacher["head"]
        tokens = backbone.forward_features(views.flatten(0, 1))              # (G B, 1 + N, D)
        z = head(tokens)                                                     # (G B, 1 + N, d)
        cls = head.last_layer(z[:, 0])                                       # (G B, K)
        patches = z[:, 1:].flatten(0, 1)                                     # (G B N, d)
        # the centre of patches is the mean of the logits of ALL patches. mean(W z) = W mean(z), as
        # logits are linear in z: so unmasked patches need no memory for logits
        self.new_center += cls.mean(0)                                       # (K,)
        self.new_patch_center += head.last_layer2(patches.mean(0))           # (K,)
        self.forwards += 1
        return (cls.unflatten(0, views.shape[:2]),                           # (G, B, K)
                head.last_layer2(patches[indices]), tokens[:, 0])            # (M, K), (G B, D)

    def student_forward(self, views: dict[str, Tensor], masks: Tensor,
                        indices: Tensor) -> tuple[Tensor, Tensor]:
        """Student's logits: (V, B, K) of [CLS], global views being masked [PersonViT Eq. 5], local
        ones not; (M, K) of the masked patches [PersonViT Eq. 6]."""
        backbone = self.student["backbone"]
        head = self.student["head"]
        tokens = backbone.forward_features(views["globals"].flatten(0, 1),   # (G B, 1 + N, D)
                                           masks.flatten(0, 1), self.mask_token)
        patches = tokens[:, 1:].flatten(0, 1)[indices]                       # (M, D)
        # the [CLS] loss uses the masked views as well [iBOT]
        cls = tokens[:, 0]                                                   # (G B, D)
        if "locals" in views:
            tokens = backbone.forward_features(views["locals"].flatten(0, 1))
            cls = torch.cat([cls, tokens[:, 0]])                             # (V B, D)
        s_patch = head.last_layer2(head(patches))                            # (M, K)
        s_cls = head.last_layer(head(cls))                                   # (V B, K)
        return s_cls.unflatten(0, (-1, views["globals"].shape[1])), s_patch

    @torch.no_grad()
    def diagnose(self, features: Tensor, p_cls: Tensor, p_patch: Tensor,
                 cls: Tensor) -> dict[str, Tensor]:
        """Scalars that tell learning from collapse; the CPU does not wait for them.

        feature_std: standard deviation of the teacher's features as unit vectors: 0 = all in one
        point, 1 = their mean is 0, which even a few clusters can have. entropy: of the targets of
        [CLS], at most ln K. kl: teacher to student, the part of the loss that can be learnt.
        mutual_information: of target and image, at most ln B. It is the entropy of the mean target
        less the mean entropy, and 0 when all images get the same target, uniform or sharp.
        patch_mutual_information: the same of target and masked patch, as patches may collapse
        alone. prototypes: how many are the best one of at least one image.
        """
        directions = F.normalize(features.float(), dim=1)                    # (G B, D)
        entropy = entr(p_cls).sum(-1).mean()
        entropy_of_mean = entr(p_cls.mean(1)).sum(-1).mean()
        M = max(len(p_patch), 1)
        patch_entropy = entr(p_patch).sum() / M
        patch_entropy_of_mean = entr(p_patch.sum(0) / M).sum()
        used = torch.zeros_like(self.center).scatter_(0, p_cls.argmax(-1).flatten(), 1.0)  # (K,)
        return {"feature_std": directions.var(0, correction=0).sum().sqrt(),
                "entropy": entropy, "kl": cls - entropy,
                "mutual_information": entropy_of_mean - entropy,
                "patch_mutual_information": patch_entropy_of_mean - patch_entropy,
                "prototypes": used.sum()}

    def clip_gradients(self, epoch: int) -> Tensor:
        """Clip, and freeze the last layer in the first epochs, when the prototypes are still random
        [DINO, iBOT]. The gradient of each tensor is scaled to a norm of at most `recipe.clip`, as
        iBOT does: a layer with a very large gradient does not shrink all others. Returns their
        global norm before."""
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(grads))
        scale = (self.recipe.clip / (norms + 1e-6)).clamp(max=1)
        torch._foreach_mul_(grads, scale.unbind())
        if epoch < self.recipe.freeze_last_layer:
            head = self.student["head"]
            for p in (*head.last_layer.parameters(), *head.last_layer2.parameters()):
                p.grad = None                                    # then the optimiser skips it
        return norms.norm()

    @torch.no_grad()
    def update_teacher(self, momentum: float, **_) -> None:
        """Once per optimiser step: teacher = m teacher + (1 - m) student. The centres move, too, by
        a momentum of their own.

        They move by the mean over all forwards since the last call and over all processes, here and
        not in forward, so that a step split into several forwards moves them once.
        """
        # teacher <- m teacher + (1 - m) student, all parameters in one launch on a GPU
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()),
                             1 - momentum)
        for center, new in ((self.center, self.new_center),
                            (self.patch_center, self.new_patch_center)):
            if dist.is_initialized():
                dist.all_reduce(new)                             # else processes would drift apart
                new /= dist.get_world_size()
            center.lerp_(new / self.forwards, 1 - self.center_momentum)
            new.zero_()
        self.forwards = 0

    def warning(self, values: dict[str, float]) -> str:
        """What a line of the log warns of, or nothing. COLLAPSE?: every image gets the same target.
        UNIFORM?: targets are hardly more than noise, from which little can be learnt."""
        # with random weights and the recipes' temperatures these are above 0.5 on images of people;
        # the limits are ours
        diversity = [values["mutual_information"], values["feature_std"]]
        if self.recipe.masks:
            diversity.append(values["patch_mutual_information"])
        if not all(value > 1e-2 for value in diversity):         # not NaN either
            return "COLLAPSE?"
        if values["entropy"] > 0.95 * self.reference["ln_K"]:
            return "UNIFORM?"
        return ""

    def backbone_for_export(self) -> VisionTransformer:
        """The teacher's ViT: an average over many students, usually better than each [DINO]."""
        return self.teacher["backbone"]


# ---------------------------------------------------------------------------------------------
# Masks: blocks of patches
# ---------------------------------------------------------------------------------------------


def draw_masks(n: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Masks of n views, (n, height, width) in patches. Half of the views have no masked patch, the
    others a ratio from U(0.1, 0.5) [iBOT; PersonViT Eq. 5]: so the network also sees people without
    holes, as it will later."""
    coin, uniform = torch.rand(2, n, generator=generator)
    ratios = torch.where(coin < 0.5, 0.0, 0.1 + 0.4 * uniform).tolist()
    return torch.stack([block_mask(height, width, ratio, generator) for ratio in ratios])


def block_mask(height: int, width: int, ratio: float, generator: torch.Generator) -> Tensor:
    """Mask about `ratio` of a (height, width) patch grid by random rectangles: bool, True = masked.

    Blocks and not single patches: a lone hole can often be filled in from its neighbours, without
    knowing what a person is. Never masks more than ratio * height * width patches, at times a
    little less.
    Source: [iBOT], after BEiT.

    >>> mask = block_mask(16, 8, 0.3, torch.Generator().manual_seed(0))
    >>> mask.shape, 0.25 < mask.float().mean() <= 0.3
    (torch.Size([16, 8]), tensor(True))
    """
    mask = torch.zeros(height, width, dtype=torch.bool)
    most = ratio * height * width
    least = (min(height, width) // 3) ** 2                       # patches of a block, if they fit
    masked = 0
    tries = 0                                                    # since the last block
    while masked < most and tries < 10:
        tries += 1
        room = most - masked
        u, v, y, x = torch.rand(4, generator=generator).tolist()
        area = least + (room - least) * u                        # at the end room < least
        aspect = math.exp((2 * v - 1) * math.log(1 / 0.3))       # h / w, 0.3 to 1/0.3, log-uniform
        h = round(math.sqrt(area * aspect))
        w = round(math.sqrt(area / aspect))
        if h < height and w < width:
            top = int(y * (height - h + 1))
            left = int(x * (width - w + 1))
            block = mask[top:top + h, left:left + w]
            new = h * w - int(block.sum())
            if 0 < new <= room:
                block[:] = True
                masked += new
                tries = 0
    return mask


# ---------------------------------------------------------------------------------------------
# How it is trained
# ---------------------------------------------------------------------------------------------


def cosine(t: float, start: float, end: float) -> float:
    """From start at t = 0 to end at t = 1 along half a cosine wave; constant outside.

    >>> cosine(0, 1.0, 0.0), cosine(0.5, 1.0, 0.0), cosine(2, 1.0, 0.0)
    (1.0, 0.5, 0.0)
    """
    t = min(max(t, 0), 1)
    return end + (start - end) * (1 + math.cos(math.pi * t)) / 2


def matrix_groups(model: nn.Module) -> list[dict]:
    """Two groups for AdamW: decay acts on tensors of two or more dimensions, so not on biases and
    norms, yet on [CLS], mask token, positions and a trained weight_g of prototypes [iBOT]."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]
    others = [p for p in trained if p.ndim <= 1]
    return [{"params": matrices, "decay": 1.0}, {"params": others, "decay": 0.0}]


@dataclass(frozen=True)
class PersonViTRecipe:
    """PersonViT's pre-training on LUPerson, a line per value. By notes on them, the released
    checkpoints hold the true values; they could not be opened here. [iBOT] = its published ViT-S/16
    command; [inferred] = guessed from the checkpoint's name. Probabilities of augmentations and
    masks stand with their code."""

    arch: Literal[tuple(VITS)] = "vit_small"  # backbone [PersonViT]
    size: tuple[int, int] = (256, 128)  # height x width of global crops, local: half [PersonViT]
    epochs: int = 300                   # passes over the images [PersonViT code]
    batch: int = 512                    # images per step, of all processes [DINO for ReID]
    lr: float = 5e-4                    # peak learning rate, times batch / 256 [iBOT]
    min_lr: float = 1e-6                # learning rate at the end [iBOT]
    warmup: int = 10                    # epochs up to lr; shorter runs do not reach it [iBOT]
    weight_decay: float = 0.04          # on matrices, at the start [iBOT]
    weight_decay_end: float = 0.4       # ... and at the end of a cosine [iBOT]
    momentum: float = 0.996             # of the teacher, cosine to 1 [iBOT]
    prototypes: int = 8192              # K [iBOT]
    hidden: int = 2048                  # width of the head's MLP [iBOT]
    bottleneck: int = 256               # width of its output [iBOT]
    shared_head: bool = True            # the same prototypes for [CLS] and patches [iBOT]
    norm_last_layer: bool = False       # the prototypes' weight_g fixed at 1 [iBOT]
    student_temp: float = 0.1           # temperature of the student [iBOT]
    teacher_temp: float = 0.04          # of the teacher at the start [iBOT]
    teacher_temp_end: float = 0.07      # ... and after temp_warmup [iBOT]
    temp_warmup: int = 30               # epochs, linear [iBOT]
    clip: float = 3.0                   # largest gradient norm of a tensor [iBOT]
    freeze_last_layer: int = 1          # epochs in which prototypes are frozen [iBOT]
    drop_path: float = 0.1              # stochastic depth of the student's last block [iBOT]
    local_crops: int = 8                # local views [DINO for ReID]; iBOT's author: 10
    masks: bool = True                  # mask patches for the student; without: DINO [PersonViT]
    global_scale: tuple[float, float] = (0.4, 1.0)   # of the area [DINO for ReID]
    local_scale: tuple[float, float] = (0.05, 0.8)   # as [SOLIDER]; 0.05 [DINO], 0.8 [inferred]
    aspect: tuple[float, float] = (0.375, 0.667)     # width / height [inferred]
    seed: int = 0                       # of everything random
    bf16: bool = False                  # bfloat16 in the networks; on by default on a GPU

    # iBOT's ViT-B/16 command, as others report it [iBOT, secondary]
    VIT_BASE: ClassVar = dict(lr=7.5e-4, min_lr=2e-6, clip=0.3, freeze_last_layer=3,
                              norm_last_layer=True)
    # small images and networks on a CPU. With so few images targets got uniform unless the
    # teacher's temperature stayed low (docs/results.md) [ours]
    LAPTOP: ClassVar = dict(size=(128, 64), epochs=64, batch=32, lr=2e-3, warmup=2,
                            weight_decay_end=0.1, momentum=0.98, prototypes=1024, hidden=512,
                            bottleneck=128, norm_last_layer=True, teacher_temp=0.02,
                            teacher_temp_end=0.02, local_crops=4, local_scale=(0.1, 0.6))
    # thousands of images, one machine: with a rising teacher temperature targets got uniform
    # (docs/results.md). With this lr and momentum a user's DINO began to learn (issue 246 of
    # facebookresearch/dino [secondary]) [ours]
    ONE_GPU: ClassVar = dict(epochs=200, batch=128, lr=1e-3, momentum=0.99, prototypes=1024,
                             norm_last_layer=True, teacher_temp_end=0.04, local_crops=6)

    @classmethod
    def preset(cls, dataset: str, arch: str | None = None) -> "PersonViTRecipe":
        """The recipe for a dataset's name and a backbone; arch=None: the usual one."""
        if arch is None:
            arch = "vit_mini" if dataset == "synthetic" else "vit_small"
        values = {"arch": arch}
        if arch == "vit_base":
            values |= cls.VIT_BASE
        if dataset == "synthetic" or arch == "vit_mini":
            values |= cls.LAPTOP
        elif dataset != "luperson":
            values |= cls.ONE_GPU
        return cls(**values)

    def build(self, forwards: int = 1) -> PersonViT:
        """The objective with random weights. forwards: forward passes of a step, processes x
        micro-batches. Raises ValueError for values that do not fit together."""
        least = 32 if self.local_crops else 16
        if min(self.size) < least:
            raise ValueError(f"--size {self.size[0]}x{self.size[1]} is too small: masks and local "
                             f"crops, half as large, need {least} pixels at least")
        if self.batch % forwards or self.batch < 2 * forwards:
            raise ValueError(f"--batch {self.batch} cannot be shared evenly, two images at least "
                             f"each, by {forwards} (processes x --accum micro-batches)")
        backbone = VITS[self.arch](self.size, drop_path=self.drop_path)
        return PersonViT(backbone, self)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW in the groups of `matrix_groups` [iBOT]."""
        return torch.optim.AdamW(matrix_groups(model), fused=True)

    def schedule(self, step: int, steps_per_epoch: int) -> tuple[dict, dict]:
        """Optimiser and model settings for step `step` (counted from 0) [iBOT: per step]."""
        steps = self.epochs * steps_per_epoch
        warmup = self.warmup * steps_per_epoch
        peak = self.lr * self.batch / 256
        if step < warmup:  # iBOT's ramp: 0 in the first step, the peak in its last
            lr = peak * step / max(warmup - 1, 1)
        else:
            lr = cosine((step - warmup) / max(steps - warmup, 1), peak, self.min_lr)
        weight_decay = cosine(step / steps, self.weight_decay, self.weight_decay_end)
        momentum = cosine(step / steps, self.momentum, 1.0)
        epoch = step // steps_per_epoch
        warm = 1.0
        if epoch < self.temp_warmup:
            warm = epoch / max(self.temp_warmup - 1, 1)          # [iBOT]
        # iBOT has a temperature each for [CLS] and patches; in its ViT-S command they are the same
        temp = (1 - warm) * self.teacher_temp + warm * self.teacher_temp_end
        return ({"lr": lr, "weight_decay": weight_decay},
                {"momentum": momentum, "teacher_temp": temp, "patch_temp": temp})

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """What is sampled for an image beside its views: masks (2, rows, columns) of its two global
        views."""
        rows = self.size[0] // 16
        columns = self.size[1] // 16
        if not self.masks:
            return {"masks": torch.zeros(2, rows, columns, dtype=torch.bool)}
        return {"masks": draw_masks(2, rows, columns, generator)}


if __name__ == "__main__":  # the file alone, in any folder: sizes, and one step on noise
    recipe = PersonViTRecipe.preset("synthetic")
    model = recipe.build()
    net = model.backbone_for_export()
    images = torch.randn(2, 4, 3, 128, 64)
    print(f"{recipe.arch}: {sum(p.numel() for p in net.parameters()):,} parameters, tokens "
          f"{tuple(net.forward_features(images[0]).shape)}, feature {tuple(net(images[0]).shape)}")
    noise = {"globals": images, "locals": torch.randn(3, 4, 3, 64, 32),
             "masks": draw_masks(8, 8, 4, torch.Generator()).unflatten(0, (2, 4))}
    losses = model(noise, **recipe.schedule(0, 100)[1])
    losses["total"].backward()
    print("one step on noise:", {k: round(v.item(), 3) for k, v in losses.items()}, model.reference)
