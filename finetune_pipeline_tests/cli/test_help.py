"""The help texts, as a terminal of 80 columns shows them."""

import click
import pytest
from click.testing import CliRunner

from finetune_pipeline.cli.main import finetune

GROUPS = [finetune, *(command for command in finetune.commands.values() if isinstance(command, click.Group))]


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)
def test_no_short_help_is_cut(group):
    shown = CliRunner().invoke(group, ["--help"], terminal_width=80).output.split("Commands:\n")[1].splitlines()
    assert len(shown) == len(group.commands)
    assert [line for line in shown if "..." in line] == []
