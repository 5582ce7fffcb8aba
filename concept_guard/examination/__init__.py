"""Doctor: what would keep a guard from working, found before the training, with the way out.

report       what an examination found, as data and as text
settings     the guard's settings and the switches of the loop, checked without a model
opening      the model and the sample as given, and the copy that is examined
firing       does the tap fire under these switches, and show and edit what a plain pass does
cost         what the guard costs, measured with the parts that do the work
examination  all of it, in order
environment  versions and devices, for reports of faults
"""

from concept_guard.examination.environment import environment
from concept_guard.examination.examination import SECONDS, doctor
from concept_guard.examination.report import Cost, DoctorReport, Problem, Ratio
from concept_guard.examination.settings import Loop, offenders, settled, timing

__all__ = [
    "SECONDS",
    "Cost",
    "DoctorReport",
    "Loop",
    "Problem",
    "Ratio",
    "doctor",
    "environment",
    "offenders",
    "settled",
    "timing",
]
