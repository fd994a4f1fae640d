"""The text of a completion while its tokens arrive."""

import codecs
from collections.abc import Sequence


class CompletionText:
    """Collects the bytes of tokens and returns the text that is final.

    Text is held back while it is an incomplete UTF-8 character or may be the start of a stop text.
    """

    def __init__(self, stop: Sequence[str] = (), *, strip_space: bool = False) -> None:
        self.token_texts: list[str] = []
        self.text = ""
        """The complete text so far, up to a stop text."""
        self.stopped = False
        self._stop = stop
        self._strip_space = strip_space
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._returned = 0

    def add(self, token: bytes) -> str:
        """Add the bytes of one token and return the text that became final, which is often empty."""
        new = self._decoder.decode(token)
        if self._strip_space and not self.token_texts:
            new = new.removeprefix(" ")
        self.token_texts.append(new)
        self._append(new)
        if self.stopped:
            return self._new_text(len(self.text))
        # Hold back the longest end of the text that a stop text starts with.
        held_back = (
            length
            for stop in self._stop
            for length in range(min(len(stop) - 1, len(self.text)), 0, -1)
            if self.text.endswith(stop[:length])
        )
        return self._new_text(len(self.text) - max(held_back, default=0))

    def finish(self) -> str:
        """End the text and return what was held back."""
        rest = self._decoder.decode(b"", final=True)
        if rest:
            self.token_texts[-1] += rest
            self._append(rest)
        return self._new_text(len(self.text))

    def _append(self, new: str) -> None:
        if self.stopped:
            return
        search_from = max(0, len(self.text) - max(map(len, self._stop), default=0))
        self.text += new
        found = [at for stop in self._stop if (at := self.text.find(stop, search_from)) >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True

    def _new_text(self, end: int) -> str:
        new = self.text[self._returned : end]
        self._returned = max(self._returned, end)
        return new
