"""Trainer callbacks: progress, validation, complete checkpoints, resuming, and the order of examples.

Loads transformers.
"""

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from finetune_pipeline.manifests import ADAPTER_WEIGHTS
from finetune_pipeline.training import distributed
from finetune_pipeline.training.checkpoints import mark_complete
from finetune_pipeline.training.job import JobConfig, Progress
from finetune_pipeline.training.model import memory_in_use
from finetune_pipeline.training.progress import PROGRESS, VALIDATION_LOSS, append_progress, check_finite

_SECONDS_BETWEEN_LINES = 1.0


class ProgressCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Writes progress, ends on a non-finite loss and marks checkpoints complete.

    Args:
        job: what is trained.
        on_checkpoint: called on every rank with the folder of each complete checkpoint.
    """

    def __init__(self, job: JobConfig, on_checkpoint: Callable[[Path], None] = lambda _: None) -> None:
        self.job, self.on_checkpoint = job, on_checkpoint
        self.began = self.written = 0.0
        self.first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: D102
        self.began, self.first_step = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:  # noqa: D102
        if "loss" not in logs:
            return
        check_finite(logs["loss"], state.global_step)
        now = time.monotonic()
        last = state.global_step + args.logging_steps > state.max_steps
        if not distributed.is_rank_zero() or not (last or now - self.written >= _SECONDS_BETWEEN_LINES):
            return
        elapsed, done = now - self.began, max(state.global_step - self.first_step, 1)
        validated = [entry[VALIDATION_LOSS] for entry in state.log_history if VALIDATION_LOSS in entry]
        progress = Progress(
            step=state.global_step,
            steps=state.max_steps,
            epoch=state.epoch,
            loss=logs["loss"],
            validation_loss=validated[-1] if validated else None,
            learning_rate=logs["learning_rate"],
            tokens_per_second=logs.get("num_tokens", 0) / max(elapsed, 1e-9),
            seconds_left=elapsed / done * (state.max_steps - state.global_step),
            micro_batch=args.per_device_train_batch_size,
            elapsed_seconds=elapsed,
            memory_bytes=memory_in_use(),
        )
        append_progress(self.job.output / PROGRESS, progress)
        self.written = now

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: D102
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        distributed.barrier()  # each rank writes its own file into it
        if not distributed.decided_by_rank_zero(lambda: _weights_are_finite(checkpoint)):
            if distributed.is_rank_zero():
                shutil.rmtree(checkpoint)  # a resumed run would start from it
            check_finite(math.nan, state.global_step)
        if distributed.is_rank_zero():
            mark_complete(checkpoint, self.job.key)
        self.on_checkpoint(checkpoint)


class ValidationCallback(TrainerCallback):  # type: ignore[misc]
    """Measures the validation loss before each checkpoint, and remembers the lowest.

    The losses are kept in the Trainer's state, which every checkpoint holds, so a resumed run has them too.

    Args:
        measure: returns the validation loss of the current weights.
        patience: validations without a lower loss after which training stops; None never does.
    """

    def __init__(self, measure: Callable[[], float], patience: int | None) -> None:
        self.measure, self.patience = measure, patience

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: D102
        if not control.should_save:
            return
        loss = self.measure()
        check_finite(loss, state.global_step)
        state.log_history.append({"step": state.global_step, VALIDATION_LOSS: loss})
        if state.best_metric is None or loss < state.best_metric:
            state.best_metric, state.best_global_step = loss, state.global_step
            # The Trainer keeps the best checkpoint when it removes older ones.
            state.best_model_checkpoint = str(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        if _patience_is_exhausted(state, self.patience):
            control.should_training_stop = True


class NoStepsLeft(Exception):
    """A resumed run has no step left; state and weights are those of its last checkpoint."""


class ResumeCallback(TrainerCallback):  # type: ignore[misc]
    """Corrects the Trainer's state when a run resumes.

    The Trainer looks for the best checkpoint under the path where it was written, which may have been moved; and it
    takes one more step after the last one, unless that one ends an epoch.

    Args:
        patience: as for `ValidationCallback`.
    """

    def __init__(self, patience: int | None) -> None:
        self.patience = patience

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: D102
        if state.best_global_step:
            best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
            if best.is_dir():
                state.best_model_checkpoint = str(best)
            else:  # it is lost, so the best of the remaining steps counts
                state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        if state.global_step >= state.max_steps or _patience_is_exhausted(state, self.patience):
            raise NoStepsLeft


class ExampleOrderCallback(TrainerCallback):  # type: ignore[misc]
    """Makes the order of examples follow from the seed and the epoch's number alone.

    The Trainer groups by length with the process's random state, which differs in a resumed process; and with several
    processes it does not tell the sampler in which epoch a run resumes.
    """

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any, **_: Any) -> None:  # noqa: D102
        import torch
        from transformers.trainer_pt_utils import LengthGroupedSampler

        batches, epoch = train_dataloader.batch_sampler, int(state.epoch)
        while hasattr(batches, "batch_sampler"):  # Accelerate's, which split batches across ranks
            batches = batches.batch_sampler
        if isinstance(batches.sampler, LengthGroupedSampler):
            batches.sampler.generator = torch.Generator().manual_seed(args.seed + epoch)
        elif hasattr(batches.sampler, "set_epoch"):  # a sequential one has no order to set
            batches.sampler.set_epoch(epoch)


def _patience_is_exhausted(state: Any, patience: int | None) -> bool:
    losses = [entry[VALIDATION_LOSS] for entry in state.log_history if VALIDATION_LOSS in entry]
    return bool(losses) and patience is not None and len(losses) - 1 - losses.index(min(losses)) >= patience


def _weights_are_finite(checkpoint: Path) -> bool:
    import torch
    from safetensors.torch import load_file

    return all(bool(torch.isfinite(weights).all()) for weights in load_file(checkpoint / ADAPTER_WEIGHTS).values())
