"""HTTP server of one model folder: MLflow's scoring protocol with limits. `medgen serve` starts it by ../app.py.

Its modules import each other relatively and nothing else of medgen: the model runs with the medgen code in its own
folder. Of this package, `main` loads the model, `connections` accepts, `app` responds, `body` checks a request's
content, `clients` checks who sends it, `model` predicts, `monitoring` counts and logs, `responses` builds answers.
"""
