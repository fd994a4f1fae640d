"""`finetune ask`: send one prompt to a model of the loop, as the application would."""

import click

from finetune_pipeline.cli.options import loop_option
from finetune_pipeline.inference.protocol import ModelSpec
from finetune_pipeline.settings import LoopSettings


@click.command()
@click.argument("prompt")
@click.option(
    "--model",
    "name",
    default="champion",
    show_default=True,
    help="champion, previous, base, or a version such as v1.2.0.",
)
@click.option("--compare", is_flag=True, help="Print the base model's answer too.")
@loop_option
def ask(prompt: str, name: str, compare: bool, loop: LoopSettings) -> None:
    """Send PROMPT to a model and print the answer."""
    if compare:
        compare_with_base(loop, prompt, name)
    else:
        click.echo(generate_answers(loop, find_model(loop, name)[1], prompt)[0])


def find_model(loop: LoopSettings, name: str) -> tuple[str, ModelSpec]:
    """Return the full name and the files of champion, previous, base or a version; export the base if necessary."""
    from finetune_pipeline.database import connect
    from finetune_pipeline.export.base_gguf import base_gguf
    from finetune_pipeline.registry.champion import resolve
    from finetune_pipeline.registry.model_versions import check_files

    version = resolve(connect(), name, loop.name)
    if version is not None:
        check_files(version, again=False)
        return version.name, ModelSpec(gguf=version.gguf_path, adapter=version.adapter_path)
    return f"{loop.name}@base", ModelSpec(gguf=base_gguf(loop, click.echo))


def generate_answers(loop: LoopSettings, spec: ModelSpec, *prompts: str) -> list[str]:
    """Return a model's answers with the loop's system prompt and limits."""
    from finetune_pipeline.inference.engine import Engine
    from finetune_pipeline.inference.protocol import GenerateRequest
    from finetune_pipeline.records import chat_messages

    requests = [
        GenerateRequest(messages=chat_messages(loop.system_prompt, prompt), max_tokens=loop.evaluation.max_tokens)
        for prompt in prompts
    ]
    with Engine(spec.model_copy(update={"context": loop.evaluation.context, "parallel": 1})) as engine:
        return [completion.text for completion in engine.generate(requests)]


def compare_with_base(loop: LoopSettings, prompt: str, name: str = "champion") -> None:
    """Print the answers of the base model and of another model to one prompt; only one if they are the same model."""
    click.echo(click.style(f"\n{prompt!r}", bold=True))
    models = dict(find_model(loop, one) for one in ("base", name))
    for full_name, spec in models.items():
        click.echo(f"  {full_name:<22} {generate_answers(loop, spec, prompt)[0]}")
    if len(models) == 1 and name == "champion":
        click.echo(f"  no champion yet: `finetune run --loop {loop.name}` trains one")
    elif len(models) == 1:
        click.echo(f"  {name} is the base model; name another with --model")
