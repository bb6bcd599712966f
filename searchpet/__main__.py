"""`python -m searchpet`."""

import sys

from searchpet.cli import main

if __name__ == "__main__":
    sys.exit(main())
