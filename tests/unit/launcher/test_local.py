"""The local launcher with a small program in the trainer's place: restarts, signals, codes, nothing left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launcher import capacity, ports, submission, watching
from launcher.attempts import latest_complete_step
from launcher.local import Job, supervise
from launcher.planning import DataSize, data_size
from launcher.ranks import World, rank_environment
from llm_dist import config, plan
from llm_dist.errors import Exit, UserError

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
run, rank = Path(os.environ["TEST_RUN"]), int(os.environ["RANK"])
mine = run / f"pid_{rank}"
start = len(list(run.glob(f"start_{rank}_*"))) + 1
(run / f"start_{rank}_{start}").write_text(os.environ["MASTER_PORT"])
def save(step):
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text("{}")
def until_asked():
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    mine.write_text(str(os.getpid()))
    while not asked:
        time.sleep(0.02)
"""


def job(tmp_path, monkeypatch, program, ranks=2, **more):
    monkeypatch.setenv("TEST_RUN", str(tmp_path))
    return Job([sys.executable, "-S", "-c", PROGRAM + program], tmp_path, ranks, **more)


def log(tmp_path, rank=0):
    return (tmp_path / "logs" / f"rank_{rank:05d}.log").read_text()


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_ranks_are_described_and_their_output_kept(tmp_path, monkeypatch, capfd):
    program = "print('hello from', rank, 'of', os.environ['WORLD_SIZE'], os.environ['OMP_NUM_THREADS'])"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    outcome = supervise(job(tmp_path, monkeypatch, program))
    assert (outcome.exit_code, outcome.starts, outcome.failure) == (Exit.DONE, 1, None)
    assert log(tmp_path, 0).startswith("=== attempt 1 | rank 0 of 2 | ")
    assert "hello from 1 of 2 3" in log(tmp_path, 1)
    shown = capfd.readouterr()
    assert shown.err == "hello from 0 of 2 3\n"
    assert shown.out == ""


def test_environment_of_a_rank():
    outer = {"PATH": "/bin", "TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": "7", "RANK": "9", "MASTER_PORT": "1"}
    environment = rank_environment(outer, 1, World(2, 2, 12345))
    assert environment["RANK"] == environment["LOCAL_RANK"] == "1"
    assert environment["WORLD_SIZE"] == environment["LOCAL_WORLD_SIZE"] == "2"
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("127.0.0.1", "12345")
    assert environment["PATH"] == "/bin"
    assert int(environment["OMP_NUM_THREADS"]) >= 1
    assert not {"TORCHELASTIC_RUN_ID", "GROUP_RANK"} & environment.keys()


def test_a_dead_rank_restarts_all_on_another_attempt(tmp_path, monkeypatch, capfd):
    program = """
if start == 1 and rank == 1: print("last words"); os.kill(os.getpid(), signal.SIGKILL)
if start == 1: until_asked(); sys.exit(75)
"""
    outcome = supervise(job(tmp_path, monkeypatch, program))
    assert (outcome.exit_code, outcome.starts) == (Exit.DONE, 2)
    said = capfd.readouterr().err
    assert "rank 1 failed first: killed by SIGKILL" in said
    assert "last words" in said
    assert "no complete checkpoint stands yet" in said
    assert log(tmp_path, 1).count("=== attempt ") == 2


def test_after_a_death_the_others_have_little_time(tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "FAILURE_GRACE_SECONDS", 0.2)
    program = """
if rank == 0: until_asked(); time.sleep(600)
while not (run / "pid_0").exists(): time.sleep(0.02)
sys.exit(3)
"""
    began = time.monotonic()
    outcome = supervise(job(tmp_path, monkeypatch, program, max_restarts=0))
    assert (outcome.exit_code, outcome.starts) == (Exit.DEFECT, 1)
    assert time.monotonic() - began < 0.5 * watching.SAVE_GRACE_SECONDS


