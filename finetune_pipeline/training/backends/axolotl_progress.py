"""A plugin that Axolotl loads in its own environment: it reports events and sets the seed.

It is copied beside the job's axolotl.yaml and has to stand alone there: nothing of this project can be imported.
"""

import json
import os
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin  # installed in the only environment that loads this file

EVENTS = Path(__file__).with_name("events.jsonl")


def report(event: str, **values: Any) -> None:
    """Append an event in a single write, so that a kill leaves no half of it."""
    line = json.dumps({"event": event, **values}) + "\n"
    descriptor = os.open(EVENTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


class ProgressPlugin(BasePlugin):  # type: ignore[misc]  # axolotl is not installed where types are checked
    """Adds the callback to Axolotl's trainer, and sets the seed before the model is made."""

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        """Have a non-finite loss reported: the Trainer would report the mean of earlier losses instead."""
        return {"logging_nan_inf_filter": False}

    def pre_model_load(self, cfg: Any) -> None:
        """Seed the adapter's initial weights, which Axolotl leaves random."""
        from transformers import set_seed

        set_seed(cfg.seed)

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        """Return the callbacks, as Axolotl asks for them."""
        return [_callback()]


def _callback() -> Any:
    import torch
    from transformers import TrainerCallback

    gpu = torch.cuda.is_available()

    class EventCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.best_global_step:  # the Trainer looks where it was written, and the folder may have been moved
                best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
                if best.is_dir():
                    state.best_model_checkpoint = str(best)
                else:
                    state.best_metric = state.best_global_step = state.best_model_checkpoint = None
            device = torch.cuda.get_device_name() if gpu else "cpu"
            report("train_begin", step=state.global_step, steps=state.max_steps, bf16=bool(args.bf16), device=device)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step >= state.max_steps:  # the last step may not be a multiple of eval_steps
                control.should_evaluate = True

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            kept = {name: float(logs[name]) for name in ("loss", "eval_loss", "learning_rate") if name in logs}
            report("log", step=state.global_step, steps=state.max_steps, epoch=state.epoch or 0.0, **kept)

        def on_save(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            trained = [weight for weight in model.parameters() if weight.requires_grad]
            report("save", step=state.global_step, finite=all(bool(w.isfinite().all()) for w in trained))

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if gpu:
                peak = int(torch.cuda.max_memory_allocated())
            else:
                lines = Path("/proc/self/status").read_text().split("\n")  # Axolotl runs on Linux
                peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
            report(
                "train_end",
                step=state.global_step,
                steps=state.max_steps,
                best_step=(args.load_best_model_at_end and state.best_global_step) or state.global_step,
                peak_memory=peak,
                history=state.log_history,
            )

    return EventCallback()
