"""The two names of kernels/.

Python started in the repository root finds the folder where transformers asks for Hugging Face's `kernels`.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils import import_utils

# the least version of `kernels` that the installed transformers wants; 5.20 and 5.23 want different ones
WANTED = getattr(import_utils, "KERNELS_MIN_VERSION", "0.18.2")
ROOT = Path(__file__).parents[1]
# what transformers 5.23 imports from a `kernels` that it finds in its range
NAMES = [
    "CUDAProperties",
    "Device",
    "KernelizeFallback",
    "LayerRepository",
    "LocalLayerRepository",
    "Mode",
    "ROCMProperties",
    "get_kernel",
    "kernelize",
    "register_kernel_mapping",
    "replace_kernel_forward_from_hub",
    "use_kernel_forward_from_hub",
    "use_kernel_mapping",
    "use_kernelized_func",
]
PACKAGE = """
__version__ = "{version}"
class Anything:
    def __init__(self, *values, **settings): pass
    def __class_getitem__(cls, key): return cls
def decorator(*values, **settings): return lambda thing: thing
{names}
"""
MODEL = """
import torch
from transformers import BertConfig, BertModel
sizes = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
print(BertModel(BertConfig(**sizes))(torch.zeros(1, 3, dtype=torch.long)).last_hidden_state.shape)
from transformers.utils.import_utils import is_kernels_available
print("available", is_kernels_available())
"""


def run(code: str, *paths: Path) -> str:
    """What code prints in a Python that was started in the root, with more folders at the end of sys.path."""
    # -c puts the working directory first, as `python -m` does
    code = f"import sys\nsys.path += {[str(path) for path in paths]}\n" + code
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def installed(tmp_path):
    """A folder in which a package `kernels` of the range that transformers wants is installed."""
    package, note = tmp_path / "kernels", tmp_path / f"kernels-{WANTED}.dist-info"
    package.mkdir()
    note.mkdir()
    values = {name: "Anything" if name[0].isupper() else "decorator" for name in NAMES}
    lines = "\n".join(f"{name} = {value}" for name, value in values.items())
    (package / "__init__.py").write_text(PACKAGE.format(version=WANTED, names=lines))
    (package / "layer.py").write_text("here = __name__\n")
    (note / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {WANTED}\n")
    return tmp_path


def test_stands_aside_for_the_installed_package(installed):
    said = run("import kernels, kernels.layer\nprint(kernels.__file__, kernels.layer.here)", installed)
    assert said.split() == [str(installed / "kernels" / "__init__.py"), "kernels.layer"]


def test_a_model_loads_beside_the_installed_package(installed):
    said = run(MODEL, installed)
    assert "torch.Size([1, 3, 8])" in said and "available True" in said


def test_without_the_package_a_quiet_empty_module():
    code = "import kernels\nprint([name for name in vars(kernels) if not name.startswith('__')])\n"
    said = run(code + MODEL)
    assert said.startswith("[]") and "torch.Size([1, 3, 8])" in said and "available False" in said


def test_an_empty_folder_of_that_name_is_no_package(tmp_path):
    (tmp_path / "kernels").mkdir()
    assert run("import kernels\nprint(hasattr(kernels, '__version__'))", tmp_path) == "False\n"


def test_a_broken_package_says_so(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("import a_module_that_nobody_has\n")
    code = "try:\n    import kernels\nexcept ModuleNotFoundError as error:\n    print(error.name)\n"
    assert run(code, tmp_path) == "a_module_that_nobody_has\n"


def test_the_room_is_another_module_beside_it(installed):
    code = "import kernels, pefast.kernels\nprint(pefast.kernels.__file__, kernels.__version__)"
    said = run(code, installed)
    assert said.split() == [str(ROOT / "kernels" / "__init__.py"), WANTED]
