"""`finetune doctor`: check what this machine can run, with a remedy for each failed check."""

import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from tempfile import TemporaryFile

import click

from finetune_pipeline.cli.options import json_option, print_json
from finetune_pipeline.settings import SettingsError, home, load_loops, project_path
from finetune_pipeline.wording import first_line


@dataclass(frozen=True)
class Finding:
    """The result of one check, with the remedy if it does not work."""

    name: str
    works: bool
    detail: str
    remedy: str = ""
    needed: bool = True


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Check what this machine can run, with remedies.

    Checks Python, the compiler, llama.cpp, the GGUF converter, the GPU, the training backends, the sandbox for code,
    and whether disk and memory suffice for a run of each loop. Exits with 1 if something that is needed does not work.
    """
    findings = (finding for check in CHECKS for finding in check())
    if as_json:
        done = list(findings)
        print_json(done)
        sys.exit(1 if any(one.needed and not one.works for one in done) else 0)
    broken = False
    for finding in findings:
        status = click.style("ok      ", fg="green") if finding.works else click.style("optional", fg="yellow")
        if not finding.works and finding.needed:
            status, broken = click.style("FAIL    ", fg="red"), True
        click.echo(f"{status}  {finding.name:<22} {finding.detail}")
        if finding.remedy and not finding.works:
            click.echo(f"          {'':<22} → {finding.remedy}")
    sys.exit(1 if broken else 0)


def _system() -> Iterator[Finding]:
    system = platform.system()
    remedy = "install WSL (wsl --install) and run the project inside it"
    yield Finding("system", system != "Windows", f"{system} {platform.machine()}", remedy)
    fits = (3, 11) <= sys.version_info[:2] < (3, 13)
    yield Finding("python", fits, platform.python_version(), "make clean; make setup PYTHON=python3.11")
    try:
        home().mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=home()):
            pass
    except OSError as error:
        problem = f"{home()} cannot be created or written ({error.strerror})"
        yield Finding("state", False, problem, "set FINETUNE_HOME to a writable folder")
    else:
        free = shutil.disk_usage(home()).free / 1e9
        yield Finding("state", free > 1, f"{home()}, {free:.0f} GB free", "free some disk space")


def _compiler() -> Iterator[Finding]:
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    remedy = "install one (Debian: apt-get install g++; macOS: xcode-select --install)"
    yield Finding("C++ compiler", found is not None, found or "none found", remedy)


def _llama() -> Iterator[Finding]:
    from finetune_pipeline.export.gguf import converter_folder
    from finetune_pipeline.export.process import ExportError
    from finetune_pipeline.inference.probe import probe_engine

    probe = probe_engine()
    rebuild = 'rebuild it: CMAKE_ARGS="-DGGML_NATIVE=OFF" .venv/bin/pip install --force-reinstall --no-deps '
    rebuild += "--no-cache-dir --no-binary llama-cpp-python llama-cpp-python"
    about = "; ".join(f"{name} {version}" for name, version in probe.versions.items())
    detail = f"a tiny model runs in F16 ({about})" if probe.works else f"{probe.detail} ({about})"
    yield Finding("llama.cpp", probe.works, detail, rebuild)
    if probe.works:
        detail = "a tiny model runs in Q4_K_M" if probe.quantized_works else probe.detail
        yield Finding("llama.cpp, quantized", probe.quantized_works, detail, rebuild)
    try:
        yield Finding("GGUF converter", True, str(converter_folder()))
    except ExportError as error:
        yield Finding("GGUF converter", False, str(error), "make setup")


def _gpu() -> Iterator[Finding]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    if shutil.which("nvidia-smi") is None:
        yield Finding("GPU", False, "no NVIDIA driver found; training runs on the CPU", needed=False)
        return
    result = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    import torch

    usable = torch.cuda.is_available()
    remedy = "this torch has no CUDA; see docs/how-to/install.md"
    yield Finding("GPU", usable, result.stdout.strip() or result.stderr.strip(), remedy, needed=False)


def _backends() -> Iterator[Finding]:
    from finetune_pipeline.training.backends import available_backends

    for backend in available_backends():
        needed = backend.name == "peft"
        yield Finding(f"training: {backend.name}", backend.available, backend.why, backend.remedy, needed)


def _sandbox() -> Iterator[Finding]:
    from finetune_pipeline.evaluation.metrics.sandbox import isolation_problem

    problem = isolation_problem()
    detail = f"off: {problem}" if problem else "code runs without network, with limits on time and memory (bubblewrap)"
    remedy = "needed only for the metric `tests`: install bubblewrap, and allow user namespaces in containers"
    yield Finding("sandbox for code", problem is None, detail, remedy, needed=False)


def _room() -> Iterator[Finding]:
    """Compare what a run of each loop needs with what is free, without downloading or dequantizing a base model."""
    from finetune_pipeline.export.base import local_tokenizer
    from finetune_pipeline.pipeline.needs import free_space, shortages, stage_needs
    from finetune_pipeline.pipeline.plan import plan_training
    from finetune_pipeline.training.architecture import architecture_of
    from finetune_pipeline.training.job import TrainingError

    try:
        loops, free = load_loops(), free_space()
    except SettingsError as error:
        yield Finding("loops", False, first_line(str(error)), "finetune check", needed=False)
        return
    for loop in loops.values():
        name, file = f"room for {loop.name}", project_path(loop.base_model)
        base = str(local_tokenizer(loop.base_model) or loop.base_model)
        try:
            planned = plan_training(architecture_of(base), loop.training, examples=1)
        except TrainingError as error:
            detail = f"unknown: {first_line(str(error))}"
            if file.is_file():
                detail = f"unknown until {file.name} is read into the cache"
            yield Finding(name, False, detail, f"finetune train plan --loop {loop.name}", needed=False)
            continue
        device = planned.machine.device
        if planned.chosen is None:
            yield Finding(name, False, planned.refusal, f"finetune train plan --loop {loop.name}", needed=False)
            continue
        gguf = file if file.is_file() else None
        best = planned.chosen
        needs = stage_needs(architecture_of(base), loop, best.settings, best.memory.bytes, device, gguf=gguf)
        if short := shortages(needs, free):
            yield Finding(name, False, "; ".join(short), f"finetune train plan --loop {loop.name}", needed=False)
            continue
        most = max(needs, key=lambda one: one.memory)
        disk = sum(one.disk for one in needs) / 1e9
        yield Finding(
            name,
            True,
            f"a run writes up to {disk:.1f} GB, and needs up to {most.memory / 1e9:.1f} GB of "
            f"{'GPU ' if most.device == 'gpu' else ''}memory ({most.stage})",
            needed=False,
        )


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (_system, _compiler, _llama, _gpu, _backends, _sandbox, _room)
