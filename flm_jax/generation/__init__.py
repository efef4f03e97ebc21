"""Text generation: prompts to answers, in batches or token by token, on one device or a mesh."""

from flm_jax.generation.engine import Answer, Generator, Piece
from flm_jax.generation.prompts import GenerateRequest
from flm_jax.generation.sampling import GREEDY, Sampling

__all__ = ["GREEDY", "Answer", "GenerateRequest", "Generator", "Piece", "Sampling"]
