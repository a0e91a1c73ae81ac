"""Benchmarks. Each prints a table and the command that made it, and writes JSON lines on request."""
