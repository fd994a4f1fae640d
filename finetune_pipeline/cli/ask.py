"""`finetune ask`: one prompt to the model that serves, as the application would ask it."""

import click

from finetune_pipeline.cli.options import loop_option
from finetune_pipeline.inference.protocol import ModelSpec
from finetune_pipeline.settings import LoopSettings


@click.command()
@click.argument("prompt")
@click.option("--model", "name", default="champion", show_default=True, help="champion, previous, base, or a version.")
@click.option("--compare", is_flag=True, help="Ask the base model too, and show both answers.")
@loop_option
def ask(prompt: str, name: str, compare: bool, loop: LoopSettings) -> None:
    """Ask the loop's model PROMPT and print its answer."""
    if compare:
        side_by_side(loop, prompt)
    else:
        click.echo(answers(loop, spec_of(loop, name)[1], prompt)[0])


def spec_of(loop: LoopSettings, name: str) -> tuple[str, ModelSpec]:
    """The full name and the files of a version, champion or base; the base's file is made if it is not there yet."""
    from finetune_pipeline.database import connect
    from finetune_pipeline.export.base_gguf import base_gguf
    from finetune_pipeline.registry.champion import resolve
    from finetune_pipeline.registry.model_versions import check_files

    found = resolve(connect(), name, loop.name)
    if found is not None:
        check_files(found, again=False)
        return found.name, ModelSpec(gguf=found.gguf_path, adapter=found.adapter_path)
    return f"{loop.name}@base", ModelSpec(gguf=base_gguf(loop, click.echo))


def answers(loop: LoopSettings, spec: ModelSpec, *prompts: str) -> list[str]:
    """What a model answers, with the loop's system prompt and limits."""
    from finetune_pipeline.inference.engine import Engine
    from finetune_pipeline.inference.protocol import GenerateRequest
    from finetune_pipeline.records import chat_messages

    requests = [
        GenerateRequest(messages=chat_messages(loop.system_prompt, prompt), max_tokens=loop.evaluation.max_tokens)
        for prompt in prompts
    ]
    with Engine(spec.model_copy(update={"context": loop.evaluation.context, "parallel": 1})) as engine:
        return [completion.text for completion in engine.generate(requests)]


def side_by_side(loop: LoopSettings, prompt: str) -> None:
    """Print the answers of the base model and of the champion to one prompt."""
    click.echo(click.style(f"\n{prompt!r}", bold=True))
    for name in ("base", "champion"):
        full_name, spec = spec_of(loop, name)
        click.echo(f"  {full_name:<22} {answers(loop, spec, prompt)[0]}")
