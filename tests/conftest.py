"""The modules lie flat in the repository root: put it on the path, wherever pytest is called from."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
