"""The part of a file that a function's result depends on, so that a new figure or claim beside it undoes no job."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


def reached_text(path: Path, name: str) -> str:
    """The text of a function, and of all that it reaches by name at the top of its file and of files beside it.

    Followed are the names that stand in what is reached: functions, classes, constants, and imports of files in the
    same folder (of a module that is imported as a whole, all its text counts). Statements that bind no name, as
    ``torch.set_num_threads(1)``, count wherever a file is reached; its docstring and what runs only as a script do not.
    What is imported from elsewhere does not count. Where the files lie makes no difference.

    Args:
        path: The file.
        name: Of the function.

    Returns:
        All of the file's text where it is no Python that can be read.
    """
    walk = _Walk(path.resolve())
    try:
        walk.reach(walk.start, name)
    except (SyntaxError, ValueError):
        return path.read_text(encoding="utf-8", errors="replace")
    return "\n".join(f"{file}:\n{text}" for file, text in sorted(walk.texts))


@dataclass
class _Walk:
    """What was reached so far.

    Attributes:
        start: The function's file, whose name does not matter.
        texts: Pairs of a file's name and a text of it.
        files: The files' statements, by path.
        seen: Pairs of a path and a name that were followed.
    """

    start: Path
    texts: set[tuple[str, str]] = field(default_factory=set)
    files: dict[Path, _File] = field(default_factory=dict)
    seen: set[tuple[Path, str]] = field(default_factory=set)

    def reach(self, path: Path, name: str) -> None:
        """Follow a name of a file."""
        if (path, name) in self.seen:
            return
        self.seen.add((path, name))
        if path not in self.files:
            self.files[path] = _File(path)
            for statement in self.files[path].loose:
                self._take(path, statement)
        for statement in self.files[path].bound.get(name, ()):
            if isinstance(statement, ast.Import | ast.ImportFrom):
                self._follow(path, statement, name)
            else:
                self._take(path, statement)

    def _take(self, path: Path, statement: ast.stmt) -> None:
        self.texts.add((path.name if path != self.start else "", self.files[path].text(statement)))
        for node in ast.walk(statement):
            if isinstance(node, ast.Name):
                self.reach(path, node.id)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                for bound in _bound_by(node):
                    self._follow(path, node, bound)

    def _follow(self, path: Path, statement: ast.Import | ast.ImportFrom, name: str) -> None:
        """Go on in the file beside this one that an import takes a name from, if it does."""
        for alias in statement.names:
            if name != (alias.asname or alias.name.partition(".")[0]):
                continue
            module = statement.module or "" if isinstance(statement, ast.ImportFrom) else ""
            inside = _beside(path, module)
            whole = _beside(path, f"{module}.{alias.name}".lstrip("."))
            if isinstance(statement, ast.ImportFrom) and inside is not None:
                self.reach(inside, alias.name)
            elif whole is not None and (whole, "") not in self.seen:
                self.seen.add((whole, ""))
                self.texts.add((whole.name, whole.read_text(encoding="utf-8")))


class _File:
    """The statements at the top of a file, by the names that they bind."""

    def __init__(self, path: Path) -> None:
        source = path.read_text(encoding="utf-8")
        self._lines = source.splitlines()
        self.bound: dict[str, list[ast.stmt]] = {}
        self.loose: list[ast.stmt] = []
        for statement in ast.parse(source).body:
            names = list(_bound_by(statement))
            for name in names:
                self.bound.setdefault(name, []).append(statement)
            if not names and not _is_text(statement) and not _is_for_scripts(statement):
                self.loose.append(statement)

    def text(self, statement: ast.stmt) -> str:
        """The lines of a statement, its decorators included."""
        first = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))])
        return "\n".join(self._lines[first - 1 : statement.end_lineno])


def _bound_by(statement: ast.stmt) -> Iterator[str]:
    """The names that a statement binds where it stands."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name.partition(".")[0] for alias in statement.names)
    elif not _is_for_scripts(statement):
        for node in ast.iter_child_nodes(statement):
            if isinstance(node, ast.stmt):
                yield from _bound_by(node)
            else:
                yield from (n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _is_for_scripts(statement: ast.stmt) -> bool:
    """Whether it is ``if __name__ == "__main__":``."""
    return isinstance(statement, ast.If) and any(
        isinstance(node, ast.Name) and node.id == "__name__" for node in ast.walk(statement.test)
    )


def _beside(path: Path, module: str) -> Path | None:
    """The file in the same folder that a module's name means, if there is one."""
    *packages, last = module.split(".")
    file = path.parent / f"{last}.py"
    same = not packages or tuple(packages) == path.parent.parts[-len(packages) :]
    return file if last and same and file.is_file() and file != path else None
