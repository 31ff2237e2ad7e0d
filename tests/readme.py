"""`make readme`: the line numbers of the README's links, [`symbol`](file.py#L1), which tests then trust."""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[`([\w.]+)`\]\(([\w/]+\.py)#L(\d+)\)")


def definitions(file: Path) -> dict[str, int]:
    """Line of each function, class, method, and name that is assigned at the top of a file or class."""
    lines = {}

    def visit(body: list, prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                lines[prefix + node.name] = node.lineno
                visit(node.body, f"{prefix}{node.name}.")
            for target in getattr(node, "targets", [getattr(node, "target", None)]):
                for name in getattr(target, "elts", [target]):
                    if isinstance(name, ast.Name):
                        lines.setdefault(prefix + name.id, node.lineno)

    visit(ast.parse(file.read_text()).body, "")
    return lines


def repaired(text: str) -> str:
    """The README with every link's number as it should be; exits when a file or symbol is not there."""
    found: dict[str, dict] = {}

    def number(match: re.Match) -> str:
        symbol, file, _ = match.groups()
        if file not in found and not (ROOT / file).exists():
            sys.exit(f"README.md links to {file}, which is absent")
        found.setdefault(file, definitions(ROOT / file))
        if symbol not in found[file]:
            sys.exit(f"README.md links to {symbol} in {file}, which has no such name")
        return f"[`{symbol}`]({file}#L{found[file][symbol]})"

    return LINK.sub(number, text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = repaired(before)
    readme.write_text(after)
    print(f"{len(LINK.findall(after))} links, {sum(a != b for a, b in zip(LINK.findall(before), LINK.findall(after)))} repaired")
