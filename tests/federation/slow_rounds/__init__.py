"""A Django app for worker processes of tests: small shards, and an engine that takes its time."""
