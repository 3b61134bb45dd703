"""Rounds: who may contribute, what came in, how it becomes a version, and whether that version may serve."""
