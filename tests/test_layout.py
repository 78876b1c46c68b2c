"""The house rules are kept, and each of them finds a planted fault."""

import pathlib
import re
import subprocess
import sys

import pytest

from pefast.ops import OPS
from tests import house

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_the_house_rules_are_kept():
    found = house.look(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_every_operation_is_in_the_table_and_has_a_reference():
    names = {path.stem for path in (ROOT / "pefast" / "ops").glob("[!_]*.py")}
    assert set(OPS) == names
    for name, operation in OPS.items():
        module = sys.modules[f"pefast.ops.{name}"]
        assert callable(module.reference) and module.OP is operation
        assert operation.hands["eager"].__name__ == f"pefast.eager.{name}"
        assert operation.backends[-1] == "eager", "the hand that takes everything stands last"
        # the header: a formula with shapes in the margin
        assert re.search(r"^    \S+ += .* \[[A-Z]", module.__doc__, re.MULTILINE), name


def test_the_native_code_knows_nothing_of_torch():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h")]
    assert sources
    for path in sources:
        included = re.findall(r"#\s*include\s*[<\"]([^>\"]+)", path.read_text(encoding="utf-8"))
        assert not [name for name in included if re.match(r"torch|ATen|c10", name)], path
        if not path.name.startswith("bindings"):
            assert not [name for name in included if re.match(r"pybind11|Python", name)], path


GOOD = {"pefast/ops/op.py": '"""y = x [M]."""\n', "pefast/eager/op.py": '"""A hand."""\n'}
GOOD |= {"tests/ops/test_op.py": '"""Tests."""\n', "benchmarks/bench_op.py": '"""Times."""\n'}
HEAD = '"""A head."""\n\n\n'
LONG = "".join(f"    x = {i}\n" for i in range(61))

# planted: the files that break a rule, and what house says of it
FAULTS = {
    "long file": ({"csrc/a.cpp": "//\n" * 401}, "csrc/a.cpp: 401 lines"),
    "long function": ({"pefast/model.py": HEAD + f'def f():\n    """F."""\n{LONG}'}, "f has 63 lines"),
    "long kernel": ({"kernels/op.py": HEAD + f"@triton.jit\ndef _k():\n{LONG * 2}"}, "_k has 123 lines"),
    "many parameters": (
        {"pefast/model.py": HEAD + f'def f({", ".join("abcdefghijklm")}):\n    """F."""\n'},
        "f takes 13 parameters",
    ),
    "empty name": ({"pefast/methods/utils.py": HEAD}, "a name that says nothing"),
    "no head": ({"tests/test_a.py": "x = 1\n"}, "tests/test_a.py: no docstring at its head"),
    "no docstring": ({"pefast/model.py": HEAD + "def f():\n    pass\n"}, "model.py:4: f has no docstring"),
    "no docstring in a class": (
        {"pefast/model.py": HEAD + 'class A:\n    """A."""\n\n    def f(self):\n        pass\n'},
        "model.py:7: f has no docstring",
    ),
    "except Exception": (
        {"pefast/model.py": HEAD + "try:\n    pass\nexcept Exception:\n    pass\n"},
        "model.py:6: catches everything",
    ),
    "bare except": ({"pefast/model.py": HEAD + "try:\n    pass\nexcept:\n    pass\n"}, "catches everything"),
    "a test without an assertion": (
        {"tests/test_a.py": HEAD + "def test_a():\n    print(1)\n"},
        "test_a asserts nothing",
    ),
    "to-do": ({"examples/a.py": HEAD + "# TO" + "DO later\n"}, "examples/a.py:4: a to-do"),
    "a machine's path": ({"README.md": "see /ro" + "ot/models/x\n"}, "README.md:1: a path of one machine"),
    "no eager hand": ({"pefast/ops/new.py": HEAD}, "pefast/ops/new.py: has no pefast/eager/new.py"),
    "no test": ({"pefast/ops/new.py": HEAD}, "has no tests/ops/test_new.py"),
    "no benchmark": ({"pefast/ops/new.py": HEAD}, "has no benchmarks/bench_new.py"),
    "a hand of nothing": (
        {"kernels/other.py": HEAD + 'def refuse(call):\n    """No."""\n'},
        "kernels/other.py: a hand of no operation",
    ),
    "ops imports layers": (
        {"pefast/ops/op.py": HEAD + "from pefast.layers.hosts import DeltaHost\n"},
        "pefast/ops/op.py:4: ops imports layers",
    ),
    "layers import methods, inside a function": (
        {"pefast/layers/a.py": HEAD + "def _f():\n    from pefast import methods\n"},
        "layers imports methods",
    ),
    "eager imports native": ({"pefast/eager/op.py": HEAD + "import pefast.native\n"}, "eager imports native"),
    "a kernel imports ops": (
        {"kernels/op.py": HEAD + "from pefast.ops.op import reference\n"},
        "kernels imports ops",
    ),
    "model imports the checkpoint": (
        {"pefast/model.py": HEAD + "from pefast.checkpoint import save\n"},
        "model imports checkpoint",
    ),
    "a room without a floor": ({"pefast/attic/a.py": HEAD}, "the room attic has no floor"),
}


def plant(root: pathlib.Path, files: dict[str, str]) -> list[str]:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return house.look(root)


def test_a_small_house_in_order_is_silent(tmp_path):
    assert plant(tmp_path, GOOD) == []


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_planted_fault_is_found(fault, tmp_path):
    files, said = FAULTS[fault]
    found = plant(tmp_path, {**GOOD, **files})
    assert any(said in line for line in found), found


def test_the_program_prints_what_it_finds(tmp_path):
    plant(tmp_path, {**GOOD, "tests/helpers.py": HEAD})
    command = [sys.executable, ROOT / "tests" / "house.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == "tests/helpers.py: a name that says nothing\n"
