"""Weights files of other projects, turned into what train.py would have saved.

Courses and papers leave weights in a dozen formats: nested or flat, under prefixes, with the head
of a classifier or of self-distillation, for another image size. Those that can be read here hold a
ViT under timm's names or a ResNet under torchvision's, so all is seen from the names and shapes of
tensors. Nested dictionaries become one, of dotted names, and then each tensor is one of four:

    backbone   a name of `BACKBONE` behind the one prefix at which a network begins
    neck       the BNNeck and classifier of TransReID, PersonViT, bag of tricks
    dropped    what its feature does not need: heads, optimisers, the network's own twin (`DROPPED`)
    unlike     anything else. It changes the feature, and the networks here lack it (`UNLIKE` knows
               some by name): the file is refused for evaluation, and as a start of training taken
               with a line that says what is missing

How a network was used in training (image size, normalisation, strides, feature) is rarely in its
file. What the file says counts; then what its project always does, which the names of its tensors
tell; the rest is assumed, and printed as assumed. `use_as` changes it.

Nothing in a file is executed. Read `read_weights` and `fill`, which everything else serves; then
`convert`, `choose_prefix`, `sort_tensors`, `positions_of`, `use_as`.
"""

import argparse
import codecs
import contextlib
import itertools
import json
import math
import os
import re
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import IMAGENET_MEAN, IMAGENET_STD, LUP_MEAN, LUP_STD
from evaluate import ARCHS, build_backbone, differences, resize_positions
from extra.files import InputError, hint

# ---------------------------------------------------------------------------------------------
# A file is understood wholly or refused, and nothing in it is executed
# ---------------------------------------------------------------------------------------------

OWN = ("reid-model", "reid-backbone")  # what train.py writes


def read_weights(path: str | Path, given: dict | None = None) -> dict:
    """A file of weights in any of the formats of docs/data-and-weights.md, as a dictionary:

        base, neck   tensors of the backbone, under the names used here; of BNNeck and classifier,
                     none if it is not fine-tuned
        recipe       arch, size, mean, std, neck_feat, last_stride, stride
        grid         rows and columns of patches that a ViT's positions belong to, else None
        kind         what the file is
        dropped      names of tensors that the feature does not need
        origins      {"size": "assumed", ...}: where each setting that the file lacks is from

    given: settings that someone knows better, as `use_as` takes them. Raises InputError, with the
    file's name, for one that is damaged or of no backbone known here.
    """
    content = read_checkpoint(path)
    try:
        if not isinstance(content, dict) or content.get("format") not in OWN:
            content = interpret(str(path), content, given or {})
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():  # PyTorch checks no sums
            raise ValueError("a checksum does not match")
        file = arrange(content)
        bad = [name for name, tensor in {**file["base"], **file["neck"]}.items()
               if not usable(name, tensor)]
    except InputError:
        raise
    except Exception as error:  # strange tensors make anything at all fail
        if limit_reached(path, error):
            raise
        raise InputError(f"{path}: damaged, its tensors or its recipe make no sense ({error}); "
                         f"nothing was loaded") from None
    if bad:
        raise InputError(f"{path}: {len(bad)} weights are not finite floating-point numbers, first "
                         f"{bad[0]}: the training diverged, or they were rounded to integers; "
                         f"nothing was loaded")
    use_as(path, file, given or {})
    return file


def read_checkpoint(path: str | Path):
    """What torch.save wrote. Only tensors and plain values are read: a pickle may ask for any
    function to be called, and `weights_only` calls none. Raises InputError that says what the file
    is, when it is not that."""
    if Path(path).is_fifo() or Path(path).is_char_device():  # would be read for ever
        raise InputError(f"{path}: is a pipe or a device; name a file of weights")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # hostile bytes make the reader raise anything at all
        return read(path, error)


def arrange(content: dict) -> dict:
    """What `read_weights` returns, of a dictionary as train.py saves it."""
    recipe = {"neck_feat": "none", "last_stride": 1, "stride": None} | content["recipe"]
    recipe |= {key: content[key] for key in ("size", "mean", "std") if key in content}
    base = {}
    neck = {}
    if content.get("model"):
        for name, tensor in content["model"].items():
            if name.startswith("base."):
                base[name.removeprefix("base.")] = tensor
            else:
                neck[name] = tensor
    else:
        base = dict(content["backbone"])
    check_recipe(recipe, bool(neck))
    grid = None
    if "pos_embed" in base:
        grid = grid_of_positions(base, recipe)
    return {"kind": f"{content['format'].removeprefix('reid-')} of this project", "dropped": [],
            "origins": {}, **content, "recipe": recipe, "base": base, "neck": neck, "grid": grid}


