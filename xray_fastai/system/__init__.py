"""The machine: files, signals, processes, devices, the terminal, text for it, errors."""
