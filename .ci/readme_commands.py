"""Print the README's two set-up commands, one a line: the first lines of its first two ``sh`` blocks marked setup."""

import re
import sys
from pathlib import Path

text = Path(sys.argv[1]).read_text()
blocks = re.findall(r"<!-- setup -->\s*```sh\n(.+?)\n```", text, flags=re.S)
if len(blocks) != 2:
    sys.exit(f"expected two set-up commands in {sys.argv[1]}, found {len(blocks)}")
for block in blocks:
    print(" ".join(block.split()))
