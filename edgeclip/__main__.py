"""`python -m edgeclip` is the command `edgeclip`."""

import sys

from edgeclip.cli.main import main

sys.exit(main())
