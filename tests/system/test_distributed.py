"""What processes other than the first print goes nowhere, whatever it is."""

import sys

from xray_fastai.system import distributed


def test_a_silenced_process_prints_any_name(monkeypatch, capfd):
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    distributed.hush()
    print("a name of any bytes: \udcff; not in cp1252: \u4e2d", flush=True)
    sys.stdout.close()
    assert capfd.readouterr() == ("", "")
