"""Select the next token of a completion."""

import numpy as np
from numpy.typing import NDArray

from finetune_pipeline.inference.grammar import Matcher
from finetune_pipeline.inference.native import NativeSampler, temperature_sampler
from finetune_pipeline.inference.protocol import GenerateRequest


class TokenSampler:
    """The sampling state of one completion: greedy or random, with or without a JSON Schema."""

    def __init__(self, request: GenerateRequest, matcher: Matcher | None) -> None:
        self._matcher = matcher
        self._sampler: NativeSampler | None = None
        self.seed = request.pick_seed()
        if self.seed is not None:
            self._sampler = temperature_sampler(request.temperature, request.top_p, self.seed)

    @property
    def is_argmax(self) -> bool:
        """Return whether the next token is simply the most probable one, which numpy can find for a whole batch."""
        return self._matcher is None and self._sampler is None

    def sample(self, logits: NDArray[np.float32]) -> int:
        """Return the next token.

        Raises:
            RequestRefused: the schema allows none of the model's tokens here.
        """
        ids = np.arange(len(logits), dtype=np.int32)
        if self._matcher is not None:
            ids = ids[self._matcher.allowed()[: len(logits)]]
            logits = logits[ids]
        if self._sampler is None:
            return int(ids[logits.argmax()])
        candidates, selected = self._sampler.apply(ids, logits)
        return int(candidates["id"][selected])

    def accept(self, token: int) -> None:
        """Advance the schema's state by this token.

        Raises:
            RequestRefused: the schema cannot be enforced any further.
        """
        if self._matcher is not None:
            self._matcher.accept(token)

    def check(self, text: str) -> None:
        """Check the complete text against the schema.

        Raises:
            RequestRefused: it is not valid.
        """
        if self._matcher is not None:
            self._matcher.grammar.check(text)

    def close(self) -> None:
        """Free the native sampler."""
        if self._sampler is not None:
            self._sampler.close()