def check_recipe(recipe: dict, fine_tuned: bool) -> None:
    """Give size, mean and std their types. Raises ValueError for values that make no sense."""
    limits = {"size": (2, 8, 4096), "mean": (3, -1e3, 1e3), "std": (3, 1e-6, 1e3)}
    for name, (length, low, high) in limits.items():
        values = np.array(recipe[name], float)
        possible = (low <= values) & (values <= high)
        if values.shape != (length,) or not possible.all():
            raise ValueError(f"its {name}")
        recipe[name] = values.tolist()
    size = tuple(map(int, recipe["size"]))
    if list(size) != recipe["size"]:
        raise ValueError("its size")
    recipe["size"] = size
    if recipe["last_stride"] not in (1, 2) or not isinstance(recipe["arch"], str):
        raise ValueError("its arch or last_stride")
    known = ["none"]
    if fine_tuned:
        known = ["before", "after"]
    if recipe["neck_feat"] not in known:
        raise ValueError("its neck_feat")


def grid_of_positions(base: dict, recipe: dict) -> tuple[int, int]:
    """Rows and columns of patches that position embeddings belong to."""
    patch = base["patch_embed.proj.weight"].shape[-1]
    shape = tuple(base["pos_embed"].shape)
    rows, columns = patches_of(recipe["size"], patch, recipe["stride"] or patch)
    if shape[:-1] != (1, 1 + rows * columns):
        raise ValueError(f"pos_embed of shape {shape} is not of {rows} x {columns} patches")
    return rows, columns


def patches_of(size: tuple[int, int], patch: int, stride: int) -> tuple[int, int]:
    """Rows and columns of patches in an image of this size (H, W)."""
    rows, columns = ((n - patch) // stride + 1 for n in size)
    return rows, columns


def usable(name: str, tensor: Tensor) -> bool:
    """Finite numbers, all of them stored? (An expanded tensor may claim terabytes.)"""
    stored = tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()
    counts = name.endswith("num_batches_tracked")
    return stored and (counts or tensor.is_floating_point() and bool(tensor.isfinite().all()))


# ---------------------------------------------------------------------------------------------
# Reading what torch.load refuses
# ---------------------------------------------------------------------------------------------

ARRAY = np.zeros(0).__reduce__()[0]  # makes a NumPy array; NumPy 2 renamed its module
HARMLESS = [argparse.Namespace, np.ndarray, np.dtype, (codecs.encode, "_codecs.encode"),
            (ARRAY, "numpy.core.multiarray._reconstruct"),
            (ARRAY, "numpy._core.multiarray._reconstruct"),
            *(type(np.dtype(kind)) for kind in "?bhilqBHILQefdSU")]
SAVE_WEIGHTS = ('d = torch.load(FILE, weights_only=False); d = d if hasattr(d, "state_dict") else '
                'd.get("state_dict", d.get("model")); d = getattr(d, "state_dict", lambda: d)(); '
                'torch.save({k: torch.as_tensor(v) for k, v in d.items()}, NEW)')
REPICKLE = ("d = pickle.load(open(FILE, 'rb'), encoding='latin1'); d = d.get('state_dict', "
            "d.get('model', d)); torch.save({k: torch.as_tensor(v) for k, v in d.items()}, NEW)")
STARTS = {  # how a file begins: what it is, and the way out
    rb"version https://git-lfs": "a pointer of git-LFS, not the file itself: run git lfs pull, or "
                                 "download it from its page",
    rb"\s*<(!doctype|html|\?xml|head)": "a web page, as a download leaves it that needs a login or "
                                        "a click: download the file again in a browser",
    rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|.{257}ustar": "an archive: unpack it, the weights are "
                                                           "inside",
    rb"\x80.(?!.{0,12}\xfc\x9cF|.*_load_from_bytes).*storageq.ctorch\n": "a part of an unpacked "
        "file of torch.save: name the file as it was downloaded, .pth.tar is no archive",
    rb"\x80[\x02-\x05](?!.{0,12}\xfc\x9cF\xf9 j\xa8P\x19)": "a plain pickle, not torch.save's "
        f"(Detectron2's .pkl are such): if you trust it, {REPICKLE}",
    rb"\x89HDF": "an HDF5 file, as Keras writes: take a file for PyTorch",
    rb"\x93NUMPY": "a NumPy array: take a file for PyTorch",
    rb"\s*[{\[]": "JSON text, an error of a server or the index of a file in parts: name the "
                  "weights themselves"}
SUFFIXES = {".onnx": "an ONNX graph", ".tflite": "a TensorFlow Lite graph", ".pb": "TensorFlow's",
            ".msgpack": "Flax's", ".pt2": "an exported program", ".engine": "TensorRT's"}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
          "F8_E5M2": torch.float8_e5m2}


