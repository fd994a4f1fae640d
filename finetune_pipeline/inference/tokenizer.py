"""Load a base model's tokenizer so that it reads texts as llama.cpp does. Loads transformers."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD")


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a folder, without the Unicode normalization that llama.cpp does not have.

    transformers raises anything for files that it cannot read.
    """
    from transformers import AutoTokenizer

    return without_unicode_normalization(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))


def without_unicode_normalization(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """Remove the Unicode normalization of a tokenizer, and return it.

    The tokenizers of Qwen, OLMo and others compose an e and a combining accent into one character; llama.cpp tokenizes
    both as they are, whichever program serves the GGUF. So training reads them as they are, too.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)  # None: a tokenizer in Python
    if backend is not None and backend.normalizer is not None:
        backend.normalizer = _without_forms(backend.normalizer)
    return tokenizer


def _without_forms(normalizer: Any) -> Any:
    """Return a normalizer of the package tokenizers without Unicode normal forms; None if nothing is left."""
    from tokenizers import normalizers

    if type(normalizer).__name__ in _UNICODE_FORMS:
        return None
    if not isinstance(normalizer, normalizers.Sequence):
        return normalizer
    parts: Any = normalizer  # which can be iterated over, other than its types say
    kept = [left for one in parts if (left := _without_forms(one)) is not None]
    return normalizers.Sequence(kept) if kept else None
