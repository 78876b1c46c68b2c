"""PTX text to kernels of instructions."""

import re
from typing import NamedTuple

from .bits import SIZES, PtxError

_ARRAY = r"(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?\s*$"
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{;]*)\{", re.S)
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)[^,\n]*?\s([\w$]+)(?:\[(\d+)\])?\s*(?:,|$)")
_STATEMENT = re.compile(r"(?:@(!?)(%?[\w$]+)\s+)?([\w.:]+)\s*(.*)$", re.S)
_LABELS = re.compile(r"\s*(?:[\w$]+:\s*)+")


class Address(NamedTuple):
    """[base + offset]; base is a register, a name or a number."""

    base: str
    offset: int


class Instruction(NamedTuple):
    """One instruction; an operand is a string, a tuple of strings, or an Address."""

    opcode: str
    parts: tuple[str, ...]
    operands: tuple
    guard: str  # register of the predicate, or ""
    negated: bool
    text: str

    @property
    def kind(self) -> str:
        """The last part, mostly the type."""
        return self.parts[-1]


class Parameter(NamedTuple):
    """One parameter of a kernel."""

    name: str
    kind: str
    count: int  # of an array, else 0


class Array(NamedTuple):
    """An array in shared memory."""

    align: int
    bytes: int
    at_launch: bool  # its size is given with the launch


class Kernel:
    """One entry of a module."""

    def __init__(self, name: str, parameters: str, body: str, shared: dict[str, Array]):
        self.name = name
        found = _PARAMETER.findall(parameters.replace("\n", " "))
        self.parameters = [Parameter(one, kind, int(count or 0)) for kind, one, count in found]
        self.shared = dict(shared)
        self.registers: dict[str, str] = {}  # name or prefix of a run: type
        self.labels: dict[str, int] = {}
        self.instructions: list[Instruction] = []
        for statement in _statements(body):
            self._take(statement)

    def _take(self, statement: str) -> None:
        while label := re.match(r"([\w$]+):(?!:)\s*", statement):
            self.labels[label[1]] = len(self.instructions)
            statement = statement[label.end() :]
        if statement.startswith(".reg"):
            kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S).groups()
            for name in names.split(","):
                self._declare(name.strip(), kind)
        elif statement.startswith(".shared"):
            name, array = _array(statement.removeprefix(".shared").strip(), False)
            self.shared[name] = array
        elif statement.startswith(".local"):
            raise PtxError(f"{self.name}: keeps an array in local memory, which this machine does not have")
        elif statement and not statement.startswith("."):
            self.instructions.append(_instruction(statement))

    def _declare(self, name: str, kind: str) -> None:
        name = re.sub(r"<\d+>$", "", name)
        before = self.registers.setdefault(name, kind)
        if SIZES[before] != SIZES[kind] or (before == "pred") != (kind == "pred"):
            raise PtxError(f"{self.name}: declares {name} as {before} and as {kind} in two scopes")

    def kind_of(self, name: str) -> str:
        """The type that a register was declared with; "" for what is no register."""
        return self.registers.get(name) or self.registers.get(name.rstrip("0123456789"), "")


def parse(text: str) -> dict[str, Kernel]:
    """The kernels of a module by name."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"^\s*\.(?:loc|file)\b[^\n]*$", "", text, flags=re.M)
    found, outside, end = [], "", 0
    for match in _ENTRY.finditer(text):
        at, depth = match.end(), 1
        while depth:
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        found.append((match[1], match[2], text[match.end() : at - 1]))
        outside, end = outside + text[end : match.start()], at
    outside += text[end:]
    shared = dict(
        _array(line, bool(extern))
        for extern, line in re.findall(r"^\s*(\.extern\s+)?\.shared\s+([^;]*);", outside, re.M)
    )
    return {name: Kernel(name, parameters, body, shared) for name, parameters, body in found}


def _array(text: str, extern: bool) -> tuple[str, Array]:
    match = re.match(_ARRAY, text)
    if not match:
        raise PtxError(f"parse: cannot read the shared array {text!r}")
    align, kind, name, count = match.groups()
    number = 1 if count is None else int(count or 0)
    return name, Array(int(align or 16), number * SIZES[kind], extern)


def _statements(body: str):
    """Statements without their semicolons; braces of scopes are dropped, those of vectors stay."""
    text, depth = "", 0
    for token in re.split(r"([{};])", body):
        opens = token == "{" and (not text.strip() or _LABELS.fullmatch(text))
        if token == ";" or opens:
            yield text.strip()
            text = ""
        elif token != "}" or depth:
            depth += {"{": 1, "}": -1}.get(token, 0)
            text += token
    yield text.strip()


def _instruction(statement: str) -> Instruction:
    statement = " ".join(statement.split())
    match = _STATEMENT.match(statement)
    if not match:
        raise PtxError(f"parse: cannot read {statement!r}")
    negated, guard, opcode, rest = match.groups()
    # "L2::cache_hint" is one part
    parts = tuple(opcode.split("."))
    return Instruction(opcode, parts, tuple(_operands(rest)), guard or "", bool(negated), statement)


def _operands(text: str):
    depth, pieces = 0, [""]
    for letter in text:
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(letter, 0)
        if letter == "," and not depth:
            pieces.append("")
        else:
            pieces[-1] += letter
    for piece in (piece.strip() for piece in pieces):
        if piece.startswith("{"):
            yield tuple(one.strip() for one in piece[1:-1].split(","))
        elif piece.startswith("["):
            yield _address(piece[1:-1].strip())
        elif piece:
            yield piece


def _address(text: str) -> Address:
    match = re.match(r"([%\w$]+)\s*(?:\+\s*(-?(?:0x[0-9a-fA-F]+|\d+)))?$", text)
    if not match:
        raise PtxError(f"parse: cannot read the address [{text}]")
    return Address(match[1], int(match[2] or "0", 0))
