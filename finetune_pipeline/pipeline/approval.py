"""Approval: a challenger that the gate accepted waits for a person (`approval: required`).

The run that evaluated it ends. What waits is a row of the database, which belongs to the hashes of everything that the
person looks at. `pipeline.promote` asks for it, and promotes once it is there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from finetune_pipeline.artifacts import Artifact, ArtifactError, find, find_alteration, hash_of, read, stage_folder
from finetune_pipeline.database import Database, connect
from finetune_pipeline.manifests import AdapterManifest, DatasetManifest, GgufManifest, Manifest, ReportManifest
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.pipeline.challengers import Challenger
from finetune_pipeline.pipeline.evaluate import comparison_settings
from finetune_pipeline.registry.approvals import (
    Approval,
    ApprovalError,
    Decision,
    approval_in,
    decide_in,
    newest_approval,
    obstacle_in,
    open_approvals_in,
    request_in,
    void_in,
)
from finetune_pipeline.registry.champion import LockedChampion, lock_champion
from finetune_pipeline.registry.comparisons import comparison_in, find_comparison
from finetune_pipeline.registry.deployment_history import record_note_in
from finetune_pipeline.settings import LoopSettings, with_loop

EVALUATE_AGAIN = "materialize eval_report and promoted_model again to ask for a new approval"
_MISSING, _EDITED = "missing", "edited"


@dataclass(frozen=True)
class PendingApproval:
    """A challenger that waits for a person.

    Attributes:
        approval: its row.
        reason: the gate's reason, in one line.
        problem: why it can no longer be approved; None if it can.
        command: what approves it in the terminal.
    """

    approval: Approval
    reason: str
    problem: str | None
    command: str

    @property
    def name(self) -> str:
        """Name of the challenger."""
        return name_of(self.approval)

    @property
    def state(self) -> str:
        """Where it stands, in a few words for lists."""
        if self.problem:
            return "approval void"
        return "waiting for approval" if self.approval.state == "waiting" else f"approved by {self.approval.actor}"

    @property
    def summary(self) -> str:
        """Where it stands and what to do next, in one sentence."""
        if self.problem:
            return f"the approval of {self.name} is void: {self.problem}; {EVALUATE_AGAIN}"
        if self.approval.state == "approved":
            return f"{self.name} was approved by {self.approval.actor} and is not promoted yet: `{self.command}`"
        until = self.approval.expires_at
        expiry = f", until {until:%Y-%m-%d %H:%M} UTC" if until else ""
        since = f"{self.approval.requested_at:%Y-%m-%d %H:%M} UTC"
        return f"{self.name} waits for approval since {since}{expiry}: `{self.command}`"


def name_of(approval: Approval) -> str:
    """Return the name of the challenger of a request."""
    return f"{approval.loop}@{approval.challenger_sha256[:16]}"


def pending_approval(loop: LoopSettings, db: Database) -> PendingApproval | None:
    """Return the loop's newest request if no person has rejected it and it promoted nothing; None if there is none."""
    newest = newest_approval(db, loop.name)
    if newest is None or newest.state == "rejected":
        return None
    compared = find_comparison(db, loop.name, newest.comparison_id)
    after = compared.after_deployment if compared else None
    with db.read() as connection:
        is_open = newest in open_approvals_in(connection, loop.name)
        problem = obstacle_in(connection, newest, after, datetime.now(UTC))
    if not is_open and newest.state != "void":
        return None  # it was promoted
    problem = problem or _change(newest, hashes_of(loop, newest.comparison_id, newest.gguf_version))
    command = with_loop(f'finetune model approve {name_of(newest)} --reason "..."', loop)
    return PendingApproval(newest, compared.reason.split("\n")[0] if compared else "", problem, command)


def ask_for_approval(loop: LoopSettings, report: Artifact[ReportManifest], gguf: Artifact[GgufManifest]) -> Approval:
    """Return the request for the challenger of a report, and record it if there is none.

    An open request of an older challenger becomes void. So does this one if what it belongs to has changed, the
    champion changed, or it expired.

    Raises:
        ApprovalError: the champion changed since the comparison, so nobody needs to be asked.
    """
    comparison_id = report.manifest.comparison_id
    hashes = hashes_of(loop, report.manifest.version, gguf.manifest.version)
    with lock_champion(connect(), loop.name) as locked:
        found = approval_in(locked.connection, loop.name, comparison_id)
        if found is None:
            days = loop.approval_days
            found = Approval(
                loop=loop.name,
                comparison_id=comparison_id,
                challenger_sha256=report.manifest.challenger_sha256,
                gguf_version=gguf.manifest.version,
                hashes=hashes,
                state="waiting",
                requested_at=locked.now,
                expires_at=locked.now + timedelta(days=days) if days else None,
            )
            if problem := _obstacle(locked, found):
                raise ApprovalError(f"{problem} since the comparison {comparison_id}; materialize eval_report again")
            request_in(locked.connection, found)
        elif found.state in {"waiting", "approved"} and locked.current_id != found.challenger_sha256[:16]:
            problem = _change(found, hashes) or _obstacle(locked, found)
            if problem:
                void_in(locked.connection, found, problem, locked.now)
        return approval_in(locked.connection, loop.name, comparison_id) or found


