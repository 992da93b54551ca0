"""`python -m lossk` is the `lossk` command."""

import sys

from lossk.cli.main import main

sys.exit(main())
