"""PersonViT (arXiv 2408.05398): a plain ViT, pre-trained on unlabelled crops of people.

Two networks of one shape look at the same people. The student learns to say what the teacher says,
about whole people it sees in other crops (DINO), and about patches it is not shown (iBOT). The
teacher is a moving average of the student; nobody else teaches.

    x        person image, 2 global and L local crops   (B, 3, H, W)    H x W = 256 x 128
    tokens   [CLS] and N patches of a view              (B, 1 + N, D)   N = 16 x 8, a tall grid
    s, t     student's and teacher's scores             (B, K)          K prototypes
    p      = softmax((t - c) / T_t): the teacher's answer; c a moving average of its scores, one
             for [CLS] and one for patches [DINO]
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


class Attention(nn.Module):
    """Multi-head self-attention, (B, T, D) -> (B, T, D), T tokens. Source: Vaswani et al. 2017."""

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        qkv = self.qkv(x).reshape(B, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                    # each (B, heads, T, D/heads)
        # = softmax(q k^T / sqrt(D/heads)) v; a fused kernel, where there is one, never stores the
        # (T, T) matrix
        x = F.scaled_dot_product_attention(q, k, v)             # (B, heads, T, D/heads)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))


class Mlp(nn.Module):
    """Two linear layers with a GELU between, on every token alone: (B, T, D) -> (B, T, D)."""

    def __init__(self, embed_dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block with stochastic depth, (B, T, D) -> (B, T, D).

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


def init_linear(net: nn.Module) -> None:
    """Small weights and no biases, as timm has it."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


class VisionTransformer(nn.Module):
    """Plain ViT on a rectangular grid; (B, 3, H, W) -> the [CLS] feature (B, embed_dim).

    img_size: (height, width) the position embeddings belong to; at other sizes they are
    interpolated. drop_path: rate of the last block, growing linearly from 0 at the first (early
    blocks carry everything after them). Raises ValueError when no patch fits. Source: Dosovitskiy
    et al. 2021; names and LayerNorm eps as timm.
    """

    def __init__(self, img_size: tuple[int, int] = (256, 128), patch_size: int = 16,
                 stride: int | None = None, embed_dim: int = 384, depth: int = 12,
                 num_heads: int = 6, mlp_ratio: float = 4.0, drop_path: float = 0.0):
        super().__init__()
        self.patch_size, self.stride = patch_size, stride or patch_size
        self.grid, self.embed_dim = self.grid_of(*img_size), embed_dim
        rows, columns = self.grid
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + rows * columns, embed_dim))
        # cutting into patches and projecting each is one convolution; with stride < patch_size
        # neighbours overlap [TransReID]
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, embed_dim, patch_size, self.stride)})
        rates = torch.linspace(0, drop_path, depth).tolist()
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, rate) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        init_linear(self)

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
        patches = self.patch_embed["proj"](x)                           # (B, D, rows, columns)
        patches = patches.flatten(2).transpose(1, 2)                    # (B, N, D), row by row
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


VITS = {"vit_mini": vit_mini, "vit_tiny": vit_tiny, "vit_small": vit_small, "vit_base": vit_base}

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
    """Masks of n views, (n, height, width) in patches: half of the views are left whole, the others
    hide a share drawn from U(0.1, 0.5) [iBOT; PersonViT Eq. 5]; the whole ones keep the network
    used to unmasked people."""
    whole, share = torch.rand(2, n, generator=generator)
    ratios = torch.where(whole < 0.5, 0.0, 0.1 + 0.4 * share).tolist()
    return torch.stack([block_mask(height, width, ratio, generator) for ratio in ratios])


