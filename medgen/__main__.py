"""`python -m medgen …`: the form DVC's stages use, so that they run in the environment DVC runs in."""

from medgen.cli import main

if __name__ == "__main__":
    main()
