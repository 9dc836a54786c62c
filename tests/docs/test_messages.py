"""Claim: every error message of the program is found in docs/troubleshooting.md."""

from tests.docs.messages import MARK, PAGE, write_list


def test_every_message_is_in_the_list():
    _, mark, listed = PAGE.read_text().partition(MARK)
    assert mark, f"{PAGE} has no line {MARK}"
    assert listed.strip().splitlines() == write_list().strip().splitlines(), (
        "error messages have changed; run `python tests/docs/messages.py`, and say above the list what a user has to know about new ones"
    )


def test_the_list_holds_messages_of_every_room_that_raises():
    listed = write_list()
    for fragment in (
        "encode.fps ... is above the video's ... frames per second",  # encoding
        "no segment holds a window of ... steps",  # data
        "weights file ... does not exist",  # encoder
        "its checksum does not match",  # store
    ):
        assert fragment in listed, fragment
