"""The error of curation."""


class CurationError(RuntimeError):
    """A file or model that curation needs is missing or has the wrong format; the message says what to do."""
