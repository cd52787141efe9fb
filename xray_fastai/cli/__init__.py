"""The command line; `app` is the console script's entry point."""

from xray_fastai.cli.main import app

__all__ = ["app"]
