"""Choose the next token of one answer: the most probable, or a drawn one, and only what a JSON Schema allows."""

import numpy as np
from numpy.typing import NDArray

from finetune_pipeline.inference.grammar import Matcher
from finetune_pipeline.inference.native import Sampler, draw
from finetune_pipeline.inference.protocol import GenerateRequest


class TokenChooser:
    """The sampling state of one answer."""

    def __init__(self, request: GenerateRequest, matcher: Matcher | None) -> None:
        self._matcher = matcher
        self._draw: Sampler | None = None
        self.seed = request.pick_seed()
        if self.seed is not None:
            self._draw = draw(request.temperature, request.top_p, self.seed)

    @property
    def is_greedy(self) -> bool:
        """It takes the most probable token and nothing else, which a whole batch can do at once."""
        return self._matcher is None and self._draw is None

    def choose(self, logits: NDArray[np.float32]) -> int:
        """The next token.

        Raises:
            RequestRefused: the schema allows none of the model's tokens here.
        """
        ids = np.arange(len(logits), dtype=np.int32)
        if self._matcher is not None:
            ids = ids[self._matcher.allowed()[: len(logits)]]
            logits = logits[ids]
        if self._draw is None:
            return int(ids[logits.argmax()])
        left, selected = self._draw.apply(ids, logits)
        return int(left["id"][selected])

    def accept(self, token: int) -> None:
        """Append this token to the answer.

        Raises:
            RequestRefused: the schema cannot be enforced any further.
        """
        if self._matcher is not None:
            self._matcher.accept(token)

    def check(self, text: str) -> None:
        """Check a complete answer against the schema.

        Raises:
            RequestRefused: it is not valid.
        """
        if self._matcher is not None:
            self._matcher.grammar.check(text)

    def close(self) -> None:
        """Free what llama.cpp holds for it."""
        if self._draw is not None:
            self._draw.close()
