"""Readers of image files, one module per file format; `medgen.ingest.images` selects the reader for a file."""
