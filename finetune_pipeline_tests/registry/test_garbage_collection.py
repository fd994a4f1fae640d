"""Only unused model files are deleted, and the registry never claims a deleted file."""

import shutil
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_pipeline.artifacts import ArtifactBusyError, draft, hash_file, publish, set_latest, stage_folder, try_lock
from finetune_pipeline.database import Database
from finetune_pipeline.manifests import BaseGgufManifest, GgufManifest, MergedManifest, ReportManifest
from finetune_pipeline.registry import champion as champion_module
from finetune_pipeline.registry import garbage_collection
from finetune_pipeline.registry import model_versions as models_module
from finetune_pipeline.registry.champion import champion, promote, resolve, rollback, switch
from finetune_pipeline.registry.deployment_history import Deployment, deployment_stack, list_deployments
from finetune_pipeline.registry.garbage_collection import (
    ModelFolder,
    RegistryState,
    RetentionDecision,
    decide_retention,
    delete_models,
    plan_deletion,
)
from finetune_pipeline.registry.model_versions import CandidateModel, ModelVersion, RegistryError, list_models
from finetune_pipeline.registry.requested_comparisons import (
    RequestedComparison,
    cancel_comparison,
    claim_comparison,
    create_comparison,
    new_comparison_id,
)
from finetune_pipeline.settings import LoopSettings
from finetune_pipeline_tests.registry.conftest import promote_over

LOOP = LoopSettings(name="aec", base_model="b", evaluation={"benchmark": "q", "metric": "rouge1"})
BASE = "base-1"
START = datetime(2026, 1, 1, tzinfo=UTC)
COMMON: dict[str, Any] = {"loop": "aec", "settings": {}, "packages": {}}


def gguf(version: str, over: Path | None = None) -> Path:
    """Publish an artifact of gguf_model and return its folder."""
    fields = {
        **COMMON, "version": version, "inputs": {}, "gguf": "model.gguf",
        "quantization": "F16", "base_model": "b", "base_hash": BASE, "adapter_version": "a", "mode": "incremental",
        "watermark": 1,
    }  # fmt: skip
    if over:
        fields |= {"form": "adapter", "base_gguf_sha256": hash_file(over / "base.gguf")}
    with draft("aec", "gguf_model", version) as folder:
        (folder / "model.gguf").write_text(f"weights of {version}")
        return publish(folder, GgufManifest, fields).path


def base_gguf(version: str, base_hash: str = BASE) -> Path:
    fields = {**COMMON, "version": version, "inputs": {}, "gguf": "base.gguf", "quantization": "Q4_K_M"}
    with draft("aec", "base_gguf", version) as folder:
        (folder / "base.gguf").write_text(f"base {version}")
        return publish(folder, BaseGgufManifest, {**fields, "base_hash": base_hash}).path


def report(version: str, on: str, passed: bool) -> None:
    fields = {
        **COMMON, "version": version, "inputs": {"gguf_model": on}, "comparison_id": version,
        "challenger_sha256": "c", "champion_id": None, "champion_sha256": "d", "benchmark_sha256": "e",
        "decision": "promote" if passed else "reject", "reason": "gain", "watermark": 1,
    }  # fmt: skip
    with draft("aec", "eval_report", version) as folder:
        publish(folder, ReportManifest, fields)


def candidate(folder: Path, base: Path | None = None) -> CandidateModel:
    """Return the candidate of an artifact; with a base, an adapter applied to it."""
    own = folder / "model.gguf"
    files: dict[str, Any] = {"gguf_path": own, "gguf_sha256": hash_file(own)}
    if base:
        files = {"gguf_path": base / "base.gguf", "gguf_sha256": hash_file(base / "base.gguf")}
        files |= {"adapter_path": own, "adapter_sha256": hash_file(own)}
    return CandidateModel(
        loop="aec", base_hash=BASE, mode="incremental", lineage={}, scores={}, report_path=folder / "r.html", **files
    )


def serve(db: Database, one: CandidateModel) -> ModelVersion:
    return promote_over(db, one)


def collect(db: Database, keep: int = 1) -> list[str]:
    """Plan a deletion, carry it out, and return the names of the deleted folders."""
    to_delete = [one.folder.path for one in plan_deletion(db, LOOP, BASE, keep) if not one.keep]
    return sorted(one.folder.path.name for one in delete_models(db, LOOP, BASE, keep, to_delete, "ann"))