def read(path: str | Path, error: Exception):
    """What is in a file that torch.load has refused with this error. Raises InputError, which says
    what the file is."""
    if isinstance(error, FileNotFoundError):
        raise InputError(f"{path}: no such weights file")
    if isinstance(error, IsADirectoryError):
        raise InputError(f"{path}: is a folder; name the model.pth or backbone.pth in it")
    if limit_reached(path, error):
        raise error
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    length = int.from_bytes(start[:8], "little")  # of the header, in a .safetensors file
    if start[8:9] == b"{" and 8 + length <= os.path.getsize(path):
        return read_safetensors(path)
    known = recognise(path, start)
    if not known and str(path).endswith(".safetensors"):
        return read_safetensors(path)
    if not known and (start[:2] == b"PK" or start[0] == 0x80):  # torch.save's formats, new and old
        return read_pickle(path)
    raise InputError(f"{path}: is {known or 'no file of PyTorch weights'}; nothing was loaded")


def limit_reached(path: str | Path, error: Exception) -> bool:
    """Is it the machine's fault? Not if a file ends too early, or claims more bytes than it has."""
    asked = re.search(r"allocate (\d+) bytes", str(error))
    damaged = isinstance(error, EOFError) or asked and int(asked[1]) > os.path.getsize(path)
    return bool(hint(error)) and not damaged


def recognise(path: str | Path, start: bytes) -> str | None:
    """What a file is, by its first bytes or by the names in its archive, and the way out."""
    if not start:
        return "empty, as an interrupted download leaves it: download it again"
    for pattern, what in STARTS.items():
        if re.match(pattern, start, re.IGNORECASE | re.DOTALL):
            return what
    suffix = Path(path).suffix
    if suffix in SUFFIXES:
        return f"{SUFFIXES[suffix]}: take the weights, of PyTorch, that it was made of"
    if not zipfile.is_zipfile(path):
        return None
    with contextlib.suppress(zipfile.BadZipFile, OSError, ValueError):
        names = zipfile.ZipFile(path).namelist()
        if any(re.search(r"(^|/)(constants\.pkl|code/)", name) for name in names):
            return ("a TorchScript program: save its weights alone, torch.save(torch.jit.load(FILE)"
                    ".state_dict(), NEW)")
        if any(name.endswith(".npy") for name in names):
            return "a NumPy archive: take a file for PyTorch"
        if not any(name.endswith("data.pkl") for name in names):
            return f"a zip archive of {', '.join(names[:3]) or 'nothing'}: unpack it"
    return None


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """A .safetensors file, as timm's are: the length of a JSON header in 8 bytes, the header with
    type, shape and place of each tensor, then their bytes."""
    content = Path(path).read_bytes()
    try:
        begin = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:begin])
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            if entry["dtype"] not in DTYPES:
                raise InputError(f"{path}: its numbers are of type {entry['dtype']}, which is not "
                                 f"read here: take the file in F32, F16 or BF16")
            dtype = DTYPES[entry["dtype"]]
            part = bytearray(content[begin + first:begin + last])
            if len(part) != math.prod(entry["shape"]) * dtype.itemsize or first < 0:
                raise ValueError(f"{name} ends too early")
            values = torch.empty(0, dtype=dtype)
            if part:
                values = torch.frombuffer(part, dtype=dtype)
            tensors[name] = values.view(entry["shape"])
    except InputError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path}: damaged, as a .safetensors file ({type(error).__name__}: {error}"
                         f"); nothing was loaded") from None
    return tensors


class StandIn:
    """In place of a class or function that a file asks for, which is not looked up: its objects
    become dictionaries. They are settings, no part of a network."""

    def __new__(cls, *_):
        return OrderedDict()


def read_pickle(path: str | Path):
    """A file of torch.save that holds objects beside tensors, as training files of DINO, iBOT and
    Lightning do. Raises InputError, with the way out, where the network itself is an object."""
    unknown = []
    while True:
        allowed = HARMLESS + [(StandIn, name) for name in unknown]
        try:
            with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about pickle versions; what cannot be read raises
                content = torch.load(path, map_location="cpu", weights_only=True,
                                     encoding="latin1")  # Python 2's text may be bytes
            if not unknown or prefixes_of(flatten(content)[0]):
                return content
            break
        except Exception as error:  # hostile bytes make the reader raise anything at all
            if limit_reached(path, error):
                raise
            found = re.search(r"Unsupported global: GLOBAL ([\w.]+)", str(error))
            if not found or found[1] in unknown:
                unknown += re.findall(r"GLOBAL ([\w.]+)", str(error))
                break
            unknown += [found[1], f"builtins.{found[1]}"]  # what PyTorch says lacks the latter
    reason = "damaged"
    if unknown:
        reason = (f"it holds Python objects ({unknown[0]}), which loading might execute: if you "
                  f"trust it and have its project's code, {SAVE_WEIGHTS}")
    raise InputError(f"{path}: {reason}; nothing was loaded")


# ---------------------------------------------------------------------------------------------
# Understanding it
# ---------------------------------------------------------------------------------------------

BACKBONE = re.compile(
    r"cls_token|pos_embed|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)|"
    r"blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)|"
    r"conv1\.weight|layer[1-4]\.\d+\.(conv[123]|downsample\.0)\.weight|"
    r"(bn1|layer[1-4]\.\d+\.(bn[123]|downsample\.1))\."
    r"(weight|bias|running_mean|running_var|num_batches_tracked)")
