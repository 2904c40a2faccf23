"""What a user can put right, told in one sentence.

Commands print a ``UserError`` and an operating system's error without a traceback; whatever else
is raised is a mistake of ours and shows its traceback.
"""

_LONGEST = 4000  # characters of a message


class UserError(ValueError):
    """Something is wrong with files, flags or data; the message says what, and what to do.

    What a stranger's file brings into the message cannot harm a terminal: control characters are
    escaped here, once for all.
    """

    def __init__(self, message: object) -> None:
        super().__init__(printable(str(message)))


def printable(text: str) -> str:
    """``text`` with control characters escaped, cut to a readable length."""
    text = text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )
