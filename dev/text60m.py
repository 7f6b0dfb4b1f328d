"""Text for `--model=60M-short` from Debian 12's packages: prose and documentation first, then kernel code.

    apt-get download $(python dev/text60m.py)     # 200 MB, into the current folder
    python dev/text60m.py . text60m               # a few minutes

text60m gets train, val and passkey as .jsonl.bz2, together at most 44 MiB, for machines to which only a little can be
copied. Whole documents are held out, one in forty. tiktoken downloads the files of GPT-2's tokenizer to ranks/,
unless they are there. paper/README.md has the next commands. Each package's copyright file has its license: public
domain, PSF, PostgreSQL, MPL-2.0, Apache-2.0, or a version of the GPL.
"""

import bz2
import hashlib
import html
import json
import os
import re
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import UserError, command, say
from data.passkey import passkey_document
from data.read import held_out
from data.tokenizer import get_tokenizer

TRAIN_BYTES = 42 * 2**20  # held-out text and passkeys take some 1.3 MiB more
VAL_SHARE = 1 / 40  # of the documents
N = 512  # tokens in a training window
PASSKEY_SHARE = 1 / 50  # of the windows


def files(tar: tarfile.TarFile, pattern: re.Pattern):
    """Yield (name, content) of the files whose names match the pattern, even those in an inner .tar.xz."""
    for member in tar:
        if member.name.endswith(".tar.xz") and member.isfile():
            with tarfile.open(fileobj=tar.extractfile(member), mode="r|xz") as inner:
                yield from files(inner, pattern)
        elif member.isfile() and pattern.search(member.name):
            yield member.name, tar.extractfile(member).read()


def without_markup(page: str) -> str:
    """The text of HTML, without menus and scripts. It is enough for documentation."""
    page = re.sub(r"(?is)<(head|script|style|nav)\b.*?</\1>|<!--.*?-->", "", page)
    page = re.sub(r"(?i)</?(?:p|div|tr|li|dt|dd|br|pre|h[1-6]|blockquote)\b", r"\n\g<0>", page)
    page = html.unescape(re.sub(r"(?s)<[^>]*>", "", page))
    return re.sub(r"\s*\n\s*", "\n", re.sub(r"[ \t\xa0]+", " ", page)).strip()


def plain(found):
    return (content.decode("utf-8", "replace") for _, content in found)


def pages(found):
    return map(without_markup, plain(found))


def scripture(found):
    """Modules of the SWORD project: a file of compressed blocks, and one with the place and size of each block."""
    contents = dict(found)
    for name in (name for name in contents if name.endswith("s")):
        blocks = contents[name[:-1] + "z"]
        for start, size, _ in struct.iter_unpack("<3I", contents[name]):
            yield without_markup(zlib.decompress(blocks[start : start + size]).decode("utf-8", "replace"))


def novels(found):
    """R's data file: for each object four bytes and a zlib stream, in which a string begins with type and length."""
    for _, rest in found:
        while rest:
            stream = zlib.decompressobj()
            lines = re.findall(rb"\x00\x04\x00\x09....([^\x00]*)", stream.decompress(rest[4:]), re.DOTALL)
            rest = stream.unused_data
            yield b"\n".join(lines).decode("utf-8", "replace")


def descriptions(found):
    """The documentation in JSON files that describe the calls of web services."""
    for _, content in found:
        texts = []
        json.loads(content, object_hook=lambda fields: texts.append(fields.get("documentation")))
        yield "\n".join(without_markup(text) for text in texts if isinstance(text, str))


