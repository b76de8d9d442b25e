"""`fedlora deploy local`, interrupted and resumed."""

import shlex
import signal

import pytest
import tomli_w

from fedlora.api import run
from fedlora.config.experiment import build

from lives import alive_in, event_log, fedlora, table, until
from wired import assert_same_runs, furnish

pytestmark = [pytest.mark.flower, pytest.mark.timeout(600)]


def test_a_local_run_that_is_interrupted_goes_on_as_if_nothing_had_happened_and_leaves_no_process(tmp_path):
    home = furnish(tmp_path)
    file, path = tmp_path / "experiment.toml", tmp_path / "run"
    what = table(home, 2, rounds=2)
    file.write_text(tomli_w.dumps(what))
    resume = interrupted(fedlora("deploy", "local", "--clients", "2", file, "--out", path), path)
    assert resume == ["deploy", "local", "--resume", str(path)]
    assert until(lambda: not alive_in(path), 30)
    second = fedlora(*resume)  # both with the umask of most systems, which lets others read
    out, err = second.communicate()
    assert second.returncode == 0, err
    assert "round 2/2" in out and "run directory" in out
    assert until(lambda: not alive_in(path), 30)
    readable = [entry for entry in [path, *path.rglob("*")] if not entry.is_symlink() and entry.stat().st_mode & 0o077]
    assert readable == []
    assert_same_runs(run(build(what), tmp_path / "simulated").folder, path)


def interrupted(process, path):
    """What it printed after a Ctrl-C once the ServerApp has begun: the command that goes on."""
    assert until(lambda: event_log(path))
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; resume with: fedlora " in said
    return shlex.split(said.partition("resume with: fedlora ")[2])
