"""How good predictions are: metrics, their intervals, and the calibration of probabilities."""
