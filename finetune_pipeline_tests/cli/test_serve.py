"""The start of `finetune serve`, and `finetune key`."""

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


def test_a_used_port_is_reported_before_a_model_is_loaded(own_home):
    with socket.create_server(("127.0.0.1", 0)) as other:
        error = refused("serve", "--port", other.getsockname()[1])
    assert "cannot be served (Address already in use). End the program that uses it" in error


@pytest.mark.parametrize("host", ["no.such.host.invalid", "::1%nosuch"])
def test_an_invalid_address_is_reported(own_home, host):
    run("key", "create", "app")
    assert "cannot be served" in refused("serve", "--host", host)


@pytest.mark.parametrize("port", ["0", "65536", "-1", "x"])
def test_an_invalid_port_is_refused(own_home, port):
    run("serve", "--port", port, code=2)


def test_a_home_that_cannot_be_written_is_reported(own_home):
    connect()
    (own_home / "write_ahead_log").write_text("a file instead of the folder")
    assert "cannot be written" in refused("serve")


def test_only_the_owner_can_read_the_database(own_home):
    connect()
    [file] = own_home.glob("*.db")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_keys_are_listed_without_their_secrets_in_80_columns(own_home):
    assert run("key", "list").stdout == "no API key exists; `finetune key create NAME` creates one\n"
    secret = run("key", "create", "the application", "--scope", "infer", "--scope", "admin").stdout.strip()
    output = run("key", "list").stdout
    assert "the" in output and "infer" in output and secret not in output
    assert max(map(len, output.splitlines())) <= 80
    assert "\u2026" not in output


def test_after_the_last_key_is_revoked_it_is_said_what_to_do(own_home):
    """Requests without a key stay refused, or revoking a stolen key would open the gateway."""
    run("key", "create", "app")
    run("key", "create", "batch")
    assert "no key is left" not in run("key", "revoke", "app").stderr
    assert "Create one with `finetune key create NAME`" in run("key", "revoke", "batch").stderr
    with socket.create_server(("127.0.0.1", 0)) as other:  # so that nothing is served
        result = CliRunner().invoke(finetune, ["serve", "--port", str(other.getsockname()[1])])
    assert "every request will be refused: all API keys are revoked" in result.stderr
