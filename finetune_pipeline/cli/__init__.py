"""The door for people in a terminal: the `finetune` command."""
