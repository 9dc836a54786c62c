"""Bytes in, arrays out: tar shards and video containers; knows no data set."""
