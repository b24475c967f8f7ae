"""Language codes: every spelling of the table resolves, and nothing else does."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from runtime.errors import LanguageError
from runtime.languages import flores_from_code, languages, languages_from_codes


@pytest.mark.parametrize("language", languages(), ids=lambda language: language.flores)
def test_every_spelling_of_a_row_is_its_language(language):
    spellings = [language.flores, language.bcp47, *language.aliases]
    spellings += [spelling.replace("_", "-").upper() for spelling in spellings]
    assert {flores_from_code(spelling) for spelling in spellings} == {language.flores}


def test_no_two_rows_share_a_spelling():
    spellings = Counter(
        spelling.casefold()
        for language in languages()
        for spelling in {language.flores.replace("_", "-"), language.bcp47, *language.aliases}
    )
    assert [spelling for spelling, n in spellings.items() if n > 1] == []


def test_the_table_holds_flores_200():
    assert sum(language.flores200 for language in languages()) >= 200
    assert all(re.fullmatch(r"[a-z]{3}_[A-Z][a-z]{3}", language.flores) for language in languages())
    assert all(language.name and language.bcp47 for language in languages())


@pytest.mark.parametrize(
    ("code", "flores"),
    [
        ("pt", "por_Latn"),
        ("pt-BR", "por_Latn"),
        ("PT_br", "por_Latn"),
        ("pt-MZ", "por_Latn"),
        ("pt-Latn-BR", "por_Latn"),
        ("por-latn", "por_Latn"),
        ("es-419", "spa_Latn"),
        ("zh", "zho_Hans"),
        ("zh-TW", "zho_Hant"),
        ("zh-Hant-MO", "zho_Hant"),
        ("sr-Latn", "srp_Latn"),
        ("sr", "srp_Cyrl"),
    ],
)
def test_codes_in_use(code, flores):
    assert flores_from_code(code) == flores


@pytest.mark.parametrize(
    "code", ["", "xx", "pt-Cyrl", "por_Cyrl", "english", "zho", "p t", "-", "por_Latn_x"]
)
def test_an_unknown_code_is_an_error_that_points_to_the_list(code):
    with pytest.raises(LanguageError, match=r"is unknown.*`babeltower languages` lists them"):
        flores_from_code(code)


@pytest.mark.parametrize(("code", "close"), [("por_Ltan", "por_Latn"), ("portuguese", "por_Latn")])
def test_an_unknown_code_names_close_ones(code, close):
    with pytest.raises(LanguageError, match=rf"close to it: .*{close}"):
        flores_from_code(code)


def test_rows_come_in_the_order_of_the_codes():
    assert [row.name for row in languages_from_codes(["por_Latn", "eng_Latn"])] == ["Portuguese", "English"]
