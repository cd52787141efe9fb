"""Settings and images become an export: two phases, early stopping, checkpoints."""
