"""Generate images: as files, as MLflow's pyfunc flavours and over HTTP."""
