"""Adapters on disk. One method is one PEFT folder; several are a folder of such folders and a manifest.

    adapter_config.json, adapter_model.safetensors          one method, as Hugging Face PEFT writes it
    pefast.json, <key>/adapter_config.json ..., head.safetensors   several: key is lora, adapter, prompt ...

A folder is written beside its place and renamed into it, so it is never half written.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pefast import __version__
from pefast.adapter_files import (
    CONFIG,
    HEAD,
    LABELS,
    MANIFEST,
    PEFT_TYPES,
    RESUME,
    TENSORS,
    Folder,
    Part,
    head_prefix,
    own_names,
    read,
    read_json,
)
from pefast.methods import METHODS
from pefast.model import activate, attach, attached, detach, head_tensors
from pefast.sharded import fill, whole

_TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def save(model: nn.Module, folder: str | os.PathLike, name: str | None = None) -> Path:
    """Writes one adapter, with its task head, to a folder; see folders.save for what the user is told."""
    state = attached(model, "save")
    name = _one_adapter(state, name)
    # a link stays a link: what it points to is replaced
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"save: {folder} is a file; a folder, or a new name, would be right")
    with whole(model, without=state.own) as writes:
        if writes:
            _write(model, folder, name)
    return folder


def _write(model: nn.Module, folder: Path, name: str) -> None:
    state = attached(model, "save")
    methods = state.adapters[name]
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        part.chmod(0o755)
        if len(methods) == 1:
            (key,) = methods
            _write_method(model, part, name, key, with_head=True)
        else:
            for key in methods:
                (part / key).mkdir()
                _write_method(model, part / key, name, key, with_head=False)
            head = _plain(head_tensors(model, name))
            if head:
                _write_tensors(head, part / HEAD)
            content = {"pefast_version": __version__, "methods": list(methods), "head": bool(head)}
            _write_json(part / MANIFEST, content | _own_labels(state, name))
        move_into_place(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _one_adapter(state, name: str | None) -> str:
    if name is None:
        choice = state.router.active if len(state.adapters) > 1 else tuple(state.adapters)
        if len(choice) != 1:
            raise ValueError(
                f"save: several adapters are meant, {sorted(choice or state.adapters)}; name= one of them"
            )
        return choice[0]
    if name not in state.adapters:
        raise ValueError(f"save: no adapter is called {name!r}; there are {sorted(state.adapters)}")
    return name


def _write_method(model: nn.Module, folder: Path, name: str, key: str, with_head: bool) -> None:
    method = attached(model, "save").adapters[name][key]
    tensors, config = method.tensors(model, name, key), method.config(model, name, key)
    config |= {
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", None) or None,
        "inference_mode": True,
    }
    head = head_tensors(model, name) if with_head else {}
    if task := _task_type(model, method.prompt_learning, bool(head)):
        config["task_type"] = task
    else:
        config["auto_mapping"] = {
            "base_model_class": type(model).__name__,
            "parent_library": type(model).__module__,
        }
    if head:
        prefix = head_prefix(method)
        tensors = tensors | {prefix + path: tensor for path, tensor in head.items()}
        config["modules_to_save"] = sorted({path.split(".")[0] for path in head})
        config |= _own_labels(attached(model, "save"), name)
    _write_tensors(_plain(tensors), folder / TENSORS)
    if resume := method.resume(model, name, key):
        _write_tensors(_plain(resume), folder / RESUME)
    _write_json(folder / CONFIG, config)


def _own_labels(state, name: str) -> dict[str, int]:
    """What a file says of a head with another number of labels than the model's."""
    own = state.labels.get(name)
    return {LABELS: own} if own != state.labels.get(None) else {}


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}


def _write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        # one key: several come in an order of their own, and the same tensors would be other bytes
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # its own kind of error also where the disk is full
        raise OSError(f"save: {path} could not be written ({error})") from None


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _task_type(model: nn.Module, prompt_learning: bool, with_head: bool) -> str | None:
    task = next((task for end, task in _TASK_TYPES.items() if type(model).__name__.endswith(end)), None)
    if task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") and not with_head:
        # PEFT looks for a head in every file with these types; prompt learning needs some type
        return "FEATURE_EXTRACTION" if prompt_learning else None
    return task


