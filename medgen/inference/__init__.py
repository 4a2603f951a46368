"""Uses of a trained model besides new images: anomaly maps, uncertainty, counterfactuals and inpainting."""
