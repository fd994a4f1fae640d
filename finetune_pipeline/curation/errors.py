"""The one error of curation that people see."""


class CurationError(RuntimeError):
    """Something that curation needs is missing or not of its form; the message says which, and what to do."""
