"""`python -m patchword`: the command `patchword`, of this very Python."""

import sys

from patchword.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
