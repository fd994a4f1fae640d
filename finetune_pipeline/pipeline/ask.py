"""Ask one model of a loop, as the gateway would: any version, a challenger, or the base model."""

from collections.abc import Callable
from uuid import UUID

from finetune_pipeline.database import connect
from finetune_pipeline.inference.protocol import Completion, ModelSpec
from finetune_pipeline.records import ASK
from finetune_pipeline.settings import LoopSettings


def find_model(loop: LoopSettings, name: str, log: Callable[[str], None]) -> tuple[str, ModelSpec]:
    """Return the full name and the files of a version, a challenger or the base; export the base if necessary.

    Args:
        name: champion, previous, base, a version such as v1.2.0, or the first digits of a challenger's SHA-256.
        log: is called with a line for each step that takes long.

    Raises:
        RegistryError: there is no such model, or its files were deleted or differ.
        ExportError: the base model cannot be exported.
    """
    from finetune_pipeline.export.base_gguf import base_gguf
    from finetune_pipeline.pipeline.challengers import find_trained
    from finetune_pipeline.registry.model_versions import check_files

    version = find_trained(connect(), name, loop.name)
    if version is not None:
        check_files(version, again=False)
        return version.name, ModelSpec(gguf=version.gguf_path, adapter=version.adapter_path)
    return f"{loop.name}@base", ModelSpec(gguf=base_gguf(loop, log))


def generate_answers(loop: LoopSettings, spec: ModelSpec, *prompts: str) -> list[str]:
    """Return the texts of a model's answers, see `generate`."""
    return [completion.text for completion in generate(loop, spec, *prompts)]


def generate(loop: LoopSettings, spec: ModelSpec, *prompts: str) -> list[Completion]:
    """Return a model's answers with the loop's system prompt, limits and constraint, as the gateway gives them."""
    from finetune_pipeline.inference.engine import Engine
    from finetune_pipeline.inference.protocol import GenerateRequest
    from finetune_pipeline.pipeline.loop_files import constraint
    from finetune_pipeline.records import chat_messages

    schema = constraint(loop)
    requests = [
        GenerateRequest(
            messages=chat_messages(loop.system_prompt, prompt), max_tokens=loop.max_tokens, json_schema=schema
        )
        for prompt in prompts
    ]
    with Engine(spec.model_copy(update={"context": loop.context, "parallel": 1})) as engine:
        return list(engine.generate(requests))


def record_answer(loop: LoopSettings, prompt: str, model: str, completion: Completion, user: str | None) -> UUID:
    """Record an answer as an application records one, and return the id of the interaction.

    Args:
        model: full name of the model that answered.
        user: author of the prompt.
    """
    from finetune_pipeline.feedback import FeedbackClient

    with FeedbackClient(loop) as client:
        return client.log(
            prompt,
            completion.text.replace("\x00", "\ufffd"),  # databases cannot store NUL
            model=model,
            confidence=completion.confidence,
            variant=ASK,
            user=user,
            prompt_tokens=completion.prompt_tokens,
            completion_tokens=completion.completion_tokens,
        )
