"""Neural-network blocks shared by models, priors and extractors."""
