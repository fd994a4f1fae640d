"""Length in tokens of the base model, counted by its tokenizer alone: neither torch nor transformers is loaded."""

from pathlib import Path
from typing import Any

from finetune_pipeline.curation.errors import CurationError

_FILES = ("tokenizer.json", "tokenizer.model")


def tokenizer_file(folder: Path) -> Path:
    """The file of a model's folder by which its tokens are counted.

    Raises:
        CurationError: it has none of tokenizer.json and tokenizer.model.
    """
    path = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if path is None:
        raise CurationError(
            f"{folder} has neither of {', '.join(_FILES)}, so tokens cannot be counted; take "
            "curation.max_prompt_tokens and max_answer_tokens out, or choose a base model with one of them"
        )
    return path


class TokenCounter:
    """Counts tokens as a base model's folder has them; goes to other processes with the tokenizer's file in it."""

    def __init__(self, folder: Path) -> None:
        """Read the tokenizer's file of a model's folder.

        Raises:
            CurationError: it has none of tokenizer.json and tokenizer.model.
        """
        path = tokenizer_file(folder)
        self._name, self._content = path.name, path.read_bytes()
        self._encoder: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_name": self._name, "_content": self._content, "_encoder": None}

    def more_than(self, text: str, limit: int) -> bool:
        """Whether a text has more tokens than `limit`. Of plain ASCII no token has less than a character."""
        if text.isascii() and len(text) < limit:
            return False
        return self.count(text) > limit

    def count(self, text: str) -> int:
        """The tokens of a text, without the chat template's."""
        if self._encoder is None:
            self._encoder = _tokenizer_json if self._name == _FILES[0] else _sentencepiece
            self._encoder = self._encoder(self._content)
        return int(self._encoder(text))


def _tokenizer_json(content: bytes) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_buffer(content)
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def _sentencepiece(content: bytes) -> Any:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_proto=content)
    return lambda text: len(model.encode(text))
