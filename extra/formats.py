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

Nothing in a file is executed. Read `read_weights` and `fill`, which everything else serves; then
`convert`, `choose_prefix`, `sort_tensors`, `positions_of`.
"""

import argparse
import contextlib
import json
import math
import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data import IMAGENET_MEAN, IMAGENET_STD
from extra.files import InputError, hint

# ---------------------------------------------------------------------------------------------
# A file is understood wholly or refused, and nothing in it is executed
# ---------------------------------------------------------------------------------------------

OWN = ("reid-model", "reid-backbone")  # what train.py writes


def read_weights(path: str | Path) -> dict:
    """A file of weights in any of the formats of docs/data-and-weights.md, as a dictionary:

        base, neck   tensors of the backbone, under the names used here; of BNNeck and classifier,
                     none if it is not fine-tuned
        recipe       arch, size, mean, std, neck_feat, last_stride, stride
        grid         rows and columns of patches that a ViT's positions belong to, else None
        kind         what the file is
        dropped      names of tensors that the feature does not need

    Raises InputError, with the file's name, for one that is damaged or of no backbone known here.
    """
    content = read_checkpoint(path)
    if not isinstance(content, dict) or content.get("format") not in OWN:
        content = convert(str(path), content)
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():  # PyTorch checks no sums
            raise ValueError("a checksum does not match")
        file = arrange(content)
        bad = [name for name, tensor in {**file["base"], **file["neck"]}.items()
               if not usable(name, tensor)]
    except Exception as error:  # strange tensors make anything at all fail
        raise InputError(f"{path}: damaged, its tensors or its recipe make no sense ({error}); "
                         f"nothing was loaded") from None
    if bad:
        raise InputError(f"{path}: {len(bad)} weights are not finite floating-point numbers, first "
                         f"{bad[0]}: the training diverged, or they were rounded to integers; "
                         f"nothing was loaded")
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
            **content, "recipe": recipe, "base": base, "neck": neck, "grid": grid}


def check_recipe(recipe: dict, fine_tuned: bool) -> None:
    """Give size, mean and std their types. Raises ValueError for values that make no sense."""
    size = np.array(recipe["size"], float)
    mean = np.array(recipe["mean"], float)
    std = np.array(recipe["std"], float)
    possible = (8 <= size) & (size <= 4096) & (size % 1 == 0)
    if size.shape != (2,) or not possible.all():
        raise ValueError("its size")
    if mean.shape != (3,) or std.shape != (3,):
        raise ValueError("its mean or std")
    possible = (1e-6 <= std) & (abs(mean) + std < 1e3)
    if not possible.all():
        raise ValueError("its mean or std")
    if recipe["last_stride"] not in (1, 2) or not isinstance(recipe["arch"], str):
        raise ValueError("its arch or last_stride")
    known = ["none"]
    if fine_tuned:
        known = ["before", "after"]
    if recipe["neck_feat"] not in known:
        raise ValueError("its neck_feat")
    recipe["size"] = tuple(map(int, size))
    recipe["mean"] = mean.tolist()
    recipe["std"] = std.tolist()


def grid_of_positions(base: dict, recipe: dict) -> tuple[int, int]:
    """Rows and columns of patches that position embeddings belong to."""
    patch = base["patch_embed.proj.weight"].shape[-1]
    shape = tuple(base["pos_embed"].shape)
    stride = recipe["stride"] or patch
    rows, columns = ((n - patch) // stride + 1 for n in recipe["size"])
    if shape[:-1] != (1, 1 + rows * columns):
        raise ValueError(f"pos_embed of shape {shape} is not of {rows} x {columns} patches")
    return rows, columns


def usable(name: str, tensor: Tensor) -> bool:
    """Finite numbers, all of them stored? (An expanded tensor may claim terabytes.)"""
    stored = tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()
    counts = name.endswith("num_batches_tracked")
    return stored and (counts or tensor.is_floating_point() and bool(tensor.isfinite().all()))


def fill(model: nn.Module, state: dict[str, Tensor], path: str | Path, file: dict) -> str:
    """Load state and say so, or raise InputError that names what differs, and leave the model."""
    here = shapes(model.state_dict())
    there = shapes(state)
    differ = [f"{name} is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
              for name in here | there if here.get(name) != there.get(name)]
    if differ:
        raise InputError(f"{path}: another --arch, {file['recipe']['arch']}; nothing was loaded: "
                         f"{len(differ)} of {len(here)} tensors differ, first {differ[0]}")
    model.load_state_dict({name: state[name] for name in here}, strict=False)
    dropped = [name for name in file["neck"] if name not in state]
    dropped += file["dropped"]
    text = f"{path}: {file['kind']}; all {len(here)} weights loaded, dropped: {len(dropped)}"
    if dropped:
        text += f" ({', '.join(dropped[:3])})"
    return text


def shapes(state: dict[str, Tensor]) -> dict[str, tuple]:
    """Old files lack the counter of batch norm, which only an average over all steps would read."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()
            if "num_batches" not in name}