SOURCES = [  # package, the files in it, what makes documents of them
    ("r-cran-janeaustenr", r"/data/Rdata\.rdb$", novels),
    ("sword-comm-tdavid", r"\.cz[sz]$", scripture),
    ("sword-comm-mhcc", r"\.bz[sz]$", scripture),
    ("sword-text-web", r"\.bz[sz]$", scripture),
    ("anarchism", r"\.html$", pages),
    ("debian-handbook", r"/en-US/[^/]*\.html$", pages),
    ("libreoffice-help-en-us", r"\.html$", pages),
    ("postgresql-doc-15", r"\.html$", pages),
    ("python3.11-doc", r"\.rst\.txt$", plain),
    ("git-doc", r"\.txt$", plain),
    ("perl-doc", r"\.pod$", plain),
    ("python3-botocore", r"/service-2\.json$", descriptions),
    ("linux-source-6.1", r"/Documentation/(?!translations/).*\.rst$", plain),
    ("linux-source-6.1", r"-6\.1/(?:block|crypto|fs|init|io_uring|ipc|kernel|lib|mm|net|security|virt)/.*\.c$", plain),
]


def documents(debs: Path, package: str, pattern: str, reader):
    """The documents of a source. A long line that a page shares with an earlier one, such as a license, is left out."""
    found, seen = list(debs.glob(f"{package}_*.deb")), set()
    if len(found) != 1:
        raise UserError(f"{debs} must have one {package}_VERSION.deb: apt-get download {package}")
    call = ["dpkg-deb", "--fsys-tarfile", found[0]]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as dpkg:  # noise if we stop early
        with tarfile.open(fileobj=dpkg.stdout, mode="r|") as tar:
            for text in reader(files(tar, re.compile(pattern))):
                if reader is not plain:
                    lines = text.split("\n")
                    text = "\n".join(line for line in lines if len(line) < 60 or not (line in seen or seen.add(line)))
                if len(text) > 200:
                    yield text


def write_passkeys(path: Path, tokenizer, n: int) -> None:
    """Write n passkey documents, each of which is a training window together with the token that ends a document.

    They must be the first file that prepare.py is given: a window begins at every 512th token.
    """
    rng = np.random.default_rng(0)
    with bz2.open(path, "wt") as file:
        for key, depth in zip(rng.integers(10_000, 100_000, n), rng.random(n)):
            text = tokenizer.decode(passkey_document(tokenizer, N - 1, int(key), depth)[0])
            assert len(tokenizer.encode_ordinary(text)) == N - 1
            file.write(json.dumps({"text": text}) + "\n")


def write(debs: Path, out: Path) -> None:
    (out / "ranks").mkdir(parents=True, exist_ok=True)
    os.environ["TIKTOKEN_CACHE_DIR"] = str(out / "ranks")
    tokenizer, val, total = get_tokenizer("gpt2"), [], 0
    say("| package | files | documents | training tokens | held-out tokens |\n|---|---|---|---|---|")
    with open(out / "train.jsonl.bz2", "wb") as packed, bz2.open(packed, "wb") as train:
        for package, pattern, reader in SOURCES:
            tokens, n_documents = {True: 0, False: 0}, 0
            for text in documents(debs, package, pattern, reader):
                if packed.tell() > TRAIN_BYTES:
                    break
                sha256, line = hashlib.sha256(text.encode()).digest(), json.dumps({"text": text}).encode() + b"\n"
                for_val = held_out(sha256, VAL_SHARE)
                val.append((sha256, line)) if for_val else train.write(line)
                tokens[for_val] += len(tokenizer.encode_ordinary(text)) + 1
                n_documents += 1
            total += tokens[False]
            say(f"| {package} | `{pattern}` | {n_documents:,} | {tokens[False]:,} | {tokens[True]:,} |")
    with bz2.open(out / "val.jsonl.bz2", "wb") as file:  # by hash, so that its beginning is a fair sample
        file.writelines(line for _, line in sorted(val))
    write_passkeys(out / "passkey.jsonl.bz2", tokenizer, round(total / N * PASSKEY_SHARE / (1 - PASSKEY_SHARE)))
    size = sum(path.stat().st_size for path in out.glob("*.bz2"))
    say(f"\n{total:,} training tokens without passkeys, {size / 2**20:.1f} MiB")


@command
def main(argv: list[str]) -> None:
    if len(argv) == 2:
        write(*map(Path, argv))
    else:
        say(" ".join(dict.fromkeys(package for package, _, _ in SOURCES)))


if __name__ == "__main__":
    main()
