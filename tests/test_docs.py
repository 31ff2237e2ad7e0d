"""The pages say what is there: commands parse, links lead to what they name, tags, recipes and exercises are complete;
and the house is as it was drawn: its top level, who imports whom, how much a file says and how densely."""

import argparse
import ast
import dataclasses
import importlib
import io
import re
import shlex
import subprocess
import sys
import tokenize

import links
import pytest
import torch
from conftest import ROOT, write_image

PAGES = {str(page.relative_to(ROOT)): page.read_text() for page in links.pages()}
README, MAP = PAGES["README.md"], PAGES["docs/paper-to-code.md"]
COMMANDS = [(page, line.split("  #")[0].strip()) for page, text in PAGES.items()
            for block in re.findall(r"```bash\n(.*?)```", text, re.S)
            for line in block.splitlines() if re.search(r"\b(python|make)\b", line)]


# ---- the README and its commands ---------------------------------------------------------------


def test_readme_is_a_front_page():
    """Short, and the first command stands on the first screen."""
    assert len(README.encode()) <= 12288
    assert len(PAGES["docs/results.md"].encode()) <= 20480       # what holds, and no log of every try
    assert "```bash\n" in "".join(README.splitlines(True)[:25])
    assert sum(page == "README.md" for page, _ in COMMANDS) >= 8 and any("--dataset msmt17" in c for _, c in COMMANDS)


class Parsed(Exception):
    """Raised in the place of all that follows the parsing of a command line."""


def parse(words: list[str], monkeypatch) -> None:
    """Let the script parse its flags; a parser exits on an unknown one, and so fails."""
    module, flags = (words[2], words[3:]) if words[1] == "-m" else (words[1].removesuffix(".py"), words[2:])
    module = module.removeprefix("tests/")
    script = importlib.import_module(module)
    if hasattr(script, "parse_args"):  # with the checks of what goes together
        script.parse_args(flags)
        return
    parsing = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, argv=None, namespace=None):
        parsing(self, argv, namespace)
        raise Parsed

    monkeypatch.setattr(sys, "argv", [module, *flags])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(Parsed):
        script.main()


@pytest.mark.parametrize("page, command", COMMANDS)
def test_command_parses(page, command, monkeypatch):
    """`make -n` says what make would run."""
    words = shlex.split(command)
    if "make" in words:
        make = ["make", "--no-print-directory", "-n", *words[words.index("make") + 1:], "PYTHON=python"]
        done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.replace("\\\n", " ").splitlines()
        words = shlex.split(next(line for line in lines if line.startswith("python")))
    assert words[0] == "python"
    if words[1:3] == ["-m", "torch.distributed.run"]:
        words = ["python", *words[words.index("--") + 1:]]
    if words[1:3] != ["-m", "pytest"]:
        parse(words, monkeypatch)


def lines_with_a_model(which: int, folder) -> str:
    """Lines of Python of docs/data-and-weights.md, and a model in a folder, under the name that they use."""
    import evaluate

    block = re.findall(r"```python\n(.*?)```", PAGES["docs/data-and-weights.md"], re.S)[which]
    weights = folder / re.search(r'"(.*\.pth)"', block)[1]
    weights.parent.mkdir(parents=True)
    reading = {"size": (32, 16), "mean": [0.5] * 3, "std": [0.5] * 3}
    model = evaluate.ReIDModel(evaluate.build_backbone("vit_mini", reading["size"]), 3)
    torch.save({"format": "reid-model", "model": model.state_dict(),
                "recipe": {"arch": "vit_mini", "neck_feat": "after", **reading}}, weights)
    return block


def test_lines_of_python_run(tmp_path, monkeypatch):
    """On photos under the names that they use."""
    block = lines_with_a_model(0, tmp_path)
    assert len(block.splitlines()) == 5
    for i, name in enumerate(re.findall(r'"(\w+\.jpg)"', block)):
        write_image(tmp_path / name, i)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block, names)
    assert names["features"].shape == (2, 128)
    torch.testing.assert_close(names["features"].norm(dim=1), torch.ones(2))


def test_lines_that_export_run(tmp_path, monkeypatch, capsys):
    """... and what is exported gives the features of one image, though it was exported with two."""
    block = lines_with_a_model(1, tmp_path)
    assert len([line for line in block.splitlines() if line and "import" not in line]) == 6
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    difference = float(re.search(r"tensor\(([\d.e-]+)", capsys.readouterr().out.splitlines()[-1])[1])
    assert difference < 1e-4 and (tmp_path / "model.pt2").exists()


# ---- links, tags, recipes, exercises: both ways ------------------------------------------------


