"""The machinery of `python -m tests.gpu`, tried with checks that pass, fail, crash and hang; no GPU is needed."""

import importlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import wait_for
from tests.gpu import __main__ as command
from tests.gpu.runner import BELOW, FAIL, MEASURED, NOT_RUN, PASS, ROOT, Check, Outcome, Place, Run, exit_code

HERE = "tests.gpu.test_runner"


def passes(place: Place, word: str = "fine") -> Outcome:
    (place.folder / "export").write_text(word)
    return Outcome(PASS, f"{word} on {place.device}, SIZE={os.environ.get('SIZE')}")


def uses(place: Place) -> Outcome:
    return Outcome(PASS, (place.folder / "export").read_text())


def is_slow(place: Place) -> Outcome:
    return Outcome(BELOW, "0.5 | of the limit")


def breaks(place: Place) -> Outcome:
    raise ValueError("the probabilities differ\nand more")


def crashes(place: Place) -> Outcome:
    print("CUDA error: an illegal memory access", flush=True)
    os.abort()


def leaves(place: Place) -> Outcome:
    print("no verdict", flush=True)
    os._exit(0)


def hangs(place: Place) -> Outcome:
    # as torchrun starts its processes
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    (place.folder / "child").write_text(str(child.pid))
    print("waiting for the other process", flush=True)
    time.sleep(600)
    raise AssertionError("nobody ended it")


def named(*names: str, **others) -> list[Check]:
    return [Check(name, f"that {name}", f"{HERE}:{name}", **others) for name in names]


def verdicts(folder: Path, checks: list[Check], minutes: float = 2.0) -> dict[str, Outcome]:
    run = Run(Place(folder, "cpu", False), 2, minutes, lambda line: None)
    run.all(checks)
    return run.outcomes


def is_running(pid: int) -> bool:
    try:  # in a container nobody may collect the exit code of an ended process
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
def test_each_check_has_its_verdict_and_the_others_go_on(tmp_path):
    checks = [
        Check("passes", "that passes", f"{HERE}:passes", arguments={"word": "good"}, settings={"SIZE": "32"}),
        *named("breaks", "crashes", "leaves"),
        *named("uses", needs=("passes",)),
        Check("dependent", "that needs a broken one", f"{HERE}:uses", needs=("passes", "breaks")),
        Check("gone", "that does not exist", f"{HERE}:gone"),
        *named("is_slow", alone=True),
    ]
    found = verdicts(tmp_path, checks)
    assert found["passes"] == Outcome(PASS, "good on cpu, SIZE=32")
    assert found["uses"] == Outcome(PASS, "good")
    assert found["is_slow"].verdict == BELOW
    assert found["breaks"] == Outcome(FAIL, "ValueError: the probabilities differ")
    assert "Traceback" in (tmp_path / "breaks.log").read_text()
    assert found["crashes"] == Outcome(FAIL, "signal SIGABRT; it last printed: CUDA error: an illegal memory access")
    assert found["leaves"] == Outcome(FAIL, "exit code 0; it last printed: no verdict")
    assert found["dependent"] == Outcome(FAIL, "not begun: it needs breaks")
    assert found["gone"].verdict == FAIL and "AttributeError" in found["gone"].detail


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc"), reason="finds the processes of a session in /proc")
def test_a_hanging_check_is_ended_with_all_that_it_started(tmp_path):
    start = time.monotonic()
    found = verdicts(tmp_path, [*named("hangs", seconds=8), *named("passes", alone=True)])
    assert time.monotonic() - start < 100
    assert found["hangs"] == Outcome(FAIL, "ended after 8 s; it last printed: waiting for the other process")
    child = int((tmp_path / "child").read_text())
    wait_for(lambda: not is_running(child), seconds=10)
    assert found["passes"].verdict == PASS


@pytest.mark.slow
def test_a_run_ends_when_its_time_is_up(tmp_path):
    found = verdicts(tmp_path, [*named("hangs"), *named("passes", alone=True)], minutes=0.05)
    assert found["hangs"].detail.startswith("ended after 3 s")
    assert found["passes"] == Outcome(FAIL, "not begun: the time of the whole run is up")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc"), reason="finds the processes of a session in /proc")