NECK = re.compile(r"(bottleneck|feat_bn)\.(weight|bias|running_mean|running_var|"
                  r"num_batches_tracked)|classifier\.weight")
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# of two networks in a file the one that is meant to be used, and its twin
MEANT = re.compile(r"teacher|target_encoder")
TWIN = re.compile(r"student|encoder_k|momentum|(^|[._])ema([._]|$)|optim")
DROPPED = re.compile(  # one part of a dotted name says so
    r"(.*\.)?(\w*heads?|head_dist|classifier|fc|pre_logits|proj(ector|ection)\w*|"
    r"momentum_\w+|predict(or|ion)\w*|prototypes?|decoder\w*|mask_token|masked_embed|queue\w*|"
    r"oldest|\w*center[s2]?|\w*loss\w*|criterion|\w*optim\w*|\w*scheduler\w*|\w*scaler\w*|"
    r"pixel_(mean|std))(\..*)?")
UNLIKE = {  # how a name begins: what it is, though a part of it may stand in DROPPED
    r"(\w+_)?reg(ister)?_tokens?|storage_tokens": "register tokens",
    r"dist_token": "a distillation token",
    r"part_token|part\d_pos|cls_pos": "part tokens (PASS)",
    r"sie_embed": "a camera embedding (SIE)",
    r"(b[123]|bottleneck_\d|classifier_\d)\.": "local branches (JPM, MGN)",
    r"patch_embed\.|conv1\.\d|(conv|bn)[23]\.": "another stem",
    r"norm_pre|pre_norm|fc_norm|ln_p(re|ost)": "a norm before or behind the blocks",
    r"blocks\.\d+\.(ls[12]|gamma_[12])": "LayerScale",
    r"blocks\.\d+\.attn\.": "another attention",
    r"blocks\.|layer\d\.|NL_\d": "other blocks (IBN, SE, non-local)",
    r"(.*\.)?(gem|gap|\w*pool\w*)(\.|$)|(.*\.)?p$": "another pooling",
    r"(.*\.)?\w*heads?\.(.*\.)?(bn|bottleneck|neck|feat|embed|fcs|norm)": "another project's neck",
    r"classifier\.(add_block|classifier)|(bottle)?neck|bn_?neck|(feat|embedding)[._]":
        "another project's neck"}
OTHERS = {  # names of networks that cannot be read here
    "relative_position_bias_table|cpb_mlp": " (a Swin, as SOLIDER's are)",
    r"(stages|layers)\.\d+\.": " (a network of stages, as Swin or ConvNeXt)",
    "embeddings.patch_embeddings": " (a ViT under the transformers package's: take timm's file)",
    "encoder_layer_0": " (a ViT under torchvision's: take timm's file)",
    "resblocks": " (a ViT under CLIP's)"}
NORMS = {"imagenet": (IMAGENET_MEAN, IMAGENET_STD), "lup": (LUP_MEAN, LUP_STD),
         "half": ((0.5,) * 3, (0.5,) * 3)}
STRIDES = {  # in the name of a tensor: last stride of its project's ResNets, and whose it is
    r"^Loss\.": (1, "as CION's"),
    r"encoder_[qk]\.|base_encoder\.|_feature_blocks\.|\bprojector\.|\bprojection_head": (
        2, "as MoCo's, LUPerson's and others' without labels"),
    r"\bclassifier\.add_block": (2, "as layumi's"),
    r"\bheads\.|\bpixel_mean": (1, "as fast-reid's"),
    r"\bfeat_bn\.": (1, "as cluster-contrast's"),
    r"\bbottleneck\.": (1, "as a strong baseline's (WARNING: reid-strong-baseline's own code has "
                           "no ReLU before the first pooling, the network here has one)"),
    r"\bfc\.0\.": (1, "as torchreid's resnet50_fc512's"),
    r"\bfc\.weight": (2, "as torchvision's"),
    r"\bclassifier\.weight": (2, "as torchreid's resnet50's")}
STAGES = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


