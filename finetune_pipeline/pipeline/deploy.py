"""Deploy the champion: bring each of a loop's targets to it, and keep it there.

Promotion is a transaction over the registry and ends before anything here starts. So a target that is down, slow or
wrong can neither block nor change the registry; it is brought to the champion later.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from finetune_pipeline.alerts import send
from finetune_pipeline.artifacts import (
    ArtifactError,
    check_unaltered,
    find,
    hash_of,
    stage_folder,
)
from finetune_pipeline.curation.errors import CurationError
from finetune_pipeline.database import Database, DatabaseError, connect
from finetune_pipeline.deployment.target import BASE, Observed, Release, Target, TargetError, TargetRefused
from finetune_pipeline.deployment.target_state import (
    ActiveRelease,
    Lease,
    LeaseLostError,
    TargetState,
    take_lease,
    target_states,
)
from finetune_pipeline.deployment.targets import open_target
from finetune_pipeline.evaluation.benchmark import BenchmarkError
from finetune_pipeline.evaluation.metrics import MetricError
from finetune_pipeline.export.base import base_hash, hub_id, resolve_base_model
from finetune_pipeline.export.base_gguf import base_gguf_artifact
from finetune_pipeline.export.process import ExportError
from finetune_pipeline.inference.errors import EngineError
from finetune_pipeline.manifests import ADAPTER_CONFIG, AdapterManifest
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.pipeline.alert_texts import deployment
from finetune_pipeline.pipeline.deploy_parity import VERSION as PARITY_VERSION
from finetune_pipeline.pipeline.deploy_parity import ParityError, check_parity
from finetune_pipeline.pipeline.lineage import card
from finetune_pipeline.pipeline.merged_model import merged_model
from finetune_pipeline.registry.champion import champion
from finetune_pipeline.registry.deployment_history import list_deployments, newest_deployment_in
from finetune_pipeline.registry.model_versions import (
    CandidateModel,
    ModelVersion,
    RegistryError,
    check_files,
    list_models,
)
from finetune_pipeline.schemas import SchemaError
from finetune_pipeline.settings import Follower, LoopSettings, SettingsError, UpstreamSettings
from finetune_pipeline.wording import duration

OBSERVE_SECONDS = 60.0
"""How often an active target is asked what it serves."""

TAKING_TOKEN_IDS = {"vllm", "llama_server"}
"""Kinds of targets whose /v1/completions takes token ids as the prompt."""

KEPT_COMPARISONS = 10
"""Results of comparisons with the judged model that a target's row keeps, the newest ones."""

LONGEST_WAIT = 3600.0
"""The longest wait between two tries, in seconds."""

_EXPECTED = (
    ArtifactError,
    BenchmarkError,
    CurationError,
    EngineError,
    ExportError,
    MetricError,
    OSError,
    RegistryError,
    SchemaError,
    SettingsError,
    TargetError,
)
"""Errors whose message says what to do; any other one is a bug, of which the log gets the traceback."""

_log = logging.getLogger(__name__)


class ConfigRefused(RuntimeError):
    """A deployment target cannot apply a `deployment_config`.

    Attributes:
        key: the setting; empty if it is their combination.
    """

    def __init__(self, message: str, key: str) -> None:
        super().__init__(message)
        self.key = key


