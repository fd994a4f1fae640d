"""`finetune model`: list, show, switch, roll back and clean up model versions."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from finetune_pipeline.cli.deploy import follow_champion
from finetune_pipeline.cli.options import UNLIMITED, actor, json_option, loop_option, print_json
from finetune_pipeline.settings import LoopSettings

if TYPE_CHECKING:
    from finetune_pipeline.database import Database
    from finetune_pipeline.registry.garbage_collection import RetentionDecision
    from finetune_pipeline.registry.model_versions import ModelVersion


@click.group()
def model() -> None:
    """List, show, switch, roll back and clean up model versions."""


@model.command("list")
@json_option
@loop_option
def list_(loop: LoopSettings, as_json: bool) -> None:
    """List the model versions, newest first; * marks the champion."""
    from finetune_pipeline.database import connect
    from finetune_pipeline.registry.champion import champion
    from finetune_pipeline.registry.deployment_history import deployment_stack, list_deployments
    from finetune_pipeline.registry.model_versions import list_models

    database = connect()
    serving = champion(database, loop.name)
    stack = deployment_stack(list_deployments(database, loop.name))
    if as_json:
        models = [{**one.model_dump(), "name": one.name} for one in list_models(database, loop.name)]
        print_json({"champion": serving.name if serving else f"{loop.name}@base", "models": models})
        return
    states = dict.fromkeys(stack[-2:-1], "previous") | {serving.id if serving else None: "champion"}
    table = Table(box=None, pad_edge=False)
    for heading in ("", "model", "accuracy", "latency", "size", "deployed (UTC)", ""):
        table.add_column(heading, no_wrap=True)
    for version in list_models(database, loop.name):
        latency = f"{version.latency_ms:,.0f} ms" if version.latency_ms is not None else ""
        table.add_row(
            "*" if serving and version.id == serving.id else "",
            version.name,
            f"{version.accuracy:.1%}" if version.accuracy is not None else "",
            latency or ("machine busy" if "speed_flag" in version.scores else ""),
            f"{version.size_bytes / 1e6:,.1f} MB" if version.size_bytes is not None else "",
            f"{version.deployed_at:%Y-%m-%d %H:%M}" if version.deployed_at else "",
            " ".join(filter(None, [states.get(version.id, ""), "deleted" if version.deleted_at else ""])),
        )
    table.add_row("" if serving else "*", f"{loop.name}@base", "", "", "", "", states.get(None, ""))
    Console(width=UNLIMITED).print(table)


@model.command()
@click.argument("version", default="champion", is_eager=True)
@click.option("--card", is_flag=True, help="Print the model card (Markdown) instead.")
@json_option
@loop_option
def show(version: str, card: bool, loop: LoopSettings, as_json: bool) -> None:
    """Show VERSION (default: the champion) in detail.

    Lists its files, scores, lineage, training run and report.
    """
    from finetune_pipeline.database import connect
    from finetune_pipeline.pipeline.lineage import card as card_of
    from finetune_pipeline.registry.champion import resolve

    database = connect()
    found = resolve(database, _version_of(database, loop, version), loop.name)
    if card and as_json:
        raise click.UsageError("--card prints Markdown; leave out --json")
    if as_json:
        base = {"name": f"{loop.name}@base", "base_model": loop.base_model}
        print_json({**found.model_dump(), "name": found.name} if found else base)
    elif found is None:
        click.echo(f"{loop.name}@base: the base model {loop.base_model}")
    elif card:
        click.echo(card_of(database, loop, found), nl=False)
    else:
        click.echo(click.style(found.name, bold=True))
        for name, value in _details(database, found):
            click.echo(f"  {name:<9} {value}")


def _details(database: "Database", found: "ModelVersion") -> Iterator[tuple[str, str]]:
    from finetune_pipeline.registry.trainings import find_training

    yield "GGUF", f"{found.gguf_path}"
    yield "SHA-256", found.gguf_sha256
    if found.adapter_path:
        yield "adapter", f"{found.adapter_path}"
        yield "SHA-256", f"{found.adapter_sha256}"
    yield "report", f"{found.report_path}"
    yield "promoted", f"{found.created_at:%Y-%m-%d %H:%M} UTC, {found.mode} training"
    for name in ("deployed", "retired", "deleted"):
        moment = getattr(found, f"{name}_at")
        if moment:
            yield name, f"{moment:%Y-%m-%d %H:%M} UTC"
    if found.size_bytes is not None:
        yield "size", f"{found.size_bytes / 1e6:,.1f} MB"
    groups: dict[str, dict[str, Any]] = {"scores": found.scores, "lineage": found.lineage}
    training = find_training(database, found.loop, found.lineage.get("lora_adapter", ""))
    if training:
        groups["training"] = training.model_dump(exclude={"id", "loop", "watermark"})
    for title, values in groups.items():
        for number, (key, value) in enumerate(values.items()):
            yield title if number == 0 else "", f"{key}: {_rounded(key, value)}"


def _rounded(key: str, value: Any) -> Any:
    """Return a number with 4 digits, and a rate in percent; "none" for None, and any other value as it is."""
    if value is None:
        return "none"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else value
    if key in {"accuracy", "exact_match"} or key.endswith("_rate"):
        return f"{value:.1%}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


@model.command()
@click.argument("version", is_eager=True)
@click.option("--reason", default="switched in the terminal", show_default=True, help="Recorded in the history.")
@loop_option
def switch(version: str, reason: str, loop: LoopSettings) -> None:
    """Make VERSION (v1.2.0, its tag in the repository of Modelfiles, or base) the champion.

    Then brings the deployment targets to it; one that fails is a warning.
    """
    from finetune_pipeline.database import connect
    from finetune_pipeline.registry.champion import champion, resolve
    from finetune_pipeline.registry.champion import switch as switch_to

    database = connect()
    version = _version_of(database, loop, version)
    before, target = champion(database, loop.name), resolve(database, version, loop.name)
    if (before.id if before else None) == (target.id if target else None):
        click.echo(f"{_name(target, loop)} is already the champion")
        return
    found = switch_to(database, loop.name, version, actor(), reason, loop.deploy.config)
    click.echo(f"{_name(found, loop)} is the champion now")
    follow_champion(loop)


@model.command()
@click.argument("version", required=False, is_eager=True)
@click.option("--reason", default="rolled back in the terminal", show_default=True, help="Recorded in the history.")
@loop_option
def rollback(version: str | None, reason: str, loop: LoopSettings) -> None:
    """Restore the previous champion, or VERSION (v1.2.0, its tag in the repository of Modelfiles, or base).

    A second rollback without VERSION goes one more step back. A VERSION that is not the previous champion is recorded
    as a switch. Then brings the deployment targets to the champion; one that fails is a warning.
    """
    from finetune_pipeline.database import connect
    from finetune_pipeline.registry.champion import resolve, switch
    from finetune_pipeline.registry.champion import rollback as roll_back
    from finetune_pipeline.registry.deployment_history import deployment_stack, list_deployments

    database = connect()
    given = version and _version_of(database, loop, version)
    target = resolve(database, given, loop.name) if given else None
    previous = deployment_stack(list_deployments(database, loop.name))[-2:-1]
    if given and previous != [target.id if target else None]:
        found = switch(database, loop.name, given, actor(), reason, loop.deploy.config)
    else:
        found = roll_back(database, loop.name, actor(), reason, loop.deploy.config)
    click.echo(f"{_name(found, loop)} is the champion again")
    follow_champion(loop)


def _version_of(database: "Database", loop: LoopSettings, name: str) -> str:
    """Return the version that a tag of the loop's repository of Modelfiles names, and any other name as it is."""
    from finetune_pipeline.registry.champion import resolve
    from finetune_pipeline.registry.model_versions import RegistryError

    modelfiles = loop.deploy.modelfiles
    version = modelfiles.version_of(loop.name, name) if modelfiles else None
    if modelfiles is None or version is None:
        return name
    found = resolve(database, version, loop.name)
    tag = modelfiles.tag_of(loop.name, version, found.created_at.date()) if found else name
    if tag != name:
        raise RegistryError(f"{loop.name} has no version with the tag {name}; the tag of {version} is {tag}")
    return version


