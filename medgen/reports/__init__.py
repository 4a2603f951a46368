"""HTML pages, figures and tables; computes nothing."""
