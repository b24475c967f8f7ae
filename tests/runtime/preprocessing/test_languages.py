"""Language codes: spellings of the table, codes in use, and hints for what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter

import pytest

from runtime.errors import LanguageError
from runtime.preprocessing.languages import (
    code_among,
    flores_from_code,
    languages,
    languages_from_codes,
    spoken_language,
)


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


def _cases(table: str) -> list[tuple[str, str]]:
    """Lines of ``row: code code …`` as (code, row); a row is a FLORES code, or several joined by commas."""
    lines = [line.split(":", 1) for line in table.strip().splitlines()]
    return [(code, row.strip()) for row, codes in lines for code in codes.split()]


CODES_IN_USE = """
    por_Latn: pt pt-BR PT_br pt-MZ pt-Latn-BR por-latn pt_BR.UTF-8 pt_PT@euro pt-BRA por pt-ao1990 pt-x-mine
    por_Latn: pt_XX por_latin pt_BR@latin pt-fonipa
    eng_Latn: en-US-u-ca-gregory en_US.UTF-8 en_US_POSIX en-GB-oed i-default en-001 en_XX en@quot eng-USA
    spa_Latn: es-419 es_MX.ISO-8859-1 spa es-ES-t-en-m0-prprname es_ES@collation=traditional
    deu_Latn: de-1996 de-DE-1901 ger deu de_AT.UTF-8@euro de-Latf de-x-en
    cat_Latn: ca-valencia ca_ES.UTF-8@valencia cat_Latn_vale1252
    zho_Hans: zh zho chi cmn zh-CN zh-SG zh-MY zh-guoyu zh-cmn zh-CHS zh_CN_#Hans zh__#Hans
    zho_Hans: zh-Hans-TW cmn_Hans
    zho_Hant: zh-TW zh-Hant-MO cmn-TW zho-HK zh-cmn-Hant zh_TW.Big5 zh-Hanb zh-TWN zh-158 zh-CHT zh_TW_#Hant
    yue_Hant: yue zh-yue zh-yue-HK yue-Hant zh-yue-Hant-HK yue_Hant
    yue_Hans: yue-CN zh-yue-CN yue-Hans
    srp_Cyrl: sr srp scc sr-RS sr-Cyrl-ME sr-YU sr-CS sh-Cyrl hbs-Cyrl sr-BA sr_RS.UTF-8
    srp_Latn: sr-Latn sr-ME sr-RO sr@latin sr_RS@latin sr_RS.UTF-8@latin sr-RS@latin sh hbs sh-BA cnr sr-MNE
    uzn_Latn: uz uzb uz-UZ uz-Latn-AF
    uzn_Cyrl: uz-Cyrl uz_UZ@cyrillic uz-CN uzb-script_cyrillic
    azb_Arab: az-IR az-Arab aze-IRN azb az-IQ
    azj_Latn: az aze azj az-SU az_AZ
    pan_Arab: pa-PK pan-PAK pa-Arab pnb lah
    kaz_Arab: kk-CN kaz-CN kk-Arab
    ckb_Arab: ku-IQ ku-IR ku-Arab ckb ckb_IQ
    kmr_Latn: ku kur kmr ku-TR
    nob_Latn: no nor nb no-bok no_NO nb_NO.UTF-8 no-bokmal nob_Latn_radical no-nob
    nno_Latn: nn nno no-nyn no_NO@nynorsk no-NO-NY
    arb_Arab: ar ara ar-EG ar-001 ar-arb arb ar-TN ar_AR ar-Arab
    arz_Arab: arz ar-arz arz-EG
    apc_Arab: apc ar-apc apc_Arab_nort3139
    ajp_Arab: ajp apc_Arab_sout3123
    pes_Arab: fa fas per fa-IR pes fa_IR.UTF-8 fa-Aran
    prs_Arab: prs fa-AF fas-AF fa-Arab-AF
    zsm_Latn: ms msa may zsm ms-zsm ms-SG
    swh_Latn: sw swa swh swc sw-CD
    heb_Hebr: he iw iw_IL heb
    ind_Latn: id in in_ID ind
    ydd_Hebr: yi ji yid ydd
    ron_Latn: ro mo mol rum ro-MD
    tgl_Latn: fil tl tgl fil_Latn tl_XX
    twi_Latn: tw twi twi_Latn_akua1239 twi_Latn_asan1239
    aka_Latn: ak aka fat
    jpn_Jpan: ja jpn ja-Jpan ja-Hira ja-Kana ja-Hrkt ja-JP-JP ja-JP-u-ca-japanese
    kor_Hang: ko kor ko-Kore ko-Kore-KR ko-Hang ko_KR.eucKR
    sat_Beng: sat sat-IN sat-Olck sat_Beng
    tzm_Tfng: tzm tzm-MA zgh zgh_Tfng
    kon_Latn: kg kon ktu_Latn
    fuv_Latn: ff ful fuv fuc ff-SN
    ful_Adlm: ff-Adlm ful_Adlm ff-Adlm-GN
    kas_Deva: ks-Deva ks_IN@devanagari
    est_Latn: et est ekk_Latn
    grn_Latn: gn grn gug_Latn
    quy_Latn: qu que quz quy qu-EC
    bho_Deva: bho bh bih
    ltz_Latn: lb i-lux ltz
