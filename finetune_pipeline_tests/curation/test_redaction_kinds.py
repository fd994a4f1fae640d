"""Every kind of secret and personal data, how it spreads over the texts of an example, and what must not be changed."""

import ast
import base64
import json
import random
import string
from pathlib import Path

import pytest

from finetune_pipeline.records import Example, Turn
from finetune_pipeline.settings import RedactionSettings
from finetune_pipeline_tests.conftest import SHARED, START, uid
from finetune_pipeline_tests.curation.default_redaction import redact, redact_example, redact_texts

LETTERS, HEX = string.ascii_letters + string.digits, "0123456789abcdef"
BECH32 = "QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L"
NO_ADDRESSES = "std::vector, a::b, 12:30:45, 1.2.3, 999.1.1.1, v1.2.3.4.5"
NETWORK = RedactionSettings(ipv4=True, ipv6=True, mac=True)


def drawn(count, alphabet=LETTERS):
    """Return characters as a service would draw them; the same in every run."""
    return "".join(random.Random(count).choices(alphabet, k=count))


# Concatenated here, so that secret scanners do not report this file.
SECRETS = {
    "PyPI": "pypi-" + "AgEIcHlwaS5vcmcCJ" + drawn(120),
    "Docker": "dckr_" + "pat_" + drawn(27),
    "Linear": "lin_" + "api_" + drawn(40),
    "Notion": "ntn_" + drawn(46),
    "Notion, older": "secret_" + drawn(43),
    "Doppler": "dp." + "pt." + drawn(43),
    "Doppler, of a service": "dp." + "st.dev_env." + drawn(43),
    "age, lower case": "age-secret-" + "key-1" + drawn(58, BECH32.lower()),
    "age": "AGE-SECRET-" + "KEY-1" + drawn(58, BECH32),
    "this project": "ft-" + drawn(43),
    "AWS, alone": "wJalrXUtnFEMI/" + "K7MDENG/bPxRfiCYEXAMPLEKEY",
    "Azure": "abC8Q" + "~" + drawn(34),
    "Grafana": "glsa_" + drawn(32) + "_1a2b3c4d",
    "Square": "sq0" + "atp-" + drawn(22),
    "Braintree": "access_token" + "$production$" + drawn(16, HEX) + "$" + drawn(32, HEX),
    "Vercel": "vercel_" + "blob_rw_" + drawn(16) + "_" + drawn(30),
    "Vault batch token": "hvb." + drawn(60),
    "Bitcoin, WIF": "5Kb8kLf9zgWQnogidDA76MzPL6TsZZY36hWXMssSzNydYXYB9KF",
    "BIP 32": "xprv9s21ZrQH143K3QTDL4LXw2F7HEK3wJUD2nW2nRk4stbPy6cq3jPPqjiChkVvvNKmPGJxWUtg6LnF5kejMRNNU3TGtRBeJgk33"
    + "yuGBxrMPHi",
    "Stellar": "S" + drawn(55, "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"),
}


