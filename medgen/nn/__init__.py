"""Network blocks that models, priors and the refiner share; `VelocityNetwork` is what a flow learns with."""
