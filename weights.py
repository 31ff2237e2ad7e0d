"""From a file of weights to a network: which formats exist, what a file holds, loading it whole.

Courses and papers leave weights in a dozen formats: nested or flat, with prefixes, with the head of
a classifier or of self-distillation, for another image size. All of them hold one of two backbones
under the names of timm (ViT) or torchvision (ResNet), so everything is read from the names and
shapes of tensors. Three rules: nothing in a file is executed; a backbone is filled wholly or not at
all; what was matched, resized and dropped is said. Read `read_file`, then `load_weights`.

Exercises (answers: README). 1. Take one tensor out of a ViT's backbone.pth and fine-tune from it:
what is said here? What would code lose that loads with strict=False and says nothing? 2. Let a ViT
trained at 128x64 read images at 256x128 (size in model.pth's recipe): what becomes of its mAP?
"""

import argparse
import math
import pickle
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import personvit
import upreid
from augment import IMAGENET_MEAN, IMAGENET_STD
from data import InputError, closest

# ---------------------------------------------------------------------------------------------
# The model that is fine-tuned and evaluated
# ---------------------------------------------------------------------------------------------

ARCHS = ("vit_mini", "vit_tiny", "vit_small", "vit_base", "resnet_tiny", "resnet50")


def build_backbone(arch: str, size: tuple[int, int] = (256, 128), drop_path: float = 0.0,
                   last_stride: int = 1, stride: int | None = None) -> nn.Module:
    """A backbone of ARCHS with random weights. size (H, W): a ViT's grid; a ResNet takes any.
    stride: of a ViT's patches, None = they do not overlap; last_stride: of a ResNet's last stage.

    Raises InputError for an unknown name and a size without a single patch.
    """
    if arch not in ARCHS:
        raise InputError(f"no architecture is called {arch!r}; "
                         f"did you mean {closest(arch, ARCHS)}?")
    if arch.startswith("resnet"):
        return getattr(upreid, arch)(last_stride)
    try:
        return getattr(personvit, arch)(size, drop_path=drop_path, stride=stride)
    except ValueError as error:
        raise InputError(str(error)) from None


