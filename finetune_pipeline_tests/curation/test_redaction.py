import json
import time
from pathlib import Path

import pytest
from hypothesis import example as given_example
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_pipeline.records import Example, Turn
from finetune_pipeline.settings import PROJECT_ROOT
from finetune_pipeline_tests.conftest import START, uid
from finetune_pipeline_tests.curation.default_redaction import redact, redact_example

# Concatenated here, so that secret scanners do not report this file.
SK, KEY = "sk-", "PRIVATE KEY-----"
AWS_ID, AWS_SECRET = "AKIA" + "IOSFODNN7EXAMPLE", f"wJalrXUtnFEMI/{'K7MDENG/'}bPxRfiCYEXAMPLEKEY"
PEM = f"-----BEGIN RSA {KEY}\nMIIEowIBAAKCAQEAabcdefgh\nqrstuvwxyzABCDEFG1\n-----END RSA {KEY}"
JWT = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("mail jane.doe+x@example.co.uk, please", "mail [EMAIL], please"),
        ("jörg@müller.de", "[EMAIL]"),
        ("line\\njane@example.com in escaped text", "line\\n[EMAIL] in escaped text"),
        ("pay with 4111 1111 1111 1111 now", "pay with [CARD] now"),
        ("5555-5555-5555-4444", "[CARD]"),
        ("150 4111 1111 1111 1111", "150 [CARD]"),  # next to an amount
        ("180 by 20 150 4111 1111 1111 1111", "180 by 20 150 [CARD]"),
        ("4111 1111 1111 1111 123", "[CARD] 123"),  # with its check number
        ("4111111111111111 12", "[CARD] 12"),
        ("3782 822463 10005", "[CARD]"),
        ("378282246310005", "[CARD]"),
        ("call me at 555-123-4567.", "call me at [PHONE]."),
        ("(415) 555-2671", "[PHONE]"),
        ("+1 (555) 123-4567", "[PHONE]"),
        ("+49 30 901820 or +442079460958", "[PHONE] or [PHONE_2]"),
        ("0049 30 901820", "[PHONE]"),
        ("Tel: 030 901820", "Tel: [PHONE]"),
        ("my phone number is 2025550123", "my phone number is [PHONE]"),
        (f"use {SK}proj-abcdEFGH1234_abcdEFGH1234-abcd", "use [SECRET]"),
        (f"{SK}ant-api03-{'Ab1_' * 20}", "[SECRET]"),
        (f"hf_{'aB' * 17}", "[SECRET]"),
        (f"github_pat_{'11ABCDEFG0' * 8}", "[SECRET]"),
        (f"ghp_{'a1' * 18}", "[SECRET]"),
        (f"AIza{'B' * 35}", "[SECRET]"),
        ("AKIA" + "IOSFODNN7EXAMPLE", "[SECRET]"),
        ("xoxb-" + "1234-5678-abcdefghij", "[SECRET]"),
        (f"sk_live_{'a1' * 40}", "[SECRET]"),  # longer than the pattern: it is replaced as a whole
        ("123456789:" + "AAHdqTcvCH1vGWJxfSeofSAs0K5PALDsaw0", "[SECRET]"),
        (f"token {JWT}.", "token [SECRET]."),
        (PEM, "[SECRET]"),
        (f"-----BEGIN {KEY}\nMIIEowIBAAKCAQEAabcdefgh\nwhat is this?", "[SECRET]\nwhat is this?"),
        ("postgresql://bob:hunter2@db.example.com/x", "postgresql://bob:[SECRET]@db.example.com/x"),
        ("Server=db;User Id=sa;Password=Sommer;Encrypt=yes", "Server=db;User Id=sa;Password=[SECRET];Encrypt=yes"),
        ("host=db user=bob password=geheim dbname=x", "host=db user=bob password=[SECRET] dbname=x"),
        ("DB_PASSWORD=Summer2024!", "DB_PASSWORD=[SECRET]"),
        ("password: s3cr3tpw", "password: [SECRET]"),
        ("const apiKey = '12ab34cd56ef';", "const apiKey = '[SECRET]';"),
        (f"aws_secret_access_key = wJalrXUtnFEMI/{'K7MDENG/'}bPxRfiCYEXAMPLEKEY", "aws_secret_access_key = [SECRET]"),
        ("Authorization: Basic dXNlcjpwYXNz", "Authorization: Basic [SECRET]"),
        ("https://x.example/?api_key=abcdefgh&n=1", "https://x.example/?api_key=[SECRET]&n=1"),
        ("my password is Hunter22xyz", "my password is [SECRET]"),
        ("password: hunter2", "password: [SECRET]"),
        ("Password: hunter2, as before.", "Password: [SECRET], as before."),
        ('{"password": "hunter2"}', '{"password": "[SECRET]"}'),
        ("DB_PASSWORD=correcthorse", "DB_PASSWORD=[SECRET]"),
        ("export PGPASSWORD='correct-horse-battery'\nX=1", "export PGPASSWORD='[SECRET]'\nX=1"),
        (f"{AWS_ID} {AWS_SECRET}", "[SECRET] [SECRET_2]"),  # the secret alone, without a name before it
        (f"{AWS_ID},{AWS_SECRET}", "[SECRET],[SECRET_2]"),
        (f"{AWS_SECRET} goes with {AWS_ID}", "[SECRET] goes with [SECRET_2]"),
        ("415-555-2671", "[PHONE]"),
        ("415 555 2671", "[PHONE]"),
        ("ring 415 555 2671, please", "ring [PHONE], please"),
        ("06 12 34 56 78", "[PHONE]"),
        ("tel de Paul 07.81.22.90.15.", "tel de Paul [PHONE]."),
        ("my password is hunter2", "my password is [SECRET]"),
        ("das Passwort ist sommer24.", "das Passwort ist [SECRET]."),
        ("DB_PASSWORD=changeme42", "DB_PASSWORD=[SECRET]"),
        ("pw: Sommer2024!", "pw: [SECRET]"),
        ('{"pw": "Sommer2024!"}', '{"pw": "[SECRET]"}'),
        ('password = "letmein"', 'password = "[SECRET]"'),
        ("connect(db_password='letmein')", "connect(db_password='[SECRET]')"),
        ("4111.1111.1111.1111", "[CARD]"),
        ("415.555.2671", "[PHONE]"),
        ("ring 415.555.2670.", "ring [PHONE]."),
        ("Ruf mich an: 0151 23456789", "Ruf mich an: [PHONE]"),
        ("0171/1234567 oder 0160-12345678", "[PHONE] oder [PHONE_2]"),
        ("user＠example.com", "[EMAIL]"),
        ('{"to": "user\\uff20example.com"}', '{"to": "[EMAIL]"}'),
    ],
)
def test_secrets_and_personal_data_are_replaced(text, clean):
    assert redact(text).text == clean
    assert sum(redact(text).counts.values()) == clean.count("[")


