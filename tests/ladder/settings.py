"""Compiles every setting that tuning may choose, and derives the shipped ones: kernels/tuned.json.

    python tests/ladder/settings.py --compile    what the compiler makes of each that is new: settings.json
    python tests/ladder/settings.py --write      kernels/tuned.json, from settings.json

Each setting is compiled for its kernel at the most slots it is for, forward and backward, with a mask where
there may be one. Of those without spills and within a target's memory kernels/tile_costs.py takes the least.
"""

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

from pefast.kernels import tile_costs, tuning
from pefast.kernels.forms import RATES

FOLDER = Path(__file__).parent
TABLE = FOLDER / "settings.json"
# what a GPU by name is compiled for
TARGET_OF = {"A100": "sm80", "H100": "sm90", "H200": "sm90"}
ROWS = (16, 256, 4096)
WIDTH = 4096
# the road and the form of a call that launches the kernel with most in its registers
CASES = {"waist": ("split", "dropped"), "product": ("split", "dropped"), "whole": ("whole", "lora"),
         "back": ("whole", "lora"), "narrow": ("split", "lora"), "down": ("split", "dropped")}  # fmt: skip


def name_of(target: str, kind: tuning.Kind, setting: dict) -> str:
    """The key of a setting in settings.json."""
    dropout = " dropped" if kind.dropout else ""
    sizes = " ".join(f"{key}={value}" for key, value in setting.items())
    return f"{target} {kind.kernel} {kind.bits} bits R={kind.slots}{dropout}: {sizes}"


def every():
    """(kind, setting) of all that tuning may choose."""
    return [(kind, setting) for kind, settings in tuning.CANDIDATES.items() for setting in settings]


class Silent:
    """Stands for the kernels that are not asked for."""

    def __getitem__(self, grid):
        return lambda *args, **settings: None


def compiled(target: str, kind: tuning.Kind, setting: dict) -> list:
    """What the compiler makes of a kernel with a setting, in the order of its launches."""
    import compile_gate as gate
    import torch
    from pefast.kernels import delta_linear_gradients, delta_linear_products

    hand = gate.OPS["delta_linear"].hands["triton"]
    road, form = CASES[kind.kernel]
    if kind.kernel == "waist" and kind.bits == 32 and not kind.dropout:
        form = "lora"
    if kind.kernel == "back" and kind.dropout:
        form = "dropped"
    dtype, rank, n, k = (torch.bfloat16 if kind.bits == 16 else torch.float32), kind.slots, 11008, 4096
    wide = {"x": (4096, k), "w": (n, k), "bias": (n,), "gain": (n,), "dy": (4096, n)}
    t = {name: gate._meta(*shape, dtype=dtype) for name, shape in wide.items()}
    t |= {"a": gate._meta(rank, k), "b": gate._meta(n, rank)}
    homes = (delta_linear_products, delta_linear_gradients)
    names = ("waist", "product", "whole", "back", "narrow", "finish", "down")
    kernels = [
        (home, name) for home in homes for name in names if hasattr(home, name) and name != kind.kernel
    ]
    before = [getattr(home, name) for home, name in kernels]
    for home, name in kernels:
        setattr(home, name, Silent())
    try:
        with contextlib.ExitStack() as stack:
            # the silent ones ask for settings too, of which there may be none yet
            for name in ("waist", "product", "whole", "back", "narrow", "down"):
                forced = next(
                    settings[0]
                    for other, settings in tuning.CANDIDATES.items()
                    if other[:2] == (name, kind.bits)
                )
                stack.enter_context(tuning.trying(name, setting if name == kind.kernel else forced))
            stack.enter_context(gate.taking(hand, road))
            found = stack.enter_context(gate.compiling_for(target))
            gate._both_ways(hand, t, gate.FORMS[form])
        return [gate.read(kernel) for kernel in found]
    finally:
        for (home, name), kernel in zip(kernels, before, strict=True):
            setattr(home, name, kernel)


def compile_all(targets: list[str], table: dict) -> dict:
    """The table, with what it lacks compiled and written after each setting, without what has gone."""
    import compile_gate as gate

    targets = sorted({*targets, *targets_of(table)})
    wanted = {name_of(target, kind, setting) for kind, setting in every() for target in targets}
    table = {"triton": gate_version(), "columns": list(gate.Made._fields)} | {
        name: made for name, made in table.items() if name in wanted
    }
    for kind, setting in every():
        for target in targets:
            name = name_of(target, kind, setting)
            if name in table:
                continue
            table[name] = [list(made) for made in compiled(target, kind, setting)]
            print(name, table[name], flush=True)
            put(table)
    put(table)
    return table


def put(table: dict) -> None:
    """Writes settings.json, one setting a line."""
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in table.items()]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def targets_of(table: dict) -> list[str]:
    """Those that the table is of."""
    return sorted({name.split()[0] for name in table if ": " in name})


def gate_version() -> str:
    """Of the compiler, which the table depends on."""
    import triton

    return triton.__version__


def passes(table: dict, target: str, kind: tuning.Kind, setting: dict) -> bool:
    """Whether a target takes a setting, by the table and the gate's own rules."""
    import compile_gate as gate

    made = [gate.Made(*row) for row in table[name_of(target, kind, setting)]]
    return bool(made) and not any(one.faults(target, kind.bits == 16) for one in made)


def derive(table: dict) -> dict:
    """The content of kernels/tuned.json."""
    rejected = {
        target: [[*kind, setting] for kind, setting in every() if not passes(table, target, kind, setting)]
        for target in targets_of(table)
    }
    everywhere = {
        kind: [s for s in settings if not any([*kind, s] in lines for lines in rejected.values())]
        for kind, settings in tuning.CANDIDATES.items()
    }
    # a GPU without a name of its own is taken for the one with the least memory on the chip
    found = {"any": rows_for("A100", table, everywhere)}
    for device, target in TARGET_OF.items():
        own = {
            kind: [s for s in settings if [*kind, s] not in rejected[target]]
            for kind, settings in tuning.CANDIDATES.items()
        }
        found[device] = [row for row in rows_for(device, table, own) if row not in found["any"]]
    return {"format": tuning.FORMAT, "devices": found, "rejected": rejected}


def rows_for(device: str, table: dict, allowed: dict) -> list[dict]:
    """For each kind and number of rows the setting with the least time; of equals the first."""
    chip, rates, target = tile_costs.CHIPS[device], RATES[device], TARGET_OF[device]
    rows = []
    for kind, settings in allowed.items():
        for m in ROWS:
            timed = []
            for setting in settings:
                registers, shared = (
                    max(row[at] for row in table[name_of(target, kind, setting)]) for at in (1, 2)
                )
                at_once = tile_costs.blocks(chip, registers, shared, setting["num_warps"])
                done = tile_costs.work(kind, setting, m, WIDTH, WIDTH)
                timed.append(tile_costs.seconds(chip, rates, at_once, done))
            best = settings[timed.index(min(timed))]
            rows.append(tuning.row_of(tuning.Asked(kind, m, WIDTH, WIDTH), best))
    return rows


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", action="store_true", help="what settings.json lacks, some minutes")
    parser.add_argument("--targets", default="", help="others than those of settings.json")
    parser.add_argument("--write", action="store_true", help="kernels/tuned.json")
    options = parser.parse_args()
    table = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    if options.compile:
        table = compile_all(options.targets.split(",") if options.targets else [], table)
    if options.write:
        tuning.SHIPPED.write_text(tuning.as_text(derive(table)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
