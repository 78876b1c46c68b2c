"""A short run of every other task: its report stands, what it advises runs, and it merges."""

import contextlib
import io
import json
import random

import pytest
import transformers

from pefast import training
from tests.test_more_tasks import CASES, folder
from tests.test_report import Seen, pefast

__all__ = ["folder"]
# what each task's report has beside the scores
SHOWN = {
    "token-classification": {"classes", "wrong"},
    "regression": {"points"},
    "relation-classification": {"counts", "classes", "labels", "wrong"},
    "question-answering": {"lengths", "wrong"},
    "causal-generation": {"tenths", "examples"},
    "sequence-to-sequence": {"tenths", "examples"},
}


@pytest.fixture(scope="module", params=CASES)
def task(request, folder, tmp_path_factory):
    """Name and output of a LoRA run of three steps."""
    model, make, _ = CASES[request.param]
    root, pick = tmp_path_factory.mktemp(request.param), random.Random(0)
    rows = "\n".join(json.dumps(make(pick)) for _ in range(60))
    (root / "rows.jsonl").write_text(rows, encoding="utf-8")
    (root / "recipe.yaml").write_text(
        f"model: {folder}/{model}\ntask: {request.param}\noutput: {root}/out\n"
        f"data: {{source: {root}/rows.jsonl, test_rows: 12}}\nmethods: [{{method: lora, rank: 2}}]\n"
        "training: {max_steps: 3, batch: 4, lr: 1e-2, max_length: 24}\n",
        encoding="utf-8",
    )
    pefast("train", root / "recipe.yaml")
    return request.param, root / "out"


def test_the_report_has_what_fits_the_task(task):
    name, run = task
    found = json.loads((run / "report.json").read_text())["findings"]
    assert found.keys() - {"kind", "rows", "errors"} == SHOWN[name] and found["rows"] == 12
    shown = Seen((run / "report.html").read_text(encoding="utf-8"))
    assert not shown.links and "Worst errors" in " ".join(shown.text)


def test_what_the_report_advises_runs(task):
    _, run = task
    *_, with_run, with_pefast, with_peft = json.loads((run / "report.json").read_text())["load"]
    restored, printed, models = training.restore(run), io.StringIO(), []
    with contextlib.redirect_stdout(printed):
        exec(with_run["code"], {})
        for each in (with_pefast, with_peft):
            space = {}
            exec(each["code"], space)
            models.append(space["model"])
    assert printed.getvalue().startswith("[{")
    right = restored.task.say(training.predict(restored, restored.test), restored.names)
    for model in models:
        said = restored.task.predict(model, restored.tokenizer, restored.test, 24)
        for got, wanted in zip(restored.task.say(said, restored.names), right, strict=True):
            assert got == pytest.approx(wanted)


def test_the_merged_run_answers_alike(task, tmp_path):
    _, run = task
    assert "12 of 12 answers alike" in pefast("merge", run, tmp_path / "merged")
    (name,) = json.loads((tmp_path / "merged" / "config.json").read_text())["architectures"]
    model, loading = getattr(transformers, name).from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not any(loading.values()) and model.config.tie_word_embeddings in (True, False)
