"""The text of an answer as its tokens arrive: whole characters only, and nothing of a stop text."""

import codecs
from collections.abc import Sequence


class CompletionText:
    """Collects the bytes of tokens; hands out what can be shown."""

    def __init__(self, stop: Sequence[str] = (), *, strip_space: bool = False) -> None:
        self.token_texts: list[str] = []
        self.stopped = False
        self._stop = stop
        self._strip_space = strip_space
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._text = ""
        self._shown = 0

    @property
    def text(self) -> str:
        """All of it, up to a stop text."""
        return self._text

    def add(self, piece: bytes) -> str:
        """Take the bytes of one token; returns the text that can now be shown, often none."""
        new = self._decoder.decode(piece)
        if self._strip_space and not self.token_texts:
            new = new.removeprefix(" ")
        self.token_texts.append(new)
        self._append(new)
        return self._show(self._text if self.stopped else self._text[: len(self._text) - self._held_back()])

    def finish(self) -> str:
        """The answer is over; returns what had been held back."""
        rest = self._decoder.decode(b"", final=True)
        if rest:
            self.token_texts[-1] += rest
            self._append(rest)
        return self._show(self._text)

    def _append(self, new: str) -> None:
        if self.stopped:
            return
        searched_from = max(0, len(self._text) - max(map(len, self._stop), default=0))
        self._text += new
        found = [at for stop in self._stop if (at := self._text.find(stop, searched_from)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.stopped = True

    def _held_back(self) -> int:
        """Characters at the end that may turn out to be the start of a stop text."""
        lengths = (
            length
            for stop in self._stop
            for length in range(min(len(stop) - 1, len(self._text)), 0, -1)
            if self._text.endswith(stop[:length])
        )
        return max(lengths, default=0)

    def _show(self, showable: str) -> str:
        new = showable[self._shown :]
        self._shown = max(self._shown, len(showable))
        return new