def release_of(
    loop: LoopSettings,
    model: CandidateModel | None,
    log: Callable[[str], None] = _log.info,
    *,
    merged: bool = False,
) -> Release:
    """Return a model with everything that a target needs to serve it.

    Args:
        model: a model version, or a model that was never promoted, whose label is its id; None is the base model.
        merged: whether the release needs the merged weights in Hugging Face's format. They are made if necessary.

    Raises:
        RegistryError: a file of the model is missing or differs from the evaluated one.
        ArtifactError: the adapter was changed, or the base model that the model was trained on is not here.
        ExportError: the base model is missing, or the merge failed.
    """
    shared: dict[str, Any] = {
        "loop": loop.name,
        "system_prompt": loop.system_prompt,
        "context": loop.serving.context or loop.evaluation.context,
        "max_tokens": loop.serving.max_tokens or loop.evaluation.max_tokens,
        "config": config_in_effect(loop, connect()),
    }
    if model is None:
        folder, base = resolve_base_model(loop.base_model), base_gguf_artifact(loop, log)
        sha256 = base.manifest.files[base.manifest.gguf].sha256
        return Release(
            label=BASE,
            sha256=sha256,
            gguf=base.path / base.manifest.gguf,
            gguf_sha256=sha256,
            base_folder=folder,
            base_name=hub_id(folder) or folder.name,
            merged_folder=folder if merged else None,
            **shared,
        )
    check_files(model, again=False)
    folder = _base_folder(loop, model)
    adapter = _adapter_folder(loop, model)
    if merged and adapter is None:
        raise ArtifactError(
            f"{model.display_name} has no adapter under {stage_folder(loop.name, AdapterManifest.stage)} any more, so "
            "its weights cannot be merged; train again, or deploy it as GGUF"
        )
    return Release(
        label=model.version if isinstance(model, ModelVersion) else model.id,
        sha256=model.sha256,
        gguf=model.gguf_path,
        gguf_sha256=model.gguf_sha256,
        base_folder=folder,
        base_name=hub_id(folder) or folder.name,
        adapter_gguf=model.adapter_path,
        adapter_folder=adapter,
        merged_folder=merged_model(loop, folder, adapter.parent, log) if merged and adapter else None,
        model_card=card(connect(), loop, model) if isinstance(model, ModelVersion) else "",
        promoted_at=model.created_at if isinstance(model, ModelVersion) else None,
        **shared,
    )


def config_in_effect(loop: LoopSettings, db: Database) -> dict[str, Any]:
    """Return the `deployment_config` of the loop's newest deployment: its request's over the settings'."""
    with db.read() as connection:
        newest = newest_deployment_in(connection, loop.name)
    requested = newest.requested_config if newest else None
    return {**loop.deploy.config, **(requested or {})}


def check_config(loop: LoopSettings, model: CandidateModel | None, config: Mapping[str, Any]) -> None:
    """Raise an error unless each of the loop's targets can apply each setting of a request; nothing is sent to it.

    Args:
        model: the model that is to be deployed; None for the base model.
        config: `deployment_config` of the request.

    Raises:
        ConfigRefused: a target cannot apply a setting, or the loop has no target.
        RegistryError: a file of the model is missing or differs from the evaluated one.
        ArtifactError: as in `release_of`.
    """
    if not config:
        return
    if not loop.deploy.followers:
        raise ConfigRefused(
            f"{next(iter(config))}: loop {loop.name} has no deployment target that could apply it; add one under "
            "deploy.targets, or leave it out",
            next(iter(config)),
        )
    release = release_of(loop, model)
    together = {"": dict(config)} if len(config) > 1 else {}  # alone first, so that the error names the setting
    for key, part in ({name: {name: value} for name, value in config.items()} | together).items():
        asked = replace(release, config={**loop.deploy.config, **part})
        for setting in loop.deploy.followers:
            try:
                open_target(setting, loop.name).check_config(asked)
            except TargetRefused as error:
                reason = str(error).removeprefix("deploy.config: ")
                raise ConfigRefused(f"{reason} (target {setting.key})", key) from error


def _base_folder(loop: LoopSettings, model: CandidateModel) -> Path:
    """Return the folder of the base model that a model was trained on, which may not be the loop's any more."""
    named = [Path(model.lineage["base_model"])] if "base_model" in model.lineage else []
    for folder in (*named, resolve_base_model(loop.base_model)):
        if folder.is_dir() and base_hash(folder) == model.base_hash:
            return folder
    raise ArtifactError(
        f"{model.display_name} was trained on the base model {model.lineage.get('base_model', model.base_hash[:16])}, "
        f"which is not there any more or was changed, and {loop.base_model} is another one; restore it, or train again"
    )


def _adapter_folder(loop: LoopSettings, model: CandidateModel) -> Path | None:
    """Return the folder of a model's adapter in PEFT's format; None if it was deleted.

    Raises:
        ArtifactError: the adapter was changed since it was trained.
    """
    version = model.lineage.get(AdapterManifest.stage)
    artifact = find(AdapterManifest, loop.name, version) if version else None
    if artifact is None or not (artifact.path / "adapter" / ADAPTER_CONFIG).is_file():
        return None
    check_unaltered(artifact)
    return artifact.path / "adapter"


