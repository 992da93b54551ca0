"""`python -m lossk` is the `lossk` command."""

import sys

from lossk.cli import main

sys.exit(main())
