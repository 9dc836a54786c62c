"""The `jepa-cache` command, one file per command, and what the stage scripts share."""
