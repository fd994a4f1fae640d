"""The example loop `examples/meeting_notes` in a home of its own, run by Dagster's command line."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import yaml

from finetune_pipeline.cli.dagster_home import dagster_yaml
from finetune_pipeline.settings import PROJECT_ROOT, read_loop

EXAMPLE = PROJECT_ROOT / "examples" / "meeting_notes" / "defs.yaml"
DEFINITIONS = """
from pathlib import Path
import dagster as dg
from finetune_pipeline.definitions import EXECUTOR
from finetune_pipeline.orchestration.component import FineTuneLoop
from finetune_pipeline.settings import read_loop
loop = read_loop(Path({yaml!r}))
defs = dg.Definitions.merge(
    FineTuneLoop(loop).build_defs(dg.ComponentTree.for_test().load_context), dg.Definitions(executor=EXECUTOR)
)
"""


class Loop:
    """The example loop in its own home, run by `dagster asset materialize`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.dagster = folder / "dagster"
        self.dagster.mkdir()
        (self.dagster / "dagster.yaml").write_text(dagster_yaml())
        self.env = {**os.environ, "FINETUNE_HOME": str(self.home), "DAGSTER_HOME": str(self.dagster)}

    def write(self, **changes):
        document = yaml.safe_load(EXAMPLE.read_text())
        attributes = document["attributes"]
        attributes |= {"base_model": "data/starter_model", "ingest": {"folders": [str(EXAMPLE.parent / "logs")]}}
        attributes["evaluation"]["benchmark"] = str(EXAMPLE.parent / "benchmark.jsonl")
        attributes |= changes
        (self.folder / "defs.yaml").write_text(yaml.safe_dump(document))
        (self.folder / "loop.py").write_text(DEFINITIONS.format(yaml=str(self.folder / "defs.yaml")))
        return read_loop(self.folder / "defs.yaml")

    def start(self, select="*meeting_notes/promoted_model"):
        command = [sys.executable, "-m", "dagster", "asset", "materialize", "--select", select, "-f"]
        return subprocess.Popen(
            [*command, str(self.folder / "loop.py")], env=self.env, cwd=PROJECT_ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def run(self, select="*meeting_notes/promoted_model", **changes):
        """Return the exit code and log of one run."""
        self.write(**changes)
        process = self.start(select)
        log = process.communicate()[0]
        with suppress(OSError):  # the home's disk may be full
            logs = self.home / "logs"  # as of `finetune run`
            logs.mkdir(parents=True, exist_ok=True)
            (logs / f"{process.pid}.log").write_text(log)
        return process.returncode, log

    def stage(self, name):
        return self.home / "artifacts" / "meeting_notes" / name

    def complete(self, name):
        return sorted(path.parent.name for path in self.stage(name).glob("[!.]*/manifest.json"))