# ---------------------------------------------------------------------------------------------
# Reading what torch.load refuses
# ---------------------------------------------------------------------------------------------

SCALAR = np.float64(0).__reduce__()[0]  # makes a NumPy number; NumPy 2 renamed its module
HARMLESS = [argparse.Namespace, np.dtype, (SCALAR, "numpy.core.multiarray.scalar"),
            (SCALAR, "numpy._core.multiarray.scalar"),
            *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "?"))]
STARTS = {  # how a file begins: what it is, and the way out
    rb"version https://git-lfs": "a pointer of git-LFS, not the file itself: run git lfs pull, or "
                                 "download it from its page",
    rb"\s*<(!doctype|html|\?xml|head)": "a web page, as a download leaves it that needs a login or "
                                        "a click: download the file again in a browser",
    rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|.{257}ustar": "an archive: unpack it, the weights are "
                                                           "inside",
    rb"\x89HDF": "an HDF5 file, as Keras writes: take a file for PyTorch",
    rb"\x93NUMPY": "a NumPy array: take a file for PyTorch",
    rb"\s*[{\[]": "JSON text, an error of a server or the index of a file in parts: name the "
                  "weights themselves"}
SUFFIXES = {".onnx": "an ONNX graph", ".tflite": "a TensorFlow Lite graph", ".pb": "TensorFlow's",
            ".msgpack": "Flax's", ".pt2": "an exported program", ".engine": "TensorRT's"}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}


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
            dtype = DTYPES[entry["dtype"]]
            part = bytearray(content[begin + first:begin + last])
            if len(part) != math.prod(entry["shape"]) * dtype.itemsize or first < 0:
                raise ValueError(f"{name} ends too early")
            values = torch.empty(0, dtype=dtype)
            if part:
                values = torch.frombuffer(part, dtype=dtype)
            tensors[name] = values.view(entry["shape"])
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path}: damaged, as a .safetensors file ({type(error).__name__}: {error}"
                         f"); nothing was loaded") from None
    return tensors


def read_pickle(path: str | Path):
    """A file of torch.save that holds harmless objects beside tensors."""
    reason = "damaged"
    try:  # training files of DINO and iBOT hold their command line and rates
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle versions; what cannot be read raises
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            what = found[1] if found else "of an unknown kind"
            reason = (f"it holds Python objects ({what}), which loading might execute: if it is a "
                      f"whole model and you trust it, "
                      f"torch.save(torch.load(FILE, weights_only=False).state_dict(), NEW)")
    except Exception as error:  # hostile bytes make the reader raise anything at all
        if limit_reached(path, error):
            raise
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
NECK = re.compile(r"bottleneck\.(weight|bias|running_mean|running_var|num_batches_tracked)|"
                  r"classifier\.weight")
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# of two networks in a file the one that is meant to be used, and its twin
MEANT = re.compile(r"teacher|target_encoder")
TWIN = re.compile(r"student|encoder_k|momentum|(^|[._])ema([._]|$)|optim")
DROPPED = re.compile(  # one part of a dotted name says so
    r"(.*\.)?(\w*heads?|head_dist|classifier|fc|pre_logits|proj(ector|ection)\w*|"
    r"predict(or|ion)\w*|prototypes?|decoder\w*|mask_token|masked_embed|queue\w*|oldest|"
    r"\w*center[s2]?|\w*loss\w*|criterion|\w*optim\w*|\w*scheduler\w*|\w*scaler\w*|"
    r"pixel_(mean|std))(\..*)?")
