"""`python -m concept_guard` does what `concept-guard` does.

Nothing here knows more than that.
"""

import sys

from concept_guard.cli import main

if __name__ == "__main__":
    sys.exit(main())
