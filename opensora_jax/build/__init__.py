"""From a configuration to what it describes: networks, tasks, optimizers, settings."""
