"""Ahead-of-time planning: what a recipe needs on a machine, and compilation for it, without the hardware."""
