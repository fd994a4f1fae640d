"""What is told while a training runs: progress, checkpoints that are whole, a loss that is no number."""

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_pipeline.training import team
from finetune_pipeline.training.checkpoints import mark_complete
from finetune_pipeline.training.job import Progress, TrainingError, TrainingJob
from finetune_pipeline.training.progress import PROGRESS, append

if TYPE_CHECKING:
    from transformers import TrainerCallback

_SECONDS_BETWEEN_LINES = 1.0


def reporter(job: TrainingJob) -> "TrainerCallback":
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
            if not team.is_first():
                return
            last = state.global_step + args.logging_steps > state.max_steps
            if last or now - self.written >= _SECONDS_BETWEEN_LINES:
                append(job.output / PROGRESS, _progress(state, logs, now - self.began, self.first))
                self.written = now

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            team.wait()  # each process writes a file of its own into it
            if team.is_first():
                mark_complete(checkpoint, job.key)
            team.checkpoint_is_whole(checkpoint)

    return Reporter()


def _progress(state: Any, logs: dict[str, float], elapsed: float, first: int) -> Progress:
    done = max(state.global_step - first, 1)
    return Progress(
        step=state.global_step,
        steps=state.max_steps,
        epoch=state.epoch,
        loss=logs["loss"],
        learning_rate=logs["learning_rate"],
        tokens_per_second=logs.get("num_tokens", 0) / max(elapsed, 1e-9),
        eta_seconds=elapsed / done * (state.max_steps - state.global_step),
        elapsed_seconds=elapsed,
    )


def must_be_finite(loss: float, step: int) -> None:
    """Raise TrainingError when the training has diverged."""
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss became {loss} by step {step}: the training diverged and its weights are useless; lower "
            "learning_rate (a tenth of it is a good try), or set bfloat16 to false"
        )
