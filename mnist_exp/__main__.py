"""`python -m mnist_exp`."""

from mnist_exp.cli import main

main()
