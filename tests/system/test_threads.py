"""How many threads torch computes with, and how they wait: what the machine, its containers and its user say."""

import os
import subprocess
import sys

import pytest
import torch

from xray_fastai.system import device, threads
from xray_fastai.system.threads import Threads, Use, advise, others_use, quota

CORES = set(range(4))


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of four cores whose files a test writes; returns what sets the time that cores and process computed."""
    for name in threads.OWN_CHOICE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: CORES, raising=False)
    monkeypatch.setattr(os, "sysconf", lambda _: 100)
    monkeypatch.setattr(threads, "Path", lambda *parts: tmp_path.joinpath(*(part.lstrip("/") for part in parts)))
    clock = {"monotonic": 1000.0, "own": 0.0, "cores": 0}
    (tmp_path / "proc/self").mkdir(parents=True)

    def write():
        busy = [f"cpu{core} {clock['cores']} 700 0 5000 30 0 0 0 0 0" for core in range(8)]  # four are others' cores
        (tmp_path / "proc/stat").write_text("\n".join(["cpu  1 1 1 1 1 1 1 1 1 1", *busy, "intr 1"]))

    def passes(seconds, cores=0.0, own=0.0):
        """Of so many seconds, each core was in use for a share, and this process computed for a while."""
        clock["monotonic"] += seconds
        clock["own"] += own
        clock["cores"] += round(100 * seconds * cores)
        write()

    monkeypatch.setattr(threads.time, "monotonic", lambda: clock["monotonic"])
    monkeypatch.setattr(os, "times", lambda: (clock["own"] / 2, clock["own"] / 4, clock["own"] / 4, 0.0, 0.0))
    monkeypatch.setattr(threads.time, "sleep", lambda seconds: passes(seconds, clock.get("asleep", 0.0)))
    passes(0)
    monkeypatch.setattr(threads, "_last", threads.look())
    passes.clock = clock
    return passes


@pytest.mark.parametrize(
    ("cores", "own", "others", "count"),
    [(0.25, 10, 0, 4), (0.5, 10, 1, 3), (0.6, 10, 1.4, 3), (0.65, 10, 1.6, 2), (1, 10, 3, 2), (1, 1, 3.9, 2)],
)
def test_cores_that_others_use_are_left_to_them_but_never_more_than_half(machine, cores, own, others, count):
    machine(10, cores, own)
    why = None if count == 4 else "the machine is busy"
    assert advise(4) == Threads(count, 4, why)
    machine(10, cores, own)
    assert others_use() == pytest.approx(others)


def test_an_old_look_says_nothing_about_now(machine):
    machine(3600, cores=1)
    machine.clock["asleep"] = 0.25
    assert others_use() == pytest.approx(1, abs=0.1)  # of ticks of 10 ms


def test_a_quota_of_a_container_is_the_most_threads(machine, tmp_path):
    (tmp_path / "proc/self/cgroup").write_text("0::/job/step\n")
    (tmp_path / "sys/fs/cgroup/job/step").mkdir(parents=True)
    machine(10)
    assert quota() is None and advise(4) == Threads(4, 4)
    (tmp_path / "sys/fs/cgroup/job/step/cpu.max").write_text("max 100000\n")
    (tmp_path / "sys/fs/cgroup/job/cpu.max").write_text("150000 100000\n")
    machine(10)
    assert quota() == 1.5 and advise(4) == Threads(2, 4, "the container allows no more")


def test_a_quota_of_the_first_version(machine, tmp_path):
    (tmp_path / "proc/self/cgroup").write_text("5:memory:/a\n4:cpu,cpuacct:/a\n1:name=systemd:/a\n")
    folder = tmp_path / "sys/fs/cgroup/cpu,cpuacct/a"
    folder.mkdir(parents=True)
    for name, microseconds in (("quota", 300000), ("period", 100000)):
        (folder / f"cpu.cfs_{name}_us").write_text(f"{microseconds}\n")
    machine(10)
    assert quota() == 3 and advise(4).count == 3
    (folder / "cpu.cfs_quota_us").write_text("-1\n")
    assert quota() is None


@pytest.mark.parametrize("name", threads.OWN_CHOICE)
def test_the_users_number_of_threads_stays(machine, monkeypatch, name):
    monkeypatch.setenv(name, "4")
    machine(10, cores=1)
    assert advise(4) == Threads(4, 4)


def test_where_the_system_says_nothing_all_threads_compute(machine, monkeypatch):
    machine(10, cores=1)
    monkeypatch.delattr(os, "sched_getaffinity")
    assert others_use() is None and advise(4) == Threads(4, 4)


def test_the_device_says_what_was_chosen_and_a_caller_may_choose_otherwise(machine, monkeypatch):
    count = [4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: count[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: count.__setitem__(0, n))
    monkeypatch.setattr(device, "_threads", None)
    cpu = torch.device("cpu")
    assert device.describe(cpu) == "cpu (4 threads)"
    machine(10, cores=1)
    device.choose_device("cpu")
    assert device.describe(cpu) == "cpu (2 of 4 threads: the machine is busy)"
    machine(10)
    device.choose_device("cpu")
    assert device.describe(cpu) == "cpu (4 threads)"
    torch.set_num_threads(1)
    assert device.describe(cpu) == "cpu (1 thread)"
    machine(10)
    device.choose_device("cpu")
    assert device.describe(cpu) == "cpu (1 thread)"


def spins_after(code, **variables):
    environment = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code += "; import os; print(os.environ.get('GOMP_SPINCOUNT'))"
    ran = subprocess.run([sys.executable, "-c", code], env=environment | variables, capture_output=True, text=True)
    return ran.stdout.split()[-1]


@pytest.mark.slow
def test_threads_sleep_soon_unless_the_user_or_an_earlier_import_says_otherwise():
    """The library reads the variable when torch is imported, so nothing of ours may import torch before."""
    ours = "import xray_fastai; xray_fastai.FitConfig"
    command = "from xray_fastai.cli import app; app(['verify', 'nowhere'], standalone_mode=False)"
    assert spins_after(ours) == str(threads.SPINS)
    assert spins_after(f"try: {command}\nexcept BaseException: pass\nimport sys") == str(threads.SPINS)
    assert spins_after(ours, GOMP_SPINCOUNT="7") == "7"
    assert spins_after(ours, OMP_WAIT_POLICY="PASSIVE") == "None"
    assert spins_after("import sys; sys.modules['torch'] = None; " + ours) == "None"


def test_use_is_a_difference(machine):
    assert threads.look() == Use(1000.0, 0.0, 0.0)
