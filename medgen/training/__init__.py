"""Train models, priors, refiners and the domain extractor; one module for each stage, one loop for all."""
