"""`python -m mnist_exp`."""

from mnist_exp.cli import main

if __name__ == "__main__":
    main()