def hidden_patches(masks: Tensor) -> tuple[Tensor, Tensor]:
    """masks (G, B, rows, columns) on the CPU -> places (M,) of the hidden ones among the G B N
    patches, and what each counts in `patch_loss` (M,): 1 / (patches hidden in its view x views of
    all images)."""
    G, B, N = masks.flatten(2).shape
    # NumPy's, as no operation of PyTorch that counts may stand in a step: on a GPU it would wait
    places = torch.from_numpy(masks.flatten().numpy().nonzero()[0])          # (M,)
    weight = 1 / (G * B * masks.flatten(2).sum(2).clamp(min=1))              # (G, B)
    return places, weight.flatten()[places // N]


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
        init_linear(self)
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
    """[CLS] self-distillation across views [PersonViT Eq. 4]: the teacher's probabilities
    (G, B, K), the student's log-probabilities (V, B, K) -> scalar.

    The first G student views are the teacher's. Mean over images, and over all pairs of a teacher's
    view and another view of the student: equal views would be matched without understanding.
    """
    G, V = len(teacher), len(student)
    assert V > 1, "one view alone has no other view to be compared with"
    # sum over v != q of CE(t_q, s_v) = CE(t_q, sum of all s) - CE(t_q, s_q): one product per q
    total = soft_cross_entropy(teacher, student.sum(0)) - soft_cross_entropy(teacher, student[:G])
    return total.sum(0).mean() / (G * (V - 1))                               # total (G, B)


def patch_loss(teacher: Tensor, student: Tensor, weight: Tensor) -> Tensor:
    """Masked-patch distillation [PersonViT Eq. 7]: the teacher's probabilities (M, K), the
    student's log-probabilities (M, K), weight (M,) -> scalar.

    The M rows are all hidden patches of the batch, of the same view in both networks. weight: see
    `hidden_patches`; each view counts alike, and one with nothing hidden counts 0 and not NaN.
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
                 student_temp: float = 0.1, center_momentum: float = 0.9, clip: float = 3.0,
                 freeze_last_layer: int = 1):
        super().__init__()
        D, K = backbone.embed_dim, num_prototypes
        head = ProjectionHead(D, K, hidden, bottleneck, shared_head, norm_last_layer)
        self.student = nn.ModuleDict({"backbone": backbone, "head": head})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        for block in self.teacher["backbone"].blocks:
            block.drop_path = 0.0                                # the teacher uses all its layers
        self.mask_token = nn.Parameter(torch.zeros(1, D))        # the student's alone
        self.student_temp, self.center_momentum = student_temp, center_momentum
        self.clip, self.freeze_last_layer = clip, freeze_last_layer
        self.reference = {"ln_K": math.log(K)}                   # `cls` when all K are as likely
        for name in ("center", "patch_center", "new_center", "new_patch_center"):
            self.register_buffer(name, torch.zeros(K))
        self.forwards = 0                                        # since the centres last moved

    def forward(self, views: dict[str, Tensor], teacher_temp: float, patch_temp: float,
                **_) -> dict[str, Tensor]:
        """Losses {"total", "cls", "patch"} and diagnostics of one batch, all scalars.

        views: "globals" (G, B, 3, H, W), G = 2; "locals" (L, B, 3, h, w); "masks" (G, B, rows,
        columns) on the CPU, True = hidden: how many there are is needed here, and asking a GPU for
        it would stall the GPU; without "masks" nothing is hidden, and nothing said of patches.
        Temperatures as scheduled; K prototypes, V = G + L views.
        """
        shape = (*views["globals"].shape[:2], *self.student["backbone"].grid)
        masks = views.get("masks", torch.zeros(shape, dtype=torch.bool))
        if masks.dtype != torch.bool or masks.shape != shape:
            raise ValueError(f"masks are bool of shape {shape}, not {masks.dtype} of "
                             f"{tuple(masks.shape)}")
        device = self.center.device
        places, weight, masks = (x if device.type == "cpu" else x.pin_memory().to(
            device, non_blocking=True) for x in (*hidden_patches(masks), masks))  # (M,), (M,), same
        t_cls, t_patch, spread = self.teach(views["globals"], places)        # (G, B, K), (M, K), ()
        s_cls, s_patch = self.study(views, masks, places)                    # (V, B, K), (M, K)
        # subtracting the centre keeps one prototype from taking all, the low temperature keeps the
        # scores from going flat: each prevents the collapse the other alone would cause [DINO]
        p_cls = ((t_cls - self.center) / teacher_temp).softmax(-1)           # (G, B, K)
        p_patch = ((t_patch - self.patch_center) / patch_temp).softmax(-1)   # (M, K)
        cls = cls_loss(p_cls, (s_cls / self.student_temp).log_softmax(-1))
        patch = patch_loss(p_patch, (s_patch / self.student_temp).log_softmax(-1), weight)
        losses = {"total": cls + patch, "cls": cls, "patch": patch,          # [PersonViT Eq. 8]
                  "feature_std": spread, **self.diagnose(p_cls, p_patch, cls)}
        return losses if "masks" in views else {k: losses[k] for k in losses if "patch" not in k}

    @torch.no_grad()
    def teach(self, views: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Teacher's scores of whole views: [CLS] (G, B, K), patches that are hidden from the
        student (M, K) [PersonViT Eq. 6]; and the spread of its features, sqrt(1 - |mean|^2) of unit
        vectors: 0 = all in one point, 1 = their mean is 0, which even a few clusters can have. Adds
        the mean scores to new_center and new_patch_center, for `update_teacher`.

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
        return cls.unflatten(0, views.shape[:2]), head.last_layer2(patches[places]), spread

    def study(self, views: dict[str, Tensor], masks: Tensor,
              places: Tensor) -> tuple[Tensor, Tensor]:
        """Student's scores: (V, B, K) of [CLS], global views being masked [PersonViT Eq. 5], local
        ones whole; (M, K) of the hidden patches [PersonViT Eq. 6]."""
        backbone, head = self.student["backbone"], self.student["head"]
        tokens = backbone.forward_features(views["globals"].flatten(0, 1),   # (G B, 1 + N, D)
                                           masks.flatten(0, 1), self.mask_token)
        patches = head.last_layer2(head(tokens[:, 1:].flatten(0, 1)[places]))  # (M, K)
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

    def finish_gradients(self, epoch: int) -> Tensor:
        """Clip, and hold the prototypes still in the first epochs, before they are told apart from
        noise [iBOT]; the norm of all gradients as it was."""
        norm = clip_each(self.parameters(), self.clip)
        if epoch < self.freeze_last_layer:
            for name, p in self.named_parameters():
                if "last_layer" in name:
                    p.grad = None
        return norm

    @torch.no_grad()
    def update_teacher(self, momentum: float, **_) -> None:
        """Once per optimiser step: teacher = m teacher + (1 - m) student.

        The centres move here too, by the mean over all forwards since the last call, and not in
        forward, so that a step split into several forwards moves them once.
        """
        ema(self.teacher, self.student, momentum)
        for center, new in ((self.center, self.new_center),
                            (self.patch_center, self.new_patch_center)):
            center.lerp_(new / self.forwards, 1 - self.center_momentum)
            new.zero_()
        self.forwards = 0

    def warning(self, values: dict[str, float]) -> str:
        """What a line of the log warns of, if of anything: a teacher that gives every image the
        same answer; or answers hardly more than noise, of which nothing is to be learnt."""
        # at random weights all are above 0.5 on images of people, with the recipes' temperatures;
        # the limits are ours. Where no patch is ever hidden, nothing of theirs can collapse.
        judged = ("information", "patch_information", "feature_std")
        if not all(values.get(name, 1.0) > 1e-2 for name in judged):
            return "COLLAPSE?"
        return "FLAT?" if values["entropy"] > 0.95 * self.reference["ln_K"] else ""

    def backbone_for_export(self) -> VisionTransformer:
        """The teacher's ViT: an average over many students, better than each [DINO]."""
        return self.teacher["backbone"]


def mutual_information(p: Tensor) -> tuple[Tensor, Tensor]:
    """Answers (..., n, K) for n images -> their mean entropy, and the mutual information of answer
    and image: the entropy of the mean answer less the mean entropy. (...) each; 0 for n = 0."""
    entropy = torch.special.entr(p).sum(-1).sum(-1) / max(p.shape[-2], 1)
    of_mean = torch.special.entr(p.sum(-2) / max(p.shape[-2], 1)).sum(-1)
    return entropy, of_mean - entropy


def ema(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Parameters of the teacher = m teacher + (1 - m) student, in one launch."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


def gathered_mean(x: Tensor) -> Tensor:
    """Mean over all processes; per-process centres would drift apart. One process: x itself."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


# ---------------------------------------------------------------------------------------------
# How it is trained
# ---------------------------------------------------------------------------------------------


def cosine(t: float, start: float, end: float) -> float:
    """From start at t = 0 to end at t = 1 along half a cosine wave; constant outside.

    >>> cosine(0, 1.0, 0.0), cosine(0.5, 1.0, 0.0), cosine(2, 1.0, 0.0)
    (1.0, 0.5, 0.0)
    """
    return end + (start - end) * (1 + math.cos(math.pi * min(max(t, 0), 1))) / 2


def matrix_groups(model: nn.Module) -> list[dict]:
    """Two groups for AdamW: decay acts on tensors of two or more dimensions, so not on biases and
    norms, yet on [CLS], mask token, positions and a trained gain of prototypes [iBOT]."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in trained if p.ndim > 1], "decay": 1.0},
            {"params": [p for p in trained if p.ndim <= 1], "decay": 0.0}]


def clip_each(parameters, limit: float) -> Tensor:
    """Scale the gradient of each tensor to a norm of at most `limit`; their global norm before.

    Per tensor, as iBOT does: one exploding layer does not silence all others.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    torch._foreach_mul_(grads, (limit / (norms + 1e-6)).clamp(max=1).unbind())
    return norms.norm()


@dataclass(frozen=True)
class PersonViTRecipe:
    """PersonViT's pre-training on LUPerson, a line per value. The paper's true values lie in its
    released checkpoints (`args`), as notes on them say. [iBOT] = its published ViT-S/16 command;
    [inferred] = read into the checkpoint's name. Probabilities of augmentation and masks stand with
    their code."""

    arch: Literal[tuple(VITS)] = "vit_small"  # backbone [PersonViT]
    size: tuple[int, int] = (256, 128)  # height x width of global crops, local: half [PersonViT]
    epochs: int = 300                   # passes over the images [PersonViT code]
    batch: int = 512                    # images per step, of all processes [DINO for ReID]
    lr: float = 5e-4                    # peak learning rate, times batch / 256 [iBOT]
    min_lr: float = 1e-6                # learning rate at the end [iBOT]
    warmup: int = 10                    # epochs of warm-up from 0; shorter runs miss the top [iBOT]
    weight_decay: float = 0.04          # on matrices, at the start [iBOT]
    weight_decay_end: float = 0.4       # ... and at the end of a cosine [iBOT]
    momentum: float = 0.996             # of the teacher, cosine to 1 [iBOT]
    prototypes: int = 8192              # K [iBOT]
    hidden: int = 2048                  # width of the head's MLP [iBOT]
    bottleneck: int = 256               # width of its output [iBOT]
    shared_head: bool = True            # the same prototypes for [CLS] and patches [iBOT]
    norm_last_layer: bool = False       # prototypes of fixed gain [iBOT]
    student_temp: float = 0.1           # temperature of the student [iBOT]
    teacher_temp: float = 0.04          # of the teacher at the start [iBOT]
    teacher_temp_end: float = 0.07      # ... and after temp_warmup [iBOT]
    temp_warmup: int = 30               # epochs, linear [iBOT]
    clip: float = 3.0                   # largest gradient norm of a tensor [iBOT]
    freeze_last_layer: int = 1          # epochs in which prototypes stand still [iBOT]
    drop_path: float = 0.1              # stochastic depth of the student's last block [iBOT]
    local_crops: int = 8                # local views [DINO for ReID]; iBOT's author: 10
    masks: bool = True                  # hide patches from the student; without: DINO [PersonViT]
    global_scale: tuple[float, float] = (0.4, 1.0)   # of the area [DINO for ReID]
    local_scale: tuple[float, float] = (0.05, 0.8)   # as [SOLIDER]; 0.05 [DINO], 0.8 [inferred]
    aspect: tuple[float, float] = (0.375, 0.667)     # width / height [inferred]
    seed: int = 0                       # of everything random
    bf16: bool = False                  # bfloat16 in the networks; on by default on a GPU

    # iBOT's ViT-B/16 command, as others report it [iBOT, secondary]
    VIT_BASE: ClassVar = dict(lr=7.5e-4, min_lr=2e-6, clip=0.3, freeze_last_layer=3,
                              norm_last_layer=True)
    # small images and networks on a CPU: a teacher that stays cool does not go flat on so few
    # images; four times this rate does no good to what is fine-tuned, 8 epochs gain much less
    # (docs/results.md) [ours]
    LAPTOP: ClassVar = dict(size=(128, 64), epochs=64, batch=32, lr=2e-3, warmup=2,
                            weight_decay_end=0.1, momentum=0.98, prototypes=1024, hidden=512,
                            bottleneck=128, norm_last_layer=True, teacher_temp=0.02,
                            teacher_temp_end=0.02, local_crops=4, local_scale=(0.1, 0.6))
    # thousands of images, one machine: a teacher that warmed up went flat (docs/results.md); with
    # this rate, before batch / 256, and momentum a user's DINO began to learn
    # (facebookresearch/dino, issue 246 [secondary]) [ours]
    ONE_GPU: ClassVar = dict(epochs=200, batch=128, lr=1e-3, momentum=0.99, prototypes=1024,
                             norm_last_layer=True, teacher_temp_end=0.04, local_crops=6)

    @classmethod
    def preset(cls, dataset: str, arch: str | None = None) -> "PersonViTRecipe":
        """The recipe for a dataset's name and a backbone; arch=None: the usual one."""
        arch = arch or ("vit_mini" if dataset == "synthetic" else "vit_small")
        small = dataset == "synthetic" or arch == "vit_mini"
        values = cls.LAPTOP if small else {} if dataset == "luperson" else cls.ONE_GPU
        return cls(arch=arch, **((cls.VIT_BASE if arch == "vit_base" else {}) | values))

    def build(self, forwards: int = 1) -> PersonViT:
        """The objective with random weights. forwards: those that share the images of a step,
        processes x passes. Raises ValueError for values that do not fit together."""
        least = 32 if self.local_crops else 16
        if min(self.size) < least:
            raise ValueError(f"--size {self.size[0]}x{self.size[1]} is too small: masks and local "
                             f"crops, half as large, need {least} pixels at least")
        if self.batch % forwards or self.batch < 2 * forwards:
            raise ValueError(f"--batch {self.batch} cannot be shared evenly, two images at least "
                             f"each, by {forwards} processes x --accum passes")
        backbone = VITS[self.arch](self.size, drop_path=self.drop_path)
        return PersonViT(backbone, self.prototypes, self.hidden, self.bottleneck, self.shared_head,
                         self.norm_last_layer, self.student_temp, clip=self.clip,
                         freeze_last_layer=self.freeze_last_layer)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW in the groups of `matrix_groups` [iBOT]."""
        return torch.optim.AdamW(matrix_groups(model), fused=True)

    def schedule(self, step: int, steps_per_epoch: int) -> tuple[dict, dict]:
        """Of a 0-based step [iBOT: per step]: what the optimiser takes, what the model takes."""
        steps, warmup = self.epochs * steps_per_epoch, self.warmup * steps_per_epoch
        peak = self.lr * self.batch / 256
        lr = cosine((step - warmup) / max(steps - warmup, 1), peak, self.min_lr)
        if step < warmup:  # iBOT's ramp: 0 in the first step, the peak in its last
            lr = peak * step / max(warmup - 1, 1)
        epoch, t = step // steps_per_epoch, step / steps
        warm = 1.0 if epoch >= self.temp_warmup else epoch / max(self.temp_warmup - 1, 1)  # [iBOT]
        # iBOT has a temperature each for [CLS] and patches; in its ViT-S command they are the same
        temp = (1 - warm) * self.teacher_temp + warm * self.teacher_temp_end
        return ({"lr": lr, "weight_decay": cosine(t, self.weight_decay, self.weight_decay_end)},
                {"momentum": cosine(t, self.momentum, 1.0), "teacher_temp": temp,
                 "patch_temp": temp})

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """What an image needs drawn beside its views: masks (2, rows, columns) of its two global
        views."""
        rows, columns = (n // 16 for n in self.size)
        return {"masks": draw_masks(2, rows, columns, generator)} if self.masks else {}


if __name__ == "__main__":  # the file alone, in any folder: sizes, and one step on noise
    recipe = PersonViTRecipe.preset("synthetic")
    model, generator = recipe.build(), torch.Generator().manual_seed(1)
    net, images = model.backbone_for_export(), torch.randn(2, 3, 128, 64)
    print(f"{recipe.arch}: {sum(p.numel() for p in net.parameters()):,} parameters, tokens "
          f"{tuple(net.forward_features(images).shape)}, feature {tuple(net(images).shape)}")
    noise = {"globals": torch.randn(2, 4, 3, 128, 64), "locals": torch.randn(3, 4, 3, 64, 32),
             "masks": torch.stack([recipe.draw(generator)["masks"] for _ in range(4)], dim=1)}
    losses = model(noise, **recipe.schedule(0, 100)[1])
    losses["total"].backward()
    print("one step on noise:", {k: round(v.item(), 3) for k, v in losses.items()}, model.reference)
