"""The command-line entry point: `finetune`."""
