"""Frozen V-JEPA 2 encoders: uint8 frames in, tokens out, under the official weights' names."""