@pytest.mark.parametrize("around", ["{}", "use {} now.", '{{"x": "{}"}}', "a='{}';"])
@pytest.mark.parametrize("name", SECRETS)
def test_a_key_is_found_by_its_form(name, around):
    assert redact(around.format(SECRETS[name])).text == around.format("[SECRET]")


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (f"private key: 0x{drawn(64, HEX)}", "private key: [SECRET]"),
        (f"My wallet's private key is {drawn(64, HEX)}.", "My wallet's private key is [SECRET]."),
        ("my seed phrase: " + "legal winner thank year wave useful " * 2 + "ok?", "my seed phrase: [SECRET] ok?"),
        ("wallet: " + ", ".join(f"{n}. abandon" for n in range(1, 13)), "wallet: 1. [SECRET]"),
        (
            json.dumps({"auths": {"x.io": {"auth": base64.b64encode(b"bob:" + b"hunter2").decode()}}}),
            '{"auths": {"x.io": {"auth": "[SECRET]"}}}',
        ),
        ("machine x.io login bob password hunter22", "machine x.io login bob password [SECRET]"),
        (f"the API key {drawn(32, HEX)}", "the API key [SECRET]"),
        (f"{drawn(64, HEX)} is my private key", "[SECRET] is my private key"),
        (f"Cookie: lang=de; session={drawn(40)}; x=1", "Cookie: lang=de; session=[SECRET]; x=1"),
        ("mysql -u root -pS3cret123 db", "mysql -u root -p[SECRET] db"),
        ("docker login -u bob -p Hunter2Secret x.io", "docker login -u bob -p [SECRET] x.io"),
        ("db:5432:app:bob:hunter2secret", "db:5432:app:bob:[SECRET]"),
        ("*:*:*:bob:hunter2secret\nhost:5432:*:ann:s3cret-x", "*:*:*:bob:[SECRET]\nhost:5432:*:ann:[SECRET_2]"),
        ("my password is 123456, the passcode was 20481632", "my password is [SECRET], the passcode was [SECRET_2]"),
        (f"MetaMask key 0x{drawn(64, HEX)}", "MetaMask key [SECRET]"),
        ("https://discord.com/api/webhooks/1234/" + drawn(68), "[SECRET]"),
        ("IBAN DE89 3704 0044 0532 0130 00, bitte", "IBAN [IBAN], bitte"),
        ("Kontonummer 1234567890, BLZ 10050000", "Kontonummer [IBAN], BLZ [IBAN_2]"),
        ("我的电话13812345678，谢谢", "我的电话[PHONE]，谢谢"),
        ("my passport (C01X00T47) expires", "my passport ([PASSPORT]) expires"),
        ("GB82WEST12345698765432", "[IBAN]"),
        ("BE68 5390 0754 7034 und dann", "[IBAN] und dann"),
        ("FR14 2004 1010 0505 0001 3M02 606 svp", "[IBAN] svp"),
        ("iban: DE12 3456 7890 1234 5678 90", "iban: [IBAN]"),  # after its name, also with a wrong checksum
        ("her number is 123-45-6789", "her number is [SSN]"),
        ("social security number 078 05 1120", "social security number [SSN]"),
        ('{"ssn": "123456789", "ssn2": 123456789}', '{"ssn": "[SSN]", "ssn2": "[SSN]"}'),
        ("2341 2341 2346", "[AADHAAR]"),
        ("Aadhaar number: 123412341234", "Aadhaar number: [AADHAAR]"),
        ("ABCPE1234F", "[PAN]"),
        ("my PAN card is BNZAA2318J", "my PAN card is [PAN]"),
        ("pan abcpe1234f", "pan [PAN]"),
        ("1 85 05 78 006 084 91 et 185057800608491", "[NIR] et [NIR]"),
        ("numéro de sécurité sociale 2 85 05 2A 006 084", "numéro de sécurité sociale [NIR]"),
        ("Meine IdNr. ist 86 095 742 719", "Meine IdNr. ist [STEUER_ID]"),
        ("Steueridentifikationsnummer: 86095742719", "Steueridentifikationsnummer: [STEUER_ID]"),
        ("Steuernummer 181/815/08155", "Steuernummer [STEUER_ID]"),
        ('{"tax_id": "86095742719"}', '{"tax_id": "[STEUER_ID]"}'),
        ("passport number C01X00T47", "passport number [PASSPORT]"),
        ("Reisepass-Nr.: C01X00T47", "Reisepass-Nr.: [PASSPORT]"),
        ("Reisepass: C4VMNG8YX", "Reisepass: [PASSPORT]"),  # with two digits
        ("Pass-Nr.: C4VMNG8YX", "Pass-Nr.: [PASSPORT]"),
        ("Reisepassnummer C01X00T478", "Reisepassnummer [PASSPORT]"),  # with its check digit
        ("passeport n° 12AB34567", "passeport n° [PASSPORT]"),
        ("my passport number is x1234567, not ab1234567", "my passport number is [PASSPORT], not ab1234567"),
        ("reisepass c01x00t47, passeport 12ab34567", "reisepass [PASSPORT], passeport [PASSPORT_2]"),
        ("abandon " * 11 + "about", "[SECRET]"),  # a seed phrase with its checksum
        ("keep: legal winner thank year wave sausage worth useful legal winner thank yellow!", "keep: [SECRET]!"),
        ("store zoo, zoo, zoo, zoo, zoo, zoo, zoo, zoo, zoo, zoo, zoo, wrong", "store [SECRET]"),
        ("mot de passe : soleil24", "mot de passe : [SECRET]"),
        ("la contraseña es Verano2024!", "la contraseña es [SECRET]"),
        ("senha: Verao_2024, wachtwoord is Zomer2024!", "senha: [SECRET], wachtwoord is [SECRET_2]"),
        ("пароль: Leto2024!", "пароль: [SECRET]"),
        ("密码：Xia2024!! パスワードはNatsu2024です", "密码：[SECRET] パスワードは[SECRET_2]"),
        ("비밀번호는 Yeoreum24!", "비밀번호는 [SECRET]"),
        ("Mein Passwort lautet Sommer2024!", "Mein Passwort lautet [SECRET]"),
        ("the PIN is 4711, CVV: 123", "the PIN is [SECRET], CVV: [SECRET_2]"),
        ('{"pin": "4711", "cvc": "123"}', '{"pin": "[SECRET]", "cvc": "[SECRET_2]"}'),
        ("jane [at] example [dot] com, j.doe (at) example.co.uk", "[EMAIL], [EMAIL_2]"),
        ("mail jane at example dot com or jane@example.com", "mail [EMAIL] or [EMAIL]"),
        ("My e-mail address is: jane.doe at mail dot example dot de.", "My e-mail address is: [EMAIL]."),
        ("Reach me at jane at example dot org, contact: joe_2 at x dot io", "Reach me at [EMAIL], contact: [EMAIL_2]"),
        ("Write to info at example dot com; E-Mail an jane at a-b dot at", "Write to [EMAIL]; E-Mail an [EMAIL_2]"),
        ("?to=jane%40example.com&cc=joe&#64;example.com", "?to=[EMAIL]&cc=[EMAIL_2]"),
        ('{"passportNumber": "123456789"}', '{"passportNumber": "[PASSPORT]"}'),
        ("P<UTOERIKSSON<<ANNA<MARIA<<<<<<<<<<<<<<<<<<<\nL898902C36UTO7408122F1204159ZE184226B<<<<<10", "[PASSPORT]"),
        ("CPF 529.982.247-25", "CPF [NATIONAL_ID]"),
        ("RSSMRA85T10A562S", "[NATIONAL_ID]"),
        ("11010519491231002X", "[NATIONAL_ID]"),
        ("AHV 756.9217.0769.85", "AHV [NATIONAL_ID]"),
        ("DNI 12345678Z", "DNI [NATIONAL_ID]"),
        ("AB 12 34 56 C", "[NATIONAL_ID]"),
        ("National Insurance number QQ123456C", "National Insurance number [NATIONAL_ID]"),
        ("BSN: 111222333, PESEL 44051401359", "BSN: [NATIONAL_ID], PESEL [NATIONAL_ID_2]"),
        ("Büro 030 901820, (0221) 123456 und 089/1234567", "Büro [PHONE], [PHONE_2] und [PHONE_3]"),
        ("040 / 123 456 78", "[PHONE]"),
        ("Fax 06151 1234-56", "Fax [PHONE]"),
        ("01 42 68 53 00 ou 04.91.12.34.56 ou 01-42-68-53-00", "[PHONE] ou [PHONE_2] ou [PHONE]"),
        ("0142685300 ou 0612345678", "[PHONE] ou [PHONE_2]"),
        ("01712345678", "[PHONE]"),
        ("call 4155552671 today. My number is 2025550123.", "call [PHONE] today. My number is [PHONE_2]."),
        ("9876543210 or 98765 43210", "[PHONE] or [PHONE]"),
        ("020 7946 0958, 07700 900123", "[PHONE], [PHONE_2]"),
        ('{"phone": 4155552671}', '{"phone": "[PHONE]"}'),
    ],
)  # fmt: skip
def test_personal_data_is_replaced(text, clean):
    assert redact(text).text == clean
    assert redact(clean).counts == {}