def test_after_a_death_while_stopping_the_others_may_save(tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "FAILURE_GRACE_SECONDS", 0.05)
    program = """
if rank == 0: until_asked(); time.sleep(0.8); save(4); sys.exit(75)
while not (run / "pid_0").exists(): time.sleep(0.02)
os.kill(os.getppid(), signal.SIGTERM)
until_asked(); os.kill(os.getpid(), signal.SIGKILL)
"""
    outcome = supervise(job(tmp_path, monkeypatch, program))
    assert (outcome.exit_code, outcome.starts) == (Exit.STOPPED, 1)
    assert latest_complete_step(tmp_path) == 4


def test_gives_up_after_failures_without_progress(tmp_path, monkeypatch, capfd):
    outcome = supervise(job(tmp_path, monkeypatch, "sys.exit(3)", max_restarts=1))
    assert (outcome.exit_code, outcome.starts) == (Exit.DEFECT, 2)
    assert outcome.failure is not None and outcome.failure.cause == "exit code 3"
    assert "gave up after 2 failures in a row" in capfd.readouterr().err


def test_progress_renews_the_patience(tmp_path, monkeypatch):
    program = "save(10 * start) if rank == 0 and start < 4 else None; time.sleep(0.3); sys.exit(3 if start < 5 else 0)"
    wanted = job(tmp_path, monkeypatch, program, max_restarts=2)
    outcome = supervise(wanted)
    assert (outcome.exit_code, outcome.starts) == (Exit.DONE, 5)
    assert latest_complete_step(tmp_path) == 30
    assert outcome.as_table(wanted)["latest_checkpoint_step"] == 30
    json.dumps(outcome.as_table(wanted))


@pytest.mark.parametrize("failing", [0, 1])
def test_a_mistake_of_the_user_is_not_restarted(tmp_path, monkeypatch, capfd, failing):
    program = f"""
if rank != {failing}: until_asked(); sys.exit(75)
print("error: data.train=x is not there"); sys.exit(2)
"""
    outcome = supervise(job(tmp_path, monkeypatch, program))
    assert (outcome.exit_code, outcome.starts) == (Exit.USER_ERROR, 1)
    assert capfd.readouterr().err == "error: data.train=x is not there\n"


def test_ranks_that_stopped_after_saving_stop_the_job(tmp_path, monkeypatch, capfd):
    outcome = supervise(job(tmp_path, monkeypatch, "save(7); sys.exit(75)"))
    assert (outcome.exit_code, outcome.starts) == (Exit.STOPPED, 1)
    assert "the checkpoint at step 7 stands" in capfd.readouterr().err


LAUNCH = """
import sys
from pathlib import Path
from launcher.local import Job, supervise
run = Path(sys.argv[1])
sys.exit(supervise(Job([sys.executable, "-S", "-c", sys.argv[2]], run, 2)).exit_code)
"""


def launch(tmp_path, program):
    command = [sys.executable, "-c", LAUNCH, str(tmp_path), PROGRAM + program]
    environment = {**os.environ, "TEST_RUN": str(tmp_path)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    pids = [tmp_path / f"pid_{rank}" for rank in range(2)]
    wait_for(lambda: all(path.exists() and path.read_text() for path in pids))
    return process, [int(path.read_text()) for path in pids]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_launcher_is_passed_on_once(tmp_path, number):
    process, pids = launch(tmp_path, "until_asked(); time.sleep(0.3); save(4); sys.exit(75)")
    process.send_signal(number)
    _, said = process.communicate(timeout=15)
    assert process.returncode == Exit.STOPPED
    assert "the ranks save and leave" in said
    assert "the checkpoint at step 4 stands" in said
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_a_second_interrupt_kills(tmp_path):
    process, pids = launch(tmp_path, "until_asked(); time.sleep(600)")
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=15)
    assert process.returncode == Exit.STOPPED
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_a_rank_that_does_not_listen_yet_stops_too(tmp_path):
    program = "signal.signal(signal.SIGTERM, signal.SIG_DFL); mine.write_text(str(os.getpid())); time.sleep(600)"
    process, _ = launch(tmp_path, program)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=15)
    assert process.returncode == Exit.STOPPED
    assert "no complete checkpoint stands yet" in said


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells children of a parent's death on Linux only")
def test_ranks_leave_when_the_launcher_is_killed(tmp_path):
    process, pids = launch(tmp_path, "until_asked(); save(9); sys.exit(75)")
    process.kill()
    process.communicate(timeout=15)
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in pids))
    assert latest_complete_step(tmp_path) == 9


