"""`python -m edgeclip` is the command `edgeclip`."""

import sys

from edgeclip.cli import main

sys.exit(main())
