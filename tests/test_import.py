"""`import pefast` in new processes: cheap, from anywhere, and with whatever is missing."""

import pathlib
import subprocess
import sys

import pytest

import pefast

ROOT = pathlib.Path(__file__).resolve().parent.parent
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name in {names} or name.startswith(tuple(each + "." for each in {names})):
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)
sys.meta_path.insert(0, Block())
"""
LAYER = """
import torch, pefast
layer = pefast.FusedLoRALinear(24, 16, rank=2, dropout=0.1)
y = layer(torch.randn(5, 24))
y.sum().backward()
assert layer.lora_b.grad.any()
print(pefast.explain(layer))
"""


def run(code: str, cwd=ROOT, **environment) -> str:
    """What a new Python prints; fails with its last words."""
    settings = {"PATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    settings.setdefault("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-W", "error::ImportWarning", "-c", code]
    done = subprocess.run(command, cwd=cwd, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("place", ["root", "elsewhere"])
def test_import_brings_nothing_heavy(place, tmp_path):
    heavy = ["torch", "triton", "transformers", "numpy", "safetensors", "peft", "kernels"]
    code = f"import sys, pefast; print([name for name in {heavy} if name in sys.modules], len(dir(pefast)))"
    printed = run(code, ROOT if place == "root" else tmp_path)
    assert printed.startswith("[] ")


def test_the_public_names_are_there():
    listed = dir(pefast)
    for name in pefast.__all__:
        assert name in listed
        assert getattr(pefast, name) is not None
    # a function stays a function: no file of the package has the name of a public one
    files = {path.stem for path in pathlib.Path(pefast.__file__).parent.glob("*")}
    functions = {name for name in pefast.__all__ if callable(getattr(pefast, name))}
    assert not functions & files


def test_a_function_is_the_same_before_and_after_the_imports_of_its_neighbours():
    code = "import pefast; one = pefast.attach; pefast.save, pefast.explain, pefast.backend, pefast.ops"
    assert run(f"{code}; assert pefast.attach is one and callable(pefast.backend); print('same')") == "same\n"


def test_a_name_that_is_not_there_says_which_are():
    with pytest.raises(AttributeError, match=r"pefast has no name 'atach'; .*attach, "):
        pefast.atach  # noqa: B018


def test_without_triton():
    printed = run(BLOCK.format(names=["triton"]) + LAYER)
    assert "triton" in printed and "(blocked)" in printed


def test_without_the_extension():
    printed = run(BLOCK.format(names=["pefast._C"]) + LAYER)
    assert "eager" in printed and "native: " in printed


def test_without_both_and_without_transformers():
    printed = run(BLOCK.format(names=["triton", "pefast._C", "transformers", "peft"]) + LAYER)
    assert ": eager (" in printed


def test_a_whole_process_on_one_back_end():
    printed = run(LAYER, PEFAST_BACKEND="eager")
    assert ": eager" in printed
    code = LAYER.replace("print", "raise SystemExit").replace("layer(torch", "print(layer)or layer(torch")
    command = [sys.executable, "-c", code]
    settings = {"PATH": "", "PEFAST_BACKEND": "abacus", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode and "there is no back end 'abacus'" in done.stderr
