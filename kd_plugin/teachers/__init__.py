"""Teachers: run, checked against the student, and asked about every batch of a training."""

from .pairs import CachedTeachers, RunningTeachers, distinct
from .probe import probe, token_losses
from .run import TRAINING, Teacher, TeacherError, TeacherSettings, hidden_widths
from .source import CachedTeacher, Needs, NoTeacher, RunningTeacher, Source, Step
from .states import looking_inside, width
from .view import Student, TeacherView

__all__ = [
    "TRAINING",
    "CachedTeacher",
    "CachedTeachers",
    "Needs",
    "NoTeacher",
    "RunningTeacher",
    "RunningTeachers",
    "Source",
    "Step",
    "Student",
    "Teacher",
    "TeacherError",
    "TeacherSettings",
    "TeacherView",
    "distinct",
    "hidden_widths",
    "looking_inside",
    "probe",
    "token_losses",
    "width",
]
