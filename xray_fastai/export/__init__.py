"""Holds a run on disk: the schema of `model.json`, safe reading, verification, and the folder of a running fit."""
