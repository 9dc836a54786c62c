"""Synthetic sample recordings in the form of VPT contractor data: world, player, recording, and the tar shards."""
