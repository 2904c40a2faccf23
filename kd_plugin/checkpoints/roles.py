"""What a checkpoint is to the command that opens it."""

from typing import NamedTuple, Optional


class Role(NamedTuple):
    """Names a checkpoint in messages, with the flags of the command at hand.

    Attributes:
        name: "teacher", "student" or "model".
        trust: the flag that opens a checkpoint with the full pickle machinery.
        data: the flag that names a folder with its dictionaries.
        overrides: the flag that changes options of its model.
        task: the flag that says which task it was trained for, whatever name its checkpoint has.
        languages: the flag that says what a multilingual model calls the languages of the data.

    None where the command has no such flag: messages then advise none.
    """

    name: str
    trust: Optional[str] = None
    data: Optional[str] = None
    overrides: Optional[str] = None
    task: Optional[str] = None
    languages: Optional[str] = None
