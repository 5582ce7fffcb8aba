"""The guard in timm's own train.py, unchanged.

    python train.py ... --device-modules concept_guard.integrations.timm_auto

Importing this module makes the script that is running build a `ConceptGuardTask` where it would
build a `ClassificationTask`; see `timm_script`.
"""

import sys

from concept_guard.integrations.timm_script import guard_script

guard_script(sys.modules["__main__"], sys.argv[1:])
