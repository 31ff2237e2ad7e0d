"""PersonViT (arXiv 2408.05398): a plain ViT, pre-trained on unlabelled crops of people.

Two networks of one shape look at the same people. The student learns to say what the teacher says,
about whole people it sees in other crops (DINO), and about patches it is not shown (iBOT). The
teacher is a moving average of the student; nobody else teaches.

    x        person image, 2 global and L local crops   (B, 3, H, W)    H x W = 256 x 128
    tokens   [CLS] and N patches of a view              (B, 1 + N, D)   N = 16 x 8, a tall grid
    s, t     student's and teacher's scores             (B, K)          K prototypes
    p      = softmax((t - c) / T_t): the teacher's answer; c a moving average of its scores [DINO]
    CE     = -sum over K of p log softmax(s / T_s): the student's distance from that answer
    L_cls    CE of [CLS], across different views                                 [PersonViT Eq. 4]
    L_patch  CE of patches hidden from the student, in the same view             [PersonViT Eq. 7]
    L      = L_cls + L_patch                                                     [PersonViT Eq. 8]

G = 2 global and L local views make V = G + L; M patches of a batch are hidden; D is the width of
the network, d of the bottleneck before the prototypes; T temperatures; m the teacher's momentum.

The paper has no public pre-training code; equations and structure are read from notes on it, the
details from iBOT's code, tagged [iBOT], and equal recorded steps of that code (tests/golden). The
exported feature is the teacher's [CLS]. What differs from the ViT of an ImageNet course: the grid
is a rectangle (code that takes sqrt(N) breaks on people) and patches may overlap (`stride`).
Parameter names are timm's, as in DINO, iBOT, TransReID, so that their files load.

Read `VisionTransformer.forward_features`, then `PersonViT.forward`.

Exercises (answers: README). 1. A teacher as unsure as its student (train.py --pretrain personvit
--epochs 4 --teacher-temp 0.1 --teacher-temp-end 0.1): which collapse is this, and after how many
steps does the log say so? 2. Leave the centres at 0 (center_momentum = 1.0 in `PersonViT.__init__`,
--epochs 4): which collapse is this, and which number in the log tells the two apart? 3. Patches
that overlap, vit_small(stride=12): how many tokens are 256 x 128 pixels then, and how much slower
is the network?
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------
# The backbone
# ---------------------------------------------------------------------------------------------


def resize_pos_embed(pos_embed: Tensor, source_grid: tuple[int, int], target_grid: tuple[int, int],
                     mode: str = "bilinear") -> Tensor:
    """Carry position embeddings to another patch grid: (1, 1 + h w, D) -> (1, 1 + h' w', D).

    Grids are (rows, columns). The [CLS] position is kept; equal grids return the input itself.
    Raises ValueError when the tokens do not fill source_grid. Source: TransReID's rule (bilinear).

    >>> resize_pos_embed(torch.randn(1, 197, 8), (14, 14), (16, 8)).shape      # ImageNet -> people
    torch.Size([1, 129, 8])
    """
    if tuple(source_grid) == tuple(target_grid):
        return pos_embed
    (rows, columns), D = source_grid, pos_embed.shape[-1]
    if pos_embed.shape[1] != 1 + rows * columns:
        raise ValueError(f"pos_embed has {pos_embed.shape[1] - 1} patch positions, "
                         f"a {rows} x {columns} grid needs {rows * columns}")
    cls, grid = pos_embed[:, :1], pos_embed[:, 1:]
    grid = grid.reshape(1, rows, columns, D).permute(0, 3, 1, 2)               # (1, D, h, w)
    # an explicit size: DINO's scale factors round a row away at times, and need a "+0.1"
    grid = F.interpolate(grid, size=tuple(target_grid), mode=mode, align_corners=False)
    return torch.cat([cls, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)     # (1, 1 + h' w', D)


class PatchEmbed(nn.Module):
    """Cut the image into patches and project each: (B, 3, H, W) -> (B, D, rows, columns).

    One convolution does both; with stride < patch_size neighbouring patches overlap [TransReID].
    """

    def __init__(self, patch_size: int, stride: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, patch_size, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D). Source: Vaswani et al. 2017."""

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                    # each (B, heads, N, D/heads)
        # = softmax(q k^T / sqrt(D/heads)) v; a fused kernel, where there is one, never stores the
        # (N, N) matrix
        x = F.scaled_dot_product_attention(q, k, v)             # (B, heads, N, D/heads)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    """Two linear layers with a GELU between, on every token alone: (B, N, D) -> (B, N, D)."""

    def __init__(self, embed_dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block with stochastic depth, (B, N, D) -> (B, N, D).

    drop_path: probability that an image skips a branch in training (Huang et al. 2016); it
    regularises like dropout, yet each network that remains is a plain ViT, only shallower.
    """

    def __init__(self, embed_dim: int, num_heads: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn = Attention(embed_dim, num_heads)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mlp = Mlp(embed_dim, int(embed_dim * mlp_ratio))
        self.drop_path = drop_path

    def drop(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        keep = 1 - self.drop_path
        kept = torch.rand(len(branch), 1, 1, device=branch.device) < keep
        return branch * (kept / keep).to(branch.dtype)          # / keep: the mean stays the same

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """Plain ViT on a rectangular grid; (B, 3, H, W) -> the [CLS] feature (B, embed_dim).

    img_size: (height, width) the position embeddings belong to; at other sizes they are
    interpolated. drop_path: rate of the last block, growing linearly from 0 at the first (early
    blocks carry everything after them). Raises ValueError when no patch fits or the heads do not
    divide embed_dim. Source: Dosovitskiy et al. 2021; names and LayerNorm eps as timm.
    """

    def __init__(self, img_size: tuple[int, int] = (256, 128), patch_size: int = 16,
                 stride: int | None = None, embed_dim: int = 384, depth: int = 12,
                 num_heads: int = 6, mlp_ratio: float = 4.0, drop_path: float = 0.0):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        self.patch_size, self.stride = patch_size, stride or patch_size
        self.grid, self.embed_dim = self.grid_of(*img_size), embed_dim
        rows, columns = self.grid
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + rows * columns, embed_dim))
        self.patch_embed = PatchEmbed(patch_size, self.stride, embed_dim)
        rates = torch.linspace(0, drop_path, depth).tolist()
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, rate) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in an image of this size; pixels left over are not seen."""
        rows, columns = ((n - self.patch_size) // self.stride + 1 for n in (height, width))
        if min(rows, columns) < 1:
            raise ValueError(f"an image of {height} x {width} pixels holds no patch of "
                             f"{self.patch_size}")
        return rows, columns

    def forward_features(self, x: Tensor, mask: Tensor | None = None,
                         mask_token: Tensor | None = None) -> Tensor:
        """All tokens after the last LayerNorm: (B, 3, H, W) -> (B, 1 + N, D), [CLS] first.

        mask (B, rows, columns), True = hidden: there mask_token (1, D) stands for the patch, before
        positions are added, so that the network still knows where the hole is [iBOT].
        """
        B, _, H, W = x.shape
        grid = self.grid_of(H, W)
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)        # (B, N, D), row by row
        if mask is not None:
            hide = mask.flatten(1)[:, :, None]                          # (B, N, 1)
            patches = torch.where(hide, mask_token.to(patches.dtype), patches)
        cls = self.cls_token.expand(B, -1, -1)                          # (B, 1, D)
        pos = resize_pos_embed(self.pos_embed, self.grid, grid, "bicubic")  # (1, 1 + N, D) [DINO]
        x = torch.cat([cls, patches], dim=1) + pos                      # (B, 1 + N, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        """[CLS] feature, not normalised: (B, 3, H, W) -> (B, D)."""
        return self.forward_features(x)[:, 0]


def vit_mini(img_size: tuple[int, int] = (256, 128), **kwargs) -> VisionTransformer:
    """Six blocks of width 128: trains on a laptop's CPU in minutes. [ours]"""
    return VisionTransformer(img_size, embed_dim=128, depth=6, num_heads=4, **kwargs)


def vit_tiny(img_size: tuple[int, int] = (256, 128), **kwargs) -> VisionTransformer:
    """ViT-Ti/16 (192 wide), between vit_mini and vit_small; the paper does not use it."""
    return VisionTransformer(img_size, embed_dim=192, depth=12, num_heads=3, **kwargs)


def vit_small(img_size: tuple[int, int] = (256, 128), **kwargs) -> VisionTransformer:
    """ViT-S/16, the paper's small model: 21.6 M parameters at 256 x 128."""
    return VisionTransformer(img_size, embed_dim=384, depth=12, num_heads=6, **kwargs)


def vit_base(img_size: tuple[int, int] = (256, 128), **kwargs) -> VisionTransformer:
    """ViT-B/16, the paper's best model: 85.7 M parameters at 256 x 128."""
    return VisionTransformer(img_size, embed_dim=768, depth=12, num_heads=12, **kwargs)


# ---------------------------------------------------------------------------------------------
# Masks: blocks of hidden patches
# ---------------------------------------------------------------------------------------------


def block_mask(height: int, width: int, ratio: float, generator: torch.Generator) -> Tensor:
    """Hide about `ratio` of a (height, width) patch grid by random rectangles: bool, True = hidden.

    Blocks and not single patches: a lone hole is filled in from its neighbours without knowing what
    a person is. Never hides more than ratio * height * width patches, at times a little less.
    Source: [iBOT], after BEiT.

    >>> mask = block_mask(16, 8, 0.3, torch.Generator().manual_seed(0))
    >>> mask.shape, 0.25 < mask.float().mean() <= 0.3
    (torch.Size([16, 8]), tensor(True))
    """
    mask = torch.zeros(height, width, dtype=torch.bool)
    target, hidden = ratio * height * width, 0
    smallest = (min(height, width) // 3) ** 2                    # area of the smallest block
    while hidden < target:
        room, before = target - hidden, hidden
        for u in torch.rand(10, 4, generator=generator).tolist():    # ten tries to place one block
            area = smallest + (room - smallest) * u[0]
            aspect = math.exp((2 * u[1] - 1) * math.log(1 / 0.3))    # height / width
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h >= height or w >= width:
                continue
            top, left = int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1))
            block = mask[top:top + h, left:left + w]
            new = h * w - int(block.sum())
            if 0 < new <= room:
                block[:] = True
                hidden += new
                break
        if hidden == before:
            break
    return mask


