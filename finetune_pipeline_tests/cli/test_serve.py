"""`finetune serve` before it serves, and `finetune key`."""

import socket
import stat

import pytest
from click.testing import CliRunner

from finetune_pipeline.cli.main import finetune
from finetune_pipeline.database import connect
from finetune_pipeline.settings import SettingsError


def run(*arguments, code=0):
    result = CliRunner().invoke(finetune, list(map(str, arguments)))
    assert result.exit_code == code, (result.output, result.exception)
    return result


def refused(*arguments):
    with pytest.raises(SettingsError) as error:
        CliRunner().invoke(finetune, list(map(str, arguments)), catch_exceptions=False)
    return str(error.value)


def test_a_port_that_another_program_has_is_said_before_a_model_is_loaded(own_home):
    with socket.create_server(("127.0.0.1", 0)) as other:
        said = refused("serve", "--port", other.getsockname()[1])
    assert "cannot be served (Address already in use); end the program that has it" in said


@pytest.mark.parametrize("host", ["no.such.host.invalid", "::1%nosuch"])
def test_an_address_that_is_none_is_said(own_home, host):
    run("key", "create", "app")
    assert "cannot be served" in refused("serve", "--host", host)


@pytest.mark.parametrize("port", ["0", "65536", "-1", "x"])
def test_a_port_that_is_none_is_refused(own_home, port):
    run("serve", "--port", port, code=2)


def test_a_home_that_cannot_be_written_is_said(own_home):
    connect()
    (own_home / "journal").write_text("a file where the journal's folder should be")
    assert "cannot be written" in refused("serve")


def test_the_store_is_for_its_owner_only(own_home):
    connect()
    [file] = own_home.glob("*.db")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_keys_are_listed_without_their_secrets_in_80_columns(own_home):
    secret = run("key", "create", "the application", "--scope", "infer", "--scope", "admin").stdout.strip()
    said = run("key", "list").stdout
    assert "the" in said and "infer" in said and secret not in said
    assert max(map(len, said.splitlines())) <= 80
    assert "\u2026" not in said
