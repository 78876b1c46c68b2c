"""The example that makes a small T5 and rows for recipes/shorthand.yaml, in a few steps."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, T5ForConditionalGeneration

from pefast.tasks import carried

EXAMPLE = Path(__file__).parents[1] / "examples" / "shorthand.py"


def example():
    spec = importlib.util.spec_from_file_location("examples_shorthand", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_and_a_model_whose_words_they_have(tmp_path, monkeypatch, capsys):
    try:
        carried.find("moviedialog")
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["shorthand.py", "--steps", "12"])
    made = example()
    made.main()
    lines = (tmp_path / "out/shorthand/rows.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) > 9000 and len({row["target"] for row in rows}) == len(rows)
    tokenizer = AutoTokenizer.from_pretrained("out/shorthand/model")
    for row in rows[:500]:
        source, target = row["source"].split(), row["target"].split()
        assert len(target) in made.LENGTHS
        # what is left of some of the target's words, in their order
        words = iter(made.short(word) for word in target)
        assert source and all(word in words for word in source)
        ids = tokenizer(row["source"], text_target=row["target"])
        assert tokenizer.unk_token_id not in (*ids["input_ids"], *ids["labels"])
        assert tokenizer.decode(ids["labels"], skip_special_tokens=True) == row["target"]
    model = T5ForConditionalGeneration.from_pretrained("out/shorthand/model")
    assert model.config.vocab_size == len(tokenizer)
    assert "step 12/12  loss" in capsys.readouterr().out
