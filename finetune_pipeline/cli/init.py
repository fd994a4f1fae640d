"""`finetune init`: a folder for a new loop."""

import os
import shlex
from contextlib import suppress
from pathlib import Path

import click

from finetune_pipeline.pipeline.loop_template import DEFAULT_BASE
from finetune_pipeline.settings import load_loops


@click.command()
@click.argument("name")
@click.option(
    "--data", type=click.Path(path_type=Path), metavar="FILE",
    help="Rows to train on and to make the benchmark from: a JSONL, JSON, CSV or Parquet file.",
)  # fmt: skip
@click.option("--base", metavar="MODEL", default=DEFAULT_BASE, show_default=True, help="Hugging Face id, or a folder.")
@click.option(
    "--folder", type=click.Path(path_type=Path), metavar="DIR",
    help="The folder of your loops; default $FINETUNE_LOOPS_DIR, else ./loops.",
)  # fmt: skip
def init(name: str, data: Path | None, base: str, folder: Path | None) -> None:
    """Write the folder of a new loop named NAME.

    It gets settings with comments, a README, data/rows.jsonl and benchmark.jsonl. With --data, a quarter of the rows
    becomes the benchmark, in slices; the JSON Schema of JSON answers is inferred; and metric, learning rate and lengths
    are set from the rows and the base model. The rows are in the format alpaca, prompt_completion, sharegpt or messages
    (docs/how-to/sources.md). Without --data, rows and benchmark are empty, and `finetune check` says what to write.
    """
    from finetune_pipeline.pipeline.init_loop import init_loop

    given = os.environ.get("FINETUNE_LOOPS_DIR")
    loops = (folder or Path(given or "loops")).expanduser().resolve()
    if given and folder is None:
        with suppress(OSError):  # writing the loop will say why
            loops.mkdir(parents=True, exist_ok=True)
    written = init_loop(name, loops, base, data)
    click.echo(f"loop {name} written to {written.folder}")
    for line in written.lines:
        click.echo(f"  {line}")
    is_default = len(load_loops([loops])) == 1 and os.environ.get("FINETUNE_LOOP", name) == name
    option = "" if is_default else f" --loop {name}"
    click.echo("next:")
    if data is None:
        click.echo(f"  write rows and questions; {written.folder / 'README.md'} shows how")
    if given is None or Path(given).expanduser().resolve() != loops:
        click.echo(f"  export FINETUNE_LOOPS_DIR={shlex.quote(str(loops))}")
    click.echo(f"  finetune check{option}")
    click.echo(f"  finetune run{option}")
