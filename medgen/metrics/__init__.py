"""What a model is judged by: pure functions of tensors, and the extractor some of them look through."""
