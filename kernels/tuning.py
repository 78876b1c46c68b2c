"""Settings of delta_linear's kernels by GPU and sizes: the one list of those allowed, and the nearest match.

    setting     tile sizes, warps and stages that a kernel is launched with
    allowed     CANDIDATES: whatever is chosen, by a model or by measuring, is one of them. A new one goes
                there; tests/ladder/settings.py compiles each at the most slots it is for, and keeps what a
                target rejects
    default     tuned.json, shipped: of those that pass, the least time by tile_costs.py. A row is for a
                GPU whose name contains its key; "any" has passed on every target
    your own    what `pefast tune` measured, laid over it: PEFAST_TUNING, or ~/.cache/pefast/tuning.json
    nearest     least Σ |log2(size / the row's size)| over M, N and K, each a power of two; of equally near
                rows your own come first, then those for the GPU by name, then "any"

A row is never for another kernel, width of numbers or kind of dropout, nor for fewer slots than are there.
"""

import contextlib
import functools
import json
import math
import os
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

SHIPPED = Path(__file__).parent / "tuned.json"
FORMAT = "pefast settings 1"
KEYS = ("kernel", "bits", "slots", "dropout", "m", "n", "k")


class Kind(NamedTuple):
    """What a setting is for, whatever the sizes."""

    kernel: str
    bits: int  # of a number: 16 or 32
    slots: int  # the most beside each other
    dropout: bool = False  # only where a mask asks for tiles of its own


def _sizes(warps: int, stages: int, **blocks: int) -> dict:
    return {**blocks, "num_warps": warps, "num_stages": stages}


def _waist(rows: int, warps: int, stages: int, inner: int = 128) -> dict:
    return _sizes(warps, stages, BLOCK_M=rows, BLOCK_K=inner)


def _product(rows: int, inner: int, warps: int, stages: int) -> dict:
    return _sizes(warps, stages, BLOCK_M=rows, BLOCK_N=128, BLOCK_K=inner, GROUP_M=8)


def _back(rows: int, stages: int, beside: int, inner: int = 32, warps: int = 8) -> dict:
    return _sizes(warps, stages, BLOCK_M=rows, BLOCK_K=128, BLOCK_N=inner, BLOCK_U=beside, GROUP_M=8)


def _narrow(rows: int, columns: int) -> dict:
    return _sizes(8, 2, BLOCK_M=rows, BLOCK_N=columns)


def _down(rows: int, warps: int, stages: int = 2) -> dict:
    return _sizes(warps, stages, BLOCK_M=rows, BLOCK_K=128)


