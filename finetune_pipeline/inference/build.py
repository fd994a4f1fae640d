"""The installed build of llama.cpp, identified without loading it."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from finetune_pipeline.artifacts import hash_file, hash_of

NUMERICS = "batches in the order of sequences"
"""Settings of the engine that change the last digits of logits; change it with them."""


@cache
def engine_build() -> str:
    """Return a hash (16 hex digits) of llama.cpp's shared libraries and NUMERICS; others may give other completions."""
    spec = find_spec("llama_cpp")
    folders = [Path(folder) for folder in (spec.submodule_search_locations if spec else None) or []]
    files = sorted(path for folder in folders for path in (folder / "lib").glob("*") if path.is_file())
    return hash_of({NUMERICS: "", **{path.name: hash_file(path) for path in files}})[:16]