@pytest.mark.parametrize(
    "text",
    [
        f"commit {drawn(40, HEX)}, sha256 {drawn(64, HEX)}, tx 0x{drawn(64, HEX)}",
        "src/components/Button/IconButton2/Index5, AbstractUserAuthenticationProviderFacto2, Foo2Bar",
        "getUserByIdAndTokenFromDatabaseV2Async12",  # 40 characters
        base64.b64encode(b"plain text that is encoded, ok").decode(),
        "the recovery of the wallet: words about a seed that are no phrase at all but ordinary English text here",
        "pypi-publish, secret_key_of_the_service, lin_alg_norm, ft-in-lb, dp.pt.x, xprv",
        "2400 1200 3650, 2100 9000 1500 mm, 1200 3400 5600 7800, 4711 0815 1234",
        "order 4155552671, invoice no. 2025550123, id: 4155552671, x = 4155552671, f(4155552671), #4155552671",
        "2147483647, 1700000000, 0123456789, 89869747 * 3644798167, 4155552671 ms, 415555267.1",
        "return 9876543210; yield 4155552671",
        "main.py:1234:def:foo:bar_baz, 00:11:22:33:44:55, a:5432:b:c:password, docker login -p $PASS, -p <password>",
        '{"id": 4155552671, "count": 2147483647, "timestamp": "1700000000"}',
        # without a checksum
        "above all other ability about absent absorb abstract absurd abuse access accident account accuse",
        "passport.js version2, a passport to level3, passport x12, the at sign (at), look at example.com (at noon)",
        "look at amazon dot com for prices, visit us at google dot com, I was at home dot com",
        "what is playing at cinema dot de, meet jane at noon dot the i's, mail jane at noon dot the i's",
        "email me at google dot com, contact us at home dot com, my mail is at home dot com, hotmail jane at x dot com",
        "mot de passe : obligatoire, contraseña: string, senha: ${SENHA}, 密码：必填, la parola è importante",
        "pin: 13, PIN: 4711.5, the pin is 12 mm, CVV: required, npm i @a/b, %40babel%2Fcore, left-pad%401.2.3",
        "ISBN 0306406152, article 0142685300, 0301 23456789, 0203/2024, 02/03/2024, 03/2024",
        "10.0.0.1:8080, fe80::1, 00:1B:44:11:3A:B7, v1.2.3.4",
        "part ABCDE1234F, model XYZAB9999Z, passport to success, passport control 2024, pan 200 mm, sin 12345678",
        "123-456-789, 12-34-5678, CAS 7732-18-5, 2024-11-29, 000-12-3456, 666-12-3456",
    ],
)
def test_similar_text_is_not_changed(text):
    assert redact(text).text == text


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("ping 192.168.1.20 or 10.0.0.1:8080", "ping [IPV4] or [IPV4_2]:8080"),
        ("fe80::1ff:fe23:4567:890a, ::1, 2001:db8:0:0:8:800:200c:417a", "[IPV6], [IPV6_2], [IPV6_3]"),
        ("::ffff:192.0.2.128, 64:ff9b::192.0.2.33, ::192.0.2.1.", "[IPV6], [IPV6_2], [IPV6_3]."),
        ("00:1B:44:11:3A:B7 00-1b-44-11-3a-b7 001b.4411.3ab7", "[MAC] [MAC] [MAC]"),
        (NO_ADDRESSES, NO_ADDRESSES),
    ],
)  # fmt: skip
def test_addresses_of_networks_are_replaced_if_they_are_switched_on(text, clean):
    assert redact(text, NETWORK).text == clean
    assert redact(text).text == text


