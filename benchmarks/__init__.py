"""Benchmarks: scripts that measure speed, memory and serving, each with a `--help`."""
