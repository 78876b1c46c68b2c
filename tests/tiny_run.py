"""A seeded two-block BERT, its tokenizer, rows whose words decide, and a recipe: a run that takes seconds."""

import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

GOOD, BAD = "good great warm fine lovely".split(), "bad dull cold poor awful".split()
FILLER = "the a film story cast it was".split()


def write(folder):
    """Fills the folder and returns it."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocab = {word: index for index, word in enumerate(special + GOOD + BAD + FILLER)}
    made = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder / "model")
    torch.manual_seed(0)
    # a wide start: a frozen random net then keeps the words apart
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    sizes |= {"initializer_range": 0.1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    BertModel(BertConfig(vocab_size=len(vocab), max_position_embeddings=32, **sizes)).save_pretrained(
        folder / "model"
    )
    pick = random.Random(0)
    lines = ["text,label"]
    for index in range(320):
        words = pick.choices((BAD, GOOD)[index % 2], k=3) + pick.choices(FILLER, k=index % 4)
        lines.append(f"{' '.join(pick.sample(words, len(words)))},{index % 2}")
    (folder / "rows.csv").write_text("\n".join(lines), encoding="utf-8")
    (folder / "recipe.yaml").write_text(
        f"model: {folder}/model\noutput: {folder}/out\n"
        f"data: {{source: {folder}/rows.csv, test_rows: 24, names: {{0: negative, 1: positive}}}}\n"
        "methods:\n  - {method: lora, rank: 4}\n  - {method: adapter, size: 4}\n  - {method: prompt}\n"
        "training: {epochs: 4, batch: 8, lr: 1e-2, max_length: 16}\n",
        encoding="utf-8",
    )
    return folder