def folders(stage: str = "gguf_model") -> set[str]:
    return {path.name for path in stage_folder("aec", stage).glob("*") if path.suffix != ".lock"}


def test_merged_weights_are_kept_for_deployed_versions_only(db: Database) -> None:
    for name in "abc":
        with draft("aec", "merged_model", f"merged-{name}") as folder:
            (folder / "model.safetensors").write_text(name)
            fields = {**COMMON, "version": f"merged-{name}", "inputs": {}, "base_hash": BASE}
            publish(folder, MergedManifest, {**fields, "adapter_version": f"adapter-{name}"})
        serve(db, candidate(gguf(name)).model_copy(update={"lineage": {"lora_adapter": f"adapter-{name}"}}))
    reasons = {one.folder.path.name: (one.keep, one.reason) for one in plan_deletion(db, LOOP, BASE, 1)}
    assert reasons["merged-c"] == (True, "v1.0.2, champion: it serves")
    assert reasons["merged-a"] == (False, "merged weights that no deployed version needs")
    assert collect(db) == ["a", "merged-a"]
    assert folders("merged_model") == {"merged-b", "merged-c"}


def test_old_versions_are_deleted_and_recent_ones_kept(db: Database) -> None:
    for name in "abcdef":
        serve(db, candidate(gguf(name)))
    reasons = {one.folder.path.name: (one.keep, one.reason) for one in plan_deletion(db, LOOP, BASE, 2)}
    assert {name for name, (keep, _) in reasons.items() if keep} == {"d", "e", "f"}
    assert reasons["f"] == (True, "v1.0.5, champion: it serves")
    assert reasons["e"] == (True, "v1.0.4, previous: the target of a rollback")
    assert reasons["d"] == (True, "v1.0.3, used by one of the last 2 deployments")
    assert reasons["a"] == (False, "v1.0.0: not champion, not previous, not in the last deployments")
    assert folders() == set("abcdef")
    assert collect(db, 2) == ["a", "b", "c"]
    assert folders() == {"d", "e", "f"}
    deleted = {model.version for model in list_models(db, "aec") if model.deleted_at}
    assert deleted == {"v1.0.0", "v1.0.1", "v1.0.2"}
    assert len(list_deployments(db, "aec")) == 6
    assert collect(db, 2) == []


def test_a_deleted_version_is_an_error_and_never_skipped(db: Database) -> None:
    for name in "abcd":
        serve(db, candidate(gguf(name)))
    collect(db)
    for name in ("v1.0.0", "v1.0.1"):
        with pytest.raises(RegistryError, match=r"its files were deleted on 20.* UTC; switch to an existing version"):
            switch(db, "aec", name, "ann", "s")
    assert rollback(db, "aec", "ann", "r").version == "v1.0.2"  # type: ignore[union-attr]
    with pytest.raises(RegistryError, match=r"aec@v1\.0\.1 cannot serve: its files were deleted on"):
        rollback(db, "aec", "ann", "r")
    assert champion(db, "aec").version == "v1.0.2"  # type: ignore[union-attr]
    assert switch(db, "aec", "base", "ann", "s") is None


def test_rollback_and_switch_work_after_a_deletion(db: Database) -> None:
    for name in "abcde":
        serve(db, candidate(gguf(name)))
    assert collect(db, 3) == ["a"]
    seen = [rollback(db, "aec", "ann", "r").version for _ in range(3)]  # type: ignore[union-attr]
    assert seen == ["v1.0.3", "v1.0.2", "v1.0.1"]
    assert switch(db, "aec", "v1.0.4", "ann", "s") == champion(db, "aec")


def test_a_deleted_model_exported_again_keeps_its_version(db: Database) -> None:
    for name in "abc":
        serve(db, candidate(gguf(name)))
    assert collect(db) == ["a"]
    again = serve(db, candidate(gguf("a")))
    assert (again.version, again.deleted_at) == ("v1.0.0", None)
    assert collect(db) == ["b"]
    assert folders() == {"a", "c"}


def test_only_rejected_challengers_are_deleted(db: Database) -> None:
    for name in ("unjudged", "rejected", "passed", "twice"):
        gguf(name)
    for version, on, passed in [("r1", "rejected", False), ("r2", "passed", True), ("r3", "twice", True)]:
        report(version, on, passed)
    report("r4", "twice", False)
    assert collect(db) == ["rejected", "twice"]
    assert folders() == {"unjudged", "passed"}


