"""What a command says that ends by a mistake of its user."""

import pytest


def refused(command, capsys, alone=False):
    """Calls what must end with exit code 2 and one line of error, which is returned.

    Args:
        command: takes nothing.
        capsys: pytest's.
        alone: whether standard error must have nothing but that line.
    """
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command()
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and "Traceback" not in said
    assert not alone or said == f"{line}\n", said
    return line
