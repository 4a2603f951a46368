"""Create projects and run recipes; `init.init` and `recipes.run` are its entry functions."""
