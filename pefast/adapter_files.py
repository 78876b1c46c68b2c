"""What lies in an adapter's folder, read and checked; checkpoint.py says how the folder is made up.

Nothing but JSON and safetensors is read, and no name in a file leads out of its folder.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import safetensors
from safetensors.torch import load_file
from torch import Tensor

from pefast.methods import METHODS

MANIFEST, CONFIG, TENSORS, HEAD, RESUME = (
    "pefast.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "head.safetensors",
    "resume.safetensors",
)
LABELS = "head_labels"
PEFT_TYPES = {peft_type: kind for kind, method in METHODS.items() for peft_type in method.peft_types}


class Part(NamedTuple):
    """One method's files."""

    kind: str
    config: dict
    tensors: dict[str, Tensor]
    resume: dict[str, Tensor]


class Manifest(NamedTuple):
    """What pefast.json says: the methods' folders, whether there is a head, and its own number of labels."""

    methods: list[str]
    head: bool
    labels: int


class Folder(NamedTuple):
    """What an adapter folder holds: its methods, and its head's tensors by their path in the base model."""

    methods: list[Part]
    head: dict[str, Tensor]
    labels: int  # where the head has another number than the model; otherwise 0


def read(folder: Path, trainable: bool) -> Folder:
    """All that the folder of one adapter holds, or of several methods as one adapter."""
    if (folder / MANIFEST).exists():
        manifest = _read_manifest(folder)
        methods = [_read_method(folder / key, trainable) for key in manifest.methods]
        return Folder(methods, _read_tensors(folder / HEAD) if manifest.head else {}, manifest.labels)
    part = _read_method(folder, trainable)
    part, biases = _with_biases(part, folder)
    owns = METHODS[part.kind].owns
    own = {key: tensor for key, tensor in part.tensors.items() if owns(key)}
    prefix = head_prefix(METHODS[part.kind])
    head = {key.removeprefix(prefix): tensor for key, tensor in part.tensors.items() if not owns(key)}
    return Folder([part._replace(tensors=own), *biases], head, _count(part.config, folder / CONFIG))


def _with_biases(part: Part, folder: Path) -> tuple[Part, list[Part]]:
    """A LoRA of PEFT's bias="all" or "lora_only" as two methods: itself, and the model's biases beside it."""
    if part.kind != "lora" or part.config.get("bias", "none") not in ("all", "lora_only"):
        return part, []
    owns, heads = METHODS[part.kind].owns, tuple(part.config.get("modules_to_save") or ())
    # what a trained head took the place of, and its values under PEFT's own path, are in the file too
    repeated = (".original_module.bias", ".modules_to_save.bias")
    tensors = {key: tensor for key, tensor in part.tensors.items() if not key.endswith(repeated)}
    found = {}
    for key in [key for key in tensors if key.endswith(".bias") and not owns(key)]:
        path = key.removeprefix("base_model.model.").replace(".base_layer.bias", ".bias")
        if path.split(".")[-2] not in heads and path.split(".")[0] not in heads:
            found[path] = tensors.pop(key)
    if not found:
        raise ValueError(
            f"load: {folder / CONFIG} has bias={part.config['bias']!r} and {TENSORS} no bias; bias='none' is"
            " right for a model without them"
        )
    config = asdict(METHODS["layers"](names=sorted(found)))
    return part._replace(tensors=tensors), [Part("layers", config, found, {})]


def _read_manifest(folder: Path) -> Manifest:
    content = read_json(folder / MANIFEST)
    methods = content.get("methods")
    # a name that leads out of the folder is no name of a method
    if not isinstance(methods, list) or not all(
        isinstance(key, str) and key.isidentifier() for key in methods
    ):
        raise ValueError(
            f"load: {folder / MANIFEST} has methods {methods!r}; names of folders beside it are right"
        )
    return Manifest(methods, bool(content.get("head")), _count(content, folder / MANIFEST))


def _count(content: dict, path: Path) -> int:
    labels = content.get(LABELS, 0)
    if not isinstance(labels, int) or labels < 0:
        raise ValueError(f"load: {path} has {LABELS} {labels!r}; a number of labels would be right")
    return labels


def _read_method(folder: Path, trainable: bool) -> Part:
    if not (folder / CONFIG).exists():
        raise FileNotFoundError(
            f"load: {folder} has neither {CONFIG} nor {MANIFEST}; a folder that save wrote would be right"
        )
    config = read_json(folder / CONFIG)
    kind = PEFT_TYPES.get(config.get("peft_type"))
    if kind is None:
        raise ValueError(
            f"load: {folder} holds a {config.get('peft_type')}; pefast reads {', '.join(PEFT_TYPES)}"
        )
    resume = _read_tensors(folder / RESUME) if trainable and (folder / RESUME).exists() else {}
    tensors = _read_tensors(folder / TENSORS)
    if config.get("share") and not any(METHODS[kind].owns(key) for key in tensors):
        tensors |= _left_elsewhere(folder, config["share"], kind)
    tensors = {key: tensor for key, tensor in tensors.items() if not METHODS[kind].repeats(key)}
    return Part(kind, {**config, "resumes": bool(resume)}, tensors, resume)


def _left_elsewhere(folder: Path, share: str, kind: str) -> dict[str, Tensor]:
    """The tensors that an adapter of a folder of several shares with the one called `share`."""
    for above in (folder.parent, folder.parent.parent):
        for place in (above / share, above / share / kind):
            # a name that leads elsewhere is no name of an adapter
            if "/" not in share and "." not in share and (place / TENSORS).exists():
                found = _read_tensors(place / TENSORS)
                return {key: tensor for key, tensor in found.items() if METHODS[kind].owns(key)}
    raise FileNotFoundError(f"load: {folder} shares with the adapter {share!r}, which is not beside it")


def adapters_of(folder: Path) -> list[str]:
    """The adapters of a folder of several; empty for a folder of one."""
    if not (folder / MANIFEST).exists():
        return []
    names = read_json(folder / MANIFEST).get("adapters", [])
    # a name that leads out of the folder is no name of an adapter
    if not isinstance(names, list) or not all(
        isinstance(each, str) and each and not set(each) & set("/\\.") for each in names
    ):
        raise ValueError(
            f"load: {folder / MANIFEST} has adapters {names!r}; names of folders beside it are right"
        )
    return names


def own_names(folder: Path) -> set[str]:
    """Names in an adapter's folder that are the adapter's own."""
    names = {MANIFEST, CONFIG, TENSORS, HEAD, RESUME}
    if several := adapters_of(folder):
        return names | set(several)
    return names | set(_read_manifest(folder).methods if (folder / MANIFEST).exists() else ())


def head_prefix(method) -> str:
    """What stands before the names of a head\'s tensors in the file of this method."""
    # PEFT puts one level less before the head of a prompt-learning checkpoint
    return "base_model." if method.prompt_learning else "base_model.model."


def read_json(path: Path) -> dict:
    """The object that a JSON file holds; ValueError where it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"load: {path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"load: {path} holds a {type(content).__name__}; an object with settings would be right"
        )
    return content


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise FileNotFoundError(f"load: {path} is missing; the folder is not whole")
    try:
        tensors = load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"load: {path} is damaged or cut off: {error}") from None
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"load: tensor {key} in {path} has values that are NaN or infinite")
    return tensors