UNLIKE = {  # how a name begins: what it is, though a part of it may stand in DROPPED
    r"(\w+_)?reg(ister)?_tokens?|storage_tokens": "register tokens",
    r"dist_token": "a distillation token",
    r"part_token|part\d_pos|cls_pos": "part tokens (PASS)",
    r"sie_embed": "a camera embedding (SIE)",
    r"(b[12]|bottleneck_\d|classifier_\d)\.": "local branches (TransReID's JPM)",
    r"patch_embed\.|conv1\.\d|(conv|bn)[23]\.": "another stem",
    r"norm_pre|pre_norm|fc_norm|ln_p(re|ost)": "a norm before or behind the blocks",
    r"blocks\.\d+\.(ls[12]|gamma_[12])": "LayerScale",
    r"blocks\.\d+\.attn\.": "another attention",
    r"blocks\.|layer\d\.|NL_\d": "other blocks (IBN, SE, non-local)",
    r"(.*\.)?(gem|\w*pool\w*)(\.|$)": "another pooling",
    r"(.*\.)?\w*heads?\.(.*\.)?(bn|bottleneck|neck|feat|embed|fcs|norm)": "another project's neck",
    r"classifier\.(add_block|classifier)|(bottle)?neck|bn_?neck|(feat|embedding)[._]":
        "another project's neck"}
OTHERS = {  # names of networks that cannot be read here
    "embeddings.patch_embeddings": " (a ViT under the transformers package's: take timm's file)",
    "encoder_layer_0": " (a ViT under torchvision's: take timm's file)",
    "resblocks": " (a ViT under CLIP's)"}


def convert(path: str, content) -> dict:
    """What train.py would have saved of this network: format, recipe and backbone or model; with
    `kind`, `dropped` and what else is worth showing.

    Raises InputError, naming the file, when it holds no backbone known here, or several.
    """
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a dictionary of weights")
    try:
        return interpret(path, content)
    except InputError:
        raise
    except Exception as error:  # strange tensors make anything at all fail
        if limit_reached(path, error):
            raise
        raise InputError(f"{path}: damaged, its tensors make no sense ({error}); nothing was "
                         f"loaded") from None


def interpret(path: str, content: dict) -> dict:
    """`convert` of a dictionary."""
    tensors = flatten(content)
    prefix, twins = choose_prefix(path, content, tensors)
    base, neck, dropped, unlike = sort_tensors(tensors, prefix, twins)
    if not {"cls_token", "layer1.0.conv1.weight"} & {*base}:
        raise InputError(f"{path}: its blocks are of no ViT with a [CLS] token and of no ResNet "
                         f"that is known here (Swin and others have like names), first "
                         f"{', '.join([*tensors][:3])}; nothing was loaded")
    arch = arch_of(base)
    kind = kind_of(content, prefix, neck)
    vit = "pos_embed" in base
    size = (256, 128)
    stride = None
    if vit:
        base["pos_embed"], size, stride = positions_of(path, base, unlike)
    mean, std = normalisation(tensors, bool(vit and neck), prefix)
    neck_feat = "none"
    if neck and vit:
        neck_feat = "before"                                                 # [PersonViT code]
    elif neck:
        neck_feat = "after"                                                  # [BoT]
    if content.get("format") == "reid-checkpoint":
        arch += " in training (evaluate the model.pth or backbone.pth beside it)"
    if unlike:
        parts = names_of_parts(unlike)
        arch += f" with {parts}"
        kind += f", WITHOUT {parts}, which change its feature and which the networks here lack"
    state = {f"base.{name}": tensor for name, tensor in base.items()} | neck
    return {"format": "reid-model", "kind": kind, "model": state, "dropped": dropped,
            "recipe": {"arch": arch, "size": size, "stride": stride, "mean": mean, "std": std,
                       "neck_feat": neck_feat},
            "third_party": True, "epoch": content.get("epoch"), "args": content.get("args")}


def normalisation(tensors: dict, reid_vit: bool, prefix: str) -> tuple[list, list]:
    """Mean and std of the images that a network takes: what the file says, else what is usual."""
    for name, tensor in tensors.items():
        if name.endswith("pixel_mean"):  # fast-reid's say theirs, of pixels up to 255
            std = tensors[name.removesuffix("mean") + "std"]
            return (tensor.flatten() / 255).tolist(), (std.flatten() / 255).tolist()
    # 0.5 for TransReID's and PersonViT's ViTs, and for timm's (a flat file with a classifier;
    # DeiT's files are nested [from memory]); ImageNet's for all others
    if reid_vit or not prefix and "head.weight" in tensors:
        return [0.5] * 3, [0.5] * 3
    return list(IMAGENET_MEAN), list(IMAGENET_STD)


def names_of_parts(unlike: dict) -> str:
    """What the networks here lack, in words, with the first three names of tensors."""
    kinds = [name_part(name) or "parts unknown here" for name in unlike]
    names = [*unlike][:3]
    if len(unlike) > 3:
        names.append("...")
    return f"{' and '.join(dict.fromkeys(kinds))} ({', '.join(names)})"