# fp32 products run without tensor cores and hold a tile's whole inner dimension in registers: lower tiles
CANDIDATES: dict[Kind, list[dict]] = {
    Kind("waist", 16, 64): [_waist(32, 4, 3), _waist(16, 4, 3)],
    Kind("waist", 16, 128): [_waist(32, 8, 2), _waist(16, 8, 2)],
    Kind("waist", 32, 64): [_waist(32, 8, 2, 16), _waist(16, 8, 2, 16)],
    Kind("waist", 32, 64, True): [_waist(32, 8, 1), _waist(16, 8, 2)],
    Kind("product", 16, 32): [_product(128, 64, 8, 3), _product(64, 64, 4, 3), _product(16, 64, 4, 3)],
    Kind("product", 16, 128): [_product(64, 64, 8, 3), _product(64, 32, 8, 3), _product(16, 64, 8, 3)],
    Kind("product", 32, 64): [_product(64, 32, 8, 2), _product(16, 32, 8, 2)],
    Kind("whole", 16, 16): [_product(128, 32, 8, 3), _product(64, 64, 4, 3), _product(16, 64, 4, 3)],
    Kind("whole", 16, 64): [_product(128, 32, 8, 3), _product(64, 32, 8, 3), _product(16, 64, 8, 3)],
    Kind("whole", 32, 16): [_product(64, 16, 8, 2), _product(32, 16, 8, 2), _product(16, 16, 8, 2)],
    Kind("back", 16, 16): [_back(128, 3, 64), _back(64, 3, 64), _back(32, 3, 64)],
    Kind("back", 16, 32): [_back(32, 3, 64), _back(16, 3, 64)],
    Kind("back", 16, 64): [_back(64, 3, 64), _back(32, 3, 64)],
    Kind("back", 32, 16): [_back(32, 2, 32, 16), _back(16, 2, 32, 16)],
    Kind("back", 32, 16, True): [_back(16, 2, 32, 16, 4)],
    Kind("narrow", 16, 16): [_narrow(64, 256), _narrow(64, 128)],
    Kind("narrow", 16, 64): [_narrow(64, 128), _narrow(16, 128)],
    Kind("narrow", 16, 128): [_narrow(32, 128), _narrow(32, 64), _narrow(16, 128)],
    Kind("narrow", 32, 32): [_narrow(16, 128)],
    Kind("narrow", 32, 64): [_narrow(16, 64)],
    Kind("down", 16, 32): [_down(64, 4), _down(32, 4)],
    Kind("down", 16, 128): [_down(64, 8), _down(32, 8)],
    # 16 warps: with fewer and a mask triton 3.7 takes tf32 on sm_100, whatever precision is asked for
    Kind("down", 32, 64): [_down(16, 16, 1)],
}


def serves(kernel: str, bits: int, slots: int) -> bool:
    """Whether there is a setting for these slots; a form whose kernel has none is not taken."""
    return any(kind[:2] == (kernel, bits) and kind.slots >= slots for kind in CANDIDATES)


def kind_of(kernel: str, bits: int, slots: int, dropout: bool = False) -> Kind:
    """The narrowest kind of CANDIDATES that serves these slots. Raises ValueError where there is none."""
    kinds = [kind for kind in CANDIDATES if kind[:2] == (kernel, bits) and kind.slots >= slots]
    kinds = [kind for kind in kinds if kind.dropout == dropout] or [k for k in kinds if not k.dropout]
    if not kinds:
        raise ValueError(f"tuning: no setting of {kernel!r} for {bits} bits and {slots} slots")
    return min(kinds, key=lambda kind: kind.slots)


def candidates(kind: Kind, target: str) -> list[dict]:
    """The settings of a kind that passed the compile gate for a target such as "sm90"; for a target that the
    gate does not know, those that passed everywhere."""
    rejected = _read(SHIPPED)["rejected"]
    named = rejected.get(target)
    found = []
    for setting in CANDIDATES[kind]:
        where = [name for name, lines in rejected.items() if [*kind, setting] in lines]
        if not where or (named is not None and target not in where):
            found.append(setting)
    return found


def bucket(size: int) -> int:
    """The power of two from `size` on, no less than 16."""
    return 1 << max(4, math.ceil(math.log2(max(1, size))))


_forced: dict[str, dict] = {}
_asked: list[list] = []


class Asked(NamedTuple):
    """What a launch asked for."""

    kind: Kind
    m: int
    n: int
    k: int


@contextlib.contextmanager
def noting():
    """Yields a list, to which each launch inside adds what it asks for."""
    _asked.append([])
    try:
        yield _asked[-1]
    finally:
        _asked.pop()


@contextlib.contextmanager
def trying(kernel: str, setting: dict):
    """Inside, this kernel is launched with this setting."""
    _forced[kernel] = setting
    try:
        yield
    finally:
        del _forced[kernel]


def settings(
    kernel: str, device: str, m: int, n: int, k: int, bits: int, slots: int, dropout: bool = False
) -> dict:
    """What to launch a kernel with, by the rule at the head of this file; `device` by CUDA's name, or ""."""
    for notes in _asked:
        notes.append(Asked(kind_of(kernel, bits, slots, dropout), bucket(m), bucket(n), bucket(k)))
    if kernel in _forced:
        return dict(_forced[kernel])
    return dict(_nearest(kernel, device, bucket(m), bucket(n), bucket(k), bits, slots, dropout))


