"""Known datasets and weights: catalog, downloads, imports and the procedural sample."""
