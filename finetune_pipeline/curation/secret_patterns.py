"""The secrets that redaction finds: keys, tokens and passwords.

Well-known tokens are found by the patterns of detect-secrets (without its entropy plugins, which match ordinary text)
and by some that it lacks. Passwords and keys without a form of their own are found by the name before them.
"""

import base64
import hashlib
import re
from functools import lru_cache
from itertools import pairwise

from finetune_pipeline.curation.found_values import PLACEHOLDER, START, FoundValues

_TOKENS = re.compile(
    START
    + r"""(?:
        sk-(?:proj|svcacct|admin|None|ant|or|lf)-[A-Za-z0-9_-]{16,}   # OpenAI, Anthropic, OpenRouter, Langfuse
      | sk-[A-Za-z0-9]{32,}                                           # OpenAI's older form, DeepSeek
      | [sr]k_(?:live|test)_[A-Za-z0-9]{16,} | whsec_[A-Za-z0-9+/=]{24,}   # Stripe
      | hf_[A-Za-z0-9]{30,} | api_org_[A-Za-z0-9]{30,}                # Hugging Face
      | github_pat_[A-Za-z0-9_]{22,}                                  # GitHub, fine-grained
      | AIza[A-Za-z0-9_-]{35} | ya29\.[A-Za-z0-9_-]{20,} | GOCSPX-[A-Za-z0-9_-]{20,}   # Google
      | gsk_[A-Za-z0-9]{40,} | xai-[A-Za-z0-9]{40,} | nvapi-[A-Za-z0-9_-]{40,} | r8_[A-Za-z0-9]{30,}
      | npm_[A-Za-z0-9]{36} | hvs\.[A-Za-z0-9_-]{20,} | dop_v1_[a-f0-9]{64} | shp(?:at|ss|ca)_[a-fA-F0-9]{32}
      | xapp-[A-Za-z0-9-]{20,} | dapi[a-f0-9]{32} | AKC[A-Za-z0-9]{20,}
      | pypi-Ag[A-Za-z0-9_-]{14,} | rubygems_[a-f0-9]{40,} | cio[A-Za-z0-9]{32} | CLOJARS_[a-z0-9]{50,}   # registries
      | dckr_[po]at_[A-Za-z0-9_-]{20,}                                # Docker
      | lin_(?:api|oauth)_[A-Za-z0-9]{32,} | (?:secret_|ntn_)[A-Za-z0-9]{40,}   # Linear, Notion
      | dp\.(?:pt|st|ct|sa|scim|audit)\.(?:[a-z0-9_-]{2,35}\.)?[A-Za-z0-9]{40,}   # Doppler
      | (?i:AGE-SECRET-KEY-1)[A-Za-z0-9]{50,} | AGE-PLUGIN-[A-Z0-9-]{20,}   # age
      | ft-[A-Za-z0-9_-]{43}                                          # this project's gateway
      | gl(?:dt|rt|cbt|ptt|ft|soat|agent|imt)-[A-Za-z0-9_-]{20,}      # GitLab
      | AT(?:ATT|BB|CTT)[A-Za-z0-9_=-]{20,} | figd_[A-Za-z0-9_-]{20,} | PMAK-[a-f0-9-]{40,}   # Atlassian, ...
      | (?:glsa|glc)_[A-Za-z0-9_+/=]{20,} | NRAK-[A-Z0-9]{27} | sntry[su]_[A-Za-z0-9_+/=-]{20,}   # monitoring
      | pscale_(?:tkn|oauth|pw)_[A-Za-z0-9_.-]{20,} | sbp_[a-f0-9]{40}   # databases
      | fo1_[A-Za-z0-9_-]{40,} | fm[12]_[A-Za-z0-9+/=]{40,} | nfp_[A-Za-z0-9]{36,} | rnd_[A-Za-z0-9]{28,}   # hosting
      | HRKU-[A-Za-z0-9_-]{30,} | do[or]_v1_[a-f0-9]{64} | tskey-[a-z]+-[A-Za-z0-9-]{16,} | pul-[a-f0-9]{40}
      | hv[br]\.[A-Za-z0-9_-]{20,} | [A-Za-z0-9]{14}\.atlasv1\.[A-Za-z0-9_=-]{60,}   # HashiCorp
      | pplx-[A-Za-z0-9]{40,} | re_[A-Za-z0-9]{6,}_[A-Za-z0-9]{20,} | ops_eyJ[A-Za-z0-9_-]{40,}
      | pat[A-Za-z0-9]{14}\.[a-f0-9]{64} | sl\.[A-Za-z0-9_-]{100,} | key-[a-f0-9]{32}(?![a-z0-9])
      | [ps]k\.eyJ[A-Za-z0-9_-]{40,}\.[A-Za-z0-9_-]{20,} | [A-Za-z0-9_~.]{3}8Q~[A-Za-z0-9_~.-]{31,34}   # Mapbox, Azure
      | [xyztuv]prv[1-9A-HJ-NP-Za-km-z]{107} | S[A-Z2-7]{55}(?![A-Z0-9])   # wallets: BIP 32, Stellar, Nostr, Cardano
      | (?:nsec|ed25519e?_sk|(?:addr|root|acct)_x?sk)1[02-9ac-hj-np-z]{50,}
      | sq0(?:atp|csp|idp)-[A-Za-z0-9_-]{22,} | access_token\$(?:production|sandbox)\$[0-9a-z]{16}\$[0-9a-f]{32}
      | vercel_blob_rw_[A-Za-z0-9_]{20,}                              # Square, Braintree (the line before), Vercel
      | eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}(?:\.[A-Za-z0-9_-]*)?     # JSON Web Token
    )""",
    re.VERBOSE,
)
_REST_OF_TOKEN = re.compile(r"[A-Za-z0-9_-]*")  # newer tokens are longer than the patterns
_OPENAI = "T3BlbkFJ"  # in every key of the older form
_PRIVATE_KEY = re.compile(
    r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----(?P<body>(?:(?!-----)[^\"])*)"
    r"(?P<end>-----END (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----)?"
)
_KEY_LINE = re.compile(r"[A-Za-z0-9+/=]{16}")
_KEY_LINES = re.compile(r"(?:(?:\s|\\[nr])*[A-Za-z0-9+/=]{16,})+")
_AUTHORIZATION = re.compile(
    r"(?i)\bauthorization[\"']?\s*[:=]\s*[\"']?(?:basic|bearer|token)\s+(?P<value>[\w.~+/=-]{8,})"
)
_BEARER = re.compile(START + r"(?i:bearer)\s+(?P<value>(?=[\w.~+/=-]{0,60}\d)[\w.~+/=-]{20,})")
_IN_URL = re.compile(r"://[^\s/:@\"'<>\\]{0,100}:(?P<value>[^\s@/\"'<>\\]{1,200})@")
_IN_QUERY = re.compile(
    r"(?i)[?&](?:[\w-]{0,30}(?:key|token|secret|password)|sig|signature|pwd)=(?P<value>[^\s&\"'#<>${}\\]{8,})"
)
_IN_CONNECTION = re.compile(  # strings of ADO.NET and JDBC (semicolons) and of libpq (spaces)
    r"(?i)(?:;|\w=[^\s,;()\"']{1,200}\s)(?:password|pwd)=(?P<value>[^\s;,()\"'\\]{1,200})"
    r"|(?<![\w.])(?:password|pwd)=(?P<first>[^\s;,()\"'\\]{1,200})(?=;\s?\w[\w ]{0,30}=|\s(?:host|user|dbname|port)=)"
)
_AWS_SECRET = re.compile(
    r"(?i)aws.{0,20}?(?:key|pwd|pw|password|pass|token|secret).{0,20}?['\"\s:=](?P<value>[0-9a-z/+]{40})(?![0-9a-z/+])"
)
_AWS_BARE = re.compile(START + r"(?<![/+=.~-])(?P<value>[A-Za-z0-9/+]{40})(?![A-Za-z0-9/+=~-]|_\w|\.\w)")
_AWS_ID = r"(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])"
_AWS_ALONE = r"(?P<value>(?<![A-Za-z0-9/+])[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=]))"
_AWS_PAIRS = (
    re.compile(rf"(?s){_AWS_ID}.{{1,40}}?{_AWS_ALONE}"),
    re.compile(rf"(?s){_AWS_ALONE}.{{1,40}}?(?<![A-Za-z0-9]){_AWS_ID}"),
)

_SECRET_NAME = (
    r"(?:password|passwd|passphrase|passcode|passwort|pwd|secret|token|credentials?"
    r"|(?:api|access|private|secret|account|encryption|signing)[ _-]?key)"
)
_EMPHASIS = r"(?:\*{1,3}|_{1,2})"  # of Markdown
_SECRET_KEY = re.compile(rf"(?i)(?:.*[^a-z]|.*(?<=[a-z])(?-i:(?=[A-Z])))?{_SECRET_NAME}(?:[ _-]?\d)?")
_ASSIGNED = re.compile(
    rf"(?i)(?P<name>{_SECRET_NAME})(?:_\d)?(?:[\"'`]?\]?|{_EMPHASIS})\s{{0,3}}(?::=|=>|=|:){_EMPHASIS}?\s{{0,3}}"
    r"(?:\"(?P<double>[^\"\\\s]{4,200})\"|'(?P<single>[^'\\\s]{4,200})'|`(?P<tick>[^`\\\s]{4,200})`"
    r"|(?P<bare>[^\s\"'`,;(){}<>\[\]\\]{6,200})(?![^\s\"'`,;.)}\]<>›»\\]))"
)
_SAID = re.compile(
    r"(?i)"
    + START
    + r"(?:(?:password|passphrase|passcode|passwort|(?:api|access|secret)[ _-]?key|token)"
    + r"(?:\s+(?:for|of|für|von)\s+[^\s:]{1,60})?(?:\s+(?:is|was|ist|war|lautet)\s*:?|\s*:)|pw:)\s*[\"'`]?"
    + r"(?P<said>[^\s\"'`,;]{8,100})"
)
_IN_COMMAND = re.compile(rf"(?i)(?<![\w-])--(?P<name>{_SECRET_NAME})[ =][\"']?(?P<value>[^\s\"'`$<>{{}}]{{6,200}})")
_IN_TAG = re.compile(rf"(?i)<(?P<name>{_SECRET_NAME})>(?P<value>[^\s<>$%{{}}]{{6,200}})</")
_IN_COOKIE = re.compile(
    r"(?i)\bcookie:[^\n]{0,300}?\b[\w.-]{0,40}(?:sess|sid|auth|token|jwt)[\w.-]{0,40}=(?P<value>[^;\s\"']{12,})"
)
_OF_SHELL = re.compile(
    r"\b(?:(?:mysql|mysqldump|mariadb)\b[^\n|;]{0,200}?\s-p"
    r"|(?:sshpass|(?:docker|podman|nerdctl|helm\s{1,3}registry)\s{1,3}login\b[^\n|;]{0,200}?)\s{1,3}-p[\s=]{0,3}[\"']?)"
    r"(?P<value>[^\s\"'$<{-][^\s\"'$]{3,99})"
)
_OF_PGPASS = re.compile(  # host, port, database, user, password
    r"(?<![\w.:/*-])[\w.*-]{1,100}:(?:\d{4,5}|\*):(?:\*|[A-Za-z_][\w.-]{0,62}):(?P<name>\*|[A-Za-z_][\w.@-]{0,62})"
    r":(?P<value>[^\s:\"'`]{6,200})"
)
_PUTTY_KEY = re.compile(r"Private-Lines: \d+\s{1,2}(?P<value>(?:[A-Za-z0-9+/=]{1,100}\r?\n){1,200})")
_WEBHOOK = re.compile(
    r"https://(?:discord(?:app)?\.com/api/webhooks/\d+/[\w-]{40,}|[\w.-]{1,60}\.webhook\.office\.com/webhookb2/[\w@/-]{60,})"
)
_HEX_KEY = re.compile(  # without a colon
    r"(?i)\b(?:api|access|secret|auth|licen[cs]e|wandb)[ _-]?(?:key|token)\s{1,3}(?:is\s{1,3})?[\"'`]?"
    r"(?P<value>(?-i:[0-9a-f]{32,64}))(?![0-9A-Za-z])"
)
_OF_NETRC = re.compile(r"\blogin\s+\S{1,100}\s+password\s+(?P<value>\S{4,200})")
_OF_CURL = re.compile(r"\bcurl\b[^\n]{0,200}?\s(?:-u|--user)[ =][\"']?[^\s:\"']{1,60}:(?P<value>[^\s\"'`$<>{}]{4,200})")
# A plain word, also with a number after it, is a password only in a note or an environment file: after a colon or "is",
# in quotes after an equals sign, or after an upper-case name and an equals sign without spaces. In code it is a name.
_END_OF_WORD = r"(?=[\"'`]?(?:[\s\\})\]<>›»,;]|[.!?](?:\s|$)|$))"
_NOTED = re.compile(
    r"(?:[Pp]ass(?:word|wd|phrase|code)|[Pp]asswort|\b[Pp]wd)(?:[\"']?\s{0,3}:|\s(?:is|was|ist|war|lautet))\s{0,3}[\"'`]?"
    rf"(?P<value>[A-Za-z]{{4,40}}\d{{1,2}}|\d{{6,20}}){_END_OF_WORD}"
)
_ABROAD = re.compile(  # passwords in other languages
    START + r"(?i:mot de passe|mdp|contraseña|contrasena|senha|palavra-passe|wachtwoord|kennwort|lösenord|adgangskode"
    r"|salasana|has[łl]o|heslo|jelszó|parola|şifre|пароль|密码|密碼|パスワード|비밀번호)"
    r"(?:\s{0,3}[:=：]|\s(?i:est|es|é|è|is|ist|lautet|är|er|on|to|jest|je|это|-|–)\s|[是为為は]|[은는]\s)\s{0,3}[\"'`«「]?"
    r"(?P<value>[^\s\"'`,;，。、»」]{4,100})"
)
_WORD_WITH_DIGITS = re.compile(r"[A-Za-z]{4,40}\d{1,2}")
_PIN = re.compile(
    r"\b(?i:pin|cv[vc]2?)(?:[ -](?i:code|number|nummer))?(?:\s?:|\s(?i:is|was|ist|war|lautet)\b)\s{0,3}[\"'`]?"
    r"(?P<value>\d{3,8})(?![\w-]|[.,]\d)"
)
_QUOTED = re.compile(
    r"(?:\b|_)(?:[Pp]ass(?:word|wd|phrase|code)|[Pp]asswort|PASSWORD|[Pp]wd)\s{0,3}=\s{0,3}"
    r"(?:\"(?P<double>[a-z]{6,40}|[A-Za-z]{4,40}\d{1,2})\"|'(?P<single>[a-z]{6,40}|[A-Za-z]{4,40}\d{1,2})')"
)
_IN_ENVIRONMENT = re.compile(
    rf"(?:PASS(?:WORD|WD|PHRASE|CODE)|_PWD|_SECRET)=[\"']?(?P<value>[A-Za-z][A-Za-z0-9-]{{5,63}}){_END_OF_WORD}"
)
_PASSWORD_KEY = re.compile(r"(?i)pass(?:word|wd|phrase|code)|passwort|pwd")
_NO_PASSWORD = re.compile(  # placeholders, types, methods
    r"(?i).*(?:pass|pwd|secret|token|your|example|placeholder|redacted|hidden|value|str|text|field|input|param"
    r"|arg|var|user|name|label|line|item|required|optional|none|null|empty|undefined|default|true|false|dummy|setting"
    r"|char|byte|int|float|base|hash|sha|crypt|argon|kdf|utf|aes).*|change(?:[_-]?(?:me|it|this|now))?"
)
_CODE = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+|[A-Za-z_]+\d{0,2}|\$.*|%.*|<.*>|\*+|x+")


def replace_secrets(text: str, found: FoundValues) -> str:
    """Replace keys, tokens and passwords."""
    text = _PRIVATE_KEY.sub(lambda match: _without_key(match, found), text)
    for pattern in (_AUTHORIZATION, _BEARER, _IN_URL, _IN_QUERY, _IN_CONNECTION, _AWS_SECRET):
        text = found.replace_matches(pattern, text, "secret", lambda match, value: bool(PLACEHOLDER.sub("", value)))
    for pattern in _AWS_PAIRS:
        text = found.replace_matches(pattern, text, "secret", lambda match, value: _is_mixed(value))
    text = found.replace_matches(_TOKENS, text, "secret")
    for pattern in _known_tokens():
        if _OPENAI in pattern.pattern and _OPENAI not in text:
            continue  # on `sk-sk-sk-...` the pattern would take quadratic time
        text = _whole_tokens(pattern, text, found)
    for pattern in (_ASSIGNED, _IN_COMMAND, _IN_TAG, _OF_PGPASS):
        text = found.replace_matches(pattern, text, "secret", lambda match, value: _looks_secret(match["name"], value))
    for pattern in (_WEBHOOK, _PUTTY_KEY, _HEX_KEY, _IN_COOKIE):
        text = found.replace_matches(pattern, text, "secret")
    for pattern in (_OF_CURL, _OF_NETRC, _OF_SHELL):
        text = found.replace_matches(pattern, text, "secret", lambda match, value: bool(PLACEHOLDER.sub("", value)))
    for pattern in (_NOTED, _QUOTED, _IN_ENVIRONMENT):
        text = found.replace_matches(pattern, text, "secret", lambda match, value: _is_password(value))
    text = found.replace_matches(_AWS_BARE, text, "secret", lambda match, value: _is_random(value))
    text = found.replace_matches(
        _ABROAD, text, "secret", lambda match, value: _looks_secret("", value) or _is_worded(value)
    )
    text = found.replace_matches(_PIN, text, "secret", lambda match, value: len(value) > 3 or match[0][0] in "cC")
    text = _wallets(text, found)
    return found.replace_matches(_SAID, text, "secret", lambda match, value: _looks_chosen(value))


def is_secret_under(key: str, value: str) -> bool:
    """Return whether the value of a JSON key is a secret because of the key, such as `clientSecret`."""
    noted = (_NOTED.search(f"{key}: {value}") or _PASSWORD_KEY.fullmatch(key)) and _is_password(value)
    if key.lower() == "pw":
        return _looks_chosen(value)
    if _PIN.fullmatch(f"{key}: {value}"):
        return len(value) > 3 or key[0] in "cC"
    if key.lower() in {"auth", "_auth"}:  # of Docker and npm: user and password in base64
        return _decoded(value) is not None and ":" in (_decoded(value) or "")
    named = _SECRET_KEY.fullmatch(key) is not None and not re.search(r"\s", value)
    return named and bool(noted or _looks_secret(key, value))


def _without_key(match: re.Match[str], found: FoundValues) -> str:
    """Return the placeholder of a private key, and the text after a key that was cut off; words about keys are kept."""
    if match["end"]:
        return found.replace("secret", match[0]) if _KEY_LINE.search(match["body"]) else match[0]
    lines = _KEY_LINES.match(match["body"])
    return (
        found.replace("secret", match[0][: -len(match["body"]) or None] + lines[0]) + match["body"][lines.end() :]
        if lines
        else match[0]
    )


def _whole_tokens(pattern: re.Pattern[str], text: str, found: FoundValues) -> str:
    parts, position = [], 0
    for match in pattern.finditer(text):
        if match.start() < position:
            continue
        rest = _REST_OF_TOKEN.match(text, match.end())
        end = rest.end() if rest else match.end()
        parts += [text[position : match.start()], found.replace("secret", text[match.start() : end])]
        position = end
    return "".join([*parts, text[position:]])


def _looks_secret(name: str, value: str) -> bool:
    """Return True if a value of a name such as `password` is a secret, not a word, an identifier or a placeholder."""
    value = PLACEHOLDER.sub("", value)
    if len(value) < 4 or _CODE.fullmatch(value) or value.startswith("os."):
        return False
    if value.replace("_", "").isdecimal():
        return len(value) >= 6 and "token" not in name.lower()
    return len(value) >= 6 and (any(c.isdigit() for c in value) or any(c in "!@#$%^&*+?~" for c in value))


def _is_password(value: str) -> bool:
    """Return True if a plain word may be a password: not a placeholder, not the name of a variable."""
    return value.isdecimal() or (not _NO_PASSWORD.fullmatch(value) and value != value.upper())


def _is_worded(value: str) -> bool:
    """Return True if a value is a word with a number after it that may be a password."""
    return _WORD_WITH_DIGITS.fullmatch(value.rstrip(".!?)")) is not None and _is_password(value)


def _is_mixed(value: str) -> bool:
    """Return True if it has digits, upper and lower case, as 40 random characters do and a commit hash does not."""
    return any(c.isdigit() for c in value) and value != value.lower() and value != value.upper()


def _looks_chosen(value: str) -> bool:
    """Return True if the word after "password is" looks like one, unlike "base64-encoded" and "required"."""
    plain = PLACEHOLDER.sub("", value).rstrip(".!?)")
    mixed = plain != plain.lower() and plain != plain.upper()
    return len(plain) >= 8 and "-" not in plain and mixed and any(c.isdigit() for c in plain)


# --- Wallets and other random characters ------------------------------------------------------------------------------

_NAMED_KEY = re.compile(  # 64 hexadecimal digits alone are a hash
    r"(?i)(?:private|priv|secret|wallet|signing|master|seed|spend|view|metamask|phantom|ledger|trezor)(?:'s)?[ _-]?key"
    r"\b[^\n]{0,60}?(?<![0-9a-z])"
    r"(?-i:(?P<hex>(?:0x)?[0-9a-fA-F]{64})(?![0-9A-Za-z])|(?P<base58>[1-9A-HJ-NP-Za-km-z]{86,88})(?![0-9A-Za-z]))"
)
_KEY_BEFORE_NAME = re.compile(
    r"(?<![0-9A-Za-z])(?P<value>(?:0x)?[0-9a-fA-F]{64})\s{1,3}(?i:is|was)\s{1,3}(?:\w{1,12}\s{1,3}){0,3}"
    r"(?i:private|secret|wallet|signing)[ _-]?(?i:key)\b"
)
_WIF = re.compile(r"(?<![A-Za-z0-9])(?:[5KL9c][1-9A-HJ-NP-Za-km-z]{50,51})(?![A-Za-z0-9])")
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_WALLET = re.compile(r"(?i)seed|mnemonic|recovery|wallet|bip-?39")
_PHRASE = re.compile(
    r"(?<![A-Za-z])[A-Za-z]{3,8}(?:(?:\s{0,3},\s{0,3}|\s{1,5})(?:\d{1,2}[.)]\s{0,3})?[A-Za-z]{3,8}){11,}(?![A-Za-z])"
)


def names_a_wallet(text: str) -> bool:
    """Return whether a text speaks of what has a seed phrase."""
    return _WALLET.search(text) is not None


def _wallets(text: str, found: FoundValues) -> str:
    text = found.replace_matches(_NAMED_KEY, text, "secret")
    text = found.replace_matches(_KEY_BEFORE_NAME, text, "secret")
    text = found.replace_matches(_WIF, text, "secret", lambda match, value: _is_wif(value))
    return _PHRASE.sub(lambda match: _without_seed(match[0], found), text)


def _is_wif(text: str) -> bool:
    """Return whether a text is a Bitcoin private key in the Wallet Import Format: Base58 with a checksum."""
    number = 0
    for character in text:
        number = number * 58 + _BASE58.index(character)
    data = number.to_bytes(39, "big").lstrip(b"\0")
    return hashlib.sha256(hashlib.sha256(data[:-4]).digest()).digest()[:4] == data[-4:]


def may_have_seed(text: str) -> bool:
    """Return whether a text has twelve words in a row that may be a seed phrase."""
    return len(text) >= 47 and _PHRASE.search(text) is not None


def _without_seed(text: str, found: FoundValues) -> str:
    """Replace seed phrases, which have 12 to 24 words of BIP 39's list: those whose checksum fits.

    If the texts speak of a wallet, any run of 12 or more words of the list is replaced, since one may be mistyped.
    """
    numbers = _seed_words()
    words = list(re.finditer(r"[A-Za-z]+", text))
    parts, position, start = [], 0, 0
    while start < len(words):
        end = start
        while end < len(words) and words[end][0].lower() in numbers:
            end += 1
        bits = "".join(f"{numbers[word[0].lower()]:011b}" for word in words[start:end])
        while end - start >= 12:
            at = len(bits) - 11 * (end - start)
            size = end - start if found.names_a_wallet else _seed_size(bits[at : at + 11 * 24])
            if size:
                begin, stop = words[start].start(), words[start + size - 1].end()
                parts += [text[position:begin], found.replace("secret", text[begin:stop])]
                position = stop
            start += size or 1
        start = end + 1
    return "".join([*parts, text[position:]])


def _seed_size(bits: str) -> int:
    """Return how many words a seed phrase at the start of 11-bit numbers has, or 0: its last bits are a checksum."""
    for size in (24, 21, 18, 15, 12):
        seed, checksum = bits[: 32 * size // 3], bits[32 * size // 3 : 11 * size]
        if len(bits) >= 11 * size:
            digest = hashlib.sha256(int(seed, 2).to_bytes(len(seed) // 8, "big")).digest()
            if f"{digest[0]:08b}".startswith(checksum):
                return size
    return 0


@lru_cache(maxsize=1)
def _seed_words() -> dict[str, int]:
    from mnemonic import Mnemonic

    return {word: number for number, word in enumerate(Mnemonic("english").wordlist)}


_NAME_OR_PATH = re.compile(r"(?:/?(?:[A-Z]{0,4}[a-z]{2,}|[A-Z]{2,})\d{0,8})+")
_CAMEL_CASE = re.compile(r"(?:(?:[A-Z]{1,4}[a-z]+|[a-z]{2,}|[A-Z]{2,})\d{0,8}|[A-Z]\d{1,3})+")


def _is_random(value: str) -> bool:
    """Return whether 40 characters are random, such as a secret key of AWS, and not a path, a name or encoded text."""
    kinds = ["".join((c.islower() * "a", c.isupper() * "A", c.isdigit() * "0")) for c in value]
    changes = sum(one != other for one, other in pairwise(kinds))
    if not _is_mixed(value) or changes < 14 or _NAME_OR_PATH.fullmatch(value):
        return False
    # Words of one or two letters, such as Id, stand in random characters too; 24 lower-case letters rarely do.
    is_name = _CAMEL_CASE.fullmatch(value) is not None and sum(c.islower() for c in value) >= 24
    return not is_name and _decoded(value) is None


def _decoded(value: str) -> str | None:
    """Return the text that a value encodes in base64, or None if it encodes none."""
    try:
        text = base64.b64decode(value, validate=True).decode("ascii")
    except ValueError:
        return None
    return text if text.isprintable() else None


@lru_cache(maxsize=1)
def _known_tokens() -> tuple[re.Pattern[str], ...]:
    """Return the patterns of detect-secrets whose whole match is a token."""
    from detect_secrets.plugins import (
        aws,
        azure_storage_key,
        discord,
        github_token,
        gitlab_token,
        mailchimp,
        openai,
        pypi_token,
        sendgrid,
        slack,
        square_oauth,
        stripe,
        telegram_token,
        twilio,
    )

    plugins = (
        azure_storage_key.AzureStorageKeyDetector, discord.DiscordBotTokenDetector, github_token.GitHubTokenDetector,
        gitlab_token.GitLabTokenDetector, mailchimp.MailchimpDetector, openai.OpenAIDetector,
        pypi_token.PypiTokenDetector, sendgrid.SendGridDetector, slack.SlackDetector, square_oauth.SquareOAuthDetector,
        stripe.StripeDetector, telegram_token.TelegramBotTokenDetector, twilio.TwilioKeyDetector,
    )  # fmt: skip
    # The second pattern of AWS would match the name and the quotes too; _AWS_SECRET is used instead.
    return (aws.AWSKeyDetector.denylist[0], *(pattern for plugin in plugins for pattern in plugin.denylist))
