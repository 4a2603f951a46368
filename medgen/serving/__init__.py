"""Use trained models: image files (`generate.run`), MLflow pyfuncs (pyfunc.py) and the HTTP server (app.py)."""
