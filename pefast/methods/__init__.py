"""Ways to tune a model: one file a method, and METHODS, by the name that recipes and folders use."""

from pefast.methods.adapter import Adapter
from pefast.methods.bias import Bias
from pefast.methods.full import Full
from pefast.methods.gates import learn_gates
from pefast.methods.heads import Heads
from pefast.methods.ia3 import IA3
from pefast.methods.importance import Importance
from pefast.methods.layers import Layers
from pefast.methods.lora import LoRA
from pefast.methods.prefix import Prefix
from pefast.methods.prompt import Prompt
from pefast.methods.scores import Scores, score
from pefast.methods.subnetwork import Subnetwork

METHODS = {
    method.kind: method
    for method in (LoRA, IA3, Adapter, Prompt, Prefix, Full, Layers, Bias, Heads, Subnetwork, Importance)
}

__all__ = [
    "IA3",
    "METHODS",
    "Adapter",
    "Bias",
    "Full",
    "Heads",
    "Importance",
    "Layers",
    "LoRA",
    "Prefix",
    "Prompt",
    "Scores",
    "Subnetwork",
    "learn_gates",
    "score",
]
