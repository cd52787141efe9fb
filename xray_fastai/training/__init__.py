"""Trains a classifier on settings and images, and exports it: two phases, early stopping, checkpoints."""
