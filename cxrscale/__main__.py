"""`python -m cxrscale COMMAND ...`, the same as `cxrscale COMMAND ...`."""

from cxrscale.cli.app import main

if __name__ == "__main__":
    main()
