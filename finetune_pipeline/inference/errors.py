"""The exceptions of `inference`.

EngineError
├── ModelNotLoaded   the file is missing, not a GGUF, truncated, or does not fit into memory
├── EngineCrashed    the child process died
│   └── EngineStuck  it made no progress and was killed
├── EngineClosed     the engine was closed before the request was done
├── RequestRefused   this request cannot be answered; other requests are not affected
│   ├── AnswerRefused  the model's answer does not follow its schema to the end
│   └── ContextExceeded  its prompt is longer than the context
└── UpstreamFailed   another OpenAI-compatible server cannot be reached, or fails
"""


class EngineError(RuntimeError):
    """Base class of all exceptions of `inference`."""


class ModelNotLoaded(EngineError):
    """The model cannot be loaded from this file on this machine."""


class EngineCrashed(EngineError):
    """The process that ran the model died. All its requests failed; open a new engine.

    Attributes:
        signal: name of the signal that ended the process (`SIGSEGV`), or None if it exited.
    """

    def __init__(self, message: str, signal: str | None = None) -> None:
        super().__init__(message)
        self.signal = signal


class EngineStuck(EngineCrashed):
    """The process that ran the model made no progress for `stuck_seconds` and was killed."""


class EngineClosed(EngineError):
    """The engine was closed before the request was done."""


class RequestRefused(EngineError):
    """This request cannot be answered: it is empty or too long, or its schema or chat template is unusable."""


class AnswerRefused(RequestRefused):
    """The model's answer does not follow its schema to the end, in a way that only shows while or after decoding it."""


class ContextExceeded(RequestRefused):
    """The prompt is too long for the model's context."""


class UpstreamFailed(EngineError):
    """The other server cannot be reached, is busy, returns an error, or returns something that is not a completion."""


RAISED_BY_WORKER: dict[str, type[EngineError]] = {
    kind.__name__: kind for kind in (ModelNotLoaded, RequestRefused, AnswerRefused, ContextExceeded)
}
"""The exceptions that the child process reports, by their names on the wire."""
