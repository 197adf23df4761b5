"""Print the longest files and functions, so that growth is seen."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("src", "tests", "benchmarks", "scripts")
SHOWN = 8


def functions(path: Path) -> list[tuple[int, str]]:
    """(lines, "file:line name") of every function in a file."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        (
            (node.end_lineno or node.lineno) - node.lineno + 1,
            f"{name(path)}:{node.lineno} {node.name}",
        )
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, kinds)
    ]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def show(title: str, rows: list[tuple[int, str]]) -> None:
    print(title)
    for lines, where in sorted(rows, reverse=True)[:SHOWN]:
        print(f"  {lines:5}  {where}")


def main() -> None:
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    files = [(len(path.read_text().splitlines()), name(path)) for path in paths]
    show(f"longest of {len(files)} files, {sum(lines for lines, _ in files)} lines:", files)
    found = [row for path in paths for row in functions(path)]
    show(f"longest of {len(found)} functions:", found)


if __name__ == "__main__":
    main()
