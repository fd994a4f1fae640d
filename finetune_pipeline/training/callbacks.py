"""What is done while a training runs: progress, validation, checkpoints that are whole, a loss that is no number."""

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_pipeline.training import distributed
from finetune_pipeline.training.checkpoints import mark_complete
from finetune_pipeline.training.job import JobConfig, Progress, TrainingError
from finetune_pipeline.training.model import memory_now
from finetune_pipeline.training.progress import PROGRESS, append

if TYPE_CHECKING:
    from transformers import TrainerCallback

VALIDATION_LOSS = "validation_loss"
"""Its name in the Trainer's history."""

_SECONDS_BETWEEN_LINES = 1.0


def reporter(job: JobConfig) -> "TrainerCallback":
    """The callback that writes progress, refuses a loss that is no number, and declares checkpoints whole."""
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
        def __init__(self) -> None:
            self.began = self.written = 0.0
            self.first = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.began, self.first = time.monotonic(), state.global_step

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" not in logs:
                return
            must_be_finite(logs["loss"], state.global_step)
            now = time.monotonic()
            if not distributed.is_first():
                return
            last = state.global_step + args.logging_steps > state.max_steps
            if last or now - self.written >= _SECONDS_BETWEEN_LINES:
                append(job.output / PROGRESS, _progress(args, state, logs, now - self.began, self.first))
                self.written = now

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            distributed.wait()  # each process writes a file of its own into it
            if not distributed.first_says(lambda: _weights_are_finite(checkpoint)):
                if distributed.is_first():
                    shutil.rmtree(checkpoint)  # it is worse than none: a resumed training would start from it
                must_be_finite(math.nan, state.global_step)
            if distributed.is_first():
                mark_complete(checkpoint, job.key)
            distributed.checkpoint_is_whole(checkpoint)

    return Reporter()


def validator(measure: Callable[[], float], early_stopping_patience: int | None) -> "TrainerCallback":
    """The callback that measures the validation loss whenever a checkpoint is due, and remembers which was best.

    What it remembers stands in the Trainer's own state, which every checkpoint holds: a resumed training knows it too.

    Args:
        measure: gives the validation loss of the weights as they are.
        early_stopping_patience: ends the training after so many validations without a lower loss; None never does.
    """
    from transformers import TrainerCallback

    class Validator(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not control.should_save:
                return
            loss = measure()
            must_be_finite(loss, state.global_step)
            state.log_history.append({"step": state.global_step, VALIDATION_LOSS: loss})
            if state.best_metric is None or loss < state.best_metric:
                state.best_metric, state.best_global_step = loss, state.global_step
                # The Trainer keeps this one when it removes older checkpoints.
                state.best_model_checkpoint = str(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            if _no_longer_better(state, early_stopping_patience):
                control.should_training_stop = True

    return Validator()


class NothingLeft(Exception):
    """A training that was resumed has no step left; its state and weights are those of its last checkpoint."""


def resumer(early_stopping_patience: int | None) -> "TrainerCallback":
    """The callback that makes a resumed training's state true here and now.

    The Trainer itself would take one step more after a checkpoint behind which there is none, unless that ends an
    epoch; and it looks for the best checkpoint in the folder where it was written, which may have been moved.

    Args:
        early_stopping_patience: as the validator has it.
    """
    from transformers import TrainerCallback

    class Resumer(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.best_global_step:
                best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
                if best.is_dir():
                    state.best_model_checkpoint = str(best)
                else:  # the best of those to come, then
                    state.best_metric = state.best_global_step = state.best_model_checkpoint = None
            if state.global_step >= state.max_steps or _no_longer_better(state, early_stopping_patience):
                raise NothingLeft

    return Resumer()


def orderer() -> "TrainerCallback":
    """The callback by which the order of an epoch's examples follows from the seed and the epoch's number alone.

    The Trainer would draw an order by lengths from the chances of the whole process, which are others in one that
    resumes; and with several processes it does not tell the sampler in which epoch a training resumes.
    """
    from transformers import TrainerCallback
    from transformers.trainer_pt_utils import LengthGroupedSampler

    class Orderer(TrainerCallback):  # type: ignore[misc]
        def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any, **_: Any) -> None:
            import torch

            sampler, epoch = _sampler(train_dataloader), int(state.epoch)
            if isinstance(sampler, LengthGroupedSampler):
                sampler.generator = torch.Generator().manual_seed(args.seed + epoch)
            elif hasattr(sampler, "set_epoch"):  # what is read as it lies has none
                sampler.set_epoch(epoch)

    return Orderer()


def _sampler(loader: Any) -> Any:
    """What orders the examples of a loader, below Accelerate's dealing them out to processes."""
    batches = loader.batch_sampler
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    return batches.sampler


def _no_longer_better(state: Any, early_stopping_patience: int | None) -> bool:
    losses = [entry[VALIDATION_LOSS] for entry in state.log_history if VALIDATION_LOSS in entry]
    return (
        bool(losses)
        and early_stopping_patience is not None
        and len(losses) - 1 - losses.index(min(losses)) >= early_stopping_patience
    )


def _progress(args: Any, state: Any, logs: dict[str, float], elapsed: float, first: int) -> Progress:
    done = max(state.global_step - first, 1)
    validated = [entry[VALIDATION_LOSS] for entry in state.log_history if VALIDATION_LOSS in entry]
    return Progress(
        step=state.global_step,
        steps=state.max_steps,
        epoch=state.epoch,
        loss=logs["loss"],
        validation_loss=validated[-1] if validated else None,
        learning_rate=logs["learning_rate"],
        tokens_per_second=logs.get("num_tokens", 0) / max(elapsed, 1e-9),
        eta_seconds=elapsed / done * (state.max_steps - state.global_step),
        micro_batch=args.per_device_train_batch_size,
        elapsed_seconds=elapsed,
        memory_bytes=memory_now(),
    )


def _weights_are_finite(checkpoint: Path) -> bool:
    import torch
    from safetensors.torch import load_file

    return all(bool(torch.isfinite(w).all()) for w in load_file(checkpoint / "adapter_model.safetensors").values())


def must_be_finite(loss: float, step: int) -> None:
    """Raise TrainingError when the training has diverged."""
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss became {loss} by step {step}: the training diverged and its weights are useless; lower "
            "learning_rate (a tenth of it is a good try), or set bf16 to false"
        )
