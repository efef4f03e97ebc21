"""Train a small decoder-only language model, grow it without changing what it computes, train on.

The system of "52B to 1T: Lessons Learned via Tele-FLM Series" (arXiv 2407.02783), in JAX. Importing the package
imports neither TensorFlow nor gin; see `flm_jax.growth` for growing a model in ten lines of Python.
"""
