"""Checks the paths that a fit is given, without torch and fastai."""

from pathlib import Path

from xray_fastai.config.fit_config import FitConfig
from xray_fastai.data.folders import find_root
from xray_fastai.data.table import check_for_table, is_table
from xray_fastai.export.reader import export_in_weights
from xray_fastai.export.run_folder import check_name
from xray_fastai.system.errors import UserError


def check_paths(config: FitConfig) -> None:
    """Answer a wrong data set, name of a run or folder of weights at once; the imports of `fit` itself take seconds.

    Raises:
        UserError: one of them is wrong.
    """
    check_name(config.exports, config.name)
    export_in_weights(config.weights)
    check_for_table(config.data, config.images, config.column)
    if config.data is not None and not is_table(config.data):
        if (Path(config.data) / "model.json").is_file():
            advice = "to continue from it, give it by weights=, and a folder of images here"
            raise UserError(f"an export, no images; {advice}", option="data", value=config.data)
        find_root(config.data)
