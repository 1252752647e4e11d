"""``python -m heliostat`` is the command ``heliostat``."""

import sys

from heliostat.cli.app import main

sys.exit(main())
