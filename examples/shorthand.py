"""A small T5 that reads film dialogue without its vowels, and rows for recipes/shorthand.yaml.

python examples/shorthand.py           two minutes of one core; --steps 300 for a quick look
pefast train recipes/shorthand.yaml    then teaches it to put in small words that were left out

The text is real, the task is derived from it: "y hv n d" is what is left of "you have an idea". No package is
known to the project that carries a T5 with weights, so this one begins with random numbers.
"""

import argparse
import json
import random
import re
import time
from collections import Counter
from pathlib import Path

import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from pefast.tasks import carried, readers

OUTPUT = Path("out/shorthand")
# clauses of so many words, all of them among the commonest; the commonest of all are the small words
LENGTHS, WORDS, SMALL = range(3, 8), 1500, 20
ROWS, BATCH, RATE, WIDTH = 10_000, 96, 3e-3, 128
console = Console(highlight=False)


def short(word: str) -> str:
    """A word without its vowels; one that is nothing else stays."""
    return re.sub("[aeiou]", "", word) or word


def dialogue() -> tuple[list[list[str]], list[str]]:
    """Clauses of film dialogue that have common words alone, each once and shuffled; and these words."""
    records = readers.records(carried.find("moviedialog"))
    lines = (record[side] for record in records for side in ("statement", "reply"))
    clauses = [clause.split() for line in lines for clause in re.split(r"[^a-z' ]+", line.lower())]
    common = [word for word, _ in Counter(word for clause in clauses for word in clause).most_common(WORDS)]
    known = set(common)
    kept = {tuple(clause) for clause in clauses if len(clause) in LENGTHS and known.issuperset(clause)}
    found = sorted(kept)
    random.Random(0).shuffle(found)
    return [list(clause) for clause in found], common


def tokenizer(common: list[str]) -> PreTrainedTokenizerFast:
    """Whole words, and what is left of them."""
    entries = dict.fromkeys(["<pad>", "</s>", "<unk>", *common, *map(short, common)])
    made = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(entries)}, unk_token="<unk>")
    )
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def write_rows(clauses: list[list[str]], small: set[str]) -> int:
    """What is left of each clause without vowels and small words, and the clause. Returns their number."""
    pairs = [([short(word) for word in clause if word not in small], clause) for clause in clauses]
    rows = [{"source": " ".join(left), "target": " ".join(clause)} for left, clause in pairs if left]
    (OUTPUT / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


def learn(
    model: T5ForConditionalGeneration, words: PreTrainedTokenizerFast, clauses: list[list[str]], steps: int
) -> None:
    """Trains everything: clauses without vowels in, clauses out."""
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 100, 1 - step / steps))
    pick, start, losses = random.Random(0), time.perf_counter(), []

    def ids(some: list[list[str]]) -> Tensor:  # [B, L]
        return words([" ".join(clause) for clause in some], padding=True, return_tensors="pt").input_ids

    for step in range(1, steps + 1):
        drawn = pick.choices(clauses, k=BATCH)
        given, wanted = ids([[short(word) for word in clause] for clause in drawn]), ids(drawn)
        mask, labels = given != words.pad_token_id, wanted.masked_fill(wanted == words.pad_token_id, -100)
        loss = model(input_ids=given, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0 or step == steps:
            mean = sum(losses[-100:]) / len(losses[-100:])
            console.print(f"step {step}/{steps}  loss {mean:.3f}  {time.perf_counter() - start:.0f} s")


def main() -> None:
    """Reads, draws the model, trains it, writes all three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    steps = parser.parse_args().steps
    clauses, common = dialogue()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    rows = write_rows(clauses[:ROWS], set(common[:SMALL]))
    words = tokenizer(common)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(words),
        d_model=WIDTH,
        d_kv=WIDTH // 4,
        d_ff=4 * WIDTH,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=words.pad_token_id,
        pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
        dropout_rate=0.0,
    )
    model = T5ForConditionalGeneration(config)
    console.print(
        f"{len(clauses) - ROWS:,} clauses to learn from; {model.num_parameters():,} parameters train"
    )
    learn(model, words, clauses[ROWS:], steps)
    model.save_pretrained(OUTPUT / "model")
    words.save_pretrained(OUTPUT / "model")
    console.print(f"{rows:,} other clauses, without their small words too, and the model are in {OUTPUT}")


if __name__ == "__main__":
    main()