@pytest.mark.parametrize(
    ("region", "text"),
    [
        ("AT", "0664 1234567"),
        ("IT", "06 6982 1234"),
        ("ES", "912 345 678"),
        ("JP", "03-1234-5678"),
        ("AU", "(02) 9374 4000"),
        ("BR", "(11) 98765-4321"),
        ("KR", "010-1234-5678"),
    ],
)
def test_national_phone_numbers_are_found_in_the_countries_of_the_setting(region, text):
    of_region = RedactionSettings(phone_regions=[region])
    assert redact(f"ring {text}, please", of_region).text == "ring [PHONE], please"
    assert redact(f"ring {text}, please").text == f"ring {text}, please"
    similar = f"part no {text}, {''.join(c for c in text if c.isdigit())}, 2024-11-29"
    assert redact(similar, of_region).text == similar
    assert redact(f"ring {text}", RedactionSettings(phone=False, phone_regions=[region])).text == f"ring {text}"


def test_an_unknown_country_of_phone_numbers_is_rejected():
    with pytest.raises(ValueError, match=r"unknown countries .'Austria'.; expected codes of two capital letters"):
        RedactionSettings(phone_regions=["Austria"])


SAMPLES = {
    "secret": "password: hunter22",
    "email": "jane@example.com",
    "phone": "+49 30 901820",
    "card": "4111 1111 1111 1111",
    "iban": "DE89370400440532013000",
    "ssn": "123-45-6789",
    "aadhaar": "2341 2341 2346",
    "pan": "ABCPE1234F",
    "nir": "185057800608491",
    "steuer_id": "86 095 742 719",
    "passport": "passport C01X00T47",
    "national_id": "529.982.247-25",
    "ipv4": "192.168.1.20",
    "ipv6": "2001:db8::1",
    "mac": "00:1B:44:11:3A:B7",
}


