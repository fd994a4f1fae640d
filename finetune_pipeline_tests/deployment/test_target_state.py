"""The table of targets and its leases, on SQLite and PostgreSQL."""

import os
import signal
import subprocess
import sys

import pytest

from finetune_pipeline.deployment.target_state import LeaseLostError, take_lease, target_states
from finetune_pipeline_tests.waiting import wait_until

HOLD = """
import sys, time
from finetune_pipeline.database import connect
from finetune_pipeline.deployment.target_state import take_lease
with take_lease(connect(sys.argv[1]), "notes", "shelf", float(sys.argv[2])) as lease:
    lease.update(wanted="v1.0.0")
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lease_is_exclusive_and_ends_with_its_block(db):
    with take_lease(db, "notes", "shelf") as first:
        with take_lease(db, "notes", "shelf") as second:
            assert second is None
        with take_lease(db, "notes", "other") as other, take_lease(db, "lists", "shelf") as elsewhere:
            assert other is not None and elsewhere is not None
        first.update(wanted="v1.0.0", tries=2)
    assert (first.state.wanted, first.state.tries) == ("v1.0.0", 2)
    state = target_states(db, "notes")["shelf"]
    assert (state.wanted, state.tries, state.state, state.locked_by) == ("v1.0.0", 2, "pending", None)
    with take_lease(db, "notes", "shelf") as again:
        assert again.state.wanted == "v1.0.0"


def test_an_error_frees_the_lease(db):
    with pytest.raises(KeyError), take_lease(db, "notes", "shelf"):
        raise KeyError
    with take_lease(db, "notes", "shelf") as lease:
        assert lease is not None


def test_a_lease_is_renewed_while_work_goes_on(db):
    with take_lease(db, "notes", "shelf", seconds=0.5) as lease:
        first = target_states(db, "notes")["shelf"].locked_until
        wait_until(lambda: target_states(db, "notes")["shelf"].locked_until > first)
        lease.update(wanted="v1.0.0")


def test_who_lost_its_lease_can_write_nothing(db):
    with take_lease(db, "notes", "shelf", seconds=-60) as late:  # ended before it began
        with take_lease(db, "notes", "shelf") as successor:
            successor.update(wanted="v2.0.0")
            with pytest.raises(LeaseLostError, match="another process works on the target shelf"):
                late.update(wanted="v1.0.0")
            with pytest.raises(LeaseLostError):
                late.renew()
        assert target_states(db, "notes")["shelf"].wanted == "v2.0.0"
    assert target_states(db, "notes")["shelf"].wanted == "v2.0.0"


def test_the_lease_of_a_killed_process_ends_by_itself(db, url):
    process = subprocess.Popen([sys.executable, "-c", HOLD, url, "2"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with take_lease(db, "notes", "shelf") as lease:
        assert lease is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()

    def taken():
        with take_lease(db, "notes", "shelf") as lease:
            return lease is not None and lease.state.wanted == "v1.0.0"

    wait_until(taken)
