"""Processes that tests run functions in, and what they compare."""
