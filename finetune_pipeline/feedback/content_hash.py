"""By what an example is known again: pure, and light enough for every process that curates."""

from finetune_pipeline.artifacts import hash_of
from finetune_pipeline.records import Example, conversation_text, normalize


def content_hash(question: str, target: str) -> str:
    """The identity of an example after exact deduplication.

    Args:
        question: the prompt, with what was said before it (`records.conversation`); compared in its normalised form.
        target: the answer to learn; compared without outer spaces.
    """
    return hash_of([normalize(question), target.strip()])


def example_hash(example: Example) -> str:
    """The content hash of an example."""
    return content_hash(conversation_text(example.prompt, example.history), example.target)