def test_links_point_to_what_they_name(tmp_path):
    """`make readme` repairs the numbers."""
    for page in links.pages():
        assert links.repaired(page) == page.read_text(), f"{page.name}: run `make readme`"
    assert len(links.LINK.findall(README)) > 25 and sum(len(links.LINK.findall(text)) for text in PAGES.values()) > 90
    (tmp_path / "a.py").write_text("import os\nX, Y = 1, 2\n\nclass C:\n    z: int = 3\n    def f(self):\n        n = 4\n")
    (tmp_path / "docs").mkdir()
    for page, path in ((tmp_path / "page.md", "a.py"), (tmp_path / "docs" / "page.md", "../a.py")):
        for symbol, line in (("X", 2), ("Y", 2), ("C", 4), ("C.z", 5), ("C.f", 6)):
            page.write_text(f"see [`{symbol}`]({path}#L99).")
            assert links.repaired(page) == f"see [`{symbol}`]({path}#L{line})."
        for lost in (f"[`f`]({path}#L6)", f"[`n`]({path}#L7)", f"[`C`](b{path}#L1)"):
            page.write_text(lost)
            with pytest.raises(SystemExit):
                links.repaired(page)


def without_blocks(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.S)


def heads(text: str) -> list[str]:
    """The names by which a page's sections are linked to, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", without_blocks(text), re.M)
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("page", PAGES)
def test_links_to_sections_and_files(page):
    assert len(heads(PAGES[page])) == len(set(heads(PAGES[page])))
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if not target.startswith("https://"):
            name, _, section = target.partition("#")
            file = ((ROOT / page).parent / name).resolve() if name else ROOT / page
            assert file.exists() and ROOT in file.parents, target
            assert file.suffix != ".md" or not section or section in heads(file.read_text()), target


def test_every_page_is_reached_from_the_readme():
    assert all(f"]({page}" in README for page in PAGES if page != "README.md")


HOUSE_FILES = sorted(ROOT.glob("*.py")) + sorted((ROOT / "extra").glob("*.py"))


def tags(text: str) -> set[str]:
    """Tags like [iBOT] or [PersonViT code; BoT]: the sources that they name."""
    found = re.findall(r"\[((?:[A-Z]|iBOT|ours|from memory|inferred|secondary|notes)[^\[\]`]*)\](?!\()",
                       re.sub(r"\s+", " ", text))
    return {part.split(":")[0].strip() for tag in found if tag != "CLS" for part in re.split("[;,]", tag)}


def prose(path) -> str:
    """Comments and strings of a module."""
    with open(path) as handle:
        return "\n".join(token.string.lstrip("# ") for token in tokenize.generate_tokens(handle.readline)
                         if token.type in (tokenize.COMMENT, tokenize.STRING))


def test_every_tag_is_explained_and_used():
    code = set().union(*(tags(prose(path)) for path in HOUSE_FILES))
    numbered = {t for t in code if re.fullmatch(r"PersonViT (Eq|Fig)\. \d|ours U\d", t)}
    assert len(numbered) == 9 and all(numbered <= tags(text) for text in (MAP, README))
    legend = re.search(r"\| tag \| is \|\n(.*?)\n\n", MAP, re.S)[1]
    explained = {key for line in legend.splitlines() for key in re.findall("`([^`]+)`", line.split("|")[1])}
    used = code.union(*(tags(without_blocks(text)) for text in PAGES.values()))
    assert used - numbered == {key for key in explained if not re.search(r"\.|U\d", key)}


def shown(value) -> str:
    """A default as the tables have it."""
    if isinstance(value, tuple):
        return ("x" if isinstance(value[0], int) else ", ").join(map(shown, value))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return {"True": "on", "False": "off", "None": "none"}.get(text, text)


@pytest.mark.parametrize("title, module, kind", [("PersonViT's pre-training", "personvit", "PersonViTRecipe"),
                                                 ("UP-ReID's pre-training", "upreid", "UPReIDRecipe"),
                                                 ("fine-tuning", "train", "Recipe")])
def test_recipes_are_the_published_ones_or_say_why_not(title, module, kind):
    section = PAGES["docs/recipes.md"].split(f"## Recipe of {title}\n")[1].split("\n#")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \| ([^|]*) \|([^|]*)\|$", section, re.M)
    recipe = getattr(importlib.import_module(module), kind)
    fields = {f.name: shown(f.default) for f in dataclasses.fields(recipe) if f.name not in ("seed", "bf16")}
    assert {name: here for name, here, _, _ in rows} == fields
    for name, here, published, why in rows:
        assert published.split(" [")[0] == here or len(why.strip()) > 5, name


def test_every_exercise_has_its_answer():
    parts = re.split(r"^## (.+)\n", PAGES["docs/exercises.md"], flags=re.M)[1:]
    sections = dict(zip(parts[::2], parts[1::2]))
    assert {f"{name}.py" for name in BOOK} <= set(sections) and all((ROOT / name).exists() for name in sections)
    for name, text in sections.items():
        paragraphs = [p.strip() for p in text.strip().split("\n\n")]
        number = 0
        for question, answer in zip(paragraphs[::2], paragraphs[1::2], strict=True):
            number += 1
            assert question.startswith(f"**{number}.** ") and answer.startswith("*Answer.* "), f"{name} {number}"
    for path in HOUSE_FILES:
        assert "xercises (answers" not in (ast.get_docstring(ast.parse(path.read_text())) or ""), path.name


# ---- the house ---------------------------------------------------------------------------------

BOOK = {"upreid": 3300, "personvit": 4700, "data": 6500, "evaluate": 4500, "train": 4600}  # most tokens of each
METHODS = ("upreid", "personvit")
TOP_LEVEL = {"README.md", "requirements.txt", "Makefile", *(f"{name}.py" for name in BOOK), "extra", "tests", "docs",
             "LICENSE", ".gitignore", ".ci"}
# extra/ is of two kinds: what the five stand on, which imports none of them, and what stands on the five
BELOW = {f"extra.{name}" for name in ("people", "files", "folders", "workers", "runs", "flags", "rerank")}
ABOVE = {f"extra.{name}" for name in ("formats", "photos", "pictures", "study", "bench", "verification")}
EDGES = {"upreid": set(), "personvit": set(),
         "data": {"extra.people", "extra.files", "extra.folders", "extra.workers"},
         "evaluate": {"data", *METHODS, "extra.files", "extra.folders", "extra.flags", "extra.runs", "extra.rerank",
                      "extra.formats", "extra.photos", "extra.pictures", "extra.verification"},
         "train": {"data", "evaluate", *METHODS, "extra.files", "extra.folders", "extra.flags", "extra.runs", "extra.formats",
                   "extra.pictures", "extra.verification"},
         "extra.people": set(), "extra.files": set(), "extra.workers": set(), "extra.flags": set(), "extra.rerank": set(),
         "extra.folders": {"extra.files"}, "extra.runs": {"extra.files"},
         "extra.formats": {"data", "evaluate", "extra.files"}, "extra.photos": {"data", "evaluate", "extra.files", "extra.pictures"},
         "extra.verification": {"evaluate"},
         "extra.pictures": {"data", "evaluate", "personvit", "extra.files", "extra.flags"},
         "extra.bench": {*BOOK, "extra.files", "extra.flags", "extra.runs"},
         "extra.study": {*BOOK, "extra.files", "extra.flags", "extra.runs", "extra.pictures", "extra.bench"}}
PACKAGES = {"torch", "torchvision", "numpy", "scipy", "PIL"}


def file_of(module: str):
    return ROOT / f"{module.replace('.', '/')}.py"


def test_top_level():
    try:
        done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no git here")
    if done.returncode:
        pytest.skip("no repository here, but a copy of its files")
    assert {line.split("/")[0] for line in done.stdout.splitlines()} == TOP_LEVEL


def test_every_module_has_its_edges():
    assert {file_of(module) for module in EDGES} == {path for path in HOUSE_FILES if path.stem != "__init__"}


def outside_functions(tree: ast.AST) -> list[ast.AST]:
    """All nodes that run when a module is imported, but for default values of parameters."""
    found = [tree]
    for node in found:  # grows while it is gone through
        found += [child for child in ast.iter_child_nodes(node)
                  if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))]
    return found


def imports(source: str, nodes=ast.walk) -> set[str]:
    """Modules of the house ("data", "extra.people") and other packages that a source imports, in functions as well."""
    names = []
    for node in nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["extra"] * node.level + [node.module]))  # relative: inside extra/
            names += [f"extra.{alias.name}" for alias in node.names] if base == "extra" else [base]
    return {".".join(name.split(".")[:2]) if name.startswith("extra") else name.split(".")[0] for name in names}


def test_imports_are_seen():
    source = """import os, extra.people as people
