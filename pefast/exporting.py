"""export: a model with its active adapters merged into it, as a folder for transformers without pefast."""

import copy
import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from pefast.layers.in_place import plain_class
from pefast.model import attached, merge, unmerge


def export(
    model: nn.Module, folder: str | os.PathLike, tokenizer: PreTrainedTokenizerBase | None = None
) -> Path:
    """Writes a transformers model with its active adapters, and the task head of the last one, merged into
    its weights, and the tokenizer beside it: what `from_pretrained` reads without pefast.

    The model stays as it was, bit for bit; a merged one stays merged. The folder appears whole or not at all.

    Raises ValueError where an active method cannot merge, where weights are kept in a form that the plain
    model has not (quantised), and where the folder is there and not empty.
    """
    state = attached(model, "export")
    folder = Path(folder).resolve()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"export: {folder} is there and not empty; a new folder would be right")
    was_merged = bool(state.merged)
    if not was_merged:
        merge(model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        part.chmod(0o755)
        _plain(model).save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        if folder.is_dir():
            folder.rmdir()
        os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if not was_merged:
            unmerge(model)
    return folder


def _plain(model: nn.Module) -> nn.Module:
    """A model of transformers' own class that shares the tensors of this one, without what pefast brought."""
    with torch.device("meta"):
        plain = plain_class(model)(copy.deepcopy(model.config))
    wanted = set(plain.state_dict())
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name in wanted}
    try:
        plain.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        why = str(error).splitlines()[-1].strip()
        raise ValueError(
            f"export: a plain {type(plain).__name__} does not take these weights ({why}); a model that was"
            " loaded without quantisation would be right"
        ) from None
    if getattr(model, "generation_config", None) is not None:
        plain.generation_config = copy.deepcopy(model.generation_config)
    ties = plain.all_tied_weights_keys
    if any(not torch.equal(tensors[one], tensors[other]) for one, other in ties.items()):
        # a table that deltas were merged into has parted from those that it shared its numbers with
        plain.load_state_dict({name: tensors[name].clone() for name in ties}, strict=False, assign=True)
        plain.config.tie_word_embeddings, plain.all_tied_weights_keys = False, {}
    return plain
