"""Write the settings reference, the command-line reference and the JSON Schema of `defs.yaml` from the code.

    .venv/bin/python scripts/make_reference.py

A test fails while a file differs from what this script writes.
"""

import inspect
import json
import textwrap
from pathlib import Path
from typing import Any, get_args

import click
from pydantic import BaseModel, TypeAdapter
from pydantic_core import PydanticUndefined

from finetune_pipeline.cli.main import finetune
from finetune_pipeline.settings import (
    COMPONENT_TYPE,
    METRIC_KINDS,
    LoopSettings,
    MetricSettings,
    ParametersMetric,
    Source,
)

ROOT = Path(__file__).parents[1]
HELP_WIDTH = 100

SETTINGS_INTRO = """\
# Settings reference

Written by `scripts/make_reference.py` from
[`finetune_pipeline/settings.py`](../../finetune_pipeline/settings.py).

Settings go under `attributes:` of a loop's `defs.yaml`. Unknown keys, values out of range and
settings that contradict each other are errors. `{{ env.NAME }}` in a text stands for an environment
variable. Editors complete and check the file with
[`defs.schema.json`](../../finetune_pipeline/defs.schema.json), named in its first line:

    # yaml-language-server: $schema=<path to>/finetune_pipeline/defs.schema.json

A setting without a default is required. Relative paths start at the folder of the file if it lies
in `FINETUNE_LOOPS_DIR`, and at the project's folder if it lies in `finetune_pipeline/defs`."""

METRICS_INTRO = """\
## Metrics

`evaluation.metric` is a metric, and `evaluation.metrics` a list of metrics: the kind alone, or a
mapping of `kind` and the settings below. Every metric has a `name` too, by default its kind."""

CLI_INTRO = """\
# Command-line reference

Written by `scripts/make_reference.py` from the commands' own `--help`. Exit codes: 0 success, 1 an
error or a rejected challenger, 2 wrong usage, 130 Ctrl-C."""


def defs_schema() -> dict[str, Any]:
    """Return the JSON Schema of a loop's `defs.yaml`."""
    settings = LoopSettings.model_json_schema(ref_template="#/$defs/{model}")
    definitions = settings.pop("$defs")
    text = {"type": "string"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "defs.yaml of a fine-tuning loop",
        "type": "object",
        "required": ["type", "attributes"],
        "additionalProperties": False,
        "properties": {
            "type": {"const": COMPONENT_TYPE},
            "attributes": settings,
            "template_vars_module": text,
            "requirements": {"type": "object"},
            "post_processing": {"type": "object"},
        },
        "$defs": definitions,
    }


def settings_page() -> str:
    """Return the settings reference as Markdown: a table of each section, then one of each kind of source."""
    sections = [
        (name, field.annotation)
        for name, field in LoopSettings.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    ]
    names = {name for name, _ in sections}
    parts = [SETTINGS_INTRO, "## Top level", _table(LoopSettings, skip=names)]
    for name, section in sections:
        parts += [f"## {name}", _prose(section), _table(section)]
        for inner, field in section.model_fields.items():
            for model in get_args(field.annotation) or (field.annotation,):
                if isinstance(model, type) and issubclass(model, BaseModel) and not issubclass(model, MetricSettings):
                    parts += [f"### {name}.{inner}", _prose(model), _table(model)]
    schema = TypeAdapter(Source).json_schema()
    parts.append("## sources\n\nA list; `kind` says which settings an entry has.")
    for model in Source.__origin__.__args__:
        kind = schema["$defs"][model.__name__]["properties"]["kind"]["const"]
        parts += [f"### kind: {kind}", _prose(model), _table(model, skip={"kind"})]
    parts.append(METRICS_INTRO)
    for kind, metric in METRIC_KINDS.items():
        parts += [f"### metric: {kind}", _prose(metric)]
        if metric.model_fields.keys() - {"kind", "name"}:
            parts.append(_table(metric, skip={"kind", "name"}))
    return "\n\n".join(parts) + "\n"


def _prose(model: type[BaseModel]) -> str:
    paragraphs = inspect.cleandoc(model.__doc__ or "").split("\n\n")
    return "\n\n".join(textwrap.fill(paragraph, 100, break_on_hyphens=False) for paragraph in paragraphs)


def _table(model: type[BaseModel], skip: set[str] = frozenset()) -> str:  # type: ignore[assignment]
    schema = model.model_json_schema()
    rows = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if name in skip:
            continue
        default = field.get_default(call_default_factory=True)
        if isinstance(default, MetricSettings):
            default = default.kind
        elif isinstance(default, BaseModel):
            default = default.model_dump(mode="json", exclude_defaults=True)
        elif isinstance(default, tuple):
            default = list(default)
        elif isinstance(default, float) and default.is_integer():
            default = int(default)
        shown = "" if default is PydanticUndefined else f"`{'' if default is None else json.dumps(default)}`"
        kind = _type(schema["properties"][name], schema.get("$defs", {}))
        unset = "not set" if "`none`" in kind else "none"
        cells = (f"`{name}`", kind, shown.replace("``", unset), field.description or "")
        rows.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(rows)


def _limit(value: float) -> str:
    power = value.bit_length() - 1 if isinstance(value, int) and value >= 2**16 else 0
    return f"2^{power}" if power and value == 2**power else f"{value:g}"


def _type(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """Return the type of a JSON Schema in words, with its range."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        target = definitions[name]
        return "settings" if target.get("type") == "object" else _type(target, definitions)
    if options := schema.get("anyOf") or schema.get("oneOf"):
        if any(option.get("$ref", "").endswith(f"/{ParametersMetric.__name__}") for option in options):
            return "[metric](#metrics)"
        kinds = [_type(option, definitions) for option in options if option.get("type") != "null"]
        return ", or ".join(dict.fromkeys(kinds))
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    kind = schema.get("type")
    if kind == "array":
        items = schema.get("items") or {}
        return f"list of {_type(items, definitions)}" if items else "list"
    if kind == "object":
        return "mapping"
    limits = [
        f"{sign} {_limit(schema[key])}"
        for key, sign in (
            ("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"),
        )
        if key in schema
    ]  # fmt: skip
    word = {"string": "text", "integer": "integer", "number": "number", "boolean": "true or false"}.get(
        kind or "", "any"
    )
    return " ".join([word, ", ".join(limits)]).strip()


def cli_page() -> str:
    """Return the help of every command as Markdown."""
    parts = [CLI_INTRO]

    def add(command: click.Command, path: tuple[str, ...], parent: click.Context | None) -> None:
        context = click.Context(command, info_name=path[-1], parent=parent, terminal_width=HELP_WIDTH,
                                max_content_width=HELP_WIDTH)  # fmt: skip
        text = "\n".join(f"    {line}".rstrip() for line in command.get_help(context).splitlines())
        parts.append(f"## {' '.join(path)}\n\n{text}")
        if isinstance(command, click.Group):
            for name, child in sorted(command.commands.items()):
                if not child.hidden:
                    add(child, (*path, name), context)

    add(finetune, ("finetune",), None)
    return "\n\n".join(parts) + "\n"


def references() -> dict[Path, str]:
    """Return every file that this script writes, with its text."""
    return {
        ROOT / "docs" / "reference" / "settings.md": settings_page(),
        ROOT / "docs" / "reference" / "cli.md": cli_page(),
        ROOT / "finetune_pipeline" / "defs.schema.json": json.dumps(defs_schema(), indent=2) + "\n",
    }


if __name__ == "__main__":
    for path, text in references().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