def flatten(content: dict) -> dict[str, Tensor]:
    """All tensors of nested dictionaries under dotted names, without what DistributedDataParallel,
    torch.compile and the like put into them, in whatever order; one that holds itself is no trap.
    """
    found = {}
    waiting = [("", content)]
    seen = set()
    for prefix, part in waiting:  # grows while it is gone through
        if id(part) in seen:
            continue
        seen.add(id(part))
        for key, value in part.items():
            if isinstance(value, Tensor):
                steps = f"{prefix}{key}".split(".")
                found[".".join(step for step in steps if step not in WRAPPERS)] = value
            elif isinstance(value, dict):
                waiting.append((f"{prefix}{key}.", value))
    return found


def choose_prefix(path: str, content: dict, tensors: dict) -> tuple[str, list[str]]:
    """Where the network begins, like "state_dict.encoder_q.", and where its twins do.

    Wherever there is a first block there is a network; no wrapper or prefix need be known. Of a
    teacher and its student, a query and a key encoder the one counts that its authors use.
    """
    begins = (re.match(r"(|.*?\.)(?:blocks\.0|layer1\.0)\.", name) for name in tensors)
    found = list(dict.fromkeys(match[1] for match in begins if match))
    if not found:
        names = [str(name) for name in tensors or content]
        text = "\n".join(names)
        whose = next((words for part, words in OTHERS.items() if part in text), "")
        raise InputError(f"{path}: holds no weights of a backbone under a name known here{whose}, "
                         f"first {', '.join(names[:3]) or 'nothing'}; nothing was loaded")
    meant = [prefix for prefix in found if MEANT.search(prefix)] or found
    meant = [prefix for prefix in meant if not TWIN.search(prefix)] or meant
    if len(meant) > 1:
        raise InputError(f"{path}: holds {len(meant)} networks, under {', '.join(meant[:4])}; save "
                         f"the one that you mean by itself; nothing was loaded")
    return meant[0], [prefix for prefix in found if prefix != meant[0]]


def sort_tensors(tensors: dict, prefix: str, twins: list[str]):
    """(backbone, neck, names dropped, parts that the networks here lack) of all tensors."""
    steps = prefix.split(".")
    beside = ".".join(steps[:-2] + [""])        # where TransReID's neck stands: "base." -> ""
    roots = tuple(root_of(twin.split("."), steps) for twin in twins)
    base = {}
    neck = {}
    dropped = []
    unlike = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(prefix if name.startswith(prefix) else beside)
        if name.startswith(prefix) and BACKBONE.fullmatch(short):
            base[short] = tensor
        elif NECK.fullmatch(short):
            neck[short] = tensor
        elif name.startswith(roots) or DROPPED.fullmatch(short) and not name_part(short):
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


def kind_of(content: dict, prefix: str, neck: dict) -> str:
    """What a file is, in words."""
    for key, kind in KINDS.items():
        if key in content or content.get("format") == key:
            return kind
    if "encoder_q." in prefix:
        return "MoCo's or LUPerson's training state: the query encoder counts"
    if neck:
        return "fine-tuned model of TransReID or PersonViT"
    if prefix:
        return f"backbone under {prefix}"
    return "bare backbone"


def arch_of(base: dict[str, Tensor]) -> str:
    """The name in evaluate.ARCHS of the network these tensors are of, by their shapes; else its
    kind."""
    def count(start: str) -> int:
        return len({name.split(".")[1] for name in base if name.startswith(start)})

    if "cls_token" in base and "blocks.0.mlp.fc1.weight" in base:
        D = base["cls_token"].shape[-1]
        depth = count("blocks.")
        if base["blocks.0.mlp.fc1.weight"].shape[0] != 4 * D:
            return "a ViT of another MLP"
        names = {(128, 6): "vit_mini", (192, 12): "vit_tiny", (384, 12): "vit_small",
                 (768, 12): "vit_base"}
        return names.get((D, depth), f"a ViT of {depth} blocks, {D} wide")
    if "layer1.0.conv3.weight" in base and "conv1.weight" in base:
        width = len(base["conv1.weight"])
        depths = tuple(count(f"layer{i}.") for i in (1, 2, 3, 4))
        names = {(64, (3, 4, 6, 3)): "resnet50", (32, (1, 1, 1, 1)): "resnet_tiny"}
        return names.get((width, depths), f"a ResNet of {depths} blocks, {width} wide")
    return "an unknown network"


SIZES = ((256, 128), (384, 128), (224, 224), (384, 384), (128, 64))  # in use for ViT and people