def test_grandchildren_do_not_outlive_their_rank(tmp_path, monkeypatch):
    program = """
import subprocess
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
(run / f"child_{rank}").write_text(str(child.pid))
sys.exit(0)
"""
    assert supervise(job(tmp_path, monkeypatch, program)).exit_code == Exit.DONE
    pids = [int((tmp_path / f"child_{rank}").read_text()) for rank in range(2)]
    wait_for(lambda: not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids))


def test_ports_lie_outside_the_ephemeral_range_and_differ_between_attempts(tmp_path, monkeypatch):
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(10_000 <= ports.choose_port() < lowest for _ in range(20))
    program = """
while not all((run / f"start_{number}_{start}").exists() for number in range(2)):
    time.sleep(0.02)  # else the failing rank's neighbour may be killed before it has noted its port
sys.exit(3 if start < 2 else 0)
"""
    supervise(job(tmp_path, monkeypatch, program))
    first, second = ((tmp_path / f"start_0_{start}").read_text() for start in (1, 2))
    assert first != second
    assert (tmp_path / "start_1_1").read_text() == first


def test_a_port_in_use_is_refused():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port} is in use"):
            ports.require_free(port)
    assert ports.require_free(port) == port


def planned(ranks):
    table = {
        "run": {"name": "x", "steps": 10},
        "model": {"layers": 2, "d_model": 64, "heads": 4},
        "data": {"train": "shards", "sequence_tokens": 128},
        "batch": {"tokens_per_step": 4096, "sequences_per_micro_batch": 4},
    }
    return plan.make_plan(config.parse(table), 1000, ranks)


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(capacity, "num_cuda_devices", lambda: 2)
    capacity.require_capacity(planned(2))
    with pytest.raises(UserError, match="--ranks 4 is more than the 2 GPUs here"):
        capacity.require_capacity(planned(4))


def test_more_ranks_than_memory_are_refused(monkeypatch):
    monkeypatch.setattr(capacity, "num_cuda_devices", lambda: 0)
    monkeypatch.setattr(capacity, "available_bytes", lambda: 2 * 2**30)
    capacity.require_capacity(planned(2))
    with pytest.raises(UserError, match=r"--ranks 32 would need .* GiB and 2\.0 GiB are free here"):
        capacity.require_capacity(planned(32))


