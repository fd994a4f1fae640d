"""Select the next token of a completion."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from finetune_pipeline.inference.errors import RequestRefused
from finetune_pipeline.inference.grammar import Matcher
from finetune_pipeline.inference.native import NativeModel, NativeSampler, sampler_chain
from finetune_pipeline.inference.protocol import GenerateRequest


class TokenSampler:
    """The sampling state of one completion: greedy or random, with or without penalties and a JSON Schema.

    Args:
        prompt: tokens of the prompt, which repeat_penalty looks back at.

    Raises:
        RequestRefused: `logit_bias` has a token that the model does not have.
    """

    def __init__(
        self, request: GenerateRequest, prompt: Sequence[int], matcher: Matcher | None, model: NativeModel
    ) -> None:
        self._matcher = matcher
        self._sampler: NativeSampler | None = None
        self.seed = request.pick_seed()
        unknown = next((token for token in request.logit_bias if not 0 <= token < model.n_vocab), None)
        if unknown is not None:
            raise RequestRefused(
                f"logit_bias: the model has no token {unknown}; its tokens are 0 to {model.n_vocab - 1}."
            )
        excluded = [token for token, bias in request.logit_bias.items() if bias is None]
        if request.ignore_eos:
            excluded += model.end_tokens
        self._included: NDArray[np.bool_] | None = None
        if excluded:
            self._included = np.ones(model.n_vocab, np.bool_)
            self._included[excluded] = False
        changes_logits = (request.repeat_penalty, request.presence_penalty, request.frequency_penalty) != (1, 0, 0)
        if self.seed is not None or changes_logits or any(request.logit_bias.values()):
            self._sampler = sampler_chain(request, self.seed, prompt, model.n_vocab)

    @property
    def is_argmax(self) -> bool:
        """Return whether the next token is simply the most probable one, which numpy can find for a whole batch."""
        return self._matcher is None and self._sampler is None and self._included is None

    def sample(self, logits: NDArray[np.float32]) -> int:
        """Return the next token.

        Raises:
            AnswerRefused: the schema allows none of the model's tokens here.
            RequestRefused: `logit_bias` excludes all tokens that could come next.
        """
        if self._matcher is not None and self._sampler is None and self._included is None:
            most_probable = int(logits.argmax())
            if self._matcher.allows(most_probable):  # as it mostly is, so that no mask of all tokens is needed
                return most_probable
        ids = np.arange(len(logits), dtype=np.int32)
        if self._matcher is not None:
            ids = ids[self._matcher.allowed()[: len(logits)]]
        if self._included is not None:
            ids = ids[self._included[ids]]
            if not len(ids):
                raise RequestRefused("logit_bias excludes every token that could come next; exclude fewer tokens.")
        if len(ids) < len(logits):
            logits = logits[ids]
        if self._sampler is None:
            return int(ids[logits.argmax()])
        candidates, selected = self._sampler.apply(ids, logits)
        return int(candidates["id"][selected])

    def accept(self, token: int) -> None:
        """Advance the state of schema and penalties by this token.

        Raises:
            AnswerRefused: the schema cannot be enforced any further.
        """
        if self._matcher is not None:
            self._matcher.accept(token)
        if self._sampler is not None:
            self._sampler.accept(token)

    def check(self, text: str) -> None:
        """Check the complete text against the schema.

        Raises:
            AnswerRefused: it is not valid.
        """
        if self._matcher is not None:
            self._matcher.grammar.check(text)

    def close(self) -> None:
        """Free the native sampler."""
        if self._sampler is not None:
            self._sampler.close()
