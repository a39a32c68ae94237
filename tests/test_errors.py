from jaxmoe.errors import first_line, listed, quote, shortened


def test_what_is_too_long_ends_in_dots():
    assert shortened("abcdefg", 7) == "abcdefg"
    assert shortened("abcdefgh", 7) == "abcd..."
    assert quote("a" * 198) == repr("a" * 198)
    assert quote("a" * 199) == f"'{'a' * 196}..."


def test_lists_say_how_many_are_left_out():
    assert listed([], 2) == ""
    assert listed(["a", "b"], 2) == "a, b"
    assert listed(["a", "b", "c", "d"], 2) == "a, b and 2 more"
    assert listed(["a", "b", "c", "d"], 3, "; ") == "a; b; c; and 1 more"


def test_the_first_line_of_an_error():
    assert first_line(ValueError("a\nb")) == "a"
    assert first_line(ValueError()) == "ValueError"
    assert first_line(ValueError("a" * 400)) == f"{'a' * 297}..."
