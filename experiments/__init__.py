"""Launchers: parse flags, parse gin, call one function."""
