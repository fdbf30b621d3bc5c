"""localrl: teach a language model with rewards, on your own desktop GPU.

Importing this package is cheap on purpose: reward workers start by importing it, and they must not pay for torch.
"""

__version__ = "0.1.0"