def deployment_states(loop: LoopSettings, db: Database) -> list[TargetState]:
    """Return where each declared target stands, in the order of the settings; reads only the database.

    A target that has not been worked on since the champion changed is pending.
    """
    states, model = target_states(db, loop.name), champion(db, loop.name)
    wanted = _label(model)
    found = []
    for setting in loop.deploy.followers:
        state = states.get(setting.key, TargetState(loop=loop.name, target=setting.key))
        if state.wanted != wanted:
            changes = {"wanted": wanted, "state": "pending", "tries": 0, "next_try_at": None, "last_error": ""}
            state = state.model_copy(update=changes)
        found.append(state)
    return found


def due_targets(loop: LoopSettings, db: Database) -> list[str]:
    """Return the targets that `reconcile` would work on now; reads only the database."""
    now = datetime.now(UTC)

    def is_due(state: TargetState) -> bool:
        if state.is_locked(now):
            return False
        if state.state in {"active", "rejected"}:  # a rejected one is tried again only if something has changed
            return state.observed_at is None or state.observed_at + timedelta(seconds=OBSERVE_SECONDS) <= now
        return state.next_try_at is None or state.next_try_at <= now

    return [state.target for state in deployment_states(loop, db) if is_due(state)]


def unsettled_targets(loop: LoopSettings, db: Database) -> list[str]:
    """Return the targets that `reconcile` has to do something about, after asking those that are due.

    A target that still serves what was verified is only asked, and that is recorded. Nothing is sent to it, so this is
    much cheaper than a process for `reconcile`.
    """
    due = due_targets(loop, db)
    settings = [one for one in loop.deploy.followers if one.key in due]
    return [one.key for one in settings if not _Reconciliation(loop, one, db, _log.debug, force=False).is_settled()]


def reconcile(
    loop: LoopSettings,
    log: Callable[[str], None],
    targets: Collection[str] | None = None,
    *,
    force: bool = False,
) -> list[TargetState]:
    """Bring each target to the loop's champion, and return where they stand then.

    For each target: ask what it serves; if it is not the champion, stage it there, compare the staged release with the
    judged model, activate it, ask again, and remove old releases. A target that fails is tried again later, by the next
    call after `next_try_at`. A target that another process works on is left to it.

    No error of a target is raised: its row says what happened. An alert is sent when a target fails for the first
    time, is rejected, or has drifted.

    Args:
        targets: names of the targets to work on; default all.
        force: try also targets whose next try is later, and rejected ones.

    Raises:
        DatabaseError: the database cannot be used.
    """
    db = connect()
    for setting in loop.deploy.followers:
        if targets is not None and setting.key not in targets:
            continue
        try:
            # A promotion that came meanwhile could not get the lease, so its champion is brought there by this process.
            while not _Reconciliation(loop, setting, db, log, force).run():
                log(f"{setting.key}: the champion changed meanwhile")
        except LeaseLostError as error:
            log(f"{setting.key}: {error}; left to it")
    return [state for state in deployment_states(loop, db) if targets is None or state.target in targets]


