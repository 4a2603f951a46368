"""medgen: train, search, evaluate and ship generative models of medical images."""

__version__ = "0.1.0"
