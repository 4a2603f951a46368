"""Read a folder of images and write the dataset store. The entry function of the stage is `preprocess.run`."""
