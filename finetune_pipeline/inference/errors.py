"""What can go wrong between a caller and a model.

EngineError
├── ModelNotLoaded   the file is missing, not a GGUF, truncated, or does not fit into memory
├── EngineCrashed    the child process died; its signal, and what it said last
│   └── EngineStuck  it made no progress, and was ended
├── EngineClosed     the engine was closed before the answer came
└── RequestRefused   this request cannot be answered; the others go on
"""


class EngineError(RuntimeError):
    """Base of all errors of `inference`; each says what was found, what was expected and what to do."""


class ModelNotLoaded(EngineError):
    """The model cannot be loaded from this file on this machine."""


class EngineCrashed(EngineError):
    """The process that ran the model died; every request in it is lost, and the engine has to be opened again.

    Attributes:
        signal: name of the signal that ended it (`SIGSEGV`), or None when it exited by itself.
    """

    def __init__(self, message: str, signal: str | None = None) -> None:
        super().__init__(message)
        self.signal = signal


class EngineStuck(EngineCrashed):
    """The process that ran the model made no progress for `stuck_seconds` and was ended."""


class EngineClosed(EngineError):
    """The engine was closed before, or while, it was asked."""


class RequestRefused(EngineError):
    """This request cannot be answered: too long, a schema or chat template that cannot be used, or an empty prompt."""


BY_NAME: dict[str, type[EngineError]] = {kind.__name__: kind for kind in (ModelNotLoaded, RequestRefused)}
"""The errors that the child reports itself, as they are named on the wire."""
