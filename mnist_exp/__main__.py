"""`python -m mnist_exp`."""

from mnist_exp.cli.main import program

if __name__ == "__main__":
    program()