def positions_of(path: str, base: dict, unlike: dict) -> tuple[Tensor, tuple[int, int], int]:
    """Position embeddings (1, 1 + N, D) of [CLS] and patches, the image size and the stride.

    Of others' files only the number of positions is known. It is that of the first of SIZES with as
    many patches, else the first with patches that overlap by a quarter (TransReID's stride 12 of
    16), else of a square grid, or one twice as tall as wide [ours]. Other tokens may stand between
    [CLS] and the patches (DeiT, timm), or [CLS] may have no position (timm), or its own (PASS).
    """
    pos = base["pos_embed"]
    p = base["patch_embed.proj.weight"].shape[-1]
    if pos.ndim != 3 or len(pos) != 1:
        raise InputError(f"{path}: pos_embed of shape {tuple(pos.shape)} is not (1, positions, "
                         f"width); nothing was loaded")
    more = sum(unlike[k].shape[1] for k in ("dist_token", "reg_token") if k in unlike)
    count = pos.shape[1]
    first = pos[:, :1]
    for n in (count - 1 - more, count - 1):
        found = grid_of(n, p)
        if found and n < count - 1:
            pos = torch.cat([first, pos[:, count - n:]], dim=1)
        if found:
            return pos, *found
    found = grid_of(count, p)
    if found and found[0] in SIZES:
        first = unlike.get("cls_pos", torch.zeros_like(first))
        return torch.cat([first, pos], dim=1), *found
    raise InputError(f"{path}: pos_embed of shape {tuple(pos.shape)} fits no grid of patches after "
                     f"one [CLS] token; nothing was loaded")


def grid_of(n: int, p: int) -> tuple[tuple[int, int], int] | None:
    """Image size and stride by which there are n patches of p pixels."""
    side = math.isqrt(max(n, 0)) * p
    half = math.isqrt(max(n, 0) // 2) * p
    guesses = [(size, p) for size in SIZES]
    guesses += [(size, max(3 * p // 4, 1)) for size in SIZES]
    guesses += [((side, side), p), ((2 * half, half), p)]
    for (H, W), stride in guesses:
        rows = (H - p) // stride + 1
        columns = (W - p) // stride + 1
        if min(rows, columns) > 0 and rows * columns == n:
            return (H, W), stride
    return None


# ---------------------------------------------------------------------------------------------
# Saying what was understood: evaluate.py --inspect
# ---------------------------------------------------------------------------------------------


def describe(path: str | Path, file: dict) -> str:
    """What a weights file is, in lines of text, of what `read_weights` returned; for files
    like DINO's the arguments it carries."""
    base = file["base"]
    recipe = file["recipe"]
    numbers = sum(tensor.numel() for tensor in base.values())
    lines = [f"{path}: {file['kind']}",
             f"  backbone  {recipe['arch']}, {len(base)} tensors, {numbers:,} numbers"]
    if file["grid"]:
        stride = recipe["stride"] or base["patch_embed.proj.weight"].shape[-1]
        sure = "as the file says"
        if "third_party" in file:
            sure = "inferred from their number"
        lines.append("  positions {}x{} patches at stride {}, image {}x{} ({})".format(
            *file["grid"], stride, *recipe["size"], sure))
    if file["neck"]:
        shown = [f"{name} {tuple(tensor.shape)}" for name, tensor in file["neck"].items()]
        lines.append(f"  head      {', '.join(shown)}")
    lines.append(f"  normalise mean {tuple(recipe['mean'])}, std {tuple(recipe['std'])}")
    if isinstance(file.get("epoch"), int):
        lines.append(f"  epoch     {file['epoch']}")
    dropped = file["dropped"]
    lines.append(f"  not used  {len(dropped)} tensors")
    if dropped:
        lines[-1] += f": {', '.join(dropped[:6])}"
    if "third_party" not in file:
        lines += values_of("recipe", recipe)
    if isinstance(file.get("args"), argparse.Namespace):
        lines += values_of("args", vars(file["args"]))
    return "\n".join(lines)


def values_of(title: str, values: dict) -> list[str]:
    """A line for each value of a dictionary."""
    return [f"  {title}.{key} = {value!r:.200}" for key, value in sorted(values.items(), key=str)]


def usage(recipe: dict) -> str:
    """How `load_model` uses a file, in a line."""
    feature = f"{recipe['neck_feat']} the neck, L2-normalised"
    if recipe["neck_feat"] == "none":
        feature = "of the backbone, L2-normalised (WARNING: not fine-tuned for ReID)"
    return (f"{recipe['arch']} at {recipe['size'][0]}x{recipe['size'][1]}, feature {feature}, mean "
            f"{tuple(recipe['mean'])}, std {tuple(recipe['std'])}")
