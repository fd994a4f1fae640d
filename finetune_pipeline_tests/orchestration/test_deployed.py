"""The step promoted_model brings deployment targets to the champion that it promoted."""

import dagster as dg
import pytest

from finetune_pipeline.database import connect
from finetune_pipeline.pipeline import deploy
from finetune_pipeline.pipeline.deploy_parity import ParityError
from finetune_pipeline.registry.champion import champion
from finetune_pipeline_tests.deployment.shelf import Shelf, shelf
from finetune_pipeline_tests.orchestration.conftest import corrected, write_events
from finetune_pipeline_tests.orchestration.test_adapter_form import ask_for_what_it_answers, make_adapter, run

pytestmark = pytest.mark.slow


def deployed(result):
    (check,) = [one for one in result.get_asset_check_evaluations() if one.check_name == "deployed"]
    return check


def test_a_promotion_is_deployed_and_a_target_that_fails_is_a_warning(make_loop, instance, tmp_path, monkeypatch):
    monkeypatch.setattr(deploy, "open_target", Shelf)
    targets = [shelf(name=name, path=str(tmp_path / name)) for name in ("first", "second")]
    loop = make_loop(
        export={"quantization": "F16"}, deploy={"targets": targets, "config": {"seed": 1}, "retry_seconds": 0.001}
    )
    write_events(loop.drop_folder / "log.jsonl", *corrected(f"person{n}" for n in range(10)))
    run(loop, instance, "raw_logs", "curated_dataset")
    make_adapter(loop, 0)
    run(loop, instance, "gguf_model")
    ask_for_what_it_answers(loop, tmp_path)
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "fail-observe").write_text("connection refused")
    result = run(loop, instance, "eval_report", "promoted_model")
    assert result.success and champion(connect(), "notes").version == "v1.0.0"
    assert (tmp_path / "first" / "current").read_text() == "v1.0.0"
    check = deployed(result)
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert check.description == "second has failed: connection refused"
    assert check.metadata["first"].value == "active, serves v1.0.0"
    release = deploy.release_of(loop, champion(connect(), "notes"), merged=True)
    assert (release.adapter_folder / "adapter_config.json").is_file() and release.config == {"seed": 1}
    assert {"config.json", "model.safetensors", "tokenizer_config.json"} <= {
        one.name for one in release.merged_folder.iterdir()
    }

    # Again, the challenger is the champion already. Dagster's database gets no prompt or answer.
    (tmp_path / "second" / "fail-observe").unlink()

    def differs(*_):
        raise ParityError("the judged model answered 'call Ann'", {})

    monkeypatch.setattr(deploy, "check_parity", differs)
    result = run(loop, instance, "promoted_model")
    assert result.success and not deployed(result).passed
    assert deployed(result).description == "second is rejected: the judged model answered '...'"
    assert not [event for event in result.all_events if "Ann" in str(event)]
