"""`python -m dmctl`."""

import sys

from dmctl.cli.main import main

sys.exit(main())
