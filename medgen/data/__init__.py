"""From files on disk to batches: images, layouts, splits, the store and the loader."""
