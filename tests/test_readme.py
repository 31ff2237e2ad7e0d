"""The README's commands parse, the modules import what they may, and nothing beyond the five packages."""

import ast
import dataclasses
import re
import shlex
import subprocess
import sys
import tokenize

import pytest
from conftest import ROOT

import data
import evaluate
import readme
import study
import train
from pretrain import PersonViTRecipe, UPReIDRecipe

README = (ROOT / "README.md").read_text()
COMMANDS = [line.split("  #")[0].strip() for block in re.findall(r"```bash\n(.*?)```", README, re.S)
            for line in block.splitlines() if re.search(r"\b(python|make)\b", line)]


def test_there_are_commands():
    assert len(COMMANDS) >= 8 and any("--dataset msmt17" in c for c in COMMANDS)


PARSERS = {"train.py": train.parse_args, "evaluate.py": evaluate.parse_args, "data.py": data.make_parser().parse_args,
           "study.py": study.make_parser().parse_args}


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command):
    """A parser exits, and so fails, on an unknown flag; `make -n` says what make would run."""
    words = shlex.split(command)
    if "make" in words:
        make = ["make", "--no-print-directory", "-n", *words[words.index("make") + 1:], "PYTHON=python"]
        done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        words = shlex.split(done.stdout.replace("\\\n", " "))
    assert words[0] == "python"
    if words[1:3] == ["-m", "torch.distributed.run"]:
        words = ["python", *words[words.index("--") + 1:]]
    if words[1:3] != ["-m", "pytest"]:
        PARSERS[words[1]](words[2:])


# ---- links, tags, recipes, exercises: both ways ------------------------------------------------


def test_links_point_to_what_they_name(tmp_path, monkeypatch):
    """`make readme` repairs the numbers."""
    assert readme.repaired(README) == README and len(readme.LINK.findall(README)) > 60
    (tmp_path / "a.py").write_text("import os\nX, Y = 1, 2\n\nclass C:\n    z: int = 3\n    def f(self):\n        pass\n")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    for symbol, line in (("X", 2), ("Y", 2), ("C", 4), ("C.z", 5), ("C.f", 6)):
        assert readme.repaired(f"see [`{symbol}`](a.py#L99).") == f"see [`{symbol}`](a.py#L{line})."
    for lost in ("[`f`](a.py#L6)", "[`C`](b.py#L1)"):
        with pytest.raises(SystemExit):
            readme.repaired(lost)


def test_links_to_sections_and_files():
    heads = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", README, re.M)}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in heads, target
        elif not target.startswith("https://"):
            assert (ROOT / target.split("#")[0]).exists(), target


def sources(text: str) -> set[str]:
    """Tags like [iBOT] or [PersonViT code; BoT]: the sources that they name."""
    found = re.findall(r"\[((?:[A-Z]|iBOT|ours|from memory|inferred|notes)[^\[\]`]*)\](?!\()", re.sub(r"\s+", " ", text))
    return {part.split(":")[0].strip() for tag in found if tag != "CLS" for part in re.split("[;,]", tag)}


def prose(path) -> str:
    """Comments and strings of a module."""
    with open(path) as handle:
        return "\n".join(token.string for token in tokenize.generate_tokens(handle.readline)
                         if token.type in (tokenize.COMMENT, tokenize.STRING))


def test_every_tag_is_explained_and_used():
    code = set().union(*(sources(prose(path)) for path in ROOT.glob("*.py")))
    legend = re.search(r"\| tag \| is \|\n(.*?)\n\n", README, re.S)[1]
    explained = {key for line in legend.splitlines() for key in re.findall("`([^`]+)`", line.split("|")[1])}
    numbered = re.compile(r"PersonViT (Eq|Fig)\. \d|ours U\d")
    assert {t for t in code if not numbered.fullmatch(t)} == {k for k in explained if not re.search(r"\.|U\d", k)}
    in_maps = {t for t in sources(README) if numbered.fullmatch(t)}
    assert in_maps == {t for t in code if numbered.fullmatch(t)} and len(in_maps) == 9


def shown(value) -> str:
    """A default as the tables have it."""
    if isinstance(value, tuple):
        return ("x" if isinstance(value[0], int) else ", ").join(map(shown, value))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return {"True": "on", "False": "off", "None": "none"}.get(text, text)


@pytest.mark.parametrize("title, kind", [("PersonViT's pre-training", PersonViTRecipe), ("UP-ReID's pre-training", UPReIDRecipe),
                                         ("fine-tuning", train.Recipe)])
def test_recipes_are_the_published_ones_or_say_why_not(title, kind):
    section = README.split(f"### Recipe of {title}\n")[1].split("\n#")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \| ([^|]*) \|([^|]*)\|$", section, re.M)
    fields = {f.name: shown(f.default) for f in dataclasses.fields(kind) if f.name not in ("seed", "bf16")}
    assert {name: here for name, here, _, _ in rows} == fields
    for name, here, published, why in rows:
        assert published.split(" [")[0] == here or len(why.strip()) > 5, name


def test_every_exercise_has_its_answer():
    answers = README.split("## Answers")[1]
    for path in ROOT.glob("*.py"):
        text = ast.get_docstring(ast.parse(path.read_text()))
        asked = re.findall(r"(?<= )(\d)\. ", text.split("Exercises (answers: README).")[1]) if "Exercises" in text else []
        assert asked == [str(i + 1) for i in range(len(asked))]
        answered = re.findall(rf"^\*\*{path.name} (\d)\.\*\*", answers, re.M)
        assert answered == asked, path.name


# ---- imports, widths ---------------------------------------------------------------------------

EDGES = {"upreid": set(), "personvit": set(), "synthetic": set(), "augment": set(), "data": {"synthetic"},
         "weights": {"upreid", "personvit", "data", "augment"}, "pictures": {"data"}, "ranking": {"data"},
         "evaluate": {"weights", "ranking", "pictures", "data", "augment", "personvit"},
         "runs": {"data", "augment", "evaluate", "weights", "personvit", "upreid"},
         "pretrain": {"data", "augment", "evaluate", "weights", "personvit", "upreid", "runs"},
         "train": {"data", "augment", "evaluate", "weights", "pretrain", "runs", "upreid"},
         "study": {"data", "evaluate", "pictures", "weights", "pretrain", "runs", "train"}}
METHOD_FILES = {"upreid": {"torch"}, "personvit": {"torch"}}
PACKAGES = {"torch", "torchvision", "numpy", "scipy", "PIL"}


def test_every_module_has_its_edges():
    assert set(EDGES) == {path.stem for path in ROOT.glob("*.py")}


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
