"""Real layers by name, for every benchmark."""

from typing import NamedTuple


class Layer(NamedTuple):
    """A linear layer of a known model: y [M, N] = x [M, K] wᵀ."""

    k: int
    n: int


LAYERS = {
    "minilm attention": Layer(384, 384),
    "minilm up": Layer(384, 1536),
    "minilm down": Layer(1536, 384),
    "bert attention": Layer(768, 768),
    "bert up": Layer(768, 3072),
    "bert down": Layer(3072, 768),
    "smollm2 up": Layer(576, 1536),
    "llama-1b attention": Layer(2048, 2048),
    "llama-7b attention": Layer(4096, 4096),
    "llama-7b up": Layer(4096, 11008),
}

# rows of x: a batch of one short text, of a training step, and of one with long texts
ROWS = {"one text": 64, "a batch": 512, "a long batch": 2048}

# activations [M, K] that dropout meets: 32 texts of 128 tokens, inside and beside the feed-forward layers
DROPPED = {"minilm feed-forward": (4096, 1536), "minilm hidden": (4096, 384), "bert hidden": (512, 768)}
