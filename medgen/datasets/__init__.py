"""Public datasets and pretrained weights: catalog, download, import into a project, and the drawn sample dataset.

Entry functions: `fetch.fetch`, `import_data.import_folder`, `import_data.draw_sample`, `weights.fetch_weights`.
"""
