"""Runs one check: `python -m tests.gpu.child TASK ANSWER`, started by `runner.Run`."""

import importlib
import json
import sys
import traceback
from pathlib import Path

from tests.gpu.runner import FAIL, Outcome, Place


def main(task: str, answer: str) -> None:
    given = json.loads(task)
    place = Place(Path(given["place"]["folder"]), given["place"]["device"], given["place"]["quick"])
    module, _, function = given["function"].partition(":")
    try:
        outcome = getattr(importlib.import_module(module), function)(place, **given["arguments"])
    except Exception as error:
        traceback.print_exc()
        text = str(error).strip().splitlines() or ["no message"]
        outcome = Outcome(FAIL, f"{type(error).__name__}: {text[0]}")
    Path(answer).write_text(json.dumps({"verdict": outcome.verdict, "detail": outcome.detail}))


if __name__ == "__main__":
    main(*sys.argv[1:])
