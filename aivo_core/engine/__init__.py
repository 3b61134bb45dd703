"""Local training of tails."""