def test_the_newest_export_is_kept_even_if_rejected(db: Database) -> None:
    for number, name in enumerate("ab"):
        path = gguf(name)
        report(f"r{number}", name, False)
        set_latest(GgufManifest.model_validate_json((path / "manifest.json").read_bytes()), "run-1")
    assert collect(db) == ["a"]


@pytest.mark.parametrize("state", ["pending", "running"])
def test_the_models_of_a_comparison_are_kept_until_it_has_ended(db: Database, state: str) -> None:
    old = serve(db, candidate(gguf("old")))
    for name in "bcd":
        serve(db, candidate(gguf(name)))
    over = base_gguf("of-an-adapter", "base-0")
    rejected = candidate(gguf("rejected", over), over)
    report("r", "rejected", False)
    fields = {"id": new_comparison_id(), "base": old.name, "base_id": old.id, "tuned": rejected.name}
    asked = RequestedComparison(
        loop="aec", tuned_id=rejected.id, created_by="ann", created_at=datetime.now(UTC), **fields
    )
    create_comparison(db, asked)
    if state == "running":
        assert claim_comparison(db, asked.id)
    reasons = {one.folder.path.name: (one.keep, one.reason) for one in plan_deletion(db, LOOP, BASE, 1)}
    assert reasons["old"] == (True, "v1.0.0, used by a comparison that has not ended")
    assert reasons["rejected"] == (True, "used by a comparison that has not ended")
    assert collect(db) == ["b"]
    assert folders("base_gguf") == {"of-an-adapter"}, "the base of the adapter is needed too"
    cancel_comparison(db, asked.id)
    assert collect(db) == ["of-an-adapter", "old", "rejected"]


def test_an_artifact_in_progress_is_kept(db: Database) -> None:
    gguf("a")
    report("r", "a", False)
    with draft("aec", "gguf_model", "a") as folder, draft("aec", "base_gguf", "x"):
        (folder / "half.gguf").write_text("half")
        (one,) = plan_deletion(db, LOOP, BASE, 1)
        assert (one.keep, one.reason) == (True, "a run is making it again now")
        assert delete_models(db, LOOP, BASE, 1, [one.folder.path], "ann") == []
        assert (folder / "half.gguf").exists()
    assert collect(db) == ["a"]


def test_the_base_of_the_loop_and_of_kept_adapters_is_kept(db: Database) -> None:
    over_old, over_new = base_gguf("over-old", "base-0"), base_gguf("over-new", "base-0")
    base_gguf("other-base", "base-0"), base_gguf("older-engine"), base_gguf("own")
    for name, over in [("a", over_old), ("b", over_new), ("c", over_new)]:
        serve(db, candidate(gguf(name, over), over))
    gguf("challenger", base_gguf("of-a-challenger", "base-0"))
    assert collect(db) == ["a", "older-engine", "other-base", "over-old"]
    assert folders("base_gguf") == {"over-new", "own", "of-a-challenger"}
    assert [model.version for model in list_models(db, "aec") if model.deleted_at] == ["v1.0.0"]


def test_files_elsewhere_and_damaged_artifacts_are_never_touched(db: Database, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "model.gguf").write_text("mine")
    serve(db, candidate(elsewhere))
    for name in "ab":
        serve(db, candidate(gguf(name)))
    linked = gguf("linked")
    report("r", "linked", False)
    linked.rename(tmp_path / "linked")
    linked.symlink_to(tmp_path / "linked", target_is_directory=True)
    serve(db, candidate(gguf("c")))
    (stage_folder("aec", "gguf_model") / "a" / "manifest.json").write_text("{}")
    assert collect(db) == []
    assert (elsewhere / "model.gguf").read_text() == "mine"
    assert (linked / "model.gguf").exists() and linked.is_symlink()
    assert not [model for model in list_models(db, "aec") if model.deleted_at]