def draw_masks(n: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Masks of n images, (n, height, width): half of the images are left whole, the others hide a
    share drawn from U(0.1, 0.5) [iBOT]; the whole ones keep the network used to unmasked people."""
    whole, share = torch.rand(2, n, generator=generator)
    ratios = torch.where(whole < 0.5, 0.0, 0.1 + 0.4 * share).tolist()
    return torch.stack([block_mask(height, width, ratio, generator) for ratio in ratios])


# ---------------------------------------------------------------------------------------------
# The head: from a token to scores over prototypes
# ---------------------------------------------------------------------------------------------


class Prototypes(nn.Module):
    """Scores of unit vectors against K prototypes, (..., d) -> (..., K): cosines times a gain.

    A prototype is a learnt unit vector, one of K classes of things that nobody has named. weight_g
    is the gain of each; fixed at 1 (`norm_last_layer`), none can score high on everything merely
    by being long. Names are those of the old weight_norm, as found in DINO's and iBOT's files.
    """

    def __init__(self, dim: int, num_prototypes: int, norm_last_layer: bool):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(num_prototypes, 1), not norm_last_layer)
        self.weight_v = nn.Parameter(torch.empty(num_prototypes, dim))
        # as nn.Linear begins; that iBOT leaves it so is [from memory]
        nn.init.kaiming_uniform_(self.weight_v, math.sqrt(5))

    def forward(self, z: Tensor) -> Tensor:
        # not in bfloat16: a temperature of 0.04 magnifies its rounding of a cosine 25 times
        with torch.autocast(z.device.type, enabled=False):
            return F.linear(z, self.weight_g * F.normalize(self.weight_v, dim=1))


class ProjectionHead(nn.Module):
    """Three-layer MLP, unit sphere, prototypes [DINO].

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
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.last_layer = Prototypes(bottleneck, num_prototypes, norm_last_layer)
        self.last_layer2 = self.last_layer if shared else Prototypes(bottleneck, num_prototypes,
                                                                     norm_last_layer)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., D) -> unit vectors (..., bottleneck); prototypes are applied where needed only."""
        return F.normalize(self.mlp(tokens).float(), dim=-1)


# ---------------------------------------------------------------------------------------------
# Losses: pure functions
# ---------------------------------------------------------------------------------------------


def soft_cross_entropy(teacher: Tensor, student: Tensor) -> Tensor:
    """-sum_k teacher_k log student_k: probabilities (..., K), log-probabilities (..., K) -> (...).

    Cross-entropy = KL(teacher || student) + entropy(teacher). The second part has no gradient, yet
    it moves as the teacher sharpens: this loss may rise while the student follows ever better.
    """
    return -(teacher * student).sum(-1)


def cls_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """[CLS] self-distillation across views [PersonViT Eq. 4]: (G, B, K), (V, B, K) -> scalar.

    The first G student views are the teacher's. Mean over images, and over all pairs of a teacher's
    view and another view of the student: equal views would be matched without understanding.
    """
    G, V = len(teacher), len(student)
    assert V > 1, "one view alone has no other view to be compared with"
    # sum over v != q of CE(t_q, s_v) = CE(t_q, sum of all s) - CE(t_q, s_q): one product per q
    total = soft_cross_entropy(teacher, student.sum(0)) - soft_cross_entropy(teacher, student[:G])
    return total.sum(0).mean() / (G * (V - 1))                               # total (G, B)


def patch_loss(teacher: Tensor, student: Tensor, weight: Tensor) -> Tensor:
    """Masked-patch distillation [PersonViT Eq. 7]: (M, K), (M, K), (M,) -> scalar.

    The M rows are all hidden patches of the batch, of the same view in both networks. weight: 1 /
    (patches hidden in the row's view x views of all images), so that each view counts alike, and
    one with nothing hidden counts 0 and not NaN.
    """
    return (weight * soft_cross_entropy(teacher, student)).sum()


# ---------------------------------------------------------------------------------------------
# The objective
# ---------------------------------------------------------------------------------------------


class PersonViT(nn.Module):
    """Student and teacher, each a ViT with a head; forward gives the losses of one step.

    backbone: the student's ViT; the teacher starts as its copy, follows it as a moving average, and
    is what gets exported. center_momentum as in iBOT; the rest: `PersonViTRecipe`. forward raises
    ValueError for masks that are not of the views' grid.
    """

    def __init__(self, backbone: VisionTransformer, num_prototypes: int = 8192, hidden: int = 2048,
                 bottleneck: int = 256, shared_head: bool = True, norm_last_layer: bool = False,
                 center_momentum: float = 0.9):
        super().__init__()
        D, K = backbone.embed_dim, num_prototypes
        head = ProjectionHead(D, K, hidden, bottleneck, shared_head, norm_last_layer)
        self.student = nn.ModuleDict({"backbone": backbone, "head": head})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        for block in self.teacher["backbone"].blocks:
            block.drop_path = 0.0                                # the teacher uses all its layers
        self.mask_token = nn.Parameter(torch.zeros(1, D))        # the student's alone
        self.center_momentum = center_momentum
        for name in ("center", "patch_center", "new_center", "new_patch_center"):
            self.register_buffer(name, torch.zeros(K))
        self.forwards = 0                                        # since the centres last moved

    def forward(self, views: dict[str, Tensor], teacher_temp: float, patch_temp: float,
                student_temp: float = 0.1) -> dict[str, Tensor]:
        """Losses {"total", "cls", "patch"} and diagnostics of one batch, all scalars.

        views: "globals" (G, B, 3, H, W), G = 2; "locals" (L, B, 3, h, w); "masks" (G, B, rows,
        columns) on the CPU, True = hidden: their number is needed here, and asking a GPU for it
        would stall the GPU. Temperatures as scheduled; K prototypes, V = G + L views.
        """
        masks, grid = views["masks"], self.student["backbone"].grid
        if masks.dtype != torch.bool or masks.shape != (*views["globals"].shape[:2], *grid):
            raise ValueError(f"masks are bool of shape (views, images, {grid[0]}, {grid[1]}), not "
                             f"{masks.dtype} of {tuple(masks.shape)}")
        G, B, N = masks.flatten(2).shape
        hidden = masks.flatten().nonzero().flatten()         # (M,), places among G B N patches
        per_view = 1 / masks.flatten(2).sum(2).clamp(min=1)                  # (G, B)
        weight = per_view.repeat_interleave(N)[hidden] / (G * B)             # (M,)
        device = self.center.device
        hidden, weight = (x.to(device, non_blocking=True) for x in (hidden, weight))
        t_cls, t_patch, spread = self.teach(views["globals"], hidden)        # (G, B, K), (M, K), ()
        s_cls, s_patch = self.study(views, hidden)                           # (V, B, K), (M, K)
        # subtracting the centre keeps one prototype from taking all, the low temperature keeps the
        # scores from going flat: each prevents the collapse the other alone would cause [DINO]
        p_cls = ((t_cls - self.center) / teacher_temp).softmax(-1)           # (G, B, K)
        p_patch = ((t_patch - self.patch_center) / patch_temp).softmax(-1)   # (M, K)
        cls = cls_loss(p_cls, (s_cls / student_temp).log_softmax(-1))
        patch = patch_loss(p_patch, (s_patch / student_temp).log_softmax(-1), weight)
        return {"total": cls + patch, "cls": cls, "patch": patch,            # [PersonViT Eq. 8]
                "feature_std": spread, **self.diagnose(p_cls, p_patch, cls)}

    @torch.no_grad()
    def teach(self, views: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Teacher's scores of whole views: [CLS] (G, B, K), hidden patches (M, K); and the spread
        of its features, sqrt(1 - |mean|^2) of unit vectors: 0 = all in one point, 1 = their mean is
        0, which even a few clusters can have. Adds the mean scores for `update_teacher`.

        No gradient: were the teacher trained too, both could lower the loss by giving every image
        the same answer."""
        backbone, head = self.teacher["backbone"], self.teacher["head"]
        tokens = backbone.forward_features(views.flatten(0, 1))              # (G B, 1 + N, D)
        spread = F.normalize(tokens[:, 0].float(), dim=1).var(0, correction=0).sum().sqrt()
        z = head(tokens)                                                     # (G B, 1 + N, d)
        cls, patches = head.last_layer(z[:, 0]), z[:, 1:].flatten(0, 1)      # (G B, K), (G B N, d)
        # the centre of patches is a mean over ALL of them; scores are linear in z, so the score of
        # the mean is the mean of the scores, and the other patches never meet the prototypes
        mean = head.last_layer2(patches.mean(0, keepdim=True))               # (1, K)
        self.new_center += gathered_mean(cls.mean(0))                        # (K,)
        self.new_patch_center += gathered_mean(mean[0])
        self.forwards += 1
        return cls.unflatten(0, views.shape[:2]), head.last_layer2(patches[hidden]), spread

    def study(self, views: dict[str, Tensor], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Student's scores: (V, B, K) of [CLS], global views being masked [PersonViT Eq. 5], local
        ones whole; (M, K) of the hidden patches [PersonViT Eq. 6]."""
        backbone, head = self.student["backbone"], self.student["head"]
        mask = views["masks"].flatten(0, 1)                                  # (G B, rows, columns)
        mask = mask.to(hidden.device, non_blocking=True)
        # (G B, 1 + N, D)
        tokens = backbone.forward_features(views["globals"].flatten(0, 1), mask, self.mask_token)
        patches = head.last_layer2(head(tokens[:, 1:].flatten(0, 1)[hidden]))  # (M, K)
        # the [CLS] loss uses the masked views as well [iBOT]
        cls = [tokens[:, 0]]                                                 # (G B, D)
        if len(views["locals"]):
            cls.append(backbone(views["locals"].flatten(0, 1)))             # (L B, D), never masked
        cls = head.last_layer(head(torch.cat(cls)))                          # (V B, K)
        return cls.unflatten(0, (-1, views["globals"].shape[1])), patches

    @torch.no_grad()
    def diagnose(self, p_cls: Tensor, p_patch: Tensor, cls: Tensor) -> dict[str, Tensor]:
        """What tells learning from collapse; without waiting for the GPU.

        entropy: of the teacher's answers on [CLS], at most ln K. kl: teacher to student, the part
        of the loss that can be learnt. information: how much an answer tells which image of the
        batch it is for (mutual information), at most ln B; 0 when all images get the same answer,
        flat or sharp. patch_information: the same of answer and hidden patch, as patches may
        collapse alone. prototypes: how many are the best one of at least one image.
        """
        entropy, information = mutual_information(p_cls)                     # (G,) each
        used = torch.zeros_like(self.center).scatter_(0, p_cls.argmax(-1).flatten(), 1.0).sum()
        return {"entropy": entropy.mean(), "kl": cls.detach() - entropy.mean(),
                "information": information.mean(),
                "patch_information": mutual_information(p_patch)[1], "prototypes": used}

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Once per optimiser step: teacher = m teacher + (1 - m) student.

        The centres move here too, by the mean over all forwards since the last call, and not in
        forward, so that a step split into several forwards moves them once.
        """
        t, s = list(self.teacher.parameters()), list(self.student.parameters())
        assert len(t) == len(s), "teacher and student are built alike"
        torch._foreach_lerp_(t, s, 1 - momentum)
        for center, new in ((self.center, self.new_center),
                            (self.patch_center, self.new_patch_center)):
            if self.forwards:
                center.lerp_(new / self.forwards, 1 - self.center_momentum)
            new.zero_()
        self.forwards = 0

    @staticmethod
    def collapsed(values: dict[str, float]) -> bool:
        """Do logged diagnostics show a teacher that gives every image the same answer?"""
        # at random weights all are above 0.5 on images of people, with the recipes' temperatures;
        # the limit is ours. Where no patch is ever hidden, nothing of theirs can collapse.
        return not all(values.get(name, 1.0) > 1e-2
                       for name in ("information", "patch_information", "feature_std"))

    def backbone_for_export(self) -> VisionTransformer:
        """The teacher's ViT: an average over many students, better than each [DINO]."""
        return self.teacher["backbone"]


def mutual_information(p: Tensor) -> tuple[Tensor, Tensor]:
    """Answers (..., n, K) for n images -> their mean entropy, and the mutual information of answer
    and image: the entropy of the mean answer less the mean entropy. (...) each; 0 for n = 0."""
    entropy = torch.special.entr(p).sum(-1).sum(-1) / max(p.shape[-2], 1)
    of_mean = torch.special.entr(p.sum(-2) / max(p.shape[-2], 1)).sum(-1)
    return entropy, of_mean - entropy


def gathered_mean(x: Tensor) -> Tensor:
    """Mean over all processes; per-process centres would drift apart. One process: x itself."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)
        x /= torch.distributed.get_world_size()
    return x


if __name__ == "__main__":  # the file alone, in any folder: sizes, and one step on noise
    for build in (vit_mini, vit_tiny, vit_small, vit_base):
        net = build().eval()
        images = torch.randn(2, 3, 256, 128)
        print(f"{build.__name__}: {sum(p.numel() for p in net.parameters()):,} parameters, images "
              f"{tuple(images.shape)} -> tokens {tuple(net.forward_features(images).shape)} -> "
              f"feature {tuple(net(images).shape)}")
    model = PersonViT(vit_mini(drop_path=0.1), num_prototypes=1024)
    noise = {"globals": torch.randn(2, 4, 3, 256, 128), "locals": torch.randn(3, 4, 3, 128, 64),
             "masks": draw_masks(8, 16, 8, torch.Generator().manual_seed(1)).unflatten(0, (2, 4))}
    losses = model(noise, teacher_temp=0.04, patch_temp=0.04)
    losses["total"].backward()
    model.update_teacher(0.996)
    print("one step on noise:", ", ".join(f"{k} {v.item():.3f}" for k, v in losses.items()),
          f"(ln 1024 = {math.log(1024):.3f})")
