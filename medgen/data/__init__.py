"""The preprocessed dataset on disk, as training reads it. The entry function is `store.open_store`."""
