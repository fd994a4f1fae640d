"""`finetune ask`: send one prompt to a model of the loop, as the application would."""

import click

from finetune_pipeline.cli.options import loop_option
from finetune_pipeline.inference.protocol import Completion, ModelSpec
from finetune_pipeline.records import ASK
from finetune_pipeline.settings import LoopSettings, with_loop


@click.command()
@click.argument("prompt")
@click.option(
    "--model",
    "name",
    default="champion",
    show_default=True,
    help="champion, previous, base, a version such as v1.2.0, or the first digits of a challenger's SHA-256.",
)
@click.option("--compare", is_flag=True, help="Print the base model's answer too. Neither answer is recorded.")
@click.option("--record/--no-record", default=True, show_default=True, help="Record the interaction, for feedback.")
@click.option("--user", metavar="NAME", help="Author of the prompt, in the record.")
@loop_option
def ask(prompt: str, name: str, compare: bool, record: bool, user: str | None, loop: LoopSettings) -> None:
    """Send PROMPT to a model and print the answer.

    It is decoded as the gateway decodes it.

    The interaction is recorded as one of an application is, and its id is printed to stderr: `finetune feedback correct
    ID TEXT` corrects the answer. It trains only if somebody gives feedback on it.
    """
    if not prompt.strip():
        raise click.UsageError("PROMPT is empty; give the text to answer")
    if compare:
        compare_with_base(loop, prompt, name)
        return
    full_name, spec = find_model(loop, name)
    completion = generate(loop, spec, prompt)[0]
    click.echo(completion.text)
    if record:
        from finetune_pipeline.feedback import FeedbackClient

        with FeedbackClient(loop) as client:
            id = client.log(
                prompt,
                completion.text.replace("\x00", "\ufffd"),  # databases cannot store NUL
                model=full_name,
                confidence=completion.confidence,
                variant=ASK,
                user=user,
                prompt_tokens=completion.prompt_tokens,
                completion_tokens=completion.completion_tokens,
            )
        click.echo(f"recorded as {id}", err=True)


def find_model(loop: LoopSettings, name: str) -> tuple[str, ModelSpec]:
    """Return the full name and the files of a version, a challenger or the base; export the base if necessary."""
    from finetune_pipeline.database import connect
    from finetune_pipeline.export.base_gguf import base_gguf
    from finetune_pipeline.pipeline.challengers import find_trained
    from finetune_pipeline.registry.model_versions import check_files

    version = find_trained(connect(), name, loop.name)
    if version is not None:
        check_files(version, again=False)
        return version.name, ModelSpec(gguf=version.gguf_path, adapter=version.adapter_path)
    return f"{loop.name}@base", ModelSpec(gguf=base_gguf(loop, click.echo))


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


def compare_with_base(loop: LoopSettings, prompt: str, name: str = "champion") -> None:
    """Print the answers of the base model and of another model to one prompt; only one if they are the same model."""
    click.echo(click.style(f"\n{prompt!r}", bold=True))
    models = dict(find_model(loop, one) for one in ("base", name))
    for full_name, spec in models.items():
        click.echo(f"  {full_name:<22} {generate_answers(loop, spec, prompt)[0]}")
    if len(models) == 1 and name == "champion":
        click.echo(f"  no champion yet: `{with_loop('finetune run', loop)}` trains one")
    elif len(models) == 1:
        click.echo(f"  {name} is the base model; name another with --model")
