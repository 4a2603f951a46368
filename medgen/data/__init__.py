"""The preprocessed dataset on disk: what training reads."""
