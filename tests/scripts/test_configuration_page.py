"""docs/configuration.md says what the schema says."""

from scripts.configuration_page import PAGE, page


def test_the_page_of_all_settings_is_up_to_date():
    assert PAGE.read_text() == page(), "run: make docs-configuration"
