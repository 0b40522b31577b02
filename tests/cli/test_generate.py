"""`nplora generate`: its arguments."""

import pytest

from nplora import cli


def test_a_system_message_without_a_chat_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "m", "x", "--system", "y"]) == 2
    assert "--system works only in a chat: add --chat" in capsys.readouterr().err
