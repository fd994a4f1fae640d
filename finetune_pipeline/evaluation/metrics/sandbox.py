"""A sandbox for Python code that a model wrote: bubblewrap, without network, with limits on time and memory.

The code sees the Python installation, `/usr` and an empty `/tmp`, and nothing else of this machine. Isolation is proved
once per process by code that tries to break out. Where it cannot be proved, nothing runs. Kernel bugs are not covered:
the code runs on this machine's kernel.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from psutil import Process

_MAX_PROCESSES = 16
_POLL_SECONDS = 0.02
_MAX_FILE_BYTES = 10_000_000
_MAX_TMP_BYTES = 64_000_000  # of all files together, which are in memory

# Limits are set before the code runs, and cannot be raised again. Success is a token that is unknown in advance:
# otherwise `sys.exit(0)` in the code would pass every test.
_RUNNER = """\
import json, resource, sys
with open("/program.json", encoding="utf-8") as file:
    program = json.load(file)
for name, limit in program["limits"].items():
    resource.setrlimit(getattr(resource, name), (limit, limit))
space = {"__name__": "answer"}
for part in ("code", "tests"):
    exec(compile(program[part], f"<{part}>", "exec"), space)
sys.__stdout__.write("\\n" + sys.argv[1])
sys.__stdout__.flush()
"""


@dataclass(frozen=True)
class SandboxResult:
    """How a run ended; `problem` is empty if the tests passed."""

    passed: bool
    problem: str = ""


def run_in_sandbox(code: str, tests: str, timeout_seconds: float, memory_mb: int) -> SandboxResult:
    """Run Python code, then tests that use its names, and return whether both ran to their end."""
    import psutil

    token = secrets.token_hex(16)
    limits = {
        "RLIMIT_AS": memory_mb * 2**20,
        "RLIMIT_CPU": int(timeout_seconds) + 1,
        "RLIMIT_FSIZE": _MAX_FILE_BYTES,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
    }
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        program = Path(folder) / "program.json"
        program.write_text(json.dumps({"code": code, "tests": tests, "limits": limits}), encoding="utf-8")
        command = [*_bubblewrap(program), sys.executable, "-I", "-B", "-c", _RUNNER, token]
        command[command.index(sys.executable)] = os.path.realpath(sys.executable)  # not the environment's link
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            problem = _watch(psutil.Process(process.pid), process, timeout_seconds, memory_mb)
        finally:
            process.kill()  # and with it everything in its PID namespace
            process.wait()
        output.seek(max(0, output.seek(0, os.SEEK_END) - 2_000))
        lines = output.read().decode("utf-8", "replace").strip().split("\n")
    if not problem and process.returncode == 0 and lines[-1] == token:
        return SandboxResult(True)
    return SandboxResult(False, problem or lines[-1] or f"it ended with exit code {process.returncode}")


def _watch(watched: "Process", process: "subprocess.Popen[bytes]", seconds: float, memory_mb: int) -> str:
    """Wait for the end of a run, and return which limit it exceeded, if any."""
    import psutil

    end = time.monotonic() + seconds
    while process.poll() is None:
        if time.monotonic() > end:
            return f"it ran for more than {seconds:g} seconds"
        used = count = 0
        try:
            for child in watched.children(recursive=True):
                count += 1
                used += child.memory_info().rss
        except psutil.NoSuchProcess:
            continue  # it ended meanwhile
        if count > _MAX_PROCESSES:
            return f"it started more than {_MAX_PROCESSES} processes"
        if used > memory_mb * 2**20:
            return f"it used more than {memory_mb} MB of memory"
        time.sleep(_POLL_SECONDS)
    return ""


def _bubblewrap(program: Path) -> list[str]:
    """Return the command that runs another one in the sandbox."""
    system = [argument for name in ("/usr", "/lib", "/lib64", "/bin") for argument in _same_path(name)]
    return [
        "bwrap", "--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL",
        "--die-with-parent", "--new-session", "--clearenv", *system, "--ro-bind", sys.base_prefix, sys.base_prefix,
        "--ro-bind", str(program), "/program.json", "--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev",
        "--size", str(_MAX_TMP_BYTES), "--tmpfs", "/tmp",
        "--chdir", "/tmp",
    ]  # fmt: skip


def _same_path(name: str) -> list[str]:
    path = Path(name)
    if path.is_symlink():  # /lib is usr/lib on most systems
        return ["--symlink", str(path.readlink()), name]
    return ["--ro-bind", name, name] if path.is_dir() else []


_BREAK_OUT = """\
import os, socket

def expect_refusal(what, action):
    try:
        action()
    except (OSError, MemoryError):
        return
    raise SystemExit("it " + what)

expect_refusal("reaches the network", lambda: socket.create_connection(("127.0.0.1", {port}), 1))
expect_refusal("reads files of this machine", lambda: open({secret!r}))
expect_refusal("writes files of this machine", lambda: open("/usr/finetune-probe", "w"))
expect_refusal("uses more memory than its limit", lambda: bytearray({memory}))
if "FINETUNE_SANDBOX_PROBE" in os.environ:
    raise SystemExit("it sees this process's environment")
"""


@lru_cache(maxsize=1)
def isolation_problem() -> str | None:
    """Return why code cannot be isolated on this machine, or None if it is proved that it can."""
    if sys.platform != "linux":
        return f"bubblewrap runs on Linux only, and this is {sys.platform}"
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed (Debian: apt-get install bubblewrap)"
    simple = run_in_sandbox("", "", 20, 512)
    if not simple.passed:
        return f"bubblewrap does not work here ({simple.problem}); containers have to allow user namespaces"
    with _listener() as port, tempfile.NamedTemporaryFile() as secret:
        os.environ["FINETUNE_SANDBOX_PROBE"] = "1"
        try:
            code = _BREAK_OUT.format(port=port, secret=secret.name, memory=1024 * 2**20)
            inside = run_in_sandbox(code, "", 20, 512)
        finally:
            del os.environ["FINETUNE_SANDBOX_PROBE"]
    if not inside.passed:
        return f"code in the sandbox is not isolated: {inside.problem}"
    endless = run_in_sandbox("while True: pass", "", 0.5, 512)
    return None if "more than 0.5 seconds" in endless.problem else "the sandbox does not stop code that runs too long"


@contextmanager
def _listener() -> Iterator[int]:
    """Yield the port of a socket that accepts connections on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]
