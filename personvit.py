"""The Vision Transformer of PersonViT (arXiv 2408.05398), written out; the objective will join it here.

PersonViT pre-trains a plain ViT on unlabelled crops of people, with self-distillation of the [CLS]
token (DINO) and of masked patches (iBOT), then fine-tunes it for ReID. This file has the network:

    x       person image                       (B, 3, H, W)       H x W = 256 x 128
    tokens  [CLS] and N patches                (B, 1 + N, D)      N = 16 x 8, a tall grid
    f       [CLS] after the last LayerNorm     (B, D)             what the ReID losses and the ranking use

What differs from the ViT one meets in an ImageNet course: the patch grid is a rectangle (code that
takes sqrt(N) breaks on people), patches may overlap (`stride` < `patch_size`, as in TransReID), and
position embeddings are carried from grid to grid by `resize_pos_embed`. Parameter names are timm's,
shared by DINO, iBOT, TransReID and PersonViT, so that their files load as they are. Read
`VisionTransformer.forward_features` first.
"""

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

    >>> tall = resize_pos_embed(torch.randn(1, 1 + 14 * 14, 8), (14, 14), (16, 8))   # ImageNet -> people
    >>> tall.shape
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
    # an explicit target size: DINO's scale factors round a row away for some sizes and need a "+0.1"
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
    """Multi-head self-attention, (B, N, D) -> (B, N, D). Source: Vaswani et al. 2017, in timm's names."""

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                    # each (B, heads, N, D/heads)
        # = softmax(q k^T / sqrt(D/heads)) v, without ever writing the (N, N) matrix to memory
        x = F.scaled_dot_product_attention(q, k, v)             # (B, heads, N, D/heads)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    """Two linear layers with a GELU between, applied to every token alone: (B, N, D) -> (B, N, D)."""

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
        return branch * (kept / keep).to(branch.dtype)          # / keep: the expectation stays the same

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """Plain ViT on a rectangular grid; forward maps (B, 3, H, W) to the [CLS] feature (B, embed_dim).

    img_size: (height, width) the position embeddings belong to; other sizes work, the embeddings are
    then interpolated on the fly. drop_path: rate of the last block, growing linearly from 0 at the
    first (early blocks carry everything after them). Raises ValueError when no patch fits or the
    heads do not divide embed_dim. Source: Dosovitskiy et al. 2021; names and LayerNorm eps as timm.
    """

    def __init__(self, img_size: tuple[int, int] = (256, 128), patch_size: int = 16,
                 stride: int | None = None, embed_dim: int = 384, depth: int = 12, num_heads: int = 6,
                 mlp_ratio: float = 4.0, drop_path: float = 0.0):
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
            raise ValueError(f"an image of {height} x {width} holds no patch of {self.patch_size} pixels")
        return rows, columns

    def forward_features(self, x: Tensor) -> Tensor:
        """All tokens after the last LayerNorm: (B, 3, H, W) -> (B, 1 + N, D), [CLS] first."""
        B, _, H, W = x.shape
        grid = self.grid_of(H, W)
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)        # (B, N, D), row by row
        cls = self.cls_token.expand(B, -1, -1)                          # (B, 1, D)
        pos = resize_pos_embed(self.pos_embed, self.grid, grid)         # (1, 1 + N, D)
        x = torch.cat([cls, patches], dim=1) + pos                      # (B, 1 + N, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        """[CLS] feature, not normalised: (B, 3, H, W) -> (B, D)."""
        return self.forward_features(x)[:, 0]


def vit_tiny(img_size: tuple[int, int] = (256, 128), **kwargs) -> VisionTransformer:
    """ViT-Ti/16 (192 wide): for exercises on a CPU; the paper does not use it."""
    return VisionTransformer(img_size, embed_dim=192, depth=12, num_heads=3, **kwargs)


def vit_small(img_size: tuple[int, int] = (256, 128), **kwargs) -> VisionTransformer:
    """ViT-S/16, the paper's small model: 21.6 M parameters at 256 x 128."""
    return VisionTransformer(img_size, embed_dim=384, depth=12, num_heads=6, **kwargs)


def vit_base(img_size: tuple[int, int] = (256, 128), **kwargs) -> VisionTransformer:
    """ViT-B/16, the paper's best model: 85.7 M parameters at 256 x 128."""
    return VisionTransformer(img_size, embed_dim=768, depth=12, num_heads=12, **kwargs)


if __name__ == "__main__":  # the file alone, in any folder: shapes and sizes
    for build in (vit_tiny, vit_small, vit_base):
        net = build().eval()
        images = torch.randn(2, 3, 256, 128)
        count = sum(p.numel() for p in net.parameters())
        print(f"{build.__name__}: {count:,} parameters, images {tuple(images.shape)} -> "
              f"tokens {tuple(net.forward_features(images).shape)} -> feature {tuple(net(images).shape)}")
