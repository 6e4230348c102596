"""`python -m launcher`, the same as `flux2-ds`."""

from launcher.cli import main

main()