def interpret(path: str, content, given: dict) -> dict:
    """What train.py would have saved of this network: format, recipe and model; with `kind`,
    `dropped`, `origins` and what else is worth showing.

    Raises InputError, naming the file, when it holds no backbone known here, or several.
    """
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a dictionary of weights")
    tensors, homes = flatten(content)
    prefix, twins = choose_prefix(path, content, tensors)
    base, neck, dropped, unlike = sort_tensors(tensors, homes, prefix, twins)
    if not {"cls_token", "layer1.0.conv1.weight"} & {*base}:
        raise InputError(f"{path}: its blocks are of no ViT with a [CLS] token and of no ResNet "
                         f"that is known here (Swin and others have like names), first "
                         f"{', '.join([*tensors][:3])}; nothing was loaded")
    recipe = {"size": (256, 128), "stride": None, "last_stride": 1, "neck_feat": "none"}
    origins = {"size": "assumed"}
    kind = kind_of(content, prefix)
    vit = "pos_embed" in base
    if vit:
        places = positions_of(path, base, unlike, given)
        base["pos_embed"], recipe["size"], recipe["stride"] = places
        origins["stride"] = "assumed"
    else:
        recipe["last_stride"], origins["last_stride"] = last_stride_of(tensors)
    if neck and vit:
        kind = "fine-tuned model of TransReID or PersonViT"
        recipe["neck_feat"] = "before"                                       # [PersonViT code]
        origins["neck"] = "as TransReID's and PersonViT's"
    elif neck:
        kind = "fine-tuned model of a strong baseline"
        recipe["neck_feat"] = "after"                                        # [BoT]
        origins["neck"] = "as a strong baseline's"
    statistics = normalisation(tensors, recipe["neck_feat"] == "before", prefix)
    recipe["mean"], recipe["std"], origins["norm"] = statistics
    arch = arch_of(base)
    if content.get("format") == "reid-checkpoint":
        kind = KINDS["reid-checkpoint"]
        arch += " in training (evaluate the model.pth or backbone.pth beside it)"
    if unlike:
        parts = names_of_parts(unlike)
        arch += f" with {parts}"
        kind += f", WITHOUT {parts}, which change its feature and which the networks here lack"
    state = {f"base.{name}": tensor for name, tensor in base.items()} | neck
    return {"format": "reid-model", "kind": kind, "model": state, "dropped": dropped,
            "recipe": recipe | {"arch": arch}, "origins": origins,
            "epoch": content.get("epoch"), "args": content.get("args")}


def last_stride_of(tensors: dict) -> tuple[int, str]:
    """Stride of a ResNet's last stage, which no tensor tells, and where that is from."""
    names = "\n".join(tensors)
    found = (stride for part, stride in STRIDES.items() if re.search(part, names, re.MULTILINE))
    return next(found, (2, "assumed"))


def normalisation(tensors: dict, reid_vit: bool, prefix: str) -> tuple[list, list, str]:
    """Mean and std of the images that a network takes, and where they are from."""
    for name, tensor in tensors.items():
        if name.endswith("pixel_mean"):  # fast-reid's say theirs, of pixels up to 255
            std = tensors[name.removesuffix("mean") + "std"]
            return (tensor.flatten() / 255).tolist(), (std.flatten() / 255).tolist(), "in the file"
    if reid_vit:
        return [0.5] * 3, [0.5] * 3, "as TransReID's and PersonViT's"
    if not prefix and "head.weight" in tensors and "dist_token" not in tensors:
        return [0.5] * 3, [0.5] * 3, "assumed (timm's ViTs; DeiT's look alike: norm=imagenet)"
    origin = "assumed"
    if "encoder_q." in prefix:
        origin = "assumed (LUPerson's: norm=lup)"
    return list(IMAGENET_MEAN), list(IMAGENET_STD), origin


def names_of_parts(unlike: dict) -> str:
    """What the networks here lack, in words, with the first three names of tensors."""
    kinds = [name_part(name) or "parts unknown here" for name in unlike]
    names = [*unlike][:3]
    if len(unlike) > 3:
        names.append("...")
    return f"{' and '.join(dict.fromkeys(kinds))} ({', '.join(names)})"


