"""The one exception that the scripts turn into a line."""


class InputError(ValueError):
    """Something that the user can mend: a flag, a file, a folder, a row. The message says what was found and
    what is allowed; a script prints it as one line and ends with exit code 2. Any other ValueError is a bug
    of ours and keeps its traceback."""
