"""Benchmarks: programs that measure speed, memory and accuracy, and write pages of docs/; see README.md here."""
