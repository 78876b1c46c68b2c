"""The house rules that a program can see. `python tests/house.py [ROOT]` prints a line a place, best none.

Sizes (a function 60 lines, a kernel 120, a file 400, a public function 12 parameters), docstrings, file names
that say nothing, `except Exception`, tests that assert nothing, to-dos, paths of one machine, operations that
lack a room, and imports against the direction of the rooms.
"""

import ast
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

PYTHON_ROOMS = ("pefast", "kernels", "tests", "benchmarks", "examples")
FORBIDDEN = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}
# each room may import those below its own line, and of its own line only itself
FLOORS = (
    ("cli",),
    ("commands",),
    ("search",),
    ("selection", "pictures", "predicting", "reporting"),
    ("card",),
    ("training", "doctor", "roofline", "tuner"),
    ("claim", "sources"),
    ("recipe", "trainer"),
    ("progress", "gauges", "sharded_trainer"),
    ("tasks",),
    ("folders", "exporting"),
    ("checkpoint", "report", "acceleration", "optimizer", "averaging"),
    ("model", "adapter_files"),
    ("methods",),
    ("architectures", "layers"),
    ("formats", "sharded"),
    ("ops",),
    ("dispatch",),
    ("eager", "kernels", "native"),
    ("testing",),
)
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
# these two are written so that they do not find themselves
MACHINE = re.compile(r"(?<![\w.~-])/(?:work|root|home|Users)/[\w.]")
UNDONE = re.compile(r"\b(?:TO[D]O|FIX[M]E|XX[X])\b")
# names that torch or Python give: their meaning is written there
INHERITED = {"forward", "backward", "extra_repr"}

Functions = ast.FunctionDef | ast.AsyncFunctionDef


def look(root: pathlib.Path) -> list[str]:
    """Every place in the repository that breaks a rule: "path:line: what"."""
    found = []
    for path in tracked(root):
        name = path.relative_to(root)
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{name}:{at}: a path of one machine" for at in lines_with(MACHINE, text)]
        if path.suffix in (".py", ".cpp", ".h") and text.count("\n") > 400:
            found.append(f"{name}: {text.count(chr(10))} lines, 400 are the most")
        if path.suffix == ".py" and name.parts[0] in PYTHON_ROOMS:
            found += [f"{name}{rest}" for rest in look_at_python(name, text)]
    return found + list(operations_without_a_room(root))


def tracked(root: pathlib.Path) -> list[pathlib.Path]:
    """The files that git tracks or would track; every file where there is no git."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode:
        return sorted(path for path in root.rglob("*") if path.is_file())
    paths = {root / name for name in listed.stdout.split("\0") if name}
    return sorted(path for path in paths if path.is_file())


def lines_with(pattern: re.Pattern, text: str) -> list[int]:
    """Numbers of the lines in which the pattern occurs."""
    return [number for number, line in enumerate(text.splitlines(), 1) if pattern.search(line)]


def look_at_python(name: pathlib.Path, text: str) -> Iterator[str]:
    """What a Python file breaks, as ":line: what"."""
    if name.stem in FORBIDDEN:
        yield ": a name that says nothing"
    tree = ast.parse(text)
    if tree.body and not ast.get_docstring(tree):
        yield ": no docstring at its head"
    yield from (f":{at}: a to-do without the event that ends it" for at in lines_with(UNDONE, text))
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and catches_everything(node):
            yield f":{node.lineno}: catches everything"
        if isinstance(node, Functions):
            yield from look_at_function(name, node)
    if name.parts[0] in ("pefast", "kernels"):
        yield from (f":{node.lineno}: {node.name} has no docstring" for node in undescribed(tree))
        yield from imports_against_the_direction(name, tree)


def catches_everything(node: ast.ExceptHandler) -> bool:
    """Whether an except clause names no exception, or the widest."""
    return node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")


def look_at_function(name: pathlib.Path, node: Functions) -> Iterator[str]:
    """Length, parameters, and for a test whether it asserts."""
    kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    length, most = node.end_lineno - node.lineno + 1, 120 if kernel else 60
    if length > most:
        yield f":{node.lineno}: {node.name} has {length} lines, {most} are the most"
    count = len(node.args.args) + len(node.args.kwonlyargs) + len(node.args.posonlyargs)
    if name.parts[0] == "pefast" and not node.name.startswith("_") and count > 12:
        yield f":{node.lineno}: {node.name} takes {count} parameters, 12 are the most"
    checks = re.compile(r"assert|raises|check|benchmark\(|warns")
    if name.parts[0] == "tests" and node.name.startswith("test_") and not checks.search(ast.unparse(node)):
        yield f":{node.lineno}: {node.name} asserts nothing"


def undescribed(tree: ast.Module) -> Iterator[ast.AST]:
    """Public functions, classes and methods without a docstring."""
    for node in tree.body:
        if not isinstance(node, (*Functions.__args__, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            yield node
        for method in node.body if isinstance(node, ast.ClassDef) else ():
            public = isinstance(method, Functions) and not method.name.startswith("_")
            if public and method.name not in INHERITED and not ast.get_docstring(method):
                yield method


def imports_against_the_direction(name: pathlib.Path, tree: ast.Module) -> Iterator[str]:
    """Imports of a room that is not below the file's own."""
    own = name.stem if name.parts[0] == "pefast" and len(name.parts) == 2 else name.parts[-2]
    if name == pathlib.Path("pefast/__init__.py"):
        return
    if own not in LEVEL:
        yield f": the room {own} has no floor in tests/house.py"
        return
    for node in ast.walk(tree):
        for room in imported_rooms(node):
            if room != own and LEVEL.get(room, -1) <= LEVEL[own]:
                yield f":{node.lineno}: {own} imports {room}, which is not below it"


def imported_rooms(node: ast.AST) -> Iterator[str]:
    """Rooms of pefast that an import statement names."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module == "pefast":
        names = [f"pefast.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        names = [node.module or ""]
    else:
        return
    parts = [name.split(".") for name in names]
    # what has no floor is a public name of the package itself
    yield from (part[1] for part in parts if part[0] == "pefast" and len(part) > 1 and part[1] in LEVEL)


def operations_without_a_room(root: pathlib.Path) -> Iterator[str]:
    """One operation has one file name in every room."""
    for op in sorted((root / "pefast" / "ops").glob("[!_]*.py")):
        for other in (f"pefast/eager/{op.name}", f"tests/ops/test_{op.name}", f"benchmarks/bench_{op.name}"):
            if not (root / other).exists():
                yield f"{op.relative_to(root)}: has no {other}"
    for room in ("kernels", "pefast/native"):
        for hand in sorted((root / room).glob("[!_]*.py")):
            if "def refuse(" in hand.read_text() and not (root / "pefast" / "ops" / hand.name).exists():
                yield f"{hand.relative_to(root)}: a hand of no operation in pefast/ops"


if __name__ == "__main__":
    places = look(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve())
    print("\n".join(places[:60]) + f"\n(+{len(places) - 60} more)" * (len(places) > 60))
    sys.exit(bool(places))
