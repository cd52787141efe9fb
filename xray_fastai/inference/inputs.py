"""Checks the paths that `predict` is given, without torch, and leaves its own files out of them."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from xray_fastai.config.predict_config import PredictConfig
from xray_fastai.system.errors import UserError


def check_paths(paths: list[str], config: PredictConfig) -> None:
    """Check that there is something to predict.

    A path that does not exist becomes a row with an error if others exist. With `append` it is an error of the command:
    the drive of an inbox may be missing.

    Raises:
        UserError: no path exists, or with `append` one does not.
    """
    missing = [path for path in paths if path != "-" and not os.path.lexists(path)]
    if missing and (config.append or len(missing) == len(paths)):
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"{missing[0]}: no such file or folder{more}; give images, or folders of them")


def without_outputs(sources: Iterable[str], config: PredictConfig) -> Iterator[str]:
    """Yield the sources that are no file which `predict` itself writes: `inbox/*` may name these, too."""
    own = {os.path.realpath(path) for path in (config.output, config.report, config.log) if path is not None}
    names = {Path(path).name for path in own}
    for source in sources:
        if os.path.basename(source) not in names or os.path.realpath(source) not in own:
            yield source
