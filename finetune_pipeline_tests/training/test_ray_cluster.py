"""Training on real Ray clusters of this machine, with killed workers and a killed driver."""

import json
import shutil
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from finetune_pipeline.artifacts import write_text
from finetune_pipeline.ray_session import ClusterError
from finetune_pipeline.training import ray_cluster
from finetune_pipeline.training.child_process import train
from finetune_pipeline.training.job import CHECKPOINTS, TrainingError
from finetune_pipeline_tests.processes import descendants
from finetune_pipeline_tests.waiting import wait_until

from ..conftest import needs_ray
from .conftest import contrary, save, with_settings
from .test_preference import PAIRS


def on_ray(job, **changes):
    return with_settings(
        job, compute="ray", num_processes=2, num_train_epochs=20, save_steps=0.125, **changes
    )  # a checkpoint every 20


def leftovers():
    return set(Path(tempfile.gettempdir()).glob("finetune-????????????????-????????-????????"))


@needs_ray
@pytest.mark.slow
def test_a_run_survives_a_killed_worker_with_the_same_loss(two_ray_nodes, job, base, dataset, tmp_path, monkeypatch):
    """Two workers, of which one is killed, give what one gives; the machines share only the storage."""
    storage = tmp_path / "storage"
    storage.mkdir()
    monkeypatch.setenv(ray_cluster.STORAGE, str(storage))
    alone = train(with_settings(job, num_train_epochs=20, save_steps=0.125))
    ours = shutil.copytree(base, tmp_path / "ours" / "tiny")
    theirs = shutil.copytree(dataset, tmp_path / "ours" / "d")
    two = on_ray(job).model_copy(update={"base_model": ours, "dataset": theirs, "output": tmp_path / "two"})
    before, seen, killed = leftovers(), [], []

    def kill_one(progress):
        seen.append(progress.step)
        if progress.step > 40 and not killed:
            shutil.rmtree(tmp_path / "ours")  # the workers have their own copies
            killed.append(descendants("RayTrainWorker")[-1])
            killed[0].kill()

    together = train(two, kill_one)

    assert killed and not killed[0].is_running()
    assert together.resumed_from >= 20
    assert together.steps == alone.steps == 160
    assert together.loss_before == pytest.approx(alone.loss_before, rel=1e-5)
    assert together.loss_after == pytest.approx(alone.loss_after, rel=0.01)
    assert alone.loss_after < alone.loss_before - 0.8
    assert max(seen) == 160 and min(seen) < 40, "progress came while it ran"
    assert loss_by_peft(two, base, dataset) == pytest.approx(together.loss_after, rel=1e-3)
    assert sorted(path.name for path in two.output.iterdir()) == sorted(
        ["adapter", "job.json", "progress.jsonl", "result.json", "training.log"]
    )
    assert list(storage.iterdir()) == [] and leftovers() == before


def loss_by_peft(job, base, dataset):
    """Return the adapter's mean loss per completion token, by PEFT and the tokenizer alone."""
    import torch
    from datasets import load_from_disk
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), job.output / "adapter").eval()
    total, counted = 0.0, 0
    for row in load_from_disk(str(dataset))["validation"]:
        question = [{"role": "user", "content": row["prompt"]}]
        whole = [*question, {"role": "assistant", "content": row["completion"]}]
        prompt = tokens.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
        ids = torch.tensor([tokens.apply_chat_template(whole)["input_ids"]])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        with torch.no_grad():
            n = ids.shape[1] - len(prompt)
            total += float(model(input_ids=ids, labels=labels).loss) * n
            counted += n
    return total / counted


