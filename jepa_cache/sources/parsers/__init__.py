"""Parsers that sources share: records of strangers within bounds, and which row of them each frame shows."""
