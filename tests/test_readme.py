"""The README's commands parse, the modules import what they may, and nothing beyond the five packages."""

import ast
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

import data
import evaluate
import study
import train

README = (ROOT / "README.md").read_text()
COMMANDS = [line.split("  #")[0].strip() for block in re.findall(r"```bash\n(.*?)```", README, re.S)
            for line in block.splitlines() if re.search(r"\b(python|make)\b", line)]


def test_there_are_commands():
    assert len(COMMANDS) >= 8 and any("--dataset msmt17" in c for c in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command):
    words = [w for w in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S*", w)]
    if words[0] == "make":
        done = subprocess.run(["make", "-n", *shlex.split(command)[shlex.split(command).index("make") + 1:]],
                              cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return
    assert words[0] == "python"
    if words[1:3] == ["-m", "torch.distributed.run"]:
        words = ["python", *words[words.index("--") + 1:]]
    if words[1:3] == ["-m", "pytest"]:
        return
    parse = {"train.py": train.parse_args, "evaluate.py": evaluate.parse_args,
             "data.py": data.make_parser().parse_args, "study.py": study.make_parser().parse_args}[words[1]]
    parse(words[2:])  # exits, and so fails, on an unknown flag


EDGES = {"upreid": set(), "personvit": set(), "synthetic": set(), "augment": set(), "data": {"synthetic"},
         "weights": {"upreid", "personvit", "data", "augment"}, "pictures": {"data"}, "ranking": {"data"},
         "evaluate": {"weights", "ranking", "pictures", "data", "augment", "personvit"},
         "runs": {"data", "augment", "evaluate", "weights", "personvit", "upreid"},
         "pretrain": {"data", "augment", "evaluate", "weights", "personvit", "upreid", "runs"},
         "train": {"data", "augment", "evaluate", "weights", "pretrain", "runs", "upreid"},
         "study": {"data", "evaluate", "pictures", "weights", "pretrain", "runs", "train"}}
METHOD_FILES = {"upreid": {"torch"}, "personvit": {"torch"}}
PACKAGES = {"torch", "torchvision", "numpy", "scipy", "PIL"}


@pytest.mark.parametrize("module", EDGES)
def test_imports(module):
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    assert names & set(EDGES) <= EDGES[module]
    others = names - set(EDGES) - set(sys.stdlib_module_names)
    assert others <= METHOD_FILES.get(module, PACKAGES)


def test_modules_fit_the_page():
    for path in ROOT.glob("*.py"):
        wide = [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]
        assert not wide, f"{path.name} lines {wide} are wider than 100 columns"