@needs_ray
@pytest.mark.slow
def test_preferences_and_initial_adapter_travel_through_the_storage(two_ray_nodes, job, tmp_path, monkeypatch):
    ours, storage = tmp_path / "ours", tmp_path / "storage"
    storage.mkdir()
    first = with_settings(job, num_train_epochs=1, save_steps=500).model_copy(update={"output": tmp_path / "learnt"})
    train(first)
    dpo = with_settings(job, method="dpo", num_train_epochs=2).model_copy(
        update={
            "preferences": save(ours / "pairs", PAIRS),
            "initial_adapter": shutil.copytree(first.output / "adapter", ours / "adapter"),
        }
    )
    alone = train(dpo.model_copy(update={"output": tmp_path / "alone"}))
    monkeypatch.setenv(ray_cluster.STORAGE, str(storage))

    def leave_nothing_here():
        sent = "finetune-*/inputs/initial_adapter/adapter_model.safetensors"
        size = (ours / "adapter" / "adapter_model.safetensors").stat().st_size
        wait_until(lambda: any(path.stat().st_size == size for path in storage.glob(sent)))
        shutil.rmtree(ours)

    leaving = threading.Thread(target=leave_nothing_here)
    leaving.start()
    together = train(with_settings(dpo, compute="ray", num_processes=2))
    leaving.join()
    assert not ours.exists() and list(storage.iterdir()) == []
    assert together.loss_before == pytest.approx(alone.loss_before, rel=1e-3)
    assert together.loss_after == pytest.approx(alone.loss_after, rel=0.02)


@needs_ray
@pytest.mark.slow
def test_tensorboard_files_come_back_from_the_workers(two_ray_nodes, job, tmp_path, monkeypatch):
    monkeypatch.setenv(ray_cluster.STORAGE, str(tmp_path / "storage"))
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    train(
        with_settings(
            job, compute="ray", num_processes=2, num_train_epochs=1, save_steps=500, report_to=("tensorboard",)
        )
    )
    [file] = (job.output / "tensorboard").rglob("events.out.tfevents.*")
    assert b"train/loss" in file.read_bytes()


@needs_ray
def test_workers_get_the_trackers_variables(job, monkeypatch):
    class Connected(Exception):
        pass

    def connected(variables, *_):
        assert variables["WANDB_PROJECT"] == "ours" and variables["MLFLOW_TRACKING_URI"] == "http://mlflow"
        raise Connected

    monkeypatch.setenv("WANDB_PROJECT", "ours")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow")
    monkeypatch.setattr(ray_cluster, "connected", connected)
    with pytest.raises(Connected):
        ray_cluster.train(on_ray(job), time.monotonic())


@contextmanager
def killed_driver(job):
    """Start training by hand; at the end kill its process, and check that everything it started ends too."""
    write_text(job.output / "job.json", job.model_dump_json())
    driver = psutil.Popen([sys.executable, "-m", "finetune_pipeline.training", job.output / "job.json"])
    try:
        yield driver
        slow = {
            *descendants("DashboardAgent", driver),
            *descendants("RuntimeEnvAgent", driver),
        }  # they notice after a minute
        family = set(driver.children(recursive=True)) - slow
    finally:
        driver.kill()
        driver.wait()
    wait_until(lambda: not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE])


@needs_ray
@pytest.mark.slow
def test_a_killed_run_ends_its_cluster_and_can_be_resumed(job):
    """Without an address, the cluster is started for the run and ends with it."""
    two = with_settings(on_ray(job), num_train_epochs=80)  # the workers notice after a second or two
    with killed_driver(two) as driver:
        wait_until(lambda: ray_has_kept(two, "checkpoint-80"))
        assert len(descendants("RayTrainWorker", driver)) == 2

    result = train(two)
    assert result.resumed_from >= 80
    assert result.steps == 640
    assert result.loss_after < result.loss_before - 0.8
    assert not (two.output / CHECKPOINTS).exists() and not (two.output / "ray").exists()


