"""What a user can put right, told in one sentence.

Commands print a ``UserError`` and an operating system's error without a traceback; whatever else
is raised is a mistake of ours and shows its traceback.
"""

import contextlib
from typing import Iterator, List, Optional, Tuple, Type

_LONGEST = 4000  # characters of a message
# torch's and CTranslate2's errors are RuntimeErrors; torch.cuda.OutOfMemoryError is newer than 1.12
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


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


def out_of_memory(error: BaseException) -> Optional[str]:
    """What to tell a user for whom memory, of the machine or of a GPU, did not suffice.

    Returns:
        one sentence; None if ``error`` is something else.
    """
    text = str(error).strip()
    if isinstance(error, RuntimeError) and any(mark in text.lower() for mark in _OUT_OF_MEMORY):
        reason = f" ({text.splitlines()[0]})"
    elif isinstance(error, MemoryError):
        reason = ""
    else:
        return None
    return f"there is not enough memory{reason}; smaller batches need less"


class Faults:
    """Everything that is wrong, collected and then told in one message.

    A user who is told of one fault at a time runs the command as often as there are faults::

        faults = Faults()
        faults.check(options.beam >= 1, f"--beam: expected 1 or more, got {options.beam}")
        with faults.collecting():
            overrides = parse_overrides(options.model_overrides, "--model-overrides")
        faults.raise_if_any()  # from here on, all of it holds
    """

    def __init__(self) -> None:
        self.messages: List[str] = []

    def __bool__(self) -> bool:
        return bool(self.messages)

    def add(self, message: object) -> None:
        self.messages.append(str(message))

    def check(self, condition: object, message: object) -> bool:
        """Note ``message`` unless ``condition`` holds.

        Returns:
            whether it does, for checks that make sense only then.
        """
        if not condition:
            self.add(message)
        return bool(condition)

    @contextlib.contextmanager
    def collecting(self, *kinds: Type[Exception]) -> Iterator[None]:
        """Note the error that ends the block, and go on behind it.

        Args:
            kinds: of exceptions; ``UserError`` by default. Others pass.
        """
        expected: Tuple[Type[Exception], ...] = kinds or (UserError,)
        try:
            yield
        except expected as error:
            self.add(error)

    def raise_if_any(self, kind: Type[Exception] = UserError, prefix: str = "") -> None:
        """Raise ``kind`` with ``prefix`` and all messages, joined by semicolons, if there are any.

        Raises:
            UserError: or ``kind``, with something noted.
        """
        if self.messages:
            raise kind(prefix + "; ".join(self.messages))