def test_a_run_that_is_stopped_ends_its_checks(tmp_path):
    program = (
        "import sys; from tests.gpu import __main__ as command; from tests.gpu.test_runner import named; "
        "command.all_checks = lambda place: named('hangs'); command.main(sys.argv[1:])"
    )
    arguments = ["--device", "cpu", "--quick", "--keep", str(tmp_path / "kept")]
    process = subprocess.Popen([sys.executable, "-c", program, *arguments], cwd=ROOT, stderr=subprocess.DEVNULL)
    child = tmp_path / "kept" / "child"
    pid = int(wait_for(lambda: child.is_file() and child.read_text(), process, 120))
    process.terminate()
    assert process.wait(60) != 0
    wait_for(lambda: not is_running(pid), seconds=10)


@pytest.mark.parametrize(
    ("given", "code"), [([PASS, NOT_RUN, MEASURED], 0), ([PASS, BELOW], 3), ([BELOW, FAIL], 1), ([FAIL, PASS], 1)]
)
def test_the_exit_code_tells_a_failure_from_a_missed_goal(given, code):
    assert exit_code([Outcome(verdict, "") for verdict in given]) == code


@pytest.mark.slow
@pytest.mark.parametrize(("names", "code"), [(["passes"], 0), (["passes", "is_slow"], 3), (["passes", "breaks"], 1)])
def test_the_table_is_markdown_and_the_command_ends_with_the_code(names, code, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "all_checks", lambda place: named(*names))
    monkeypatch.setenv("XDG_CACHE_HOME", os.environ["XDG_CACHE_HOME"])  # the command changes it
    assert command.main(["--device", "cpu", "--quick", "--keep", str(tmp_path / "kept")]) == code
    printed = capsys.readouterr().out
    assert re.search(r"^xray-fastai \S+, \d{4}-\d\d-\d\d: torch \S+, Python \S+, \d+ cores$", printed, re.MULTILINE)
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert rows[:2] == ["| check | verdict | seconds | detail |", "| --- | --- | --- | --- |"]
    assert [re.match(r"\| that (\w+) \|", row)[1] for row in rows[2:]] == names
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows)
    assert (tmp_path / "kept" / "passes.log").is_file()


def test_without_a_gpu_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert command.main([]) == 1
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "no GPU" in err


@pytest.mark.parametrize("quick", [True, False])
def test_every_check_of_the_command_exists_and_comes_after_what_it_needs(quick, tmp_path):
    checks = command.all_checks(Place(tmp_path, "cuda", quick))
    for i, check in enumerate(checks):
        module, _, function = check.function.partition(":")
        assert callable(getattr(importlib.import_module(module), function)), check
        assert set(check.needs) <= {other.name for other in checks[:i]}, check
    assert len({check.name for check in checks}) == len(checks)
    assert {check.name for check in command.chosen(checks, ["onnx"])} == {"onnx", "fp32", "data"}


def test_checks_fail_where_results_differ():
    from tests.gpu.checks import compare, differs
    from tests.gpu.speed import judged

    history = [{"phase": "frozen", "epoch": 1, "train_loss": 0.5, "valid_loss": 0.4}]
    other = [history[0] | {"valid_loss": 0.44}]
    assert differs(history, history) == 0 and differs(history, other) == pytest.approx(0.1)
    with pytest.raises(AssertionError):
        differs(history, [history[0] | {"epoch": 2}])
    assert compare(1e-4, 1e-3, "AUC") == "AUC 1.0e-04"
    for wrong in (2e-3, float("nan")):
        with pytest.raises(AssertionError, match=r"more than 0\.001"):
            compare(wrong, 1e-3, "AUC")
    place = Place(Path(), "cuda", False)
    assert judged(place, "", True, False).verdict == BELOW and judged(place, "", True, True).verdict == PASS
