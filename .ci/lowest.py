"""Print pyproject's lower bounds as pip constraints: `fastai>=2.8.12` becomes `fastai==2.8.12`, of the extras too."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text("utf-8"))["project"]
for requirement in sum(project["optional-dependencies"].values(), project["dependencies"]):
    if bound := re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement):
        print(f"{bound[1]}=={bound[2]}")
    elif not requirement.startswith(project["name"]):
        raise SystemExit(f"pyproject.toml: {requirement}: not NAME>=VERSION")