def test_hidden_gpus_do_not_count(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert capacity.num_cuda_devices() == 0


def write_dataset(folder, **changes):
    """As much of a shard folder as planning reads."""
    folder.mkdir()
    dataset = {"format": 2, "dtype": "uint16", "tokenizer": "t", "vocabulary_tokens": 1000, "num_tokens": 10**6}
    dataset |= {"num_documents": 1, "num_bytes": 1, "fingerprint": "f", "shards": []}
    dataset |= {"index_sha256": "i", "checksums_sha256": "c", **changes}
    (folder / "dataset.json").write_text(json.dumps(dataset))


@pytest.fixture
def run_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(submission.capacity, "num_cuda_devices", lambda: 0)
    write_dataset(tmp_path / "shards")
    path = tmp_path / "x.toml"
    path.write_text(
        '[run]\nname = "x"\nsteps = 10\n[model]\nlayers = 1\nd_model = 64\nheads = 4\n'
        '[data]\ntrain = "shards"\nsequence_tokens = 128\n[batch]\ntokens_per_step = 1024\n'
        "sequences_per_micro_batch = 4\n"
    )
    return str(path)


def test_a_mixture_is_planned_by_all_its_sources(run_file, tmp_path):
    write_dataset(tmp_path / "more", num_tokens=500, vocabulary_tokens=1200)
    both = config.load(run_file, ['data.train={a="shards", b="more"}'])
    assert data_size(both, must_exist=True) == DataSize(1200, 10**6 + 500)
    absent = config.load(run_file, ['data.train={a="shards", b="nowhere"}'])
    assert data_size(absent, must_exist=False) == DataSize(1000, None)
    with pytest.raises(UserError, match="nowhere: no such shard folder"):
        data_size(absent, must_exist=True)


def test_raw_text_is_planned_before_it_is_tokenized(run_file, tmp_path):
    (tmp_path / "x.txt").write_text("words")
    raw = config.load(run_file, ["data.train=x.txt", "data.tokenizer=t", "plan.vocabulary_tokens=777"])
    assert data_size(raw, must_exist=True) == DataSize(777, None)
    assert submission.prepare(submission.Wanted(run_file, ["data.train=x.txt", "data.tokenizer=t"], ranks=1)).ranks == 1
    with pytest.raises(UserError, match=r"no-such\.txt: no such"):
        data_size(config.load(run_file, ["data.train=no-such.txt", "data.tokenizer=t"]), must_exist=True)


def test_prepare_makes_the_training_command(run_file):
    wanted = submission.Wanted(run_file, ["run.steps=20"], ["optim.lr"], ranks=2)
    made = submission.prepare(wanted)
    assert made.command[1:] == ["-m", "llm_dist", "train", run_file, "--accept", "optim.lr", "run.steps=20"]
    assert (made.run, made.ranks) == (Path("runs/x"), 2)
    assert made.logs.is_dir()


@pytest.mark.parametrize(
    ("overrides", "ranks", "message"),
    [
        (["optim.lrr=1"], 2, "optim.lrr is not a key of a run file"),
        (["data.train=nowhere"], 2, "nowhere: no such shard folder"),
        ([], 3, "11% of the computed rows would be absent"),
        (["run.dir=shards", "run.name=dataset.json"], 2, "exists and is not a run folder"),
    ],
)
def test_prepare_refuses_before_a_rank_starts(run_file, overrides, ranks, message):
    with pytest.raises(UserError, match=message):
        submission.prepare(submission.Wanted(run_file, overrides, ranks=ranks))


def test_prepare_refuses_a_run_that_is_being_trained(run_file, monkeypatch):
    monkeypatch.setattr(submission, "SAVE_GRACE_SECONDS", 0.3)
    run = Path("runs/x")
    run.mkdir(parents=True)
    (run / "config.json").write_text(config.load(run_file).to_json())
    beat = {"pid": os.getpid(), "host": socket.gethostname(), "time": time.time(), "step": 1, "phase": "step"}
    (run / "heartbeat.json").write_text(json.dumps(beat))
    with pytest.raises(UserError, match=f"is being trained by process {os.getpid()}"):
        submission.prepare(submission.Wanted(run_file, ranks=1))


@pytest.mark.parametrize("command", [[], ["local"], ["status"], ["plan"]])
def test_help_imports_nothing_heavy(command):
    code = (
        "import sys; from launcher.cli import app\n"
        f"try: app({[*command, '--help']!r})\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'psutil'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not command or "Examples:" in done.stdout


@pytest.mark.parametrize("room", ["local", "status", "submission", "plan_table"])
def test_no_room_of_the_launcher_loads_torch(room):
    code = f"import sys, launcher.{room}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_commands_end_with_one_line_and_code_2(run_file):
    command = [sys.executable, "-m", "launcher.cli", "local", run_file, "--ranks", "2", "model.heads=5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == Exit.USER_ERROR
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_plan_prints_a_table_or_one_json_object(run_file):
    command = [sys.executable, "-m", "launcher.cli", "plan", run_file, "--ranks", "2", "--gpu", "H100"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "peak per rank" in table and "LlamaForCausalLM" in table
    made = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert made["rows"]["num_micro_batches"] == 1
    assert made["vocabulary_tokens"] == 1000
    assert made["pace"]["fits"] is True


def test_a_cpu_is_known_by_its_flags(monkeypatch, tmp_path):
    from llm_dist.model.layers import HOST_MULTIPLIES_BF16

    monkeypatch.setattr(capacity, "num_cuda_devices", lambda: 0)
    assert capacity.machine_here() == (True, HOST_MULTIPLIES_BF16)
    flags = tmp_path / "cpuinfo"
    for text, has_units in (("flags : avx2 fma", False), ("flags : avx2 avx512f avx512bw avx512vl avx512dq", True)):
        flags.write_text(text)
        assert capacity.machine_here(flags).multiplies_bf16 is has_units
    assert not capacity.machine_here(tmp_path / "none").multiplies_bf16