"""


@pytest.mark.parametrize(("code", "flores"), _cases(CODES_IN_USE))
def test_codes_in_use(code, flores):
    assert flores_from_code(code) == flores


REFUSED_WITH_HINTS = """
    uzn_Latn, uzn_Cyrl: uz-AF uzn-AF uz-Arab uzs uzs_Arab
    por_Latn: pt-Cyrl por_Cyrl por_Ltan por_Latn_x portuguese portugese pt-
    por_Latn: por_banana por_Latnn por-Latn-banana pt_BR@banana pt_BR@ltan pt-YY pt-QQQQ pt-555 pt-1996
    srp_Cyrl, srp_Latn: sr@ltan sr-Latnn
    zho_Hans, zho_Hant: zh-Hantt zh-000
    hau_Latn: ha-CM ha-Arab
    tgk_Cyrl: tg-PK tg-Arab
    khk_Cyrl: mn-CN khk_Mong
    snd_Arab: sd-IN snd_Deva
    kir_Cyrl: ky-CN ky-TR
    uig_Arab: ug-KZ ug-Latn
    bel_Cyrl: be@latin be_BY@latin
    tat_Cyrl: tt_RU@iqtelif tt-Latn
    arb_Arab: arb_Latn ar-Latn
    min_Latn: min_Arab
    mni_Beng: mni_Mtei
    kmr_Latn, ckb_Arab: kmr-Arab kmr-IQ ku-Cyrl
    azj_Latn, azb_Arab: azj-IR azj-Arab az-RU
    zho_Hans, zho_Hant: zh-Hani cmn_Hani zh-Latn-pinyin zh-Bopo
    zho_Hans, zho_Hant, yue_Hant, yue_Hans: nan wuu zh-min-nan zh-hakka i-hak lzh
    zho_Hans: wuu_Hans
    arb_Arab, acm_Arab, acq_Arab, aeb_Arab: arq apd ar-arq
    fuv_Latn, ful_Adlm: fub fuf fuv-Adlm
    taq_Latn, taq_Tfng: tmh ttq
    hye_Armn: hyw hy-arevmda hy-AM-arevmda
    bgn_Arab: bal bcc
    lvs_Latn: lv-Cyrl
    eng_Latn: english en@shaw en-US,en;q=0.9 English_United_States.1252 egn_Latn us
    jpn_Jpan: jp ja-Latn
    rus_Cyrl, kaz_Cyrl: kz
