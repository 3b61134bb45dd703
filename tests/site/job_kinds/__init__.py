"""A Django app that exists in tests only: kinds of jobs whose behaviour a test can choose."""