from extra import pictures
from extra.study import study as s
from . import bench
from .photos import main
def f():
    import data
    from train import main
if os:
    class C:
        from extra import flags
        def g(self):
            from extra import runs"""
    extra = {f"extra.{name}" for name in ("people", "pictures", "study", "bench", "photos", "flags")}
    assert imports(source) == {"os", "data", "train", "extra.runs"} | extra
    assert imports(source, outside_functions) == {"os"} | extra


@pytest.mark.parametrize("module", EDGES)
def test_imports(module):
    names = imports(file_of(module).read_text())
    house = {name for name in names if name in EDGES or name.startswith("extra")}
    assert house <= EDGES[module]
    assert names - house - set(sys.stdlib_module_names) <= ({"torch"} if module in METHODS else PACKAGES)


def test_the_two_kinds_of_extra():
    """Import the five and nothing is loaded that stands on them; what they stand on can be read without them."""
    assert BELOW | ABOVE | {*BOOK} == set(EDGES) and not BELOW & ABOVE
    for module in BELOW:
        assert EDGES[module] <= BELOW, module
    for module in BOOK:
        assert not imports(file_of(module).read_text(), outside_functions) & ABOVE, module
    assert imports(file_of("evaluate").read_text()) & ABOVE      # it has some, in functions


LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def docstring_lines(tree: ast.AST) -> set[int]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            text = first.value if isinstance(first, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                found |= {*range(first.lineno, first.end_lineno + 1)}
    return found


def is_nested(node: ast.AST) -> bool:
    """A comprehension with two `for`, or with another one in it?"""
    return isinstance(node, COMPREHENSIONS) and (
        len(node.generators) > 1 or any(isinstance(inner, COMPREHENSIONS) for inner in ast.walk(node) if inner is not node))


def is_several(node: ast.AST) -> bool:
    """Several values to several names in one statement?"""
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)


def measured(source: str) -> dict[str, int]:
    """What there is to read in a source, however it is broken into lines.

    code: lines that hold anything but a comment, a docstring or nothing; comments: lines with a comment or of a docstring (a
    line may be both); tokens: names, operators, numbers and strings outside of docstrings, an f-string being one;
    nested, conditional, several: see `is_nested`, `ast.IfExp`, `is_several`."""
    tree = ast.parse(source)
    docstrings, code, comments, tokens, depth = docstring_lines(tree), set(), set(), 0, 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        lines, kind = {*range(token.start[0], token.end[0] + 1)}, tokenize.tok_name[token.type]
        if token.type == tokenize.COMMENT:
            comments |= lines
        elif token.type not in LAYOUT:
            code |= lines
            tokens += depth == 0 and token.start[0] not in docstrings
        depth += kind.endswith("STRING_START")                   # from Python 3.12 on an f-string is many tokens
        depth -= kind.endswith("STRING_END")
    nodes = list(ast.walk(tree))
    return {"code": len(code - docstrings), "comments": len(comments | docstrings), "tokens": tokens,
            "nested": sum(map(is_nested, nodes)), "conditional": sum(isinstance(node, ast.IfExp) for node in nodes),
            "several": sum(map(is_several, nodes))}


def test_what_is_measured():
    source = '"""One.\n\nTwo."""\n\n# three\nx = [1,  # four\n\n     2]\ndef f():\n    """Five."""\n    return "\\\n"\n'
    assert measured(source) == {"code": 5, "comments": 6, "tokens": 14, "nested": 0, "conditional": 0, "several": 0}
    for line, tokens, found in (
            ("a = f'{b} of {c:>{d}}' + 'e'", 5, []), ("a, b = c", 5, []), ("a, b = c, d", 7, ["several"]),
            ("a = b if c else d", 7, ["conditional"]), ("a = [b for c in d]", 9, []),
            ("a = [b for c in d for b in c]", 13, ["nested"]), ("a = {b: [c for c in b] for b in d}", 17, ["nested"])):
        got = measured(line)
        assert (got["code"], got["tokens"]) == (1, tokens), line
        assert [kind for kind in ("nested", "conditional", "several") if got[kind]] == found, line


HOUSE = {module: measured(file_of(module).read_text()) for module in EDGES}


@pytest.mark.parametrize("module", BOOK)
def test_a_file_of_the_book_is_short_plain_and_explained(module):
    """A file that says too much has an idea too many; too much on a line, or too few comments, is not for reading."""
    found = HOUSE[module]
    assert found["tokens"] <= BOOK[module]
    assert found["tokens"] / found["code"] <= (12 if module in METHODS else 11)
    assert found["nested"] == 0
    assert found["conditional"] / found["code"] <= 0.02
    assert found["several"] / found["code"] <= 0.015
    assert found["comments"] / found["code"] >= (0.6 if module in METHODS else 0.35)


def test_the_house_is_small():
    book = sum(HOUSE[module]["tokens"] for module in BOOK)
    extra = sum(HOUSE[module]["tokens"] for module in BELOW | ABOVE)
    assert book <= 23_600 and extra <= 33_000 and book + extra <= 56_500, (book, extra)


DENSE = {"extra.people": 18.2, "extra.pictures": 16.5, "extra.study": 13.1, "extra.bench": 12.9}  # older files: no denser than they were


@pytest.mark.parametrize("module", sorted(BELOW | ABOVE))
def test_extra_is_not_pressed_together(module):
    assert HOUSE[module]["tokens"] / HOUSE[module]["code"] <= DENSE.get(module, 12)


def test_modules_fit_the_page():
    for path in HOUSE_FILES:
        wide = [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]
        assert not wide, f"{path.name} lines {wide} are wider than 100 columns"
