"""`python -m cxrscale VERB ...`, the same as `cxrscale VERB ...`."""

from cxrscale.cli import main

if __name__ == "__main__":
    main()