@pytest.mark.parametrize(
    "text",
    [
        "150 mm concrete wall, EI 120, 2 hour fire rating",
        "level +3.500 to +7.000 m, then +10.500 +14.000",
        "2100 900 1500 2400 mm, RAL 9010",
        "3f2504e0-4f89-11d3-9a0c-0305e82c3301",
        "2024-01-15T10:30:00+00:00, 2024-01-15 10:30:45.123456, 15.01.2024",
        "v1.2.3-rc.4+build.567, DIN EN 1992-1-1:2011-01, 10.0.0.1:8080",
        "ISBN 978-3-16-148410-0, 9783161484100, EAN 4006381333931",
        "part no 4711-0815-1234-5678, AB-1234-5678-90, W1-2100-900-0054",
        "490154203237518",  # an IMEI, which has the same checksum as a card
        "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "1699999999999999 and 1234567890123456789 and 0.4111111111111111",
        "The password is required and must have 12 characters; the password is SHA256-hashed.",
        "Enter your password: at least 8 characters",
        "9787500*p**7 + 39062500*p**4 +4979687500*q, pad_token=129_595, mask_token='<mask_2>'",
        "def check(password: str, token) -> bool: return password == token",
        'token = tokenizer.decode(ids); password = os.environ["PW"]; secret = load_secret(path2)',
        '{"token": "string", "password": "required", "max_tokens": 4096}',
        "password=${DB_PASSWORD}, api_key: YOUR_API_KEY, token: <your-token>",
        "git clone git@github.com:org/repo.git && npm i left-pad@1.2.3",
        "@app.route('/x') def f(a @ b): ...",
        "sk-learn-something-with-a-very-long-name-here-and-there",
        "call the function on 2024-01-15, call on 12.05.2024, cell 12, fax machine 2100 900",
        f"-----BEGIN {KEY} is how a key begins",
        "login(user, password=pass2); password = other1; password=model2.get(); user.password = form.entry1",
        "password: string2, password: base64 encoded, password: varchar50, password: required",
        "DB_PASSWORD=YOUR_PASSWORD, DB_PASSWORD=getpass.getpass(), POSTGRES_PASSWORD=changeme, MODE_PASSWORD=field",
        "150 200 3000, 240 365 1200 mm, 800 600 2400, 413 827 4561 mm, 415 555 2671 3000, 2 x 415 555 2671",
        "part no 415 555 2671, article 415 555 2673",
        "06 08 10 12 16 and 06 07 08 09 10 and 0a 06 12 34 56 78 and 06 12 34 56 78 90",
        "commit da39a3ee5e6b4b0d3255bfef95601890afd80709",
        "400.500.600 mm, 400.500.6000 mm, 415.555.2671 mm, part no 415.555.2671, 10.415.555.267",
        "4711.0815.1234.5678, 4111.1111.1111.1112, 4111.1111.1111.1111.1",
        "article 0151 23456789, 0151 23456789 mm, 12 0151 23456789, 0151-23456789-01, 0151 234 567, 0301 23456789",
        'password = "required", password="string", password: "letmein", password = "MODE", type="password" id="login"',
        "the password is string2, the password is base64 encoded, the password was required, the key is hunter2",
        "pw: 3.5e6 kW, pw: password, pw: Config.model2-x, pw: int",
    ],
)
def test_ordinary_text_is_not_changed(text):
    assert redact(text).text == text
    assert redact(text).counts == {}


def strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for item in value.values() for text in strings(item))
    elif isinstance(value, list):
        yield from (text for item in value for text in strings(item))


def project_texts():
    data = PROJECT_ROOT / "data"
    for path in [
        *data.glob("samples/**/*.jsonl"),
        *data.glob("benchmarks/*.json*"),
        data / "starter_model/replay.jsonl",
    ]:
        text = Path(path).read_text(encoding="utf-8")
        for line in text.splitlines() if path.suffix == ".jsonl" else [text]:
            yield line
            yield from strings(json.loads(line))


def test_the_sample_logs_and_benchmarks_are_not_changed():
    texts = list(project_texts())
    assert len(texts) > 1_000
    assert [text for text in texts if redact(text).text != text] == []


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ('{"to": "jane@example.com",  "n": 1.50}', '{"to": "[EMAIL]",  "n": 1.50}'),  # the rest is unchanged
        ('{"card": 4111111111111111, "all": [5555555555554444]}', '{"card": "[CARD]", "all": ["[CARD_2]"]}'),
        (
            '{"phone": "030 901820", "mobileNumber": "0171 1234567"}',
            '{"phone": "[PHONE]", "mobileNumber": "[PHONE_2]"}',
        ),
        (
            '{"password": "hunter2!", "clientSecret": "a1\\"b2c3"}',
            '{"password": "[SECRET]", "clientSecret": "[SECRET_2]"}',
        ),
        (
            '{"a": "jane\\u0040example.com é", "b": "x\\njane@example.com"}',
            '{"a": "[EMAIL] \\u00e9", "b": "x\\n[EMAIL]"}',
        ),
        (json.dumps({"key": f"{PEM}\n"}), '{"key": "[SECRET]\\n"}'),
    ],
)
def test_json_stays_json(text, clean):
    assert redact(text).text == clean
    json.loads(redact(text).text)


def test_the_same_secret_gives_the_same_placeholder_everywhere_in_an_example():
    logged = Example(
        interaction_id=uid("a"), ingest_offset=1, created_at=START, prompt="write to jane@example.com",
        target='{"to": "jane@example.com"}',
        output="to: jane@example.com",
        history=(Turn(role="user", content="her number is +49 30 901820"),),
        reward=1, confirmed=True, corrected=False, provenance="People/2024-05-06 Talk.md#Call jane@example.com",
    )  # fmt: skip
    redacted, counts = redact_example(logged)
    assert (redacted.prompt, redacted.target) == ("write to [EMAIL]", '{"to": "[EMAIL]"}')
    assert redacted.history[0].content == "her number is [PHONE]"
    assert redacted.output == "to: [EMAIL]"
    assert redacted.provenance == "People/2024-05-06 Talk.md#Call [EMAIL]"
    assert counts == {"email": 4, "phone": 1}
    assert redacted.interaction_id == logged.interaction_id


def test_a_commit_hash_next_to_an_aws_key_is_kept():
    hash = "da39a3ee5e6b4b0d3255bfef95601890afd80709"
    assert redact(f"{AWS_ID} {hash}").text == f"[SECRET] {hash}"


def test_an_example_without_secrets_is_returned_itself():
    plain = Example(
        interaction_id=uid("a"),
        ingest_offset=1,
        created_at=START,
        prompt="p",
        output="t",
        target="t",
        reward=1,
        confirmed=True,
        corrected=False,
    )
    assert redact_example(plain)[0] is plain


PIECES = st.sampled_from(
    [
        "jane@example.com", "4111111111111111", "4111 1111 1111 1111", "+49 30 901820", "555-123-4567",
        "(415) 555-2671",
        "hf_" + "aB" * 17, JWT, PEM, "password=", "password is ", "hunter2x", "://a:", "@", ":", "=", '"', "'", "\\",
        "\\n", "\\u0040", "[SECRET]", "[EMAIL]", "[", "]", "{", "}", "phone: ", "Bearer ", "?token=", ";pwd=", "+",
        "415.555.2671", "0151 23456789", "pw: ", "password = ", "letmein", "Sommer24x", "＠", "4111.1111.1111.1111",
        "415 555 2671", "06 12 34 56 78", AWS_ID, AWS_SECRET, "hunter2", "DB_PASSWORD=", "correcthorse", "password: ",
        "DE89 3704 0044 0532 0130 00", "123-45-6789", "passport ", "C01X00T47", "2341 2341 2346", "ABCPE1234F",
        "iban: ", "4155552671", "030 901820", "private key ", "a1" * 32, "wallet ", "abandon " * 12, "steuer-id: ",
        "86095742719", "[EMAIL_2]", "_2]", "joe@example.com", "joe (at) ", "%40", " dot ", "abandon " * 11 + "about",
        "mot de passe: ", "PIN is ",
        "00", "-", " ", ".", "1", "12345678", "aws key ", "-----END PRIVATE KEY-----", ",", "é", "\n",
    ]
)  # fmt: skip
TEXTS = st.one_of(st.text(), st.lists(st.one_of(PIECES, st.text(max_size=4)), max_size=14).map("".join))


@settings(max_examples=1_000, deadline=None)
@given(TEXTS)
@given_example("password=[SECRET]x1y2z3")
def test_redaction_never_fails_and_is_idempotent(text):
    once = redact(text)
    again = redact(once.text)
    assert again.text == once.text
    assert again.counts == {}
    assert bool(once.counts) == (once.text != text)


@pytest.mark.parametrize("escaped", [True, False])
@settings(max_examples=150, deadline=None)
@given(
    value=st.recursive(
        TEXTS | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=5
    )
)
def test_a_json_document_stays_valid(value, escaped):
    if isinstance(value, list | dict):
        clean = json.loads(redact(json.dumps(value, ensure_ascii=escaped)).text)
        assert isinstance(clean, type(value))
        assert isinstance(value, dict) or len(clean) == len(value)


