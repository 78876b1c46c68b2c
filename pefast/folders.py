"""save and load as a user calls them: one adapter in a folder, or several, what they share stored once.

    pefast.json {"adapters": ["films", "topics"]}, films/..., topics/...

Each sub-folder is what checkpoint.py writes for one adapter, except that an adapter whose prefix belongs to
another one of the folder leaves the numbers there.
"""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from pefast import checkpoint
from pefast.adapter_files import adapters_of
from pefast.model import attached, detach


def save(model: nn.Module, folder: str | os.PathLike, name: str | Sequence[str] | None = None) -> Path:
    """Writes one adapter, with its task head, to a folder: the one called `name`, or the only active one.
    With several names it writes each to a sub-folder; a prefix that they share is stored once.

    LoRA, IA3, Prompt and Prefix are PEFT's own files, which PeftModel.from_pretrained reads. An adapter of
    several methods gets a sub-folder for each and a manifest. The folder appears whole or not at all; other
    files in it are kept. Raises ValueError where it is not clear which adapter is meant, or the folder is a
    file.
    """
    if name is None or isinstance(name, str):
        return checkpoint.save(model, folder, name)
    there, names = sorted(attached(model, "save").adapters), list(dict.fromkeys(name))
    if not names or not set(names) <= set(there):
        raise ValueError(f"save: names {names} came; one or more of {there} would be right")
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"save: {folder} is a file; a folder, or a new name, would be right")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        part.chmod(0o755)
        for each in names:
            checkpoint.save(model, part / each, each)
            checkpoint.leave_shared(part / each, names)
        checkpoint.write_manifest(part, names)
        checkpoint.move_into_place(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def load(
    model: nn.Module, folder: str | os.PathLike, name: str = "default", *, trainable: bool = True
) -> nn.Module:
    """Attaches the adapter that a folder holds, under `name`, in place: pefast's own folders and PEFT's. A
    folder of several adapters gives them all, under the names that they had; the last one is active.

    With trainable=False its parameters are frozen, and what a folder keeps for training alone stays there.
    Raises FileNotFoundError or ValueError, in one sentence that names the tensor and both shapes where they
    differ, and then leaves the model as it was.
    """
    names = adapters_of(Path(folder))
    if not names:
        return checkpoint.load(model, folder, name, trainable=trainable)
    done = []
    try:
        for each in names:
            checkpoint.load(model, Path(folder) / each, each, trainable=trainable)
            done.append(each)
    except (ValueError, OSError):
        for each in done:
            detach(model, each)
        raise
    return model
