"""Command lines: a flag for each field of a recipe, and one line for values that make no sense."""

import argparse
import inspect
import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import torch


def device_name(text: str) -> str:
    """cpu, cuda or cuda:1, if there is such a thing here."""
    here = ["cpu"]
    for i in range(torch.cuda.device_count()):
        here += ["cuda", f"cuda:{i}"]
    if text not in here:
        names = ", ".join(dict.fromkeys(here))
        raise argparse.ArgumentTypeError(f"{text!r} is none of what is here: {names}")
    return text


def usual_device() -> str:
    """A GPU, if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def has_bfloat16(device: str) -> bool:
    """Does a GPU compute in bfloat16? T4, V100 and P100 would imitate it, slower than float32."""
    return device != "cpu" and torch.cuda.is_bf16_supported(including_emulation=False)


def two_numbers(text: str) -> tuple:
    """Two numbers, written 256x128 or 0.4x1."""
    try:
        first, second = map(float, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not two numbers like 256x128") from None
    if first % 1 == second % 1 == 0:
        return int(first), int(second)
    return first, second


def number_or_none(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def setting(text: str) -> tuple[str, str]:
    """A name and a value, written norm=half."""
    name, _, value = text.partition("=")
    if not name or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, like norm=imagenet")
    return name, value


PARSERS = {tuple[int, int]: two_numbers, tuple[float, float]: two_numbers,
           float | None: number_or_none}

# flags of numbers that are more than 0, and the most that others may be
POSITIVE = re.compile("threads|save_every|accum|monitor_every|batch|batch_size|ids|images|"
                      r"prototypes|hidden|bottleneck|queue|dim|clip|aspect|labelled|\w+_temp.*|"
                      "temperature.*")
MOST = {"threads": 1024, "workers": 1024, "batch_size": 1 << 16, "drop_path": 0.99} | dict.fromkeys(
    ("smoothing", "labelled", "momentum", "global_scale", "local_scale"), 1)


def add_recipe_flags(parser: argparse.ArgumentParser, usual) -> None:
    """A flag for each field of a recipe: its value is the default, its comment the help."""
    kinds = get_type_hints(type(usual))
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(type(usual)), re.M))
    for field in fields(usual):
        kind, value = kinds[field.name], getattr(usual, field.name)
        how = {"type": PARSERS.get(kind, type(value))}
        if get_origin(kind) is Literal:
            how["choices"] = get_args(kind)
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        if isinstance(value, tuple):
            value = "x".join(map(str, value))
        if value is None:
            value = "none"
        parser.add_argument(f"--{field.name.replace('_', '-')}", **how, default=value,
                            help=comments[field.name].replace("%", "%%"))


def check_values(parser: argparse.ArgumentParser, args) -> None:
    """End with one line for a number that makes no sense."""
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')} {value}"
        if value == "":
            parser.error(f"{flag}: must be a name")
        numbers = value if isinstance(value, (tuple, list)) else [value]
        most = MOST.get(name, 1e9)
        for number in numbers:
            if not isinstance(number, (int, float)):
                continue
            if POSITIVE.fullmatch(name) and not 0 < number <= most:
                parser.error(f"{flag}: must be more than 0, at most {most:g}")
            if not 0 <= number <= most:
                parser.error(f"{flag}: must be at least 0, at most {most:g}")
    size = getattr(args, "size", None) or ()
    if not all(n % 1 == 0 and 8 <= n <= 4096 for n in size):
        parser.error(f"--size {size}: two whole numbers from 8 to 4096, as 256x128")


def check_training(parser: argparse.ArgumentParser, args) -> None:
    """End with one line for flags of train.py that make no sense, or do not go together."""
    check_values(parser, args)
    if args.monitor == "held-out" and not args.held_out:
        parser.error("--monitor held-out needs --held-out N")
    of_dataset = args.monitor not in (None, "held-out")
    if not args.pretrain and (args.accum > 1 or of_dataset or args.keep_every):
        parser.error("--accum, --keep-every and --monitor of a dataset are for --pretrain")
    if args.sheet:
        check_place(parser, args, "sheet", ".png")


PATCHES = ("attention", "clusters", "correspondence")  # pictures of a ViT's patches
GOES_WITH = {"rerank": ["dataset"], "ranks": ["dataset", "query"], "skip_bad": ["extract", "query"],
             "flip": ["dataset", "extract"], **dict.fromkeys(PATCHES, ["dataset"])}
TOGETHER = {"extract": "out", "query": "gallery", "curves": "runs"}


def check_evaluation(parser: argparse.ArgumentParser, args) -> None:
    """End with one line for flags of evaluate.py that do not go together, or files that cannot be
    written."""
    check_values(parser, args)
    if not args.weights and not args.inspect and not args.curves:
        parser.error("--weights FILE is needed")
    args.given = dict(args.given)
    for flag, tasks in GOES_WITH.items():
        if getattr(args, flag) and not any(getattr(args, task) for task in tasks):
            parser.error(f"--{flag.replace('_', '-')} goes with --{' or --'.join(tasks)}")
    for task, flag in TOGETHER.items():
        if bool(getattr(args, task)) != bool(getattr(args, flag)):
            parser.error(f"--{task} and --{flag} go together")
    places = []
    for flag in ("ranks", *PATCHES, "curves", "out"):
        name = getattr(args, flag)
        if name:
            check_place(parser, args, flag, ".npz" if flag == "out" else ".png")
            places.append(os.path.abspath(name))
    if len(set(places)) < len(places):
        parser.error("two pictures cannot go into one file")


def check_place(parser: argparse.ArgumentParser, args, flag: str, suffix: str) -> None:
    """End with one line for a file that cannot be written."""
    name = getattr(args, flag)
    if not name.endswith(suffix):
        parser.error(f"--{flag} {name}: the file is a {suffix[1:].upper()}, name it so")
    if os.path.exists(name) and not args.overwrite:
        parser.error(f"{name} exists; --overwrite replaces it")
    if os.path.isdir(name) or not os.access(Path(name).parent, os.W_OK):
        parser.error(f"--{flag} {name}: its folder is absent or read-only")
