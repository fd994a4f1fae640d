"""The training process: killed, resumed, locked, canceled and orphaned."""

import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from filelock import FileLock

from finetune_pipeline.artifacts import write_text
from finetune_pipeline.training import child_process
from finetune_pipeline.training.checkpoints import COMPLETE, is_complete, last_complete, mark_complete
from finetune_pipeline.training.child_process import train
from finetune_pipeline.training.hardware import cpu_quota, threads_per_process, usable_cores
from finetune_pipeline.training.job import CHECKPOINTS, Progress, TrainingError, TrainingFailed
from finetune_pipeline.training.trainer import run_training
from finetune_pipeline_tests.waiting import wait_until

from .conftest import weights, with_settings

LINE = Progress(
    step=1, steps=9, epoch=0.1, loss=1.0, learning_rate=0.1, tokens_per_second=1, seconds_left=1, elapsed_seconds=1,
    memory_bytes=1,
).model_dump_json()  # fmt: skip


def shell(text):
    return lambda job: ["sh", "-c", text.replace("{out}", str(job.output))]


def test_a_killed_run_resumes_to_the_same_weights(job, tmp_path):
    # 160 steps, a checkpoint every 20
    long = with_settings(job, num_train_epochs=20, save_steps=0.125, lora_dropout=0.1)
    broken = long.model_copy(update={"output": tmp_path / "broken"})
    uninterrupted = long.model_copy(update={"output": tmp_path / "uninterrupted"})
    write_text(broken.output / "job.json", broken.model_dump_json())
    process = subprocess.Popen([sys.executable, "-m", "finetune_pipeline.training", broken.output / "job.json"])
    checkpoints = broken.output / CHECKPOINTS
    wait_until((checkpoints / "checkpoint-40" / COMPLETE).exists)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (broken.output / "result.json").exists()
    half = shutil.copytree(checkpoints / "checkpoint-40", checkpoints / "checkpoint-140")
    (half / COMPLETE).unlink()
    (half / "optimizer.pt").write_bytes(b"half")

    seen = []
    result = train(broken, seen.append)
    uninterrupted.output.mkdir()
    run_training(uninterrupted, time.monotonic())

    assert result.resumed_from in range(40, 160, 20)
    assert weights(broken) == weights(uninterrupted)
    assert [point.step for point in result.curve][-1] == seen[-1].step == 160
    assert not checkpoints.exists()
    repeated = []
    assert train(broken, repeated.append) == result  # finished work is found, not done again
    assert not repeated


def test_only_complete_checkpoints_of_the_same_job_count(tmp_path):
    for name, job in [("checkpoint-10", "this"), ("checkpoint-20", "this"), ("checkpoint-30", "other")]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "optimizer.pt").write_bytes(b"12345")
        mark_complete(tmp_path / name, job)
    # Truncated, as after a power cut.
    (tmp_path / "checkpoint-20" / "optimizer.pt").write_bytes(b"123")
    (tmp_path / "checkpoint-40").mkdir()
    assert not is_complete(tmp_path / "checkpoint-20", "this")
    assert last_complete(tmp_path, "this") == tmp_path / "checkpoint-10"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]


def test_a_second_run_on_the_same_folder_is_refused(job):
    (job.output / CHECKPOINTS).mkdir(parents=True)
    message = "^another training run is writing to"
    with FileLock(job.output / CHECKPOINTS / "training.lock"), pytest.raises(TrainingFailed, match=message):
        train(job)


def test_the_training_process_dies_with_its_parent(job, tmp_path):
    job_file = tmp_path / "job.json"
    job_file.write_text(job.model_dump_json())
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from finetune_pipeline.training.child_process import train;"
            "from finetune_pipeline.training.job import JobConfig;"
            f"train(JobConfig.model_validate_json(open({str(job_file)!r}).read()))",
        ]
    )
    watched = psutil.Process(parent.pid)
    wait_until(lambda: watched.children() and (job.output / CHECKPOINTS / "training.lock").exists())
    child = watched.children()[0]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not child.is_running())


