"""`finetune model`: list, show, switch, roll back, upload and clean up versions; see `cli.decide` for the others."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from finetune_pipeline.cli.decide import approve, archive, promote, reject, unarchive
from finetune_pipeline.cli.deploy import follow_champion
from finetune_pipeline.cli.options import UNLIMITED, json_option, loop_option, print_json
from finetune_pipeline.hosts import os_user
from finetune_pipeline.settings import LoopSettings

if TYPE_CHECKING:
    from finetune_pipeline.database import Database
    from finetune_pipeline.pipeline.challengers import Challenger
    from finetune_pipeline.registry.garbage_collection import RetentionDecision
    from finetune_pipeline.registry.model_versions import CandidateModel, ModelVersion


@click.group(short_help="Model versions: list, approve, switch, roll back, push.")
def model() -> None:
    """List, show, approve, switch, roll back, upload and clean up model versions."""


for command in (approve, reject, promote, archive, unarchive):
    model.add_command(command)


@model.command("list")
@click.option("--all", "everything", is_flag=True, help="List archived versions and all challengers too.")
@json_option
@loop_option
def list_(loop: LoopSettings, everything: bool, as_json: bool) -> None:
    """List the model versions, newest first; * marks the champion.

    Challengers, which were never promoted, are named by the beginning of their SHA-256. Without --all, only those that
    wait for approval are listed. JSON has all models.
    """
    from finetune_pipeline.database import connect
    from finetune_pipeline.pipeline.approval import pending_approval
    from finetune_pipeline.pipeline.challengers import list_challengers
    from finetune_pipeline.registry.champion import champion
    from finetune_pipeline.registry.deployment_history import deployment_stack, list_deployments
    from finetune_pipeline.registry.model_versions import list_models

    database = connect()
    serving = champion(database, loop.name)
    stack = deployment_stack(list_deployments(database, loop.name))
    if as_json:
        models = [{**one.model_dump(), "name": one.name} for one in list_models(database, loop.name)]
        champion_name = serving.name if serving else f"{loop.name}@base"
        others = [_challenger_json(one) for one in list_challengers(database, loop.name)]
        print_json({"champion": champion_name, "models": models, "challengers": others})
        return
    pending = pending_approval(loop, database)
    states = dict.fromkeys(stack[-2:-1], "previous") | {serving.id if serving else None: "champion"}
    table = Table(box=None, pad_edge=False)
    for heading in ("", "model", "accuracy", "latency", "size", "deployed (UTC)", ""):
        table.add_column(heading, no_wrap=True)
    for challenger in list_challengers(database, loop.name):
        waits = pending is not None and pending.approval.challenger_sha256 == challenger.sha256
        if not waits and not everything:
            continue
        accuracy, milliseconds = challenger.scores.get("accuracy"), challenger.scores.get("latency_p50_ms")
        table.add_row(
            "",
            challenger.name,
            f"{accuracy:.1%}" if accuracy is not None else "",
            f"{milliseconds:,.0f} ms" if milliseconds is not None else "",
            f"{sum(file.size for file in challenger.gguf.manifest.files.values()) / 1e6:,.1f} MB",
            "",
            pending.state if pending and waits else challenger.verdict,
        )
    for version in list_models(database, loop.name):
        if version.archived_at and not everything:
            continue
        marks = [states.get(version.id, ""), "archived" if version.archived_at else ""]
        latency = f"{version.latency_ms:,.0f} ms" if version.latency_ms is not None else ""
        table.add_row(
            "*" if serving and version.id == serving.id else "",
            version.name,
            f"{version.accuracy:.1%}" if version.accuracy is not None else "",
            latency or ("machine busy" if "speed_flag" in version.scores else ""),
            f"{version.size_bytes / 1e6:,.1f} MB" if version.size_bytes is not None else "",
            f"{version.deployed_at:%Y-%m-%d %H:%M}" if version.deployed_at else "",
            " ".join(filter(None, [*marks, "deleted" if version.deleted_at else ""])),
        )
    table.add_row("" if serving else "*", f"{loop.name}@base", "", "", "", "", states.get(None, ""))
    Console(width=UNLIMITED).print(table)


def _challenger_json(challenger: "Challenger") -> dict[str, Any]:
    compared = challenger.comparison
    return {
        "name": challenger.name,
        "sha256": challenger.sha256,
        "verdict": challenger.verdict,
        "reason": compared.reason if compared else None,
        "report_path": compared.report_path if compared else None,
        "gguf_model": challenger.gguf.manifest.version,
        "scores": challenger.scores,
        "created_at": challenger.created_at,
    }


@model.command(short_help="Show a version or a challenger.")
@click.argument("version", default="champion", is_eager=True)
@click.option("--card", is_flag=True, help="Print the model card (Markdown) instead.")
@json_option
@loop_option
def show(version: str, card: bool, loop: LoopSettings, as_json: bool) -> None:
    """Show VERSION (default: the champion), or the challenger with this SHA-256, in detail.

    Lists its files, scores, lineage, training run and report.
    """
    from finetune_pipeline.database import connect
    from finetune_pipeline.pipeline.challengers import find_trained
    from finetune_pipeline.pipeline.lineage import card as card_of
    from finetune_pipeline.registry.model_versions import ModelVersion

    database = connect()
    found = find_trained(database, _version_of(database, loop, version), loop.name)
    if card and as_json:
        raise click.UsageError("--card prints Markdown; leave out --json")
    if as_json:
        base = {"name": f"{loop.name}@base", "base_model": loop.base_model}
        print_json({**found.model_dump(), "name": found.name} if found else base)
    elif found is None:
        click.echo(f"{loop.name}@base: the base model {loop.base_model}")
    elif card and isinstance(found, ModelVersion):
        click.echo(card_of(database, loop, found), nl=False)
    elif card:
        report = found.report_path
        raise click.ClickException(f"{found.name} has no model card before its promotion; its report is {report}")
    else:
        click.echo(click.style(found.name, bold=True))
        for name, value in _details(database, found):
            click.echo(f"  {name:<9} {value}")


def _details(database: "Database", found: "CandidateModel") -> Iterator[tuple[str, str]]:
    from finetune_pipeline.pipeline.challengers import find_challenger
    from finetune_pipeline.registry.model_versions import ModelVersion
    from finetune_pipeline.registry.trainings import find_training

    yield "GGUF", f"{found.gguf_path}"
    yield "SHA-256", found.gguf_sha256
    if found.adapter_path:
        yield "adapter", f"{found.adapter_path}"
        yield "SHA-256", f"{found.adapter_sha256}"
    yield "report", f"{found.report_path}"
    if isinstance(found, ModelVersion):
        yield "promoted", f"{found.created_at:%Y-%m-%d %H:%M} UTC, {found.mode} training"
        for name in ("deployed", "retired", "archived", "deleted"):
            moment = getattr(found, f"{name}_at")
            if moment:
                yield name, f"{moment:%Y-%m-%d %H:%M} UTC"
        if found.size_bytes is not None:
            yield "size", f"{found.size_bytes / 1e6:,.1f} MB"
    else:
        challenger = find_challenger(database, found.id, found.loop)
        reason = challenger.comparison.reason.replace("\n", "; ") if challenger.comparison else ""
        yield "verdict", f"{challenger.verdict}: {reason}".removesuffix(": ")
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


@model.command(short_help="Make a version the champion.")
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
    found = switch_to(database, loop.name, version, os_user(), reason, loop.deploy.config)
    click.echo(f"{_name(found, loop)} is the champion now")
    follow_champion(loop)


@model.command(short_help="Restore the previous champion, or a version.")
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
        found = switch(database, loop.name, given, os_user(), reason, loop.deploy.config)
    else:
        found = roll_back(database, loop.name, os_user(), reason, loop.deploy.config)
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


@model.command(short_help="Upload a version to the Hugging Face Hub.")
@click.argument("version", is_eager=True)
@click.argument("repo_id")
@click.option("--private/--public", default=True, show_default=True, help="Who can read a new repository.")
@click.option("--merged", is_flag=True, help="Upload the merged weights too, as safetensors.")
@loop_option
def push(version: str, repo_id: str, private: bool, merged: bool, loop: LoopSettings) -> None:
    """Upload VERSION (v1.2.0, champion or base) to the Hugging Face Hub as REPO_ID (owner/name).

    Uploads adapter, GGUF, tokenizer and model card. Uses the token in HF_TOKEN, or that of `hf auth login`.
    """
    from finetune_pipeline.pipeline.push_model import push_model

    click.echo(
        push_model(loop, version, repo_id, lambda line: click.echo(line, err=True), public=not private, merged=merged)
    )


@model.command(short_help="Show deployments and what people decided.")
@json_option
@loop_option
def history(loop: LoopSettings, as_json: bool) -> None:
    """Show all deployments of the loop, and what people decided about its models, oldest first.

    promote: the gate accepted the model. approve: a person did so too. force: a person overruled the gate. switch,
    rollback: a person chose an earlier version. reject, archive and unarchive do not change the champion.
    """
    from finetune_pipeline.database import connect
    from finetune_pipeline.pipeline.sealed_benchmark import sealed_findings
    from finetune_pipeline.registry.deployment_history import list_history
    from finetune_pipeline.registry.model_versions import list_models

    database = connect()
    versions = {version.id: version.name for version in list_models(database, loop.name)}
    rows, sealed = list_history(database, loop.name), sealed_findings(database, loop.name)
    names = {one.model_id: versions.get(one.model_id or "", f"{loop.name}@{one.model_id or 'base'}") for one in rows}
    if as_json:
        print_json([{**one.model_dump(), "model": names[one.model_id], "sealed": sealed.get(one.id)} for one in rows])
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("time (UTC)", "action", "model", "actor", "reason"):
        table.add_column(heading, overflow="fold")
    if not rows:
        click.echo(f"loop {loop.name} has no deployments yet; the base model serves")
        return
    for one in rows:
        found = f"\nsealed benchmark, {sealed[one.id]}" if one.id in sealed else ""
        cells = (f"{one.created_at:%Y-%m-%d %H:%M}", one.action, names[one.model_id], one.actor)
        table.add_row(*cells, one.reason + found)
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
    database; deleted versions are archived.
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
    deleted = delete_models(database, loop, base, kept, [one.folder.path for one in to_delete], os_user())
    click.echo(f"deleted {len(deleted)} of {len(decisions)} folders, {_megabytes(deleted)}")
    if len(deleted) < len(to_delete):
        click.echo(f"kept {len(to_delete) - len(deleted)} folders that are in use by now")


def _megabytes(decisions: "Iterable[RetentionDecision]") -> str:
    return f"{sum(one.folder.size for one in decisions) / 1e6:,.1f} MB"
