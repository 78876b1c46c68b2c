"""Every task beside text classification: what it makes of rows, its numbers by hand, that it learns."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import pefast
from pefast import recipe, tasks, training
from pefast.progress import Watcher
from pefast.tasks import (
    causal_generation,
    derived,
    question_answering,
    regression,
    rows,
    sequence_to_sequence,
    token_classification,
)
from tests import tiny_run
from tests.models import stir
from tests.tiny_run import BAD, FILLER, GOOD

ROWS = 240
RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny BERT, a tiny Llama and a tiny T5 that share one vocabulary of words."""
    folder = tiny_run.write(tmp_path_factory.mktemp("tasks"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 3, "bos_token_id": 2}
    narrow = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    made = {
        "llama": LlamaForCausalLM(LlamaConfig(**sizes, **narrow)),
        "t5": T5ForConditionalGeneration(
            T5Config(
                d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=2, **sizes
            )
        ),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
        # what a language model ends with
        tokenizer.eos_token = "[SEP]"
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder / "model")


def words(pick, count=5):
    """A few words of every sort."""
    return pick.choices(GOOD + BAD + FILLER, k=count)


def tagged(pick):
    tokens = words(pick)
    return {
        "tokens": tokens,
        "tags": ["B-GOOD" if word in GOOD else "B-BAD" if word in BAD else "O" for word in tokens],
    }


def scored(pick):
    tokens = words(pick)
    return {"text": " ".join(tokens), "label": sum((word in GOOD) - (word in BAD) for word in tokens)}


def asked(pick):
    tokens = [*pick.choices(FILLER, k=4), pick.choice(GOOD)]
    pick.shuffle(tokens)
    return {
        "question": "good",
        "context": " ".join(tokens),
        "answer": next(word for word in tokens if word in GOOD),
    }


def paired(pick):
    head, tail = pick.choice(GOOD + BAD), pick.choice(FILLER)
    return {"text": f"the {head} film {tail}x {tail}", "head": head, "tail": tail, "label": str(head in GOOD)}


def answered(pick):
    good = pick.random() < 0.5
    return {
        "prompt": " ".join(pick.choices(GOOD if good else BAD, k=3)),
        "answer": "film" if good else "story",
    }


def turned(pick):
    good = pick.random() < 0.5
    return {
        "source": " ".join(pick.choices(GOOD if good else BAD, k=4)),
        "target": "film" if good else "story",
    }


CASES = {
    "token-classification": ("model", tagged, 0.9),
    "regression": ("model", scored, 0.7),
    "question-answering": ("model", asked, 0.8),
    "relation-classification": ("model", paired, 0.8),
    "causal-generation": ("llama", answered, -0.6),
    "sequence-to-sequence": ("t5", turned, 0.8),
}


@pytest.mark.parametrize("name", CASES)
def test_it_learns(folder, name):
    """From rows to a metric above what the untrained head has, and answers that people can read."""
    base, make, least = CASES[name]
    pick = random.Random(0)
    lines = "\n".join(json.dumps(make(pick) | {"n": number}) for number in range(ROWS))
    (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    changes = {"task": name, "model": str(folder / base), "output": str(folder / name), "data.names": None}
    changes |= {"data.source": str(folder / f"{name}.jsonl"), "data.test_rows": 8, "training.max_length": 32}
    changes |= {"methods": [{"method": "full"}], "training.max_steps": 80}
    run = training.prepare(recipe.read(folder / "recipe.yaml", changes))
    training.attach(run)
    metric = run.task.METRIC
    before = training.score(run)[1][metric]
    training.fit(run, Watcher())
    after = training.score(run)[1][metric]
    assert after >= least and after > before
    said = training.say(run, run.test)
    assert len(said) == len(run.test) and json.dumps(said)


def test_every_task_keeps_the_contract():
    for name in tasks.TASKS:
        task = tasks.find(name)
        for part in ("names", "model", "encode", "collator", "hits", "predict", "metrics", "say"):
            assert callable(getattr(task, part)), f"{name} has no {part}"
        assert "label" in task.ROLES and isinstance(task.METRIC, str)


def test_a_tag_stands_at_the_first_token_of_its_word(tokenizer):
    names = {"O": "O", "B-X": "B-X"}
    row = {"tokens": ["good", "film", "good"], "label": ["B-X", "O", "B-X"]}
    (encoded,) = token_classification.encode([row], tokenizer, names, 16)
    assert encoded["labels"] == [-100, 1, 0, 1, -100]
    (cut,) = token_classification.encode([row], tokenizer, names, 4)
    assert cut["labels"] == [-100, 1, 0, -100]
    with pytest.raises(ValueError, match="the tag 'B-Y' is new"):
        token_classification.encode([row | {"label": ["B-Y", "O", "O"]}], tokenizer, names, 16)
    with pytest.raises(ValueError, match="row 1 has 3 words and 2 tags"):
        token_classification.names([row | {"label": ["O", "O"]}])


def test_entities_count_whole():
    names = {tag: tag for tag in ("O", "B-X", "I-X")}
    rows = [{"tokens": list("abc"), "label": ["B-X", "I-X", "O"]}, {"tokens": list("a"), "label": ["B-X"]}]
    # one entity of two is whole, one of two guesses is right
    got = token_classification.metrics([[1, 0, 0], [1]], rows, names)
    assert got == pytest.approx({"f1": 0.5, "precision": 0.5, "recall": 0.5, "accuracy": 0.75})


def test_answers_are_compared_as_squad_does():
    rows = [{"label": "The cat."}, {"label": "red dog"}, {"label": "x"}]
    got = question_answering.metrics(["cat", "dog", "y"], rows, {})
    assert got == pytest.approx({"f1": (1 + 2 / 3) / 3, "exact_match": 1 / 3})
    with pytest.raises(ValueError, match="the answer of row 1, 'z', is not in its context"):
        question_answering.names([{"context": "a b", "label": "z"}])


def test_an_answer_beyond_the_first_window_is_found(tokenizer):
    context = " ".join(["the"] * 40 + ["good"] + ["it"] * 3)
    row = {"question": "film", "context": context, "label": "good"}
    features = question_answering.encode([row], tokenizer, {}, 16)
    good = tokenizer.convert_tokens_to_ids("good")
    assert features and all(len(feature["input_ids"]) <= 16 for feature in features)
    for feature in features:
        assert feature["start_positions"] == feature["end_positions"]
        assert feature["input_ids"][feature["start_positions"]] == good


def test_a_question_that_is_too_long_is_cut(folder, tokenizer):
    model = question_answering.model(folder / "model", {}, torch.float32)
    row = {"question": "the film " * 40, "context": "it was a good story " * 4}
    (said,) = question_answering.predict(model, tokenizer, [row], 16)
    assert said in row["context"]
    for window in question_answering._windows(row, tokenizer, 16):
        assert len(window.inputs["input_ids"]) <= 16 and window.places


def test_texts_of_several_adapters_in_one_batch(folder):
    """Each row is written by its own adapter, or by the base model, as it is alone."""
    for task, base, methods in (
        (causal_generation, "llama", [pefast.LoRA(rank=2), pefast.Prefix(tokens=3)]),
        (sequence_to_sequence, "t5", [pefast.LoRA(rank=2), pefast.LoRA(rank=4)]),
    ):
        pieces = AutoTokenizer.from_pretrained(folder / base)
        model = task.model(folder / base, {}, torch.float32)
        for name, method in zip(("one", "two"), methods, strict=True):
            torch.manual_seed(len(name))
            stir(pefast.attach(model, method, name), size=0.5)
        pick, names = random.Random(0), ["one", "two", None] * 3
        rows = [{"text": " ".join(words(pick, 2 + index)), "label": "good"} for index in range(len(names))]
        together = task.predict(model, pieces, rows, 16, 4, names)
        for row, name, text in zip(rows, names, together, strict=True):
            pefast.activate(model, name)
            (alone,) = task.predict(model, pieces, [row], 16)
            assert str(getattr(text, "text", text)) == str(getattr(alone, "text", alone))
            if task is causal_generation:
                assert text.log_likelihood == pytest.approx(alone.log_likelihood, rel=1e-4)
        assert len({str(getattr(text, "text", text)) for text in together}) > 3


def test_regression_answers_in_the_labels_unit():
    rows = [{"label": "1"}, {"label": 3}, {"label": "5"}]
    names = regression.names(rows)
    assert float(names["mean"]) == 3 and float(names["deviation"]) == 2
    said = torch.tensor([-1.0, 0.0, 2.0])
    assert [one["value"] for one in regression.say(said, names)] == [1, 3, 7]
    assert regression.metrics(said, rows, names)["rmse"] == pytest.approx((4 / 3) ** 0.5)
    with pytest.raises(ValueError, match="the label 'x' is no number"):
        regression.names([{"label": "x"}])
    with pytest.raises(ValueError, match="every row has the label 2"):
        regression.names([{"label": 2}, {"label": "2"}])


def test_a_long_prompt_loses_its_beginning(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
    row = {"text": "the a film story cast it was", "label": "good"}
    (encoded,) = causal_generation.encode([row], tokenizer, {}, 6)
    answer = [tokenizer.convert_tokens_to_ids("good"), tokenizer.eos_token_id]
    assert len(encoded["input_ids"]) == 6 and encoded["input_ids"][-2:] == answer
    assert encoded["labels"] == [-100] * 4 + answer


def test_likelihood_is_that_of_the_model(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
    model = LlamaForCausalLM.from_pretrained(folder / "llama").eval()
    rows = [{"text": "good film", "label": "bad"}, {"text": "the", "label": "it was a film"}]
    said = causal_generation.predict(model, tokenizer, rows, 32)
    for row, one in zip(rows, said, strict=True):
        (pair,) = causal_generation.encode([row], tokenizer, {}, 32)
        batch = {key: torch.tensor([value]) for key, value in pair.items()}
        with torch.no_grad():
            loss = model(**batch).loss
        assert one.log_likelihood == pytest.approx(-loss.item() * one.tokens, rel=1e-4)


def test_derived_rows():
    record = {
        "tokens": "Ann Lee met Bo in Rome".split(),
        "tags": ["B-PER", "I-PER", "O", "B-PER", "O", "B-LOC"],
    }
    assert list(derived.questions(record)) == [
        {"question": derived.QUESTIONS["LOC"], "context": "Ann Lee met Bo in Rome", "answer": "Rome"}
    ]
    (pair,) = derived.typed_pairs(record)
    assert (pair["head"], pair["tail"], pair["label"]) == ("Ann Lee", "Bo", "PER-PER")
    # an I- with nothing before it begins an entity, as in files of the IOB1 kind
    assert [entity.kind for entity in derived.entities(["I-LOC", "I-LOC", "I-PER", "O", "B-PER"])] == [
        "LOC",
        "PER",
        "PER",
    ]


def test_derived_headlines_come_once_each(tmp_path):
    for topic in ("sport", "tech"):
        (tmp_path / topic).mkdir()
        for number in range(9):
            (tmp_path / topic / f"{number}.txt").write_text(f"{topic} head {number}\n{topic} body {number}")
    columns = {"text": "headline", "pair": "body", "label": "label"}
    found = rows.read(tmp_path, columns, derive="headlines")
    assert len(found) == len({row["text"] for row in found}) == len({row["pair"] for row in found}) == 16
    for row in found:
        alike = row["text"].replace("head", "body") == row["pair"]
        assert row["label"] == ("own" if alike else "another's")
        assert row["text"].split()[0] == row["pair"].split()[0]
    assert sum(row["label"] == "own" for row in found) == 8
    (tmp_path / "x.csv").write_text("text,label\na,1")
    with pytest.raises(ValueError, match=r"x\.csv has no 'tags'; a CoNLL file would be right"):
        rows.read(tmp_path / "x.csv", derive="questions")


BASELINES = {
    "text-classification": (
        [{"label": "a"}, {"label": "b"}, {"label": "b"}],
        "always 'B'",
        {"accuracy": 2 / 3},
    ),
    "regression": ([{"label": 1}, {"label": "3"}], "always 2.000", {"rmse": 1.0, "pearson": 0.0}),
    "token-classification": (
        [
            {"tokens": ["x", "y", "x"], "label": ["B-A", "O", "B-A"]},
            {"tokens": ["x", "y", "z"], "label": ["O", "O", "O"]},
        ],
        "each word's commonest tag",
        # x is said to be B-A once too often
        {"precision": 2 / 3, "recall": 1.0, "accuracy": 5 / 6},
    ),
    "question-answering": ([{"context": "b c", "label": "c"}], "the whole context", {"f1": 2 / 3}),
    "sequence-to-sequence": ([{"text": "one two", "label": "one two"}], "the source as it is", {"chrf": 1.0}),
}


@pytest.mark.parametrize("name", BASELINES)
def test_what_can_be_said_without_a_model(name):
    made, words, numbers = BASELINES[name]
    task = tasks.find(name)
    shown = {"a": "A", "b": "B"} if name == "text-classification" else task.names(made)
    said, answers = task.baseline(made, made, shown)
    got = task.metrics(answers, made, shown)
    assert said == words and {key: got[key] for key in numbers} == pytest.approx(numbers)
    assert tasks.find("causal-generation").baseline(made, made, shown) is None


def test_a_column_may_be_a_text_around_columns(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": "one", "b": 2}', encoding="utf-8")
    assert rows.read(path, {"text": "Say {a}, then {b}.", "label": "b"}) == [
        {"text": "Say one, then 2.", "label": 2}
    ]
    with pytest.raises(ValueError, match="row 1 has no 'c'"):
        rows.read(path, {"text": "Say {c}"})
    with pytest.raises(ValueError, match="is no text around columns"):
        rows.read(path, {"text": "Say {a"})


def test_every_recipe_is_read_whole_and_short():
    found = sorted(RECIPES.glob("*.yaml"))
    assert len(found) >= 7
    for path in found:
        long, short = recipe.read(path), recipe.read(path, quick=True)
        assert recipe.methods(long) and short != long, path.name
        tasks.find(long.task)
