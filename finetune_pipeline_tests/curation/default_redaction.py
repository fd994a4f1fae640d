"""Redaction with the default kinds, for tests of what is found."""

from finetune_pipeline.curation import redaction
from finetune_pipeline.settings import RedactionSettings

_DEFAULT = RedactionSettings()


def redact(text, settings=_DEFAULT):
    return redaction.redact(text, settings)


def redact_texts(texts, settings=_DEFAULT):
    return redaction.redact_texts(texts, settings)


def redact_example(example, settings=_DEFAULT):
    return redaction.redact_example(example, settings)
