"""Predictions with known labels become metrics, intervals, top losses, plots and the report."""
