"""`finetune ask`: send one prompt to a model of the loop, as the application would."""

import click

from finetune_pipeline.cli.options import loop_option
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
    from finetune_pipeline.pipeline.ask import find_model, generate, record_answer

    full_name, spec = find_model(loop, name, click.echo)
    completion = generate(loop, spec, prompt)[0]
    click.echo(completion.text)
    if record:
        click.echo(f"recorded as {record_answer(loop, prompt, full_name, completion, user)}", err=True)


def compare_with_base(loop: LoopSettings, prompt: str, name: str = "champion") -> None:
    """Print the answers of the base model and of another model to one prompt; only one if they are the same model."""
    from finetune_pipeline.pipeline.ask import find_model, generate_answers

    click.echo(click.style(f"\n{prompt!r}", bold=True))
    models = dict(find_model(loop, one, click.echo) for one in ("base", name))
    for full_name, spec in models.items():
        click.echo(f"  {full_name:<22} {generate_answers(loop, spec, prompt)[0]}")
    if len(models) == 1 and name == "champion":
        click.echo(f"  the champion is the base model; see `{with_loop('finetune status', loop)}`")
    elif len(models) == 1:
        click.echo(f"  {name} is the base model; name another with --model")
