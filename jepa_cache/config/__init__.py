"""Settings: the schema of params.yaml and of the presets, how they are parsed, and what is refused."""