KINDS = [name for name, field in RedactionSettings.model_fields.items() if field.annotation is bool]


def test_every_kind_has_a_sample():
    assert set(SAMPLES) == set(KINDS)


@pytest.mark.parametrize("kind", SAMPLES)
def test_every_kind_is_a_setting(kind):
    every = dict.fromkeys(KINDS, True)
    assert redact(SAMPLES[kind], RedactionSettings(**every)).counts == {kind: 1}
    assert redact(SAMPLES[kind], RedactionSettings(**{**every, kind: False})).text == SAMPLES[kind]


@pytest.mark.parametrize("kind", SAMPLES)
def test_every_kind_is_replaced_in_every_text_of_an_example(kind):
    text = f"it is {SAMPLES[kind]}, ok"
    logged = Example(
        interaction_id=uid("a"), created_at=START, ingest_offset=1, prompt=text, target=text, reward=1,
        output=f"no, {text}",
        history=(Turn(role="user", content=text), Turn(role="assistant", content=json.dumps({"x": text}))),
        confirmed=True, corrected=False, provenance=text,
    )  # fmt: skip
    redacted, counts = redact_example(logged, RedactionSettings(**dict.fromkeys(KINDS, True)))
    clean = redacted.prompt
    assert f"[{kind.upper()}]" in clean
    assert (redacted.target, redacted.output, redacted.provenance) == (clean, f"no, {clean}", clean)
    assert [turn.content for turn in redacted.history] == [clean, json.dumps({"x": clean})]
    assert counts == {kind: 6}


# A value that is found in one text and stands in another without its name, or in another form.
SPREAD = [
    ("my password is Hunter22xyz", "I set it to Hunter22xyz.", "I set it to [SECRET]."),
    ("password: hunter2", '{"pw2": "hunter2", "n": 1.50}', '{"pw2": "[SECRET]", "n": 1.50}'),
    ("DB_PASSWORD=correcthorse", "connect with correcthorse!", "connect with [SECRET]!"),
    (f"private key: {drawn(64, HEX)}", f"signed by {drawn(64, HEX)}", "signed by [SECRET]"),
    ("call (415) 555-2671", '{"x": 4155552671}', '{"x": "[PHONE]"}'),
    ("SSN 123-45-6789", "it is 123 45 6789 or 123456789", "it is [SSN] or [SSN]"),
    ("passport number C01X00T47", "| C01X00T47 |", "| [PASSPORT] |"),
    ("IBAN DE89 3704 0044 0532 0130 00", "de89-3704-0044-0532-0130-00", "[IBAN]"),
    ("create a wallet with 12 words", "legal " * 12, "[SECRET] "),
    ("Jane.Doe@example.com", "jane.doe@example.com", "[EMAIL]"),
]


@pytest.mark.parametrize("back", [False, True], ids=["prompt first", "completion first"])
@pytest.mark.parametrize(("named", "bare", "clean"), SPREAD)
def test_a_value_found_in_one_text_is_replaced_in_the_others(named, bare, clean, back):
    texts, _ = redact_texts([bare, named] if back else [named, bare])
    assert texts[0 if back else 1] == clean
    assert redact_texts(texts) == (texts, {})


