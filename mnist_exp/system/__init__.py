"""The operating system: files, processes, signals, standard streams."""
