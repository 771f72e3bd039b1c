"""`python -m eckart`."""

from eckart.cli import main

main()
