"""English and Spanish verses side by side, and a small T5 that has seen neither: for recipes/translation.yaml

apt-get download sword-text-web sword-text-sparv       two public-domain Bibles of Debian
for deb in sword-text-*.deb; do dpkg-deb -x $deb bibles; done
pip install pysword
python examples/verses.py bibles/usr/share/sword      writes out/verses/rows.jsonl and out/verses/model
"""

import argparse
import json
import re
from pathlib import Path

import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

ENGLISH, SPANISH, OUTPUT = "engWEB2015eb", "spaRV1909eb", Path("out/verses")
WORDS, WIDTH, BLOCKS = 4000, 192, 2
console = Console(highlight=False)


def verses(folder: Path) -> list[dict[str, str]]:
    """Verses that both Bibles count alike, in their order: source and target."""
    from pysword.modules import SwordModules

    modules = SwordModules(str(folder))
    modules.parse_modules()
    english, spanish = (modules.get_bible_from_module(name) for name in (ENGLISH, SPANISH))
    # the English one has books that the Spanish one has not
    shared = [book.name for books in spanish.get_structure().get_books().values() for book in books]
    found = []
    for name in shared:
        pair = [list(bible.get_iter(books=[name], clean=False)) for bible in (english, spanish)]
        if len(pair[0]) == len(pair[1]):
            found += [
                {"source": plain(one), "target": plain(other)} for one, other in zip(*pair, strict=True)
            ]
    return [row for row in found if row["source"] and row["target"]]


def plain(verse: str) -> str:
    """A verse without its notes and marks."""
    return " ".join(re.sub(r"<[^>]*>", " ", re.sub(r"<note.*?</note>", " ", verse, flags=re.DOTALL)).split())


def tokenizer(rows: list[dict[str, str]]) -> PreTrainedTokenizerFast:
    """Pieces of words of both languages, learnt from the rows."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=WORDS, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator((text for row in rows for text in row.values()), trainer)
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", made.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def main() -> None:
    """Reads, learns the pieces, draws the model, writes all three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="share/sword of the two packages")
    rows = verses(parser.parse_args().folder)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (OUTPUT / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = tokenizer(rows)
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(words),
            d_model=WIDTH,
            d_kv=WIDTH // 4,
            d_ff=4 * WIDTH,
            num_layers=BLOCKS,
            num_heads=4,
            decoder_start_token_id=words.pad_token_id,
            pad_token_id=words.pad_token_id,
            eos_token_id=words.eos_token_id,
            dropout_rate=0.1,
        )
    )
    model.save_pretrained(OUTPUT / "model")
    words.save_pretrained(OUTPUT / "model")
    count = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"{len(rows):,} verses and a T5 of {count:,} parameters in {OUTPUT}")


if __name__ == "__main__":
    main()
