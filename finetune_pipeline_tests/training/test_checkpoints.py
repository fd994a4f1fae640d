"""Complete checkpoints."""

from finetune_pipeline.training.checkpoints import is_complete, last_complete, mark_complete


def test_a_checkpoint_is_complete_with_all_its_files(tmp_path):
    checkpoint = tmp_path / "checkpoint-8"
    (checkpoint / "ref").mkdir(parents=True)
    (checkpoint / "weights").write_text("1234")
    (checkpoint / "ref" / "weights").write_text("123456")
    assert not is_complete(checkpoint, "job")
    mark_complete(checkpoint, "job")
    assert is_complete(checkpoint, "job") and not is_complete(checkpoint, "another")
    (checkpoint / "ref" / "weights").write_text("123")  # truncated
    assert last_complete(tmp_path, "job") is None and not checkpoint.exists()
