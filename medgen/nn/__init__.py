"""Neural-network building blocks that models, priors and the refiner share."""