@pytest.mark.parametrize("killed_in", ["_rename_folder", "_remove_renamed"])
def test_the_next_deletion_finishes_a_killed_one(db: Database, monkeypatch: pytest.MonkeyPatch, killed_in: str) -> None:
    for name in "abc":
        serve(db, candidate(gguf(name)))
    to_delete = [one.folder.path for one in plan_deletion(db, LOOP, BASE, 1) if not one.keep]

    def die(path: Any) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            *(garbage_collection, "_rename_folder", die) if killed_in == "_rename_folder" else (shutil, "rmtree", die)
        )
        with pytest.raises(KeyboardInterrupt):
            delete_models(db, LOOP, BASE, 1, to_delete, "ann")
    first = resolve(db, "v1.0.0", "aec")
    assert first is not None and first.deleted_at is not None
    with pytest.raises(RegistryError, match="were deleted"):
        switch(db, "aec", "v1.0.0", "ann", "s")
    left = {"_rename_folder": "a", "_remove_renamed": ".deleted-a"}[killed_in]
    assert folders() == {left, "b", "c"}
    assert collect(db) == [left]
    assert folders() == {"b", "c"}


def test_a_model_deleted_after_its_check_is_rejected(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        serve(db, candidate(gguf(name)))
    rejected = candidate(gguf("rejected"))
    report("r", "rejected", False)
    check: Callable[..., None] = champion_module.check_files

    def check_then_lose(model: CandidateModel, **how: bool) -> None:
        check(model, **how)
        collect(db)

    monkeypatch.setattr(champion_module, "check_files", check_then_lose)
    with pytest.raises(RegistryError, match="were deleted"):
        switch(db, "aec", "v1.0.0", "ann", "s")
    report("r", "rejected", False)
    with pytest.raises(RegistryError, match="does not exist"):
        promote(db, rejected, champion(db, "aec").id, "ann", "the customer waits", None, "force")  # type: ignore[union-attr]
    assert champion(db, "aec").version == "v1.0.2"  # type: ignore[union-attr]
    assert len(list_models(db, "aec")) == 3


def test_a_model_deleted_while_it_is_hashed_is_rejected(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        serve(db, candidate(gguf(name)))
    read: Callable[..., str] = models_module.hash_file_cached

    def lose_then_read(path: Path, **how: bool) -> str:
        collect(db)
        return read(path, **how)

    monkeypatch.setattr(models_module, "hash_file_cached", lose_then_read)
    with pytest.raises(RegistryError, match=r"aec@v1\.0\.0 cannot serve: its GGUF .* does not exist"):
        switch(db, "aec", "v1.0.0", "ann", "s")
    assert champion(db, "aec").version == "v1.0.2"  # type: ignore[union-attr]


def test_a_folder_needed_since_the_plan_is_kept(db: Database) -> None:
    for name in "abc":
        serve(db, candidate(gguf(name)))
    (to_delete,) = [one.folder.path for one in plan_deletion(db, LOOP, BASE, 1) if not one.keep]
    switch(db, "aec", "v1.0.0", "ann", "s")
    assert delete_models(db, LOOP, BASE, 1, [to_delete], "ann") == []
    assert folders() == {"a", "b", "c"}
    assert not [model for model in list_models(db, "aec") if model.deleted_at]


def test_a_promotion_between_mark_and_deletion_keeps_the_model(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {name: candidate(gguf(name)) for name in "abc"}
    for one in made.values():
        serve(db, one)
    lock: Callable[..., Any] = garbage_collection.lock_champion
    opened: list[int] = []

    def promote_before_the_second(*arguments: Any) -> Any:
        opened.append(1)
        if len(opened) == 2:
            serve(db, made["a"])
        return lock(*arguments)

    monkeypatch.setattr(garbage_collection, "lock_champion", promote_before_the_second)
    assert collect(db) == []
    assert folders() == {"a", "b", "c"}
    now = champion(db, "aec")
    assert now is not None and (now.version, now.deleted_at) == ("v1.0.0", None)


def test_a_concurrent_switch_never_serves_a_deleted_model(db: Database) -> None:
    for round_ in range(6):
        for name in "xyz":
            serve(db, candidate(gguf(f"{name}{round_}")))
        target = next(model for model in list_models(db, "aec") if f"x{round_}" in str(model.gguf_path))
        to_delete = [one.folder.path for one in plan_deletion(db, LOOP, BASE, 1) if not one.keep]
        start = threading.Barrier(2)
        outcomes: list[str] = []

        def run(
            target: ModelVersion = target, start: threading.Barrier = start, outcomes: list[str] = outcomes
        ) -> None:
            start.wait()
            try:
                switch(db, "aec", target.version, "ann", "s")
                outcomes.append("switched")
            except RegistryError as error:
                outcomes.append(str(error))

        thread = threading.Thread(target=run)
        thread.start()
        start.wait()
        delete_models(db, LOOP, BASE, 1, to_delete, "ann")
        thread.join()
        after = resolve(db, target.version, "aec")
        assert after is not None
        switched = outcomes == ["switched"]
        assert switched or "were deleted" in outcomes[0] or "does not exist" in outcomes[0]
        assert after.gguf_path.is_file() == switched == (after.deleted_at is None)
        assert (champion(db, "aec") == after) == switched


def test_a_concurrent_promotion_finds_its_file_or_is_rejected(db: Database) -> None:
    for round_ in range(4):
        path = gguf(f"n{round_}")
        report(f"r{round_}", path.name, False)
        one, start = candidate(path), threading.Barrier(2)
        outcomes: list[str] = []

        def run(one: CandidateModel = one, start: threading.Barrier = start, outcomes: list[str] = outcomes) -> None:
            start.wait()
            try:
                now = champion(db, "aec")
                promote(db, one, now.id if now else None, "ann", "the customer waits", None, "force")
                outcomes.append("promoted")
            except RegistryError as error:
                outcomes.append(str(error))

        thread = threading.Thread(target=run)
        thread.start()
        start.wait()
        delete_models(db, LOOP, BASE, 1, [path], "ann")
        thread.join()
        serving = champion(db, "aec")
        assert serving is None or (serving.gguf_path.is_file() and serving.deleted_at is None)
        assert (serving is not None and serving.id == one.id) == (outcomes == ["promoted"])


def test_deletions_exclude_each_other(db: Database) -> None:
    gguf("a")
    report("r", "a", False)
    with (
        try_lock(stage_folder("aec", ".deletion"), "room"),
        pytest.raises(ArtifactBusyError, match="another process is working on the deletion of model files"),
    ):
        collect(db)
    assert collect(db) == ["a"]


def version(number: int) -> ModelVersion:
    path = Path("/home/artifacts/aec/gguf_model") / f"m{number}" / "model.gguf"
    return ModelVersion(
        loop="aec", gguf_path=path, gguf_sha256=f"{number:064x}"[::-1], base_hash="b", mode="full", lineage={},
        scores={}, report_path=path, version=f"v1.{number}.0", created_at=START,
    )  # fmt: skip


MODELS = [version(number) for number in range(7)]


def replay(steps: list[tuple[str, int]]) -> list[Deployment]:
    """Return the history that the registry would write for these steps."""
    deployments: list[Deployment] = []
    for action, number in steps:
        stack = deployment_stack(deployments)
        target = None if number == len(MODELS) else MODELS[number].id
        if action == "rollback":
            if len(stack) < 2:
                continue
            target = stack[-2]
        elif target == stack[-1]:
            continue
        deployments.append(
            Deployment(
                id=len(deployments),
                loop="aec",
                action=action,
                model_id=target,
                previous_id=stack[-1],
                actor="a",
                reason="r",
                comparison_id=None,
                created_at=START + timedelta(minutes=len(deployments)),
            )
        )
    return deployments


STEPS = st.lists(
    st.tuples(st.sampled_from(["promote", "switch", "rollback"]), st.integers(0, len(MODELS))), max_size=30
)


@settings(max_examples=300, deadline=None)
@given(steps=STEPS, keep=st.integers(1, 8), in_progress=st.sets(st.integers(0, len(MODELS) - 1)))
def test_no_history_leads_to_deleting_a_needed_model(
    steps: list[tuple[str, int]], keep: int, in_progress: set[int]
) -> None:
    deployments = replay(steps)
    stack = deployment_stack(deployments)
    folders = [
        ModelFolder(model.gguf_path.parent, False, 1, protected="in progress" if number in in_progress else "")
        for number, model in enumerate(MODELS)
    ]
    decisions = decide_retention(folders, RegistryState(stack[-1], MODELS, deployments), keep)
    going = {one.folder.path for one in decisions if not one.keep}
    needed = {
        *stack[-2:],
        *(one.model_id for one in deployments[-keep:]),
        *(one.previous_id for one in deployments[-keep:]),
    }
    for number, model in enumerate(MODELS):
        assert (model.gguf_path.parent in going) == (model.id not in needed and number not in in_progress)
    assert all(isinstance(one, RetentionDecision) and one.reason for one in decisions)
