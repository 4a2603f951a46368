"""HTML pages, figures and tables from given values; computes no metrics. `html.render` fills the templates."""