@pytest.mark.parametrize(
    "piece",
    [
        "a@",
        "://a:",
        "1 ",
        "+1 ",
        f"-----BEGIN {KEY}",
        "password=",
        "aws key ",
        "phone:",
        "a-",
        "eyJ",
        "x=1 ",
        "[",
        "A",
        "415 555 2671 ",
        "06 12 34 56 78 ",
        f"{AWS_ID} ",
        f"{AWS_SECRET} ",
        "DB_PASSWORD=a",
        "password: a",
        "password is a",
        "415.555.",
        "0151 ",
        "pw:",
        "sk-",
        "curl -u ",
        "curl -u a:",
        "--password ",
        "<password>",
        "password for ",
        "password **",
        "0151 12 ",
        "?sig=",
        "4111\u00a0",
        "DE89 ",
        "DE89370400440532013000 ",
        "wallet abandon ",
        "passport A",
        "private key ",
        "P<UTO",
        "A1",
        "steuer 12 345 ",
        "0221/",
        "login a password ",
        "x: 4155552671 ",
        "ab:",
        "a:5432:b:",
        "docker login ",
        "abandon ",
        "zoo wrong ",
        "a (at) ",
        "a at a dot ",
        "mail a at a dot ",
        "mail : at ",
        "a%40",
        "mdp: ",
        "PIN is ",
        "a@b.io ",
    ],
)
def test_adversarial_text_takes_linear_time(piece):
    began = time.process_time()  # other processes do not change it
    redact("a@b." + piece * (200_000 // len(piece)) + "password=")
    # Linear time is a fraction of a second, ten times that on a machine whose cores are shared; quadratic is minutes.
    assert time.process_time() - began < 60


SECRETS = {
    "ann.smith@example.com": "ann.smith",
    "4111 1111 1111 1111": "4111",
    "4111\u00a01111\u00a01111\u00a01111": "4111",
    "+49 30 901820": "901820",
    "(415) 555-2671": "2671",
    "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH": "hf_abc",
    "sk-proj-abcdefgh0123456789abcdefgh": "sk-proj",
    "sk-abcdefghijklmnopqrstT3BlbkFJabcdefghijklmnopqrst": "T3Blbk",
    "hvs.abcdefghijklmnopqrst": "hvs.abc",
    "https://x.example/?sig=abcdefgh12": "abcdefgh12",
    "password: hunter2": "hunter2",
    "DB_PASSWORD=hunter2": "hunter2",
    "api_key=abcdef0123456789": "abcdef",
    "password is Tr0ub4dor&3": "Tr0ub",
    "Bearer abcdefghijklmnop0123456": "abcdefgh",
    "DE89 3704 0044 0532 0130 00": "3704",
    "GB82WEST12345698765432": "WEST",
    "123-45-6789": "6789",
    "2341 2341 2346": "2341",
    "ABCPE1234F": "1234F",
    "185057800608491": "0578",
    "passport C01X00T47": "C01X",
    "Steuer-ID 86095742719": "8609",
    "wJalrXUtnFEMIzK7MDENGzbPxRfiCYEXAMPLEKEY": "wJalr",
    f"private key {'a1' * 32}": "a1a1",
}
CONTEXTS = (
    "{}", "use {} now", "it is {}.", "({})", "[{}]", "<{}>", '"{}"', "`{}`", "{}, and", "1,{},2", "a;{};b", "|{}|",
    "x:{}", "- {}",
    "**{}**", "*{}*", "_{}_", "我的{}是", "«{}»", "a\\n{}\\nb", "a\n{}\nb", "<b>{}</b>", "a\u00a0{}\u00a0b",
    "{}!", "ü{}",
)  # fmt: skip


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_is_found_in_any_surrounding_text(secret):
    left = [around for around in CONTEXTS if SECRETS[secret] in redact(around.format(secret)).text]
    left += [around for around in CONTEXTS if SECRETS[secret] in redact(json.dumps({"a": around.format(secret)})).text]
    assert left == []


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("**Password:** Tr0ub4dor&9aa", "**Password:** [SECRET]"),
        ("__API key__: 9f8a7b6c5d4e3f2a1b0d", "__API key__: [SECRET]"),
        ('config = {"password": "hunter22"}', 'config = {"password": "[SECRET]"}'),
        ("config['password'] = 'hunter22!'", "config['password'] = '[SECRET]'"),
        ('connect(password="hunter2")', 'connect(password="[SECRET]")'),
        ('{"password": "swordfish", "api key": "9f8a7b6c5d4e"}', '{"password": "[SECRET]", "api key": "[SECRET_2]"}'),
        ("<password>S3cr3tPass</password>", "<password>[SECRET]</password>"),
        ("run --password S3cr3tPass now", "run --password [SECRET] now"),
        ("curl -u admin:S3cr3tPass https://x", "curl -u admin:[SECRET] https://x"),
        ("Password for root: S3cr3tPass", "Password for root: [SECRET]"),
        ("The API key is 9F8a7b6c5d4e3f2a1b0d", "The API key is [SECRET]"),
        ("0170 123 4567, 0171/123 45 67", "[PHONE], [PHONE_2]"),
    ],
)
def test_secrets_are_found_in_notes(text, clean):
    assert redact(text).text == clean


@pytest.mark.parametrize(
    "text",
    [
        "the API key is required", "token for each: 12", "--token TOKEN", "<password>secret</password>",
        "curl -u $USER:$PASS https://x", "0170 123 45 mm", "sizes 0150 200 300 400", "press key: enter",
        'secret key = os.environ["X"]', '{"password": "required", "token": "string"}',
    ],
)  # fmt: skip
def test_text_about_secrets_is_kept(text):
    assert redact(text).text == text
