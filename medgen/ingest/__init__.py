"""Read a folder of images and write the dataset store; `preprocess.run` is the stage."""