def _name(version: "ModelVersion | None", loop: LoopSettings) -> str:
    return version.name if version else f"{loop.name}@base"


@model.command()
@json_option
@loop_option
def history(loop: LoopSettings, as_json: bool) -> None:
    """Show all deployments of the loop, oldest first."""
    from finetune_pipeline.database import connect
    from finetune_pipeline.registry.deployment_history import list_deployments
    from finetune_pipeline.registry.model_versions import list_models

    database = connect()
    names = {version.id: version.name for version in list_models(database, loop.name)}
    if as_json:
        deployments = list_deployments(database, loop.name)
        print_json(
            [{**one.model_dump(), "model": names.get(one.model_id or "", f"{loop.name}@base")} for one in deployments]
        )
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("time (UTC)", "action", "model", "actor", "reason"):
        table.add_column(heading, overflow="fold")
    deployments = list_deployments(database, loop.name)
    if not deployments:
        click.echo(f"loop {loop.name} has no deployments yet; the base model serves")
        return
    for one in deployments:
        name = names.get(one.model_id or "", f"{loop.name}@base")
        table.add_row(f"{one.created_at:%Y-%m-%d %H:%M}", one.action, name, one.actor, one.reason)
    Console().print(table)


@model.command()
@click.option(
    "--keep", type=click.IntRange(min=1), help="Keep models of this many newest deployments. Default: registry.keep."
)
@click.option("--dry-run", is_flag=True, help="Show what would be deleted, and delete nothing.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@json_option
@loop_option
def gc(keep: int | None, dry_run: bool, yes: bool, loop: LoopSettings, as_json: bool) -> None:
    """Delete unused model files.

    These are old versions, their merged weights, rejected challengers and old base models. The champion, the previous
    model, the models of the newest deployments and everything in progress are kept. History and metrics stay in the
    database.
    """
    from finetune_pipeline.database import connect
    from finetune_pipeline.export.base import base_hash, resolve_base_model
    from finetune_pipeline.registry.garbage_collection import delete_models, plan_deletion

    database, base, kept = connect(), base_hash(resolve_base_model(loop.base_model)), keep or loop.registry.keep
    decisions = plan_deletion(database, loop, base, kept)
    if as_json:
        if not dry_run:
            raise click.UsageError("--json lists what would be deleted; give --dry-run too")
        print_json(
            [{"path": x.folder.path, "bytes": x.folder.size, "keep": x.keep, "reason": x.reason} for x in decisions]
        )
        return
    to_delete = [one for one in decisions if not one.keep]
    for one in sorted(decisions, key=lambda one: one.keep):
        folder = f"{one.folder.path.parent.name}/{one.folder.path.name}"
        click.echo(f"{'keep' if one.keep else 'delete':<7} {_megabytes([one]):>10}  {folder}  {one.reason}")
    if not to_delete:
        click.echo("nothing to delete")
        return
    what = f"{len(to_delete)} of {len(decisions)} folders, {_megabytes(to_delete)}"
    if dry_run:
        click.echo(f"would delete {what}")
        return
    if not yes:
        click.confirm(f"delete {what}?", abort=True)
    deleted = delete_models(database, loop, base, kept, [one.folder.path for one in to_delete])
    click.echo(f"deleted {len(deleted)} of {len(decisions)} folders, {_megabytes(deleted)}")
    if len(deleted) < len(to_delete):
        click.echo(f"kept {len(to_delete) - len(deleted)} folders that are in use by now")


def _megabytes(decisions: "Iterable[RetentionDecision]") -> str:
    return f"{sum(one.folder.size for one in decisions) / 1e6:,.1f} MB"
