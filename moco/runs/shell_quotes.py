"""Words of a shell command that can be copied from the terminal."""

import shlex


def shell_quoted(text: str) -> str:
    r"""Return text as one word for a shell.

    Control characters and bytes that are not UTF-8, which a terminal cannot show, become escapes in
    the quotes ``$'caf\xe9'``, which bash and zsh understand.
    """
    if text.isprintable():
        return shlex.quote(text)
    shown = ""
    for char in text:
        if char in "\\'":
            shown += f"\\{char}"
        elif char.isprintable():
            shown += char
        else:
            for byte in char.encode("utf-8", "surrogateescape"):
                shown += f"\\x{byte:02x}"
    return f"$'{shown}'"