def move_into_place(part: Path, folder: Path) -> None:
    """Renames `part` to `folder`, where other files of an older folder stay; an error puts all of it back."""
    if not folder.exists():
        os.rename(part, folder)
        return
    others = {path.name for path in folder.iterdir()} - own_names(folder) - own_names(part)
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    was = old / "was"
    moves = [(folder, was), (part, folder), *((was / name, folder / name) for name in others)]
    done = 0
    try:
        for source, target in moves:
            os.rename(source, target)
            done += 1
    finally:
        if done < len(moves):
            for source, target in reversed(moves[:done]):
                os.rename(target, source)
            old.rmdir()
    shutil.rmtree(old)


def load(
    model: nn.Module, folder: str | os.PathLike, name: str = "default", *, trainable: bool = True
) -> nn.Module:
    """Attaches the adapter that a folder of one holds; see folders.load for what the user is told."""
    folder = Path(folder)
    parts = read(folder, trainable)
    methods = [_method(part, model, folder) for part in parts.methods]
    before = model._pefast.router.active if hasattr(model, "_pefast") else None
    rng = torch.get_rng_state()
    attach(model, methods, name, head=parts.labels or bool(parts.head))
    # the numbers drawn for parameters that the file replaces do not count
    torch.set_rng_state(rng)
    try:
        pairs = _pair(model, name, parts, folder)
    except ValueError:
        detach(model, name)
        if before:
            activate(model, before)
        raise
    with torch.no_grad():
        for parameter, value in pairs:
            fill(parameter, value)
    if not trainable:
        attached(model, "load").frozen.add(name)
    return activate(model, name)


def refill(model: nn.Module, folder: str | os.PathLike, name: str = "default") -> None:
    """Gives an adapter that is attached the values that a folder holds, in place.

    Raises FileNotFoundError or ValueError as `load` does, before anything changes.
    """
    pairs = _pair(model, name, read(Path(folder), trainable=True), Path(folder))
    with torch.no_grad():
        for parameter, value in pairs:
            fill(parameter, value)


def _method(part: Part, model: nn.Module, folder: Path):
    """A method with the settings of its file, checked alone and against the model."""
    try:
        method = METHODS[part.kind].from_config(part.config, part.tensors)
        method.check()
    except KeyError as key:
        raise ValueError(f"load: the {CONFIG} of {folder} has no {key}") from None
    except ValueError as error:
        raise ValueError(f"load: {folder} has settings that cannot be: {error}") from None
    try:
        method.plan(model)
    except ValueError as error:
        raise ValueError(f"load: {folder} does not fit this {type(model).__name__}: {error}") from None
    return method


def leave_shared(folder: Path, names: Sequence[str]) -> None:
    """Takes out of an adapter's new folder what it shares with another one of `names`."""
    for path in folder.rglob(CONFIG):
        config = read_json(path)
        if config.get("share") not in names:
            continue
        owns = METHODS[PEFT_TYPES[config["peft_type"]]].owns
        tensors = load_file(path.parent / TENSORS)
        kept = {key: tensor for key, tensor in tensors.items() if not owns(key)}
        _write_tensors(kept, path.parent / TENSORS)
        (path.parent / RESUME).unlink(missing_ok=True)


def write_manifest(folder: Path, adapters: Sequence[str]) -> None:
    """Says which adapters a folder of several holds."""
    _write_json(folder / MANIFEST, {"pefast_version": __version__, "adapters": list(adapters)})


def _pair(model: nn.Module, name: str, parts: Folder, folder: Path) -> list[tuple[Tensor, Tensor]]:
    """(parameter, new value) for every tensor; raises ValueError where file and model do not fit."""
    pairs = []
    for (key, method), part in zip(
        attached(model, "load").adapters[name].items(), parts.methods, strict=True
    ):
        if part.resume:
            pairs += _pair_tensors(method.resume(model, name, key), part.resume, model, folder)
        else:
            pairs += _pair_tensors(method.tensors(model, name, key), part.tensors, model, folder)
    return pairs + _pair_tensors(head_tensors(model, name), parts.head, model, folder)


def _pair_tensors(wanted: dict[str, Tensor], given: dict[str, Tensor], model: nn.Module, folder: Path):
    where = f"load: {folder} does not fit this {type(model).__name__}"
    if lost := sorted(set(given) - set(wanted)):
        raise ValueError(f"{where}: its tensor {lost[0]} has no place in the model ({len(lost)} such)")
    if lost := sorted(set(wanted) - set(given)):
        raise ValueError(f"{where}: it has no tensor {lost[0]} ({len(lost)} such)")
    for key, parameter in wanted.items():
        if parameter.shape != given[key].shape:
            raise ValueError(
                f"{where}: tensor {key} is {list(given[key].shape)} in the file"
                f" and {list(parameter.shape)} in the model"
            )
    return [(parameter, given[key]) for key, parameter in wanted.items()]
