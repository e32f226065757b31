"""A training run: settings, folder, processes, optimizer."""
