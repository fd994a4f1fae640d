"""Commands that read, in a home on a read-only mount."""

import os
import subprocess
import sys

import pytest

READING = (("status",), ("feedback", "list"), ("feedback", "stats"), ("train", "list"), ("model", "list"))
KILLED = (
    "import os, sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None); "
    "c.execute('PRAGMA wal_autocheckpoint=0'); "
    "c.execute(\"UPDATE interactions SET prompt = 'a roof in the log'\"); os._exit(0)"
)


def finetune(folder, *arguments):
    command = [sys.executable, "-m", "finetune_pipeline.cli.main", *arguments]
    env = {**os.environ, "FINETUNE_HOME": str(folder), "FINETUNE_DATABASE_URL": "", "DAGSTER_HOME": ""}
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module", params=["closed", "killed", "killed, without its index"])
def mounted(request, tmp_path_factory):
    folder, mount = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("mount")
    logged = finetune(folder, "feedback", "log", "--prompt", "a roof", "--output", "{}", "--user", "ann")
    assert logged.returncode == 0, logged.stderr
    assert finetune(folder, "status").returncode == 0  # creates Dagster's home
    if request.param != "closed":
        subprocess.run([sys.executable, "-c", KILLED, str(folder / "finetune.db")], check=True)
    if request.param == "killed, without its index":
        (folder / "finetune.db-shm").unlink()
    refused = subprocess.run(["mount", "--bind", str(folder), str(mount)], capture_output=True, text=True)
    if refused.returncode:
        pytest.skip(f"mounting needs root: {refused.stderr.strip()}")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(mount)], check=True)
        yield request.param, mount
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


@pytest.mark.slow
def test_commands_that_read_work_in_a_read_only_home(mounted):
    kind, home = mounted
    for arguments in READING if kind == "closed" else [("feedback", "list")]:
        done = finetune(home, *arguments)
        if kind == "killed, without its index":
            assert done.returncode == 1 and "copy the folder to a writable one" in done.stderr
        else:
            assert done.returncode == 0, done.stderr
            assert arguments[:2] != ("feedback", "list") or ("in the log" in done.stdout) == (kind == "killed")
            assert arguments != ("status",) or "is read-only" in done.stdout
    if kind == "closed":
        done = finetune(home, "feedback", "log", "--prompt", "x", "--output", "y")
        assert done.returncode == 1
        assert f"{home}/finetune.db is read-only; nothing of this step was stored" in done.stderr
