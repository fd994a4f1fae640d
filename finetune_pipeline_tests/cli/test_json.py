"""`--json` of every command that shows something, by walking the tree of commands."""

from collections.abc import Iterator

import click

from finetune_pipeline.cli.main import finetune


def commands(command: click.Command, *path: str) -> Iterator[tuple[str, click.Command]]:
    """Yield each command that is no group, with its name as it is typed."""
    if isinstance(command, click.Group):
        for name, one in command.commands.items():
            yield from commands(one, *path, name)
    else:
        yield " ".join(path), command


COMMANDS = dict(commands(finetune))
WITH_JSON = [name for name, command in COMMANDS.items() if any("--json" in one.opts for one in command.params)]

WITHOUT_JSON = {
    "init": "writes files",
    "run": "shows the progress of a run; `report --json` has its result",
    "demo": "as run",
    "up": "serves until it is stopped",
    "ui": "serves until it is stopped",
    "serve": "serves until it is stopped",
    "console": "serves until it is stopped",
    "env": "prints shell commands",
    "ask": "prints the answer, which is JSON if the loop has a schema",
    "dataset export": "writes a file",
    "feedback export": "writes a file",
    "feedback import": "changes the store; `feedback stats --json` counts it",
    "feedback log": "prints the id alone",
    "feedback correct": "changes the store; `feedback show --json` has it",
    "feedback rate": "changes the store; `feedback show --json` has it",
    "feedback retract": "changes the store; `feedback stats --json` counts it",
    "feedback erase": "deletes; what it lists is for a person to act on",
    "feedback tail": "prints JSON lines anyway",
    "model switch": "changes the champion; `model history --json` has it",
    "model rollback": "changes the champion; `model history --json` has it",
    "model approve": "changes the champion; `model history --json` has it",
    "model reject": "records a decision; `model history --json` has it",
    "model promote": "changes the champion; `model history --json` has it",
    "model push": "uploads; the page on the Hub has it",
    "model archive": "records a decision; `model history --json` has it",
    "model unarchive": "records a decision; `model history --json` has it",
    "key create": "prints the secret alone",
    "key revoke": "changes the keys; `key list --json` has it",
}


def test_every_command_prints_json_or_has_a_reason_not_to():
    assert sorted(WITHOUT_JSON) == sorted(COMMANDS.keys() - set(WITH_JSON))