NUMBERED = [
    (["a@x.io and b@x.io", "b@x.io, a@x.io"], ["[EMAIL] and [EMAIL_2]", "[EMAIL_2], [EMAIL]"]),
    (["mail A@x.io", '{"a@x.io": "c@x.io"}'], ["mail [EMAIL]", '{"[EMAIL]": "[EMAIL_2]"}']),
    (["+49 30 901820, (415) 555-2671", "030 901820"], ["[PHONE], [PHONE_2]", "[PHONE]"]),  # in the order of the text
    (["+1 415 555 2671 or 415.555.2671 or 4155552671"], ["[PHONE] or [PHONE] or [PHONE]"]),
    (["+49 (0)30 1234567, 030 1234567, +49 30 1234567, 0049301234567"], [", ".join(["[PHONE]"] * 4)]),
    (["0049301234567", "+49 030/1234567", "call 030 1234567 or +49 (0) 30 1234567"],
     ["[PHONE]", "[PHONE]", "call [PHONE] or [PHONE]"]),
    (["0044 20 7946 0958, +44 (0)20 7946 0958, 020 7946 0958"], ["[PHONE], [PHONE], [PHONE]"]),
    (["+39 06 6982 1234, tel. 06 6982 1234"], ["[PHONE], tel. [PHONE]"]),  # the zero belongs to it
    (["4111 1111 1111 1111, 4111-1111-1111-1111"], ["[CARD], [CARD]"]),
    (["password: hunter2, later password: hunter3"], ["password: [SECRET], later password: [SECRET_2]"]),
    (["password: hunter2", "Hunter2 is not hunter2"], ["password: [SECRET]", "Hunter2 is not [SECRET]"]),
    (["[EMAIL] wrote to [EMAIL_3]", "a@x.io, b@x.io"], ["[EMAIL] wrote to [EMAIL_3]", "[EMAIL_2], [EMAIL_4]"]),
    (["[EMAIL_999999] [EMAIL_99999999999] a@x.io"], ["[EMAIL_999999] [EMAIL_99999999999] [EMAIL]"]),
    (["a@x.io", "1 to 9"], ["[EMAIL]", "1 to 9"]),
]  # fmt: skip


@pytest.mark.parametrize(("texts", "clean"), NUMBERED)
def test_each_value_has_one_placeholder_in_an_example(texts, clean):
    assert redact_texts(texts)[0] == clean
    assert redact_texts(clean) == (clean, {})


def test_placeholders_are_numbered_in_the_order_of_a_conversation():
    logged = Example(
        interaction_id=uid("a"), created_at=START, ingest_offset=1, reward=1, confirmed=True, corrected=True,
        history=(Turn(role="user", content="I am a@x.io"), Turn(role="assistant", content="hello a@x.io")),
        prompt="write to b@x.io", output="to c@x.io", target="to b@x.io from a@x.io", provenance="c@x.io",
    )  # fmt: skip
    redacted, counts = redact_example(logged)
    assert [turn.content for turn in redacted.history] == ["I am [EMAIL]", "hello [EMAIL]"]
    assert (redacted.prompt, redacted.target) == ("write to [EMAIL_2]", "to [EMAIL_2] from [EMAIL]")
    assert (redacted.output, redacted.provenance) == ("to [EMAIL_3]", "[EMAIL_3]")
    assert counts == {"email": 7}


def test_a_plain_word_that_was_a_password_is_kept_as_a_name_in_its_text():
    code = 'def login(letmein):\n    connect(password="letmein", user=letmein)'
    assert redact(code).text == 'def login(letmein):\n    connect(password="[SECRET]", user=letmein)'


EVERYWHERE = RedactionSettings(phone_regions=["AT", "AU", "BR", "ES", "IT", "JP", "KR", "NL", "PL"])


def changed(texts):
    return [text for text in texts if redact(text, EVERYWHERE).text != text]


@pytest.mark.skipif(not (SHARED / "snips").is_dir(), reason="shared/data/snips is not there")
def test_at_most_one_in_a_thousand_requests_is_changed():
    texts = [
        "".join(piece["text"] for piece in utterance["data"])
        for path in sorted((SHARED / "snips" / "raw").rglob("*.json"))
        for utterances in json.loads(path.read_bytes().decode("utf-8", "replace")).values()
        for utterance in utterances
    ]
    assert len(texts) > 13_000
    assert len(changed(texts)) <= len(texts) / 1_000


def test_at_most_one_in_a_hundred_functions_is_changed():
    functions = []
    for path in sorted(Path(ast.__file__).parent.glob("[a-m]*.py")):
        text = path.read_text(encoding="utf-8")
        lines = text.split("\n")
        nodes = (node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef))
        functions += ["\n".join(lines[node.lineno - 1 : node.end_lineno]) for node in nodes]
    functions = [source for source in functions if len(source) < 4_000]
    assert len(functions) > 500
    assert len(changed(functions)) <= len(functions) / 100