"""


@pytest.mark.parametrize(("code", "hints"), _cases(REFUSED_WITH_HINTS))
def test_a_refused_code_names_the_rows_of_its_language_or_nearest_to_it(code, hints):
    with pytest.raises(LanguageError, match=re.escape(f"{code!r} is unknown")) as refused:
        flores_from_code(code)
    assert re.findall(r"\(closest: (.*?)\)", str(refused.value)) == [hints]


WITHOUT_KIN = (
    "xx xx-nowhere gsw tlh i-klingon sgn-BE-FR sgn-ase art-lojban qaa aa ber prt nonsense 日本語 a-DE 12 -"
)


@pytest.mark.parametrize("code", WITHOUT_KIN.split())
def test_a_language_without_kin_in_the_table_is_given_no_hint(code):
    with pytest.raises(LanguageError, match=r"is unknown.*`babeltower languages` lists them") as refused:
        flores_from_code(code)
    assert "closest" not in str(refused.value)


@pytest.mark.parametrize(
    "code", ["", " ", "und", "mul", "zxx", "mis", "root", "C", "C.UTF-8", "POSIX", "x-pt", "und-BR"]
)
def test_a_code_that_names_no_language_says_so(code):
    with pytest.raises(LanguageError, match=r"is unknown: it names no language\. Pass a FLORES-200 code"):
        flores_from_code(code)


@pytest.mark.parametrize(
    "code", ["p t", "pt--BR", "pt-BR-", "pt.", "@euro", "por_Latn_x", "pt-a-x", "zh-abc", "pt\0", "ｐt"]
)
def test_what_is_no_tag_says_so(code):
    with pytest.raises(LanguageError, match=r"is unknown: it is neither a BCP-47 tag nor a locale name"):
        flores_from_code(code)


@pytest.mark.parametrize(
    ("code", "script"),
    [("uz-AF", "Arab"), ("mn-CN", "Mong"), ("kmr-IQ", "Arab"), ("pt-Cyrl", "Cyrl"), ("zh-Hani", "Hani")],
)
def test_a_refused_script_is_named(code, script):
    with pytest.raises(LanguageError, match=rf"is unknown in the script {script}[, ]"):
        flores_from_code(code)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("pt-YY", "'YY' is not a region of ISO 3166 or UN M49"),
        ("pt-555", "'555' is not a region of ISO 3166 or UN M49"),
        ("por_Latnn", "'latnn' is neither a script nor a registered variant"),
        ("sr@ltan", "'ltan' is neither a script nor a registered variant"),
        ("pt-1996", r"'1996' is a variant of other languages \(de\)"),
    ],
)
def test_a_region_or_variant_that_is_not_registered_is_named(code, reason):
    with pytest.raises(LanguageError, match=rf"is unknown: {reason} \(closest: "):
        flores_from_code(code)


@pytest.mark.parametrize(
    ("code", "known", "close"),
    [
        ("sr-ME", ["eng_Latn", "srp_Cyrl"], "srp_Cyrl"),
        ("uz_UZ@cyrillic", ["uzn_Latn", "kaz_Cyrl"], "uzn_Latn"),
        ("arz", ["arb_Arab", "heb_Hebr"], "arb_Arab"),
        ("nn", ["nob_Latn", "dan_Latn"], "nob_Latn"),
        ("br", ["fra_Latn", "cym_Latn"], None),
    ],
)
def test_a_tower_without_a_language_names_its_closest_one(code, known, close):
    with pytest.raises(LanguageError, match="does not support") as refused:
        spoken_language(code, known)
    assert re.findall(r"\(closest: (.*?)\)", str(refused.value)) == ([close] if close else [])


@pytest.mark.parametrize(
    ("code", "found"), [("pt-BR", "por_Latn"), ("xyz_Latn", "xyz_Latn"), ("de", None), ("?", None)]
)
def test_a_code_among_a_towers_own(code, found):
    assert code_among(code, {"por_Latn", "xyz_Latn"}) == found


def test_importing_reads_no_table():
    program = (
        "import sys; import runtime.preprocessing.languages as l, runtime.preprocessing.language_tags as t; "
        "sys.exit(l.languages.cache_info().currsize + t._facts.cache_info().currsize)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_rows_come_in_the_order_of_the_codes():
    assert [row.name for row in languages_from_codes(["por_Latn", "eng_Latn"])] == ["Portuguese", "English"]
