"""`make readme`: line numbers of the links in README.md and docs/, [`symbol`](file.py#L1), which tests then trust."""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[`([\w.]+)`\]\(([\w./]+\.py)#L(\d+)\)")


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def definitions(file: Path) -> dict[str, int]:
    """Line of each function, class, method, and name that is assigned at the top of a file or class."""
    lines = {}

    def visit(body: list, prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                lines[prefix + node.name] = node.lineno
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            for target in getattr(node, "targets", [getattr(node, "target", None)]):
                for name in getattr(target, "elts", [target]):
                    if isinstance(name, ast.Name):
                        lines.setdefault(prefix + name.id, node.lineno)

    visit(ast.parse(file.read_text()).body, "")
    return lines


def repaired(page: Path) -> str:
    """The page's text with every link's number as it should be; files are relative to the page.

    Exits, naming all of them, when files or symbols are not there.
    """
    found: dict[str, dict | None] = {}
    lost = []

    def number(match: re.Match) -> str:
        symbol, file, _ = match.groups()
        if file not in found:
            found[file] = definitions(page.parent / file) if (page.parent / file).exists() else None
        if found[file] is None or symbol not in found[file]:
            lost.append(f"{page.name} links to {symbol} in {file}, which " +
                        ("is absent" if found[file] is None else "has no such name"))
            return match[0]
        return f"[`{symbol}`]({file}#L{found[file][symbol]})"

    text = LINK.sub(number, page.read_text())
    if lost:
        sys.exit("\n".join(lost))
    return text


if __name__ == "__main__":
    after = {page: repaired(page) for page in pages()}  # all are looked at before any is written
    for page, text in after.items():
        links, old = LINK.findall(text), LINK.findall(page.read_text())
        page.write_text(text)
        print(f"{page.relative_to(ROOT)}: {len(links)} links, {sum(a != b for a, b in zip(old, links))} repaired")
