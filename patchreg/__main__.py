"""``python -m patchreg``."""

import sys

from patchreg.cli.main import main

sys.exit(main())
