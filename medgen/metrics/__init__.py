"""Metrics of images, latents and masks: pure functions of tensors, and the networks whose features they compare."""