class ReIDModel(nn.Module):
    """Backbone, BNNeck, classifier: images (B, 3, H, W) -> in training scores (B, num_ids) and
    feature (B, D), in evaluation the feature before [PersonViT code] or after the neck [BoT].

    The two losses disagree on what a feature is: the triplet loss wants distances, the classifier
    angles; with a batch norm between them each has a space of its own. State keys base.*,
    bottleneck.*, classifier.* are TransReID's.
    """

    def __init__(self, backbone: nn.Module, num_ids: int, neck_feat: str = "before"):
        super().__init__()
        assert neck_feat in ("before", "after"), neck_feat
        self.base, self.neck_feat = backbone, neck_feat
        self.bottleneck = nn.BatchNorm1d(backbone.embed_dim)
        # no shift, no classifier bias: decision planes go through the origin, as in cosine ranking
        self.bottleneck.bias.requires_grad_(False)
        self.classifier = nn.Linear(backbone.embed_dim, num_ids, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.head(self.base(x).float())        # (B, D); statistics and losses in float32

    def head(self, feature: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """What forward returns, of the backbone's features (B, D)."""
        if not self.training and self.neck_feat == "before":
            return feature
        neck = self.bottleneck(feature)               # (B, D)
        return (self.classifier(neck), feature) if self.training else neck


# ---------------------------------------------------------------------------------------------
# What a file holds
# ---------------------------------------------------------------------------------------------


@dataclass
class WeightsFile:
    """A file of weights, read: the backbone's tensors under plain names, and what else it says."""

    path: str
    kind: str                                    # of KINDS
    state: dict[str, Tensor]                     # of the backbone
    head: dict[str, Tensor]                      # of BNNeck and classifier, if fine-tuned
    dropped: list[str]                           # what belongs to neither
    arch: str = ""                               # of ARCHS, "" if none of them
    size: tuple[int, int] | None = None          # (H, W) of a ViT's positions
    stride: int | None = None                    # ... and of its patches
    grid: tuple[int, int] | None = None          # rows and columns of patches
    recipe: dict = field(default_factory=dict)   # of this project's files
    args: dict = field(default_factory=dict)     # the command line that DINO and iBOT keep
    epoch: int | None = None

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std by which images enter: as the file says, else by this table.

        0.5 and 0.5 for TransReID's and PersonViT's fine-tuned models and timm's ViT (a flat file
        with a classifier; DeiT's files are nested [from memory]); ImageNet's for all others.
        """
        if "mean" in self.recipe:
            return tuple(self.recipe["mean"]), tuple(self.recipe["std"])
        timm = "head.weight" in self.dropped and self.kind == "bare"
        half = timm or self.head and self.arch.startswith("vit")
        return ((0.5,) * 3, (0.5,) * 3) if half else (IMAGENET_MEAN, IMAGENET_STD)


SCALAR = np.float64(0).__reduce__()[0]  # makes a NumPy number; NumPy 2 renamed its module
HARMLESS = [argparse.Namespace, np.dtype, (SCALAR, "numpy.core.multiarray.scalar"),
            (SCALAR, "numpy._core.multiarray.scalar"),
            *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "?"))]


def read_checkpoint(path: str | Path) -> dict:
    """The dictionary in a weights file; nothing in the file is executed.

    Raises InputError for a missing, truncated or foreign file.
    """
    try:  # training files of DINO and iBOT hold their command line and rates, which are harmless
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle versions; what cannot be read raises
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such weights file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; name the model.pth or backbone.pth in it") from None
    except Exception as error:  # hostile bytes make the reader raise anything at all
        reason = "damaged, or no file of PyTorch weights"
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            reason = (f"it holds Python objects ({found[1] if found else 'of an unknown kind'}), "
                      f"which loading might execute")
        raise InputError(f"{path}: {reason}; nothing was loaded") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a dictionary of weights")
    return content


# Nesting and prefixes of the usual files, in the order in which they are taken off. Of two
# networks the one that is meant to be used: DINO's and iBOT's teacher, MoCo's query encoder.
WRAPPERS = ("model", "state_dict", "module", "teacher", "target_encoder", "backbone")
PREFIXES = ("module.", "_orig_mod.", "teacher.", "online.", "encoder_q.", "backbone.", "base.")
HEAD = ("bottleneck.", "classifier.")            # TransReID's names, and ours
UNFIT = {"part_token1": "the part tokens of PASS",
         "sie_embed": "TransReID's camera embedding (SIE)",
         "b1.0.norm1.weight": "the local branches of TransReID (JPM)",
         "patch_embed.conv.0.weight": "the convolutional stem (ICS) of TransReID-SSL"}


def read_file(path: str | Path) -> WeightsFile:
    """Read any of the formats of README's table. Raises InputError, naming the file, for files that
    are damaged, hold no known backbone, or one with parts that the networks here lack."""
    content = read_checkpoint(path)
    try:
        return interpret(str(path), content)
    except (TypeError, LookupError, ArithmeticError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: damaged, its tensors or its recipe make no sense ({error}); "
                         f"nothing was loaded") from None


def interpret(path: str, content: dict) -> WeightsFile:
    """`read_file` of what was read."""
    inner = content
    for _ in range(8):  # deep enough for every format, and an end for a file that holds itself
        key = next((k for k in WRAPPERS if isinstance(inner.get(k), dict)), None)
        inner = inner[key] if key else inner
    plain = {k: v for k, v in inner.items() if isinstance(k, str) and isinstance(v, Tensor)}
    head, others = {}, []
    for prefix in PREFIXES:  # what lies outside the prefix is a head, an optimiser, another network
        if any(k.startswith(prefix) for k in plain):
            outside = [k for k in plain if not k.startswith(prefix)]
            head |= {k: plain[k] for k in outside if k.startswith(HEAD)}
            others += [k for k in outside if not k.startswith(HEAD)]
            plain = {k.removeprefix(prefix): v for k, v in plain.items() if k.startswith(prefix)}
    ours = re.compile(r"cls_token|pos_embed|patch_embed\.proj\.|blocks\.|norm\.|"
                      r"conv1\.|bn1\.|layer\d\.")
    state = {k: v for k, v in plain.items() if ours.match(k)}
    others += [k for k in plain if k not in state]
    for name, what in UNFIT.items():
        if name in others:
            raise InputError(f"{path}: holds {what}, which the backbones here lack; nothing was "
                             f"loaded")
    if not state:
        raise InputError(f"{path}: holds no weights of a backbone under a name known here, first "
                         f"{', '.join(map(str, list(inner)[:3])) or 'nothing'}; nothing was loaded")
    bad = [k for k, v in (state | head).items() if not usable(v, k)]
    if bad:
        raise InputError(f"{path}: {len(bad)} weights are not finite floating-point numbers, first "
                         f"{bad[0]}: the training diverged, or they were rounded to integers; "
                         f"nothing was loaded")
    if "dist_token" in others and "pos_embed" in state:  # DeiT: the second is its
        state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], state["pos_embed"][:, 2:]], 1)
    recipe = content.get("recipe") if isinstance(content.get("recipe"), dict) else {}
    recipe = recipe | {k: content[k] for k in ("size", "mean", "std") if k in content}
    args, epoch = content.get("args"), content.get("epoch")
    check_reading(path, recipe)
    file = WeightsFile(path, kind_of(content, inner, head), state, head, others,
                       arch_of(state), recipe=recipe,
                       args=vars(args) if isinstance(args, argparse.Namespace) else {},
                       epoch=epoch if isinstance(epoch, int) else None)
    if "pos_embed" in state and "patch_embed.proj.weight" in state:
        file.size, file.stride, file.grid = positions_of(file)
    return file


def usable(tensor: Tensor, name: str) -> bool:
    """Ordinary finite numbers? Rounded to integers, or claimed but not stored, they are none."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        return False
    if name.endswith("num_batches_tracked"):
        return True
    stored = tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()
    return stored and tensor.is_floating_point() and bool(tensor.isfinite().all())


def check_reading(path: str, recipe: dict) -> None:
    """Raise InputError for a recipe that says nonsense about how images enter."""
    def numbers(key: str, count: int, low: float, high: float) -> bool:
        values = recipe.get(key, ())
        return key not in recipe or (
            isinstance(values, (list, tuple)) and len(values) == count and
            all(isinstance(v, (int, float)) and low <= v <= high for v in values))

    right = (numbers("size", 2, 8, 4096) and numbers("mean", 3, -1e3, 1e3) and
             numbers("std", 3, 1e-6, 1e3) and ("mean" in recipe) == ("std" in recipe) and
             recipe.get("last_stride", 1) in (1, 2) and
             recipe.get("neck_feat", "before") in ("before", "after"))
    if not right:
        raise InputError(f"{path}: damaged, its size, mean, std, last_stride or neck_feat makes no "
                         f"sense; nothing was loaded")


KINDS = {
    "reid-model": "fine-tuned model of this project",
    "reid-backbone": "pre-trained backbone of this project",
    "reid-checkpoint": "training state of this project",
    "ibot_loss": "iBOT's training state, as PersonViT's pre-training has it: the teacher counts",
    "dino_loss": "DINO's training state: the teacher counts",
    "moco": "MoCo's or LUPerson's training state: the query encoder counts",
    "transreid": "fine-tuned model of TransReID or PersonViT",
    "bare": "bare backbone",
    "wrapped": "backbone in a wrapper"}


def kind_of(content: dict, inner: dict, head: dict) -> str:
    """The key in KINDS."""
    own = str(content.get("format"))
    if own.startswith("reid-") and own in KINDS:
        return own
    for key in ("ibot_loss", "dino_loss"):
        if key in content:
            return key
    if any(str(k).removeprefix("module.").startswith("encoder_q.") for k in inner):
        return "moco"
    if head:
        return "transreid"
    return "bare" if inner is content else "wrapped"


def arch_of(state: dict[str, Tensor]) -> str:
    """The name in ARCHS of the network these tensors are of, by their shapes; "" if it has none."""
    def count(pattern: str) -> int:
        return len({m[1] for k in state if (m := re.match(pattern, k))})

    if "cls_token" in state and "blocks.0.mlp.fc1.weight" in state:
        D, depth = state["cls_token"].shape[-1], count(r"blocks\.(\d+)\.")
        four = state["blocks.0.mlp.fc1.weight"].shape[0] == 4 * D
        names = {(128, 6): "vit_mini", (192, 12): "vit_tiny", (384, 12): "vit_small",
                 (768, 12): "vit_base"}
        return names.get((D, depth), "") if four else ""
    if "layer1.0.conv3.weight" in state and "conv1.weight" in state:
        depths = tuple(count(rf"layer{i}\.(\d+)\.") for i in (1, 2, 3, 4))
        names = {(64, (3, 4, 6, 3)): "resnet50", (32, (1, 1, 1, 1)): "resnet_tiny"}
        return names.get((state["conv1.weight"].shape[0], depths), "")
    return ""


SIZES = ((256, 128), (384, 128), (224, 224), (384, 384), (128, 64))  # in use for ViT and people


def positions_of(file: WeightsFile) -> tuple[tuple[int, int], int, tuple[int, int]]:
    """Image size, stride and grid (rows, columns) that a ViT's position embeddings belong to.

    This project's files say their size. Of others only the number of patches is known: the first of
    SIZES with as many, else the first with patches that overlap by a quarter (TransReID's stride 12
    of 16), else a square grid, or one twice as tall as wide [ours].
    """
    pos, p = file.state["pos_embed"], file.state["patch_embed.proj.weight"].shape[-1]
    n = pos.shape[1] - 1 if pos.ndim == 3 and len(pos) == 1 else 0
    sizes = (tuple(file.recipe["size"]),) if "size" in file.recipe else SIZES
    side, half = math.isqrt(max(n, 0)), math.isqrt(max(n, 0) // 2)
    guesses = [(size, stride) for stride in (p, max(3 * p // 4, 1)) for size in sizes]
    for (H, W), stride in guesses + [((side * p, side * p), p), ((2 * half * p, half * p), p)]:
        grid = (H - p) // stride + 1, (W - p) // stride + 1
        if min(grid) > 0 and grid[0] * grid[1] == n:
            return (H, W), stride, grid
    raise InputError(f"{file.path}: pos_embed of shape {tuple(pos.shape)} fits no grid of patches "
                     f"after one [CLS] token; nothing was loaded")


# ---------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------


def load_weights(path: str | Path, backbone: nn.Module) -> str:
    """Fill a backbone from a weights file and say what was done; it is filled wholly or not at all.

    Classifiers and heads are dropped; position embeddings are resized to the backbone's grid.
    Raises InputError as `read_file` does, when a backbone weight is missing, has another shape or
    is not finite, and when the file's network is deeper.
    """
    return fill(read_file(path), backbone)


def fill(file: WeightsFile, backbone: nn.Module, use_head: bool = False) -> str:
    """`load_weights` of a file that is read already; use_head: its head will be used as well."""
    state, own, resized = dict(file.state), backbone.state_dict(), "none"
    if file.grid and "pos_embed" in own and file.grid != backbone.grid and \
            state["pos_embed"].shape[2] == backbone.embed_dim:
        resized = "pos_embed {}x{} -> {}x{}".format(*file.grid, *backbone.grid)
        state["pos_embed"] = personvit.resize_pos_embed(state["pos_embed"].float(), file.grid,
                                                        backbone.grid)
    # old files lack the counter of batch norm, which only an average over all steps would read
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    wrong = [k for k in own if k in state and state[k].shape != own[k].shape]
    deeper = [k for k in state if k not in own]
    if missing or wrong or deeper:
        kinds = (("cls_token", "a ViT"), ("layer1.0.conv1.weight", "a ResNet"))
        kind = file.arch or next((name for key, name in kinds if key in state), "unknown")
        example = (f"missing {missing[0]}" if missing else f"too many: {deeper[0]}" if deeper else
                   f"{wrong[0]} is {tuple(state[wrong[0]].shape)}, "
                   f"not {tuple(own[wrong[0]].shape)}")
        raise InputError(f"{file.path}: weights of another architecture: "
                         f"{len(missing)} of {len(own)} backbone weights missing, "
                         f"{len(wrong)} of another shape, "
                         f"{len(deeper)} of blocks that this one lacks ({example}); "
                         f"the file's backbone: {kind}. "
                         f"Choose --arch to match; nothing was loaded")
    backbone.load_state_dict(state, strict=False)
    dropped = file.dropped if use_head else [*file.head, *file.dropped]
    head = " and the BNNeck" if use_head and file.head else ""
    return (f"{file.path}: {KINDS[file.kind]}; "
            f"{len(own)}/{len(own)} backbone weights{head} loaded, "
            f"resized: {resized}, dropped: {len(dropped)}"
            f"{' (' + ', '.join(dropped[:3]) + ')' if dropped else ''}")


def load_model(path: str | Path) -> tuple[nn.Module, dict]:
    """A model to evaluate, and how to use it: {"arch", "size", "mean", "std", "neck_feat"}.

    A fine-tuned model (ours, TransReID's, PersonViT's) comes with its BNNeck; a pre-trained
    backbone gives its plain feature. Raises InputError as `load_weights` does.
    """
    file = read_file(path)
    if not file.arch:
        raise InputError(f"{path}: its backbone is none of {', '.join(ARCHS)}; nothing was loaded")
    if file.kind == "reid-checkpoint":
        raise InputError(f"{path}: a training state does not say how images enter; evaluate the "
                         f"model.pth or backbone.pth beside it")
    if file.kind == "reid-model" and not {"size", "mean"} <= set(file.recipe):
        raise InputError(f"{path}: damaged, its recipe is missing")
    mean, std = file.statistics
    recipe = {"arch": file.arch, "size": file.size or (256, 128), "neck_feat": "none"}
    recipe |= {"mean": list(mean), "std": list(std)} | file.recipe
    try:
        model = build_backbone(file.arch, tuple(recipe["size"]),
                               last_stride=recipe.get("last_stride", 1), stride=file.stride)
        print(fill(file, model, use_head=True))
        if file.head:
            if recipe["neck_feat"] == "none":                                # [PersonViT code; BoT]
                recipe["neck_feat"] = "before" if file.arch.startswith("vit") else "after"
            model = ReIDModel(model, len(file.head["classifier.weight"]), recipe["neck_feat"])
            state = {f"base.{k}": v for k, v in model.base.state_dict().items()} | file.head
            model.load_state_dict(state)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, AssertionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: damaged, its weights and recipe do not fit ({error})") from None
    return model.eval(), recipe


def inspect(path: str | Path) -> str:
    """What a weights file is, in lines of text; for files like DINO's the arguments it carries."""
    file = read_file(path)
    count = sum(v.numel() for v in file.state.values())
    arch = file.arch or "none of " + ", ".join(ARCHS)
    lines = [f"{path}: {KINDS[file.kind]}",
             f"  backbone  {arch}, {len(file.state)} tensors, {count:,} numbers"]
    if file.grid:
        sure = "as the file says" if "size" in file.recipe else "inferred from their number"
        lines.append("  positions {}x{} patches at stride {}, image {}x{} ({})".format(
            *file.grid, file.stride, *file.size, sure))
    if file.head:
        shapes = ", ".join(f"{k} {tuple(v.shape)}" for k, v in file.head.items())
        lines.append(f"  head      {shapes}")
    lines.append(f"  normalise mean {file.statistics[0]}, std {file.statistics[1]}")
    if file.epoch is not None:
        lines.append(f"  epoch     {file.epoch}")
    lines.append(f"  not used  {len(file.dropped)} tensors"
                 f"{': ' + ', '.join(file.dropped[:6]) if file.dropped else ''}")
    for title, values in (("recipe", file.recipe), ("args", file.args)):
        lines += [f"  {title}.{key} = {value!r:.200}"
                  for key, value in sorted(values.items(), key=str)]
    return "\n".join(lines)
