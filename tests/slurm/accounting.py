"""The database behind sacct, sacctmgr and QOS: MariaDB and slurmdbd."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from contextlib import ExitStack

from tests.slurm.daemons import Daemon, run, succeeds
from tests.slurm.settings import Place, slurmdbd_conf

_USERS = """
create database slurm;
create user slurm@localhost identified by 'slurm';
create user slurm@127.0.0.1 identified by 'slurm';
grant all on slurm.* to slurm@localhost;
grant all on slurm.* to slurm@127.0.0.1;
"""


def start_accounting(place: Place, environment: Mapping[str, str], undo: ExitStack) -> None:
    """`undo` is where their end is kept. Their files are thrown away, so neither has to say goodbye."""
    _start_database(place, environment, undo)
    conf = place.folder / "slurmdbd.conf"
    conf.touch(mode=0o600)
    conf.write_text(slurmdbd_conf(place))
    slurmdbd = Daemon(["slurmdbd", "-D"], place.folder / "log" / "slurmdbd.out", environment)
    undo.callback(slurmdbd.stop, signal.SIGKILL)
    ask = ["sacctmgr", "--noheader", "show", "cluster"]
    slurmdbd.wait_until(lambda: succeeds(ask, environment), 30, "slurmdbd answers")
    run(["sacctmgr", "--immediate", "--quiet", "add", "cluster", "local"], environment)


def _start_database(place: Place, environment: Mapping[str, str], undo: ExitStack) -> None:
    data = place.folder / "database"
    data.mkdir()
    mine = ["--no-defaults", "--user=root", f"--datadir={data}"]
    run(["mariadb-install-db", *mine, "--auth-root-authentication-method=normal", "--skip-test-db"], environment)
    here = [f"--socket={place.database_socket}", "--bind-address=127.0.0.1", f"--port={place.database_port}"]
    quick = ["--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900", "--innodb-flush-log-at-trx-commit=0"]
    pid_file = f"--pid-file={place.folder}/run/mariadbd.pid"
    daemon = Daemon(["mariadbd", *mine, *here, *quick, pid_file], place.folder / "log" / "mariadbd.out", environment)
    undo.callback(daemon.stop, signal.SIGKILL)
    client = ["mariadb", "--no-defaults", "--user=root", f"--socket={place.database_socket}"]
    daemon.wait_until(lambda: succeeds([*client, "--execute=select 1"], environment), 30, "mariadbd answers")
    run(client, environment, text=_USERS)