def test_a_run_whose_parent_is_gone_ends_at_once(job):
    write_text(job.output / "job.json", job.model_dump_json())
    gone = subprocess.Popen(["true"])
    gone.wait()
    command = [sys.executable, "-m", "finetune_pipeline.training", job.output / "job.json", "--parent", str(gone.pid)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "has ended" in ended.stderr
    assert not (job.output / CHECKPOINTS).exists()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo loading; kill -9 $$", r"SIGKILL.*memory ran out.*smaller per_device_train_batch_size(.|\n)*loading"),
        ("echo loading; kill -SEGV $$", r"SIGSEGV.*resumes from the last checkpoint(.|\n)*loading"),
        ("echo ValueError: odd; exit 1", r"status 1(.|\n)*ValueError: odd"),
        ("exit 0", "status 0 and no result"),
        ("echo noise; echo 'TRAINING FAILED: too hot'; exit 2", "^too hot$"),
    ],
)
def test_a_failure_says_how_it_ended_and_what_to_do(job, monkeypatch, script, message):
    monkeypatch.setattr(child_process, "_command", shell(script))
    with pytest.raises(TrainingFailed, match=message):
        train(job)


def test_the_first_line_of_a_failure_has_the_last_output_and_the_log(job, monkeypatch):
    noise = "Failed to load CPU gemm_4bit_forward from kernels-community: no module. Please make sure"
    monkeypatch.setattr(child_process, "_command", shell(f"echo step 7; echo '{noise}'; kill -9 $$"))
    with pytest.raises(TrainingFailed) as failed:
        train(job)
    first, *rest = str(failed.value).splitlines()
    assert first.endswith(f"Its last output: step 7. The complete log is {job.output / 'training.log'}")
    assert f"  {noise}" in rest


@pytest.mark.parametrize("words", ["OSError: [Errno 122] Disk quota exceeded: 'x'", "Io(Os { os error 122 })"])
def test_an_exhausted_quota_is_reported_as_a_full_disk(job, monkeypatch, words):
    monkeypatch.setattr(child_process, "_command", shell(f'echo "{words}"; exit 1'))
    with pytest.raises(TrainingFailed, match="the disk is full"):
        train(job)


def test_a_failure_shows_the_output_of_this_attempt_only(job, monkeypatch):
    write_text(job.output / "training.log", "OSError: No space left on device\n")
    monkeypatch.setattr(child_process, "_command", shell("echo loading; kill -9 $$"))
    with pytest.raises(TrainingFailed, match="SIGKILL") as failed:
        train(job)
    assert "loading" in str(failed.value) and "No space" not in str(failed.value)


@pytest.mark.parametrize(
    ("cores", "quota", "processes", "threads"),
    [(8, None, 1, 8), (8, 2.5, 1, 2), (2, 16.0, 1, 2), (8, None, 3, 2), (8, 6.0, 2, 3), (2, 0.5, 4, 1)],
)
def test_threads_do_not_outnumber_the_usable_cores(cores, quota, processes, threads):
    assert threads_per_process(cores, quota, processes) == threads


def test_cores_and_quota_are_those_of_process_and_container(tmp_path):
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    write_text(tmp_path / "own", "1:cpu:/x\n0::/pod/container\n")
    write_text(tmp_path / "pod" / "cpu.max", "250000 100000\n")
    write_text(tmp_path / "pod" / "container" / "cpu.max", "max 100000\n")
    assert cpu_quota(tmp_path, tmp_path / "own") == 2.5
    assert cpu_quota(tmp_path / "elsewhere", tmp_path / "own") is None
    assert cpu_quota(tmp_path, tmp_path / "not there") is None


def test_an_exception_in_the_caller_stops_the_training_process(job, monkeypatch):
    monkeypatch.setattr(child_process, "_command", shell(f"echo '{LINE}' >> {{out}}/progress.jsonl; exec sleep 60"))
    before = set(psutil.Process().children())

    def cancel(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(job, cancel)
    assert set(psutil.Process().children()) <= before  # others of this test run may have children of their own


def test_an_unusable_base_model_is_refused_before_anything_starts(job, tmp_path):
    with pytest.raises(TrainingError, match="does not exist"):
        train(job.model_copy(update={"base_model": tmp_path / "nothing"}))
    assert not job.output.exists()