def decide(loop: LoopSettings, approval: Approval, decision: Decision, actor: str, reason: str) -> Approval:
    """Record a person's decision and return the request; of two approvals, the first one stays.

    Raises:
        ApprovalError: it is void, or was rejected, by now.
    """
    with lock_champion(connect(), loop.name) as locked:
        found = approval_in(locked.connection, loop.name, approval.comparison_id) or approval
        if found.state == "approved" and decision == "approved":
            return found
        problem = _obstacle(locked, found)
        if problem:
            raise ApprovalError(f"the approval of {name_of(found)} is void: {problem}; {EVALUATE_AGAIN}")
        if found.state == "rejected":
            raise rejected(found)
        decide_in(locked.connection, found, decision, actor, reason, locked.now)
        if decision == "rejected":
            model_id, compared = found.challenger_sha256[:16], found.comparison_id
            record_note_in(locked.connection, loop.name, "reject", model_id, actor, reason, locked.now, compared)
        return approval_in(locked.connection, loop.name, approval.comparison_id) or found


def reject_challenger(db: Database, loop: LoopSettings, challenger: Challenger, actor: str, reason: str) -> Approval:
    """Decide that a challenger that waits is not promoted.

    Raises:
        ApprovalError: it does not wait, or actor or reason is missing.
    """
    check_actor_and_reason("reject", actor, reason)
    with db.read() as connection:
        waiting = {one.challenger_sha256: one for one in open_approvals_in(connection, loop.name)}
    if challenger.sha256 not in waiting:
        raise ApprovalError(
            f"{challenger.name}, {challenger.verdict}, does not wait for approval; `finetune status` shows what does"
        )
    return decide(loop, waiting[challenger.sha256], "rejected", actor, reason)


def make_void(loop: LoopSettings, comparison_id: str, problem: str) -> None:
    """Mark the open request of a comparison as void, if there is one."""
    with lock_champion(connect(), loop.name) as locked:
        found = approval_in(locked.connection, loop.name, comparison_id)
        if found is not None and found in open_approvals_in(locked.connection, loop.name):
            void_in(locked.connection, found, problem, locked.now)


def rejected(approval: Approval) -> ApprovalError:
    """Return the error about a request that a person rejected."""
    return ApprovalError(
        f"{name_of(approval)} was rejected by {approval.actor}: {approval.reason}. {EVALUATE_AGAIN.capitalize()}, or "
        "overrule it with `finetune model promote --force`"
    )


def check_actor_and_reason(action: str, actor: str, reason: str) -> None:
    """Raise an error if one of them is empty."""
    if not actor.strip() or not reason.strip():
        raise ApprovalError(f"{action} needs a name and a reason: the history records who decided and why")


def hashes_of(loop: LoopSettings, report: str, gguf: str) -> dict[str, str]:
    """Return the hashes of everything that an approval is for, as it is now; "missing" or "edited" for some of it.

    Args:
        report: version of eval_report.
        gguf: version of gguf_model. If it is missing or edited, what it was made from is not known.
    """
    found = _content(loop, GgufManifest, gguf)
    sources = {}
    if found not in {_MISSING, _EDITED}:
        manifest = read(GgufManifest, stage_folder(loop.name, GgufManifest.stage) / gguf).manifest
        datasets = {version: _content(loop, DatasetManifest, version) for version in manifest.datasets}
        sources = {"dataset": hash_of(datasets), "adapter": _content(loop, AdapterManifest, manifest.adapter_version)}
    return {**sources, "gguf": found, "report": _content(loop, ReportManifest, report), **_settings(loop)}


def _settings(loop: LoopSettings) -> dict[str, str]:
    files = loop_files.judging_files(loop)
    others = {name: sha256 for name, sha256 in files.items() if name != "benchmark"}
    return {"settings": hash_of({**comparison_settings(loop), **others}), "benchmark": files["benchmark"]}


def _content(loop: LoopSettings, kind: type[Manifest], version: str) -> str:
    """Return the hash of an artifact's manifest, which contains the hashes of its files."""
    try:
        found = find(kind, loop.name, version)
    except ArtifactError:
        return _EDITED
    if found is None:
        return _MISSING
    return _EDITED if find_alteration(found) else found.sha256


def _change(approval: Approval, now: Mapping[str, str]) -> str | None:
    """Return what changed since an approval was requested; None if nothing did."""
    names = [name for name, value in now.items() if approval.hashes.get(name) != value]
    return f"changed since it was requested: {', '.join(names)}" if names else None


def _obstacle(locked: LockedChampion, approval: Approval) -> str | None:
    compared = comparison_in(locked.connection, approval.loop, approval.comparison_id)
    after = compared.after_deployment if compared else None
    return obstacle_in(locked.connection, approval, after, locked.now)
