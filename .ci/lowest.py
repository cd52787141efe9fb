"""Print the lower bounds of pyproject.toml as constraints for pip: `torch>=2.9` becomes `torch==2.9`."""

import re
import tomllib
from itertools import chain
from pathlib import Path

settings = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text("utf-8"))
project = settings["project"]
extras = project["optional-dependencies"].values()
for requirement in chain(settings["build-system"]["requires"], project["dependencies"], *extras):
    if bound := re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement):
        print(f"{bound[1]}=={bound[2]}")
    elif not requirement.startswith(f"{project['name']}["):
        raise SystemExit(f"pyproject.toml: {requirement}: give its lower bound as NAME>=VERSION, and nothing else")