def flatten(content: dict) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of nested dictionaries under dotted names, without what DistributedDataParallel,
    torch.compile and the like put into them, in whatever order, and the name of the dictionary
    that each lies in; one that holds itself is no trap."""
    found = {}
    homes = {}
    waiting = [("", content)]
    seen = set()
    for prefix, part in waiting:  # grows while it is gone through
        if id(part) in seen:
            continue
        seen.add(id(part))
        for key, value in named_stages(part).items():
            if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
                value = torch.from_numpy(value)
            if isinstance(value, Tensor):
                if value.element_size() == 1 and value.is_floating_point():
                    value = value.float()  # PyTorch computes little with 8 bits
                steps = f"{prefix}{key}".split(".")
                name = ".".join(step for step in steps if step not in WRAPPERS)
                found[name] = value
                homes[name] = prefix
            elif isinstance(value, dict):
                waiting.append((f"{prefix}{key}.", value))
    return found, homes


def named_stages(part: dict) -> dict:
    """A dictionary with torchvision's names for a ResNet that was saved as a numbered
    nn.Sequential, as lightly and cluster-contrast do. fast-reid's MGN does, too, and its third
    stage goes on in a branch, b1."""
    matches = (re.fullmatch(r"(|.*\.)4\.0\.conv1\.weight", str(key)) for key in part)
    roots = [match[1] for match in matches if match]
    renamed = {}
    for key, value in part.items():
        name = str(key)
        if "backbone.6.conv1.weight" in part:  # MGN
            block = re.fullmatch(r"b1\.0\.(\d+)(.*)", name)
            if block:
                name = f"backbone.6.{int(block[1]) + 1}{block[2]}"
            name = re.sub(r"^backbone\.6\.(?=\D)", "backbone.6.0.", name)
            name = re.sub(r"^b1\.1\.", "backbone.7.", name)
        for root in roots:
            number, _, rest = name.removeprefix(root).partition(".")
            if name.startswith(root) and number in STAGES:
                name = f"{root}{STAGES[number]}.{rest}"
        renamed[name] = value
    return renamed


def prefixes_of(tensors: dict) -> list[str]:
    """Where networks begin: at a first block, but for those of a single stage of several."""
    begins = (re.match(r"(|.*?\.)(?:blocks\.0|layer1\.0)\.", name) for name in tensors)
    found = dict.fromkeys(match[1] for match in begins if match)
    return [prefix for prefix in found if not re.search(r"(stages|layers)\.\d+\.$", prefix)]


def choose_prefix(path: str, content: dict, tensors: dict) -> tuple[str, list[str]]:
    """Where the network begins, like "state_dict.encoder_q.", and where its twins do.

    Wherever there is a first block there is a network; no wrapper or prefix need be known. Of a
    teacher and its student, a query and a key encoder the one counts that its authors use.
    """
    found = prefixes_of(tensors)
    if not found:
        names = [str(name) for name in tensors or content]
        text = "\n".join(names)
        whose = next((words for part, words in OTHERS.items() if re.search(part, text)), "")
        raise InputError(f"{path}: holds no weights of a backbone under a name known here{whose}, "
                         f"first {', '.join(names[:3]) or 'nothing'}; nothing was loaded")
    meant = [prefix for prefix in found if MEANT.search(prefix)] or found
    meant = [prefix for prefix in meant if not TWIN.search(prefix)] or meant
    if len(meant) > 1:
        raise InputError(f"{path}: holds {len(meant)} networks, under {', '.join(meant[:4])}; save "
                         f"the one that you mean by itself; nothing was loaded")
    return meant[0], [prefix for prefix in found if prefix != meant[0]]


def sort_tensors(tensors: dict, homes: dict, prefix: str, twins: list[str]):
    """(backbone, neck, names dropped, parts that the networks here lack) of all tensors.

    Numbers, integers, and what lies beside the dictionary that holds the network are no part of it,
    unless UNLIKE knows them.
    """
    begins = (f"{prefix}blocks.0.", f"{prefix}layer1.0.")
    home = next(homes[name] for name in tensors if name.startswith(begins))
    steps = prefix.split(".")
    beside = ".".join(steps[:-2] + [""])        # where TransReID's neck stands: "base." -> ""
    roots = tuple(root_of(twin.split("."), steps) for twin in twins)
    base = {}
    neck = {}
    dropped = []
    unlike = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(prefix if name.startswith(prefix) else beside)
        # MoCo's training files name their heads in many ways
        unneeded = (DROPPED.fullmatch(short) or tensor.numel() == 1 or homes[name] != home
                    or not tensor.is_floating_point() or "encoder_q." in prefix)
        if name.startswith(prefix) and BACKBONE.fullmatch(short):
            base[short] = tensor
        elif NECK.fullmatch(short):
            neck[short.replace("feat_bn.", "bottleneck.")] = tensor
        elif name.startswith(roots) or unneeded and not name_part(short):
            dropped.append(short)
        else:
            unlike[short] = tensor
    if "bottleneck.weight" not in neck:         # a classifier on the feature itself ...
        layers = {k: tensors[prefix + k] for k in dropped if neck and re.match(r"fc\.\d", k)}
        unlike |= layers                        # ... or behind layers of torchreid's
        dropped, neck = [*neck, *(k for k in dropped if k not in layers)], {}
    return base, neck, dropped, unlike


def root_of(twin: list[str], steps: list[str]) -> str:
    """Below which all is the twin's, its heads too: student. of student.backbone. beside
    teacher.backbone."""
    shared = len(os.path.commonprefix([twin, steps]))
    return ".".join(twin[:shared + 1]) + "."


def name_part(name: str) -> str | None:
    """What a part of UNLIKE is called."""
    return next((what for start, what in UNLIKE.items() if re.match(start, name)), None)


KINDS = {"reid-checkpoint": "training state of this project",
         "ibot_loss": "iBOT's training state, as PersonViT's pre-training has it: the teacher "
                      "counts",
         "dino_loss": "DINO's training state: the teacher counts"}


def kind_of(content: dict, prefix: str) -> str:
    """What a file is, in words."""
    for key, kind in KINDS.items():
        if key in content or content.get("format") == key:
            return kind
    if "encoder_q." in prefix:
        return "MoCo's or LUPerson's training state: the query encoder counts"
    if prefix:
        return f"backbone under {prefix}"
    return "bare backbone"


def arch_of(base: dict[str, Tensor]) -> str:
    """The network in ARCHS that has these widths and depths; else these, in words."""
    def count(start: str) -> int:
        return len({name.split(".")[1] for name in base if name.startswith(start)})

    if "cls_token" in base and "blocks.0.mlp.fc1.weight" in base:
        D = base["cls_token"].shape[-1]
        depth = count("blocks.")
        hidden = len(base["blocks.0.mlp.fc1.weight"])
        p = base["patch_embed.proj.weight"].shape[-1]
        names = {(128, 6): "vit_mini", (192, 12): "vit_tiny", (384, 12): "vit_small",
                 (768, 12): "vit_base"}
        if hidden == 4 * D and p == 16 and (D, depth) in names:
            return names[D, depth]
        return f"a ViT of {depth} blocks, {D} wide, its MLP {hidden}, with patches of {p} x {p}"
    if "layer1.0.conv3.weight" in base and "conv1.weight" in base:
        width = len(base["conv1.weight"])
        inner, channels = base["layer1.0.conv2.weight"].shape[:2]
        depths = tuple(count(f"layer{i}.") for i in (1, 2, 3, 4))
        kind = "ResNet"
        if inner != width:
            kind = "wide ResNet"
        if inner != channels:
            kind = f"ResNeXt with {inner // channels} groups"
        names = {"a ResNet of (3, 4, 6, 3) blocks, 64 wide": "resnet50",
                 "a ResNet of (1, 1, 1, 1) blocks, 32 wide": "resnet_tiny"}
        words = f"a {kind} of {depths} blocks, {width} wide"
        return names.get(words, words)
    if "layer1.0.conv2.weight" in base:
        return "a ResNet of blocks of two convolutions (ResNet-18 or -34)"
    return "an unknown network"


SIZES = ((256, 128), (384, 128), (224, 224), (384, 384), (128, 64))  # in use for ViT and people


def positions_of(path: str, base: dict, unlike: dict,
                 given: dict) -> tuple[Tensor, tuple[int, int], int]:
    """Position embeddings (1, 1 + N, D) of [CLS] and patches, the image size and the stride.

    Of others' files only the number of positions is known. It is that of the size and stride that
    are given, else of the first of SIZES with as many patches, else the first with patches that
    overlap by a quarter (TransReID's stride 12 of 16), else of a square grid, or one twice as tall
    as wide [ours]. Other tokens may stand between [CLS] and the patches (DeiT, timm), or [CLS] may
    have no position (timm), or its own (PASS).
    """
    pos = base["pos_embed"]
    channels, p = base["patch_embed.proj.weight"].shape[1::2]
    if channels != 3:
        raise InputError(f"{path}: its patches are of {channels} channels, not of RGB: it has "
                         f"another stem, of convolutions (TransReID-SSL's and CION's ICS), which "
                         f"the networks here lack; nothing was loaded")
    if pos.ndim != 3 or len(pos) != 1:
        raise InputError(f"{path}: pos_embed of shape {tuple(pos.shape)} is not (1, positions, "
                         f"width); nothing was loaded")
    more = sum(unlike[k].shape[1] for k in ("dist_token", "reg_token") if k in unlike)
    first = pos[:, :1]
    for others in (1 + more, 1, 0):  # positions that are no patch's
        found = grid_of(pos.shape[1] - others, p, given)
        if not others:
            first = unlike.get("cls_pos", torch.zeros_like(first))
        if found and (others or found[0] in SIZES):
            return torch.cat([first, pos[:, others:]], dim=1), *found
    raise InputError(f"{path}: pos_embed of shape {tuple(pos.shape)} fits no grid of patches after "
                     f"one [CLS] token: evaluate.py --as size=HEIGHTxWIDTH says which; nothing was "
                     f"loaded")


def grid_of(n: int, p: int, given: dict) -> tuple[tuple[int, int], int] | None:
    """Image size and stride by which there are n patches of p pixels."""
    side = math.isqrt(max(n, 0)) * p
    half = math.isqrt(max(n, 0) // 2) * p
    strides = [p, max(3 * p // 4, 1)]
    if "stride" in given:
        strides.insert(0, given["stride"])
    guesses = [(size, stride) for stride, size in itertools.product(strides, SIZES)]
    guesses += [((side, side), p), ((2 * half, half), p)]
    if "size" in given:
        guesses = [(given["size"], stride) for stride in strides] + guesses
    for size, stride in guesses:
        rows, columns = patches_of(size, p, stride)
        if min(rows, columns) > 0 and rows * columns == n:
            return size, stride
    return None


# ---------------------------------------------------------------------------------------------
# Using it otherwise, and saying what was understood: evaluate.py --as, --inspect
# ---------------------------------------------------------------------------------------------

SIDE = "(1[6-9]|[2-9][0-9]|[1-9][0-9]{2,3})"  # 16 to 9999
SETTINGS = {"size": f"{SIDE}x{SIDE}", "norm": "imagenet|half|lup", "neck": "before|after",
            "stride": "[1-9]|1[0-6]", "last_stride": "[12]"}


def check_settings(given: dict) -> dict:
    """Settings of `use_as`, texts or values, as values. Raises InputError for a wrong one."""
    values = {}
    for name, value in given.items():
        text = re.sub(r"\W+", "x", str(value)).strip("x")  # of (256, 128): 256x128
        if not re.fullmatch(SETTINGS.get(name, "!"), text):
            raise InputError(f"{name}={value}: must be one of size=256x128 or another from 16x16, "
                             f"norm=imagenet, half or lup, neck=before or after, stride=1 to 16, "
                             f"last_stride=1 or 2")
        values[name] = text
        if name == "size":
            values[name] = tuple(map(int, text.split("x")))
        elif name.endswith("stride"):
            values[name] = int(text)
    return values


def use_as(path: str | Path, file: dict, given: dict) -> None:
    """Change how a file is used as a model: size (H, W), norm (a name in NORMS), neck ("before",
    "after"), stride (of a ViT), last_stride (of a ResNet). Raises InputError for what this network
    has not."""
    recipe = file["recipe"]
    there = {"stride": file["grid"], "last_stride": not file["grid"], "neck": file["neck"]}
    for name, value in given.items():
        if not there.get(name, True):
            raise InputError(f"{path}: {name}={value}: {recipe['arch']}, as it is in this file, "
                             f"has no {name} that could be changed")
        file["origins"] = file["origins"] | {name: "as given"}
        if name == "norm":
            recipe["mean"], recipe["std"] = map(list, NORMS[value])
        elif name == "neck":
            recipe["neck_feat"] = value
        else:
            recipe[name] = value


def describe(path: str | Path, file: dict) -> str:
    """What a weights file is, in lines of text, of what `read_weights` returned; for files
    like DINO's the arguments it carries."""
    base = file["base"]
    recipe = file["recipe"]
    numbers = sum(tensor.numel() for tensor in base.values())
    lines = [f"{path}: {file['kind']}",
             f"  backbone  {recipe['arch']}, {len(base)} tensors, {numbers:,} numbers"]
    if recipe["arch"] in ARCHS:
        net = build_backbone(recipe["arch"], recipe["size"], stride=recipe["stride"])
        differ = differences(net, resize_positions(file, net)[0])
        if differ:
            lines.append(f"            but {len(differ)} tensors are not {recipe['arch']}'s, first "
                         f"{differ[0]}")
    if file["grid"]:
        lines.append("  positions of {}x{} patches".format(*file["grid"]))
    if file["neck"]:
        shown = [f"{name} {tuple(tensor.shape)}" for name, tensor in file["neck"].items()]
        lines.append(f"  head      {', '.join(shown)}")
    lines.append(f"  used      {usage(file)}")
    if isinstance(file.get("epoch"), int):
        lines.append(f"  epoch     {file['epoch']}")
    dropped = file["dropped"]
    lines.append(f"  not used  {len(dropped)} tensors")
    if dropped:
        lines[-1] += f": {', '.join(dropped[:6])}"
    if "args" not in file:  # ours
        lines += values_of("recipe", recipe)
    if isinstance(file.get("args"), argparse.Namespace):
        lines += values_of("args", vars(file["args"]))
    return "\n".join(lines)


def values_of(title: str, values: dict) -> list[str]:
    """A line for each value of a dictionary."""
    return [f"  {title}.{key} = {value!r:.200}" for key, value in sorted(values.items(), key=str)]


def usage(file: dict) -> str:
    """How a file is used as a model, and what of that it does not say itself."""
    recipe = file["recipe"]
    norm = tuple(recipe["mean"]), tuple(recipe["std"])
    size = "{}x{}".format(*recipe["size"])
    feature = f"{recipe['neck_feat']} the neck, L2-normalised"
    if recipe["neck_feat"] == "none":
        feature = "of the backbone, L2-normalised (WARNING: not fine-tuned for ReID)"
    text = f"at {size}, feature {feature}, mean {norm[0]}, std {norm[1]}"
    values = recipe | {"size": size, "neck": recipe["neck_feat"], "norm": "its own"}
    values |= {"norm": name for name, known in NORMS.items() if known == norm}
    for name, origin in file["origins"].items():
        text += f"; {name}={values[name]} {origin}"
    if file["origins"]:
        text += "; evaluate.py --as NAME=VALUE ... changes these"
    return text


def with_origin(dataset, weights: str):
    """A dataset with people held out, whose `people` say so where the network of a weights file may
    have seen these in training. Raises InputError if that was on the same dataset with other people
    held out, or none."""
    run = read_weights(weights).get("run", {})
    there = run.get("dataset", "unknown data")
    people = run.get("people", "")
    if there == dataset.name and people.startswith(dataset.people):
        return replace(dataset, people=people)
    if there == dataset.name != "folder":
        raise InputError(f"{weights}: trained on {there} without the same --held-out, so it may "
                         f"have seen people who are held out here")
    return replace(dataset, people=f"{dataset.people}, weights trained on {there}")
