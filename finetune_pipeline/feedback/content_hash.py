"""The content hash of an example: its identity after exact deduplication."""

from finetune_pipeline.artifacts import hash_of
from finetune_pipeline.records import Example, conversation_text, normalize


def content_hash(conversation: str, target: str) -> str:
    """Return the hash of a prompt and its target.

    Args:
        conversation: the prompt with the messages before it (`records.conversation_text`); hashed in normalized form.
        target: the target answer; hashed without surrounding white space.
    """
    return hash_of([normalize(conversation), target.strip()])


def example_hash(example: Example) -> str:
    """Return the content hash of an example."""
    return content_hash(conversation_text(example.prompt, example.history), example.target)