@functools.lru_cache(maxsize=4096)
def _nearest(kernel, device, m, n, k, bits, slots, dropout) -> dict:
    kind = kind_of(kernel, bits, slots, dropout)
    best, least = None, (math.inf, math.inf)
    for closeness, rows in enumerate(_layers(device)):
        for row in rows:
            if tuple(row[key] for key in KEYS[:4]) != kind:
                continue
            far = sum(abs(math.log2(row[key] / size)) for key, size in (("m", m), ("n", n), ("k", k)))
            if (far, closeness) < least:
                best, least = row, (far, closeness)
    return {key: value for key, value in best.items() if key not in KEYS}


def _layers(device: str) -> list[list[dict]]:
    """Rows for a GPU: your own, those for its name, those for any."""
    shipped, own = _read(SHIPPED)["devices"], _own()
    named = [row for name, rows in shipped.items() if name != "any" and name in device for row in rows]
    return [own.get(device, []), named, shipped["any"]]


def path() -> Path:
    """Your own file, which need not be there."""
    return Path(os.environ.get("PEFAST_TUNING") or Path.home() / ".cache" / "pefast" / "tuning.json")


@functools.lru_cache(maxsize=1)
def _own() -> dict[str, list[dict]]:
    try:
        return load(path())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"{error}; it is not used", stacklevel=2)
        return {}


@functools.lru_cache(maxsize=4)
def _read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def load(file: Path) -> dict[str, list[dict]]:
    """Rows by GPU of a file that save() wrote. Raises ValueError, in one sentence, for any other file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"tuning: {file} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"tuning: {file} is not a file of `pefast tune`, which says {FORMAT!r}")
    devices = content.get("devices")
    rows_by_device = devices.items() if isinstance(devices, dict) else [("", None)]
    for device, rows in rows_by_device:
        if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
            raise ValueError(f"tuning: {file} has a setting for {device!r} that this version does not allow")
    return devices


def _is_row(row) -> bool:
    if not isinstance(row, dict) or not all(key in row for key in KEYS):
        return False
    if not all(isinstance(row[key], int) and row[key] > 0 for key in ("m", "n", "k")):
        return False
    setting = {key: value for key, value in row.items() if key not in KEYS}
    return setting in CANDIDATES.get(Kind(*(row[key] for key in KEYS[:4])), [])


def row_of(asked: Asked, setting: dict) -> dict:
    """A line of a file: for what, at which sizes, the setting."""
    return dict(zip(KEYS, (*asked.kind, *asked[1:]), strict=True)) | setting


def save(device: str, rows: list[dict], file: Path | None = None) -> Path:
    """Lays rows for a GPU over those of your own file, all or nothing, and returns its path."""
    file = file or path()
    devices = load(file) if file.exists() else {}
    new = {tuple(row[key] for key in KEYS): row for row in [*devices.get(device, []), *rows]}
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as temporary:
        temporary.write(as_text({"format": FORMAT, "devices": devices | {device: list(new.values())}}))
    os.replace(temporary.name, file)
    forget()
    return file


def as_text(content: dict) -> str:
    """JSON with one setting a line."""
    parts = []
    for name, value in content.items():
        if isinstance(value, dict):
            groups = [
                f"    {json.dumps(key)}: [\n"
                + ",\n".join(f"      {json.dumps(line)}" for line in lines)
                + "\n    ]"
                if lines
                else f"    {json.dumps(key)}: []"
                for key, lines in value.items()
            ]
            parts.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(groups) + "\n  }")
        else:
            parts.append(f"  {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def forget() -> None:
    """Reads the files again at the next launch."""
    for cached in (_nearest, _own, _read):
        cached.cache_clear()
