"""The files that containers and service managers read: they parse, and what they name exists."""

import configparser
import plistlib
import re
import shlex
from pathlib import PurePosixPath

import yaml

from finetune_pipeline.cli.main import finetune
from finetune_pipeline.settings import PROJECT_ROOT

DOCKERFILE = PROJECT_ROOT / "Dockerfile"
COMPOSE = PROJECT_ROOT / "compose.yaml"
SERVICES = PROJECT_ROOT / "examples" / "services"


def accept(arguments: list[str]) -> None:
    """Parse the arguments of `finetune` as the command line does, without running the command."""
    with finetune.make_context("finetune", list(arguments)) as context:
        name, command, rest = finetune.resolve_command(context, arguments)
        while (resolve := getattr(command, "resolve_command", None)) is not None:
            name, command, rest = resolve(context, rest)
        with command.make_context(name, rest, parent=context):
            pass


def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile with their arguments, continued lines joined."""
    text = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", DOCKERFILE.read_text(encoding="utf-8")))
    lines = [line.split(None, 1) for line in text.splitlines() if line.strip()]
    return [(word, " ".join(rest.split())) for word, rest in lines]


def of(word: str) -> list[str]:
    return [rest for found, rest in instructions() if found == word]


def test_the_images_have_exact_versions():
    images = [rest.split()[0] for rest in of("FROM")]
    images += [service["image"] for service in compose().values()]
    assert images and all(re.fullmatch(r"[\w./-]+:\d+\.\d+[\w.-]*", image) for image in images), images


def test_the_image_is_built_by_a_target_that_exists():
    (setup,) = [rest for rest in of("RUN") if "apt-get" not in rest]
    make, target = shlex.split(setup)
    assert make == "make" and f"\n{target}:" in (PROJECT_ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_build_has_every_file_that_it_copies_and_no_state():
    assert of("COPY") == [". .", "--from=build /app /app"]
    ignored = (PROJECT_ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {".git", ".venv", "data/state"} <= set(ignored)
    kept = {"Makefile", "pyproject.toml", "constraints.txt", "scripts/setup.sh", "workspace.yaml", "dagster.yaml"}
    assert not kept & set(ignored) and all((PROJECT_ROOT / name).is_file() for name in kept)


def test_the_build_arguments_are_those_of_the_set_up():
    script = (PROJECT_ROOT / "scripts" / "setup.sh").read_text(encoding="utf-8")
    assert of("ARG") == list(compose()["finetune"]["build"]["args"])
    assert all(f"${{{name}" in script for name in of("ARG"))


def test_the_command_of_the_image_is_accepted():
    (entry,), (command,) = of("ENTRYPOINT"), of("CMD")
    assert yaml.safe_load(entry) == ["finetune"]
    accept(yaml.safe_load(command))


def compose() -> dict:
    return dict(yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"])


def test_the_commands_of_compose_are_accepted():
    service = compose()["finetune"]
    accept(service["command"])
    comments = [line for line in COMPOSE.read_text(encoding="utf-8").splitlines() if "run --rm finetune" in line]
    (line,) = [line.partition("run --rm finetune ")[2].partition("    #")[0] for line in comments]
    accept(shlex.split(line))


def test_compose_publishes_the_ports_of_the_programs_on_this_machine_alone():
    defaults = {one.name: one.default for one in finetune.commands["up"].params}
    ports = sorted(defaults[name] for name in ("ui_port", "gateway_port", "console_port"))
    assert sorted(compose()["finetune"]["ports"]) == sorted(f"127.0.0.1:{port}:{port}" for port in ports)
    assert sorted(int(port) for rest in of("EXPOSE") for port in rest.split()) == ports


def test_compose_keeps_state_and_database_in_volumes_that_it_declares():
    mounted = {volume.partition(":")[0] for service in compose().values() for volume in service["volumes"]}
    declared = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["volumes"]
    assert mounted == set(declared)
    (home,) = re.findall(r"FINETUNE_HOME=(\S+)", " ".join(of("ENV")))
    assert f"state:{home}" in compose()["finetune"]["volumes"] and home in of("VOLUME")


def test_the_systemd_unit_starts_a_command_that_exists():
    unit = configparser.ConfigParser(interpolation=None, delimiters=("=",), strict=False)
    unit.optionxform = str  # type: ignore[method-assign,assignment]
    unit.read_string((SERVICES / "finetune-pipeline.service").read_text(encoding="utf-8"))
    service = unit["Service"]
    program, *arguments = shlex.split(service["ExecStart"])
    assert PurePosixPath(program) == PurePosixPath(service["WorkingDirectory"]) / ".venv/bin/finetune"
    accept(arguments)
    assert int(service["TimeoutStopSec"]) > 30  # what `up` takes at most
    assert service["Environment"] == f"FINETUNE_HOME=/var/lib/{service['StateDirectory']}"


def test_the_launchd_agent_starts_a_command_that_exists():
    agent = plistlib.loads((SERVICES / "finetune-pipeline.plist").read_bytes())
    program, *arguments = agent["ProgramArguments"]
    assert PurePosixPath(program) == PurePosixPath(agent["WorkingDirectory"]) / ".venv/bin/finetune"
    accept(arguments)
    assert agent["ExitTimeOut"] > 30
