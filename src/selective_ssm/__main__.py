"""``python -m selective_ssm``: the command line."""

import sys

from selective_ssm.cli import main

if __name__ == "__main__":
    sys.exit(main())
