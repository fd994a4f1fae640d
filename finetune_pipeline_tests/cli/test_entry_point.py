"""The entry point of the `finetune` command."""

import subprocess
import sys

ENTRY = "from finetune_pipeline.cli.entry_point import main; main()"


def test_ctrl_c_while_the_modules_load_is_no_traceback(tmp_path):
    loading = tmp_path / "sqlalchemy.py"  # found before the real one
    loading.write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(60)")
    program = f"import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); {ENTRY}"
    ended = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {program}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def test_it_runs_the_command():
    ended = subprocess.run([sys.executable, "-c", ENTRY, "--version"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and "version" in ended.stdout, ended.stderr