@needs_ray
@pytest.mark.slow
def test_a_run_killed_after_its_last_step_is_not_repeated(job):
    two = on_ray(job)
    with killed_driver(two) as driver:
        wait_until(lambda: descendants("RayTrainWorker", driver))
        driver.suspend()  # so it cannot fetch the result
        wait_until(lambda: ray_has_kept(two, "result"))

    result = train(two)
    assert result.resumed_from == 0 and result.steps == 160
    assert (two.output / "adapter" / "adapter_model.safetensors").exists()
    assert not (two.output / "ray").exists()


def ray_has_kept(job, name):
    return any(f'"{name}"' in path.read_text() for path in job.output.glob("ray/*/checkpoint_manager_snapshot.json"))


@needs_ray
@pytest.mark.slow
def test_after_a_lost_worker_the_best_weights_are_kept(job, tmp_path):
    overfitting = contrary(with_settings(job, num_train_epochs=40, save_steps=0.05, learning_rate=6e-2), tmp_path)
    two = with_settings(overfitting, compute="ray", num_processes=2)
    killed, kept = [], set()

    def kill_one(progress):
        if progress.step > 120 and not killed:
            kept.update(int(path.name.removeprefix("checkpoint-")) for path in two.output.glob("ray/*/checkpoint-*"))
            killed.append(descendants("RayTrainWorker")[-1])
            killed[0].kill()

    result = train(two, kill_one)
    losses = {point.step: point.loss for point in result.validation}
    best_before = min((step for step in losses if step <= result.resumed_from), key=losses.__getitem__)
    assert killed and result.resumed_from >= 104
    assert result.best_step == min(losses, key=losses.__getitem__)
    assert best_before in kept or best_before > max(kept), "the second was written after the list was made"
    assert len(kept) <= 4, "of 15: the best, the newest, one being written, one being removed"
    assert loss_by_peft(two, two.base_model, two.dataset) == pytest.approx(losses[result.best_step], rel=1e-3)


@needs_ray
@pytest.mark.parametrize("best_is_there", [True, False])
def test_a_new_worker_gets_the_newest_checkpoint_and_the_best(job, tmp_path, best_is_there):
    from ray.train import Checkpoint

    for step in (8, 40) if best_is_there else (40,):
        state = {"best_global_step": 8, "log_history": []}
        write_text(tmp_path / "storage" / f"checkpoint-{step}" / "trainer_state.json", json.dumps(state))
    write_text(tmp_path / "storage" / "checkpoint-16" / "trainer_state.json", "{}")
    ray_cluster._restore(Checkpoint(str(tmp_path / "storage" / "checkpoint-40")), job)
    restored = {path.name for path in (job.output / CHECKPOINTS).glob("checkpoint-*")}
    assert restored == ({"checkpoint-8", "checkpoint-40"} if best_is_there else {"checkpoint-40"})


def test_without_ray_the_error_says_how_to_install_it(job, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ClusterError, match=r"pip install .*'\.\[ray\]', or set compute: local"):
        ray_cluster.train(on_ray(job), time.monotonic())


@pytest.mark.parametrize(
    ("resources", "workers", "gpus"), [({"CPU": 4.0}, 2, False), ({"CPU": 64.0, "GPU": 4.0}, 4, True)]
)
def test_workers_use_gpus_if_the_cluster_has_any(resources, workers, gpus):
    assert ray_cluster.use_gpus(resources, workers) is gpus


def test_a_cluster_that_is_too_small_is_refused():
    with pytest.raises(
        TrainingError, match=r"num_processes is 8, but the Ray cluster has 4 GPU\(s\) now; set num_processes to 4"
    ):
        ray_cluster.use_gpus({"CPU": 64.0, "GPU": 4.0}, 8)


def test_a_hub_model_is_sent_as_its_id(tmp_path):
    cached = tmp_path / "hub" / "models--meta-llama--Llama-3.1-8B" / "snapshots" / "d04e592"
    assert ray_cluster.hub_revision(cached) == ("meta-llama/Llama-3.1-8B", "d04e592")
    assert ray_cluster.hub_revision(tmp_path / "models" / "tiny") is None
