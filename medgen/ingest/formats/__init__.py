"""One module a file format; data/images.py chooses between them."""
