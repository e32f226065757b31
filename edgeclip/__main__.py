"""Entry point of `python -m edgeclip`, the same as the command `edgeclip`."""

import sys

from edgeclip.cli.main import main

sys.exit(main())