class _Reconciliation:
    """One attempt to bring one target to the champion."""

    def __init__(
        self,
        loop: LoopSettings,
        setting: Follower,
        db: Database,
        log: Callable[[str], None],
        force: bool,
    ) -> None:
        self._loop = loop
        self._setting = setting
        self._db = db
        self._log = log
        self._force = force

    def run(self) -> bool:
        """Work on the target if no other process does; return whether the champion is still the same afterwards."""
        with take_lease(self._db, self._loop.name, self._setting.key) as lease:
            if lease is None:
                self._say("another process works on it now; left to it")
                return True
            model = champion(self._db, self._loop.name)
            self._want(lease, model)
            if self._is_time(lease.state):
                self._attempt(lease, model)
        return _label(model) == _label(champion(self._db, self._loop.name))

    def _say(self, text: str) -> None:
        self._log(f"{self._setting.key}: {text}")

    def _want(self, lease: Lease, model: ModelVersion | None) -> None:
        if lease.state.wanted != _label(model):
            lease.update(
                wanted=_label(model),
                wanted_sha256=model.sha256 if model else "",
                state="pending",
                tries=0,
                next_try_at=None,
                last_error="",
            )

    def _is_time(self, state: TargetState) -> bool:
        return self._force or state.next_try_at is None or state.next_try_at <= datetime.now(UTC)

    def _attempt(self, lease: Lease, model: ModelVersion | None) -> None:
        """Bring the target to a model; write into its row how that ended."""
        try:
            self._bring(lease, model)
        except (LeaseLostError, DatabaseError):
            raise
        except (TargetRefused, ParityError) as error:
            self._say(f"rejected: {error}")
            known = lease.state.state == "rejected" and lease.state.last_error == str(error)
            found = error.facts if isinstance(error, ParityError) else {}
            facts = {**lease.state.facts, **found}
            now = datetime.now(UTC)
            lease.update(state="rejected", next_try_at=None, last_error=str(error), facts=facts, observed_at=now)
            if not known:
                send(self._loop, deployment(self._loop, lease.state))
        except Exception as error:  # a bug in one target must not stop the others, nor the run that promoted
            expected = isinstance(error, _EXPECTED)
            message = str(error) if expected else f"unexpected error, a bug: {type(error).__name__}: {error}"
            if not expected:
                _log.exception("the target %s failed unexpectedly", self._setting.key)
            tries = lease.state.tries + 1
            wait = min(LONGEST_WAIT, self._loop.deploy.retry_seconds * 2 ** min(tries - 1, 20))
            later = datetime.now(UTC) + timedelta(seconds=wait)
            self._say(f"failed (try {tries}, again in {duration(wait)}): {message}")
            lease.update(state="failed", tries=tries, next_try_at=later, last_error=message)
            if tries == 1:
                send(self._loop, deployment(self._loop, lease.state))

    def is_settled(self) -> bool:
        """Ask the target and return whether nothing is to be done; True too while another process works on it.

        An error counts as something to be done: who does it meets the error again, and records it.
        """
        with take_lease(self._db, self._loop.name, self._setting.key) as lease:
            if lease is None:
                return True
            model = champion(self._db, self._loop.name)
            if lease.state.wanted != _label(model) or lease.state.state not in {"active", "rejected"}:
                return False
            try:
                return self._ask(lease, *self._open(model)) is None
            except Exception:
                return False

    def _open(self, model: ModelVersion | None) -> tuple[Target, Release]:
        target = open_target(self._setting, self._loop.name)
        return target, release_of(self._loop, model, self._say, merged=target.wants_merged_folder)

    def _ask(self, lease: Lease, target: Target, release: Release) -> Observed | None:
        """Return what the target serves; None if nothing is to be done about it.

        That is so if it serves what was verified, or if the release was rejected and nothing has changed since.
        """
        inputs, before = self._inputs(release), lease.state
        if before.state == "rejected" and before.facts.get("inputs") == inputs and not self._force:
            lease.update(observed_at=datetime.now(UTC))
            return None
        observed = target.observe(release)
        lease.update(observed=observed.label, digest=observed.digest, observed_at=datetime.now(UTC))
        verified = {"inputs": inputs, "digest": observed.digest}
        if before.facts.get("verified") == verified and observed.label == release.label:
            lease.update(state="active", tries=0, next_try_at=None, last_error="")
            return None
        return observed

    def _bring(self, lease: Lease, model: ModelVersion | None) -> None:
        target, release = self._open(model)
        before = lease.state
        try:
            observed = self._ask(lease, target, release)
        except TargetError:
            if command := target.start_command(release):  # it may not run yet
                lease.update(facts={**before.facts, "start_command": command})
            raise
        if observed is None:
            return
        inputs = self._inputs(release)
        if "verified" in before.facts and before.facts.get("inputs") == inputs:
            self._drifted(lease, release, observed)
        facts: dict[str, Any] = {"inputs": inputs}
        kept = ("drift", "active", "compared")
        facts |= {name: lease.state.facts[name] for name in kept if name in lease.state.facts}
        if command := target.start_command(release):  # shown also if the release cannot be staged before a restart
            facts["start_command"] = command
        lease.update(wanted_sha256=release.sha256, facts=facts)
        self._say(f"serves {observed.label or observed.detail or 'nothing'}; stage {release.label}")
        endpoint = target.stage(release)
        lease.renew()
        facts |= self._compare(facts.get("compared", []), inputs, release, target, endpoint)
        lease.update(facts=facts)
        if _label(champion(self._db, self._loop.name)) != release.label:
            return  # `run` starts again with the new champion; this one must not become active any more
        endpoint = target.activate(release) or endpoint
        observed = target.observe(release)
        lease.update(observed=observed.label, digest=observed.digest, observed_at=datetime.now(UTC))
        if observed.label != release.label:
            raise TargetError(
                f"{release.name} was activated without an error, but the target serves "
                f"{observed.label or 'something else'} ({observed.detail or 'no details'}); see the server's log"
            )
        facts["verified"] = {"inputs": inputs, "digest": observed.digest}
        if endpoint is not None:
            ids = facts.get("reads_control_tokens") and self._setting.kind in TAKING_TOKEN_IDS
            vocabulary = str(release.gguf) if ids else None
            active = ActiveRelease(label=release.label, upstream=endpoint, vocabulary=vocabulary)
            facts["active"] = active.model_dump(mode="json")
        lease.update(state="active", tries=0, next_try_at=None, last_error="", facts=facts)
        self._say(f"{release.label} is active")
        self._clean_up(lease, target, release)

    def _compare(
        self,
        earlier: list[dict[str, Any]],
        inputs: str,
        release: Release,
        target: Target,
        endpoint: UpstreamSettings | None,
    ) -> dict[str, Any]:
        """Return the results of comparing a staged release with the judged model, and the list of them.

        An earlier result is reused, such as after a rollback or a failed activation, if it is of the same model,
        settings and version of the comparison, and nobody has changed what the target serves since.
        """
        key = hash_of([inputs, PARITY_VERSION])
        result = next((one["result"] for one in earlier if one["key"] == key and not self._force), None)
        if result is None:
            result = check_parity(self._loop, release, target, endpoint, self._say)
        else:
            self._say(f"{release.label} was compared with the judged model before, and nothing changed since")
        others = [one for one in earlier if one["key"] != key]
        return {**result, "compared": [*others, {"key": key, "result": result}][-KEPT_COMPARISONS:]}

    def _drifted(self, lease: Lease, release: Release, observed: Observed) -> None:
        found = observed.label or observed.detail or "nothing"
        if observed.label == release.label:
            found = f"{found} with another digest, {observed.digest}"
        message = f"serves {found} instead of {release.label}, which was active; it is brought back"
        self._say(message)
        drift = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "found": found}
        facts = {name: value for name, value in lease.state.facts.items() if name != "compared"}
        lease.update(state="drifted", last_error=message, facts={**facts, "drift": drift})
        send(self._loop, deployment(self._loop, lease.state))

    def _clean_up(self, lease: Lease, target: Target, release: Release) -> None:
        """Remove old releases. The target serves the right one by now, so an error is a warning."""
        try:
            removed = target.remove_old(_kept_labels(self._db, self._loop.name, release.label, self._setting.keep))
        except (TargetError, OSError) as error:
            self._say(f"old releases could not be removed: {error}")
            lease.update(facts={**lease.state.facts, "warning": f"old releases could not be removed: {error}"})
            return
        if removed:
            self._say(f"removed {', '.join(removed)}")

    def _inputs(self, release: Release) -> str:
        """Return the hash of all that decides whether the target may serve a release, and how."""
        loop = self._loop
        return hash_of(
            {
                "release": [release.label, release.sha256],
                "target": self._setting.model_dump(mode="json"),
                "config": dict(release.config),
                "base": release.base_name,
                "prompt": [release.system_prompt, release.context, release.max_tokens],
                "evaluation": loop.evaluation.model_dump(mode="json", include={"max_tokens", "context", "metric"}),
                "constrain": loop.constrain,
                "files": loop_files.judging_files(loop),
                "limits": [loop.deploy.parity_sample, loop.export.min_agreement, loop.export.equivalence_margin],
            }
        )


def _label(model: ModelVersion | None) -> str:
    return model.version if model else BASE


def _kept_labels(db: Database, loop: str, active: str, keep: int) -> list[str]:
    """Return the active release's label and those of the champions before it, newest first, `keep` in all."""
    versions = {model.id: model.version for model in list_models(db, loop)}
    newest_first = [versions.get(one.model_id or "", BASE) for one in reversed(list_deployments(db, loop))]
    return list(dict.fromkeys([active, *newest_first, BASE]))[:keep]
