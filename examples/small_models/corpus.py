# SPDX-License-Identifier: Apache-2.0
"""Make the labelled text that the small models are trained, calibrated and judged on.

    python examples/small_models/corpus.py TEXT_DIR

writes ``train.jsonl`` (training and calibration), ``tune.jsonl`` (choosing defaults) and ``heldout.jsonl`` (judging),
each line ``{"text", "domain"}``, and ``corpus.json`` with the Python version, the counts and the seeds. Nothing is
downloaded: two domains come from the running Python's own library, four from the generators in this file.

==========  ========================================================================================
domain      what it is
==========  ========================================================================================
code        source code of the standard library, docstrings taken out
docs        English: docstrings of the standard library and the ``pydoc`` topics
math        worked arithmetic, equations and word problems
records     JSON, CSV and YAML-like records about people, orders and devices
logs        web server, system and application logs
queries     SQL: tables, inserts, selections with joins and aggregates
==========  ========================================================================================

Library text goes to a split by a hash of its module's (or topic's) name, the same for both library domains, so that a
module's code and its docstrings never stand on different sides. A paragraph that was already used is dropped wherever
it appears again: topics quote each other. Generated text goes to a split by its range of seeds.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import platform
import random
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

SPLITS = ("train", "tune", "heldout")
DOMAINS = ("code", "docs", "math", "records", "logs", "queries")
SAMPLE_CHARS = 900
SEED_RANGES = {"train": 0, "tune": 10_000_000, "heldout": 20_000_000}
# Not on every installation, or tables rather than text.
SKIPPED_PACKAGES = {
    "test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo", "tkinter", "ensurepip",
    "encodings", "pydoc_data", "distutils", "__pycache__", "config-3",
}  # fmt: skip


def split_of(name: str) -> str:
    """The split of a module or topic: 80% train, 10% tune, 10% heldout, by a hash of its name."""
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return "train" if share < 0.8 else "tune" if share < 0.9 else "heldout"


# --------------------------------------------------------------------------------------- text of the library


def library_modules() -> Iterator[tuple[str, str]]:
    """Dotted name and source of every module of the standard library, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if any(part in SKIPPED_PACKAGES or part.startswith(("config-", "_sysconfigdata")) for part in parts):
            continue
        try:
            yield ".".join(parts), path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue


def code_and_docs(name: str, source: str) -> tuple[list[str], list[str]]:
    """Paragraphs of a module's code without its docstrings, and of its docstrings without doctests."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return [], []
    lines = source.splitlines()
    docs: list[str] = []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        text = ast.get_docstring(node, clean=False)
        if text is None:
            continue
        first = node.body[0]
        for number in range(first.lineno - 1, first.end_lineno or first.lineno):
            lines[number] = ""
        paragraphs = [p for p in inspect.cleandoc(text).split("\n\n") if ">>>" not in p]
        if sum(map(len, paragraphs)) >= 80:
            title = name if isinstance(node, ast.Module) else f"{name}.{node.name}"
            docs.extend([f"{title}\n{paragraphs[0]}", *paragraphs[1:]])
    return "\n".join(lines).split("\n\n"), docs


@cache
def library_samples() -> dict[tuple[str, str], list[str]]:
    """Samples of the two library domains: ``{(split, domain): texts}``."""
    from pydoc_data.topics import topics

    paragraphs: dict[str, list[tuple[str, str, list[str]]]] = {split: [] for split in SPLITS}
    for name, source in library_modules():
        code, docs = code_and_docs(name, source)
        paragraphs[split_of(name)] += [("code", name, code), ("docs", name, docs)]
    for name, text in sorted(topics.items()):
        paragraphs[split_of(name)].append(("docs", name, text.split("\n\n")))

    seen: set[str] = set()
    samples: dict[tuple[str, str], list[str]] = {}
    for split in SPLITS:
        for domain, _, pieces in paragraphs[split]:
            fresh = []
            for piece in pieces:
                key = " ".join(piece.split())
                if not key or (len(key) >= 40 and key in seen):
                    continue
                seen.add(key)
                fresh.append(piece.strip("\n").rstrip())
            # What is judged is worth judging: a lone line, such as an interpreter's name, stands in many modules.
            least = 0 if split == "train" else 200
            samples.setdefault((split, domain), []).extend(s for s in pack(fresh) if len(s) >= least)
    for texts in samples.values():  # neighbouring samples come from one module; a prefix should see many
        random.Random(0).shuffle(texts)
    return samples


def pack(pieces: Iterable[str]) -> Iterator[str]:
    """Join paragraphs into samples of about ``SAMPLE_CHARS`` characters; longer paragraphs are cut at a line."""
    sample = ""
    for piece in pieces:
        while len(piece) > SAMPLE_CHARS:
            cut = piece.rfind("\n", SAMPLE_CHARS // 2, SAMPLE_CHARS)
            cut = cut if cut > 0 else SAMPLE_CHARS
            if sample:
                yield sample
                sample = ""
            yield piece[:cut]
            piece = piece[cut:].lstrip("\n")
        if sample and len(sample) + len(piece) > SAMPLE_CHARS:
            yield sample
            sample = ""
        sample = f"{sample}\n\n{piece}" if sample else piece
    if len(sample) >= 200:
        yield sample


# --------------------------------------------------------------------------------------- generated text

NAMES = (
    "Ada Ben Carla Dmitri Elena Farid Grace Hiro Ines Jonas Katya Liam Mona Nadia Omar Priya Quentin Rosa Samir Tessa "
    "Uma Viktor Wanda Xavier Yara Zoe Anton Bella Cyrus Delia Emil Freya Gustav Hanna Ivan Julia Karim Leila Marco "
    "Nina"
).split()
SURNAMES = (
    "Abbott Berg Castillo Dorsey Eriksen Fontaine Gupta Hayashi Ibrahim Jansen Kowalski Lindqvist Moreau Novak Okafor "
    "Petrov Quinn Rossi Schmidt Tanaka Ueda Varga Weber Xu Yilmaz Zhang Alvarez Brandt Conti Dubois"
).split()
CITIES = (
    "Lisbon Oslo Kyoto Nairobi Lima Toronto Krakow Hanoi Tunis Dublin Quito Seoul Cairo Graz Bergen Porto Leeds Lyon "
    "Turin Malaga Zagreb Tallinn Riga Austin Denver Perth Accra Dakar Mumbai Izmir"
).split()
THINGS = (
    "apples pencils tickets bottles stamps books marbles cookies chairs lamps shirts plates candles coins melons "
    "bricks "
    "buttons cables towels baskets"
).split()
PRODUCTS = (
    "desk lamp;steel kettle;garden hose;wool blanket;road bike;paper shredder;coffee grinder;hiking boots;phone case;"
    "rain jacket;cutting board;wall clock;yoga mat;table fan;travel mug;tool box;picture frame;bath towel"
).split(";")


def math_text(rng: random.Random) -> str:
    """Worked arithmetic, equations and word problems, every answer right."""
    blocks = []
    for _ in range(rng.randint(4, 6)):
        kind = rng.randrange(6)
        a, b, c = rng.randint(2, 99), rng.randint(2, 99), rng.randint(2, 30)
        who, friend = rng.sample(NAMES, 2)
        thing = rng.choice(THINGS)
        if kind == 0:
            blocks.append(
                f"Compute {a} * {c} + {b}.\n{a} * {c} = {a * c}\n{a * c} + {b} = {a * c + b}\nAnswer: {a * c + b}"
            )
        elif kind == 1:
            left = c * a + b
            blocks.append(
                f"Solve for x: {c}x + {b} = {left}.\n{c}x = {left} - {b} = {left - b}\nx = {left - b} / {c} = "
                f"{a}\nAnswer: {a}"
            )
        elif kind == 2:
            total = a + b
            blocks.append(
                f"{who} has {a} {thing}. {friend} gives {who} {b} more, and {who} shares them equally among "
                f"{c} friends. How many does each friend get, and how many are left over?\n{a} + {b} = {total}. "
                f"{total} / {c} = {total // c} remainder {total % c}.\nAnswer: {total // c}, remainder {total % c}"
            )
        elif kind == 3:
            price = rng.randint(2, 40)
            blocks.append(
                f"A shop sells {thing} at {price} coins each. {who} buys {c} and pays with {price * c + a} coins. "
                "What is "
                f"the change?\n{price} * {c} = {price * c}. {price * c + a} - {price * c} = {a}.\nAnswer: {a}"
            )
        elif kind == 4:
            big, small = max(a, b), min(a, b)
            steps, x, y = [], big, small
            while y:
                steps.append(f"{x} mod {y} = {x % y}")
                x, y = y, x % y
            blocks.append(
                f"Find the greatest common divisor of {big} and {small}.\n" + "\n".join(steps) + f"\nAnswer: {x}"
            )
        else:
            speed, hours = rng.randint(20, 120), rng.randint(2, 9)
            blocks.append(
                f"A train leaves {rng.choice(CITIES)} at {speed} km per hour. How far does it travel in {hours} "
                "hours?\n"
                f"{speed} * {hours} = {speed * hours}.\nAnswer: {speed * hours} km"
            )
    return "\n\n".join(blocks)


def _person(rng: random.Random) -> dict[str, object]:
    first, last = rng.choice(NAMES), rng.choice(SURNAMES)
    return {
        "id": rng.randint(1000, 99999),
        "name": f"{first} {last}",
        "email": f"{first}.{last}@example.{rng.choice(['org', 'com', 'net'])}".lower(),
        "city": rng.choice(CITIES),
        "active": rng.random() < 0.7,
        "score": round(rng.uniform(0, 100), 1),
    }


def _order(rng: random.Random) -> dict[str, object]:
    items = [
        {"product": rng.choice(PRODUCTS), "quantity": rng.randint(1, 9), "price": round(rng.uniform(2, 200), 2)}
        for _ in range(rng.randint(1, 3))
    ]
    return {
        "order": f"A{rng.randint(10000, 99999)}",
        "date": f"202{rng.randint(0, 6)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}",
        "items": items,
        "paid": rng.random() < 0.8,
    }


def records_text(rng: random.Random) -> str:
    """JSON, CSV or YAML-like records."""
    kind = rng.randrange(4)
    if kind == 0:
        return json.dumps([_person(rng) for _ in range(4)], indent=2)[: SAMPLE_CHARS + 100]
    if kind == 1:
        return "\n".join(json.dumps(_order(rng)) for _ in range(5))
    people = [_person(rng) for _ in range(12)]
    if kind == 2:
        return "\n".join([",".join(people[0]), *(",".join(map(str, p.values())) for p in people)])
    blocks = []
    for index in range(6):
        model = rng.choice(["sensor", "camera", "router", "meter"])
        blocks.append(
            f"- device: {model}-{rng.randint(100, 999)}\n  location: {rng.choice(CITIES)}\n  firmware: "
            f"{rng.randint(1, 4)}."
            f"{rng.randint(0, 9)}.{rng.randint(0, 20)}\n  battery: {rng.randint(5, 100)}%\n  readings: "
            f"[{', '.join(str(rng.randint(10, 40)) for _ in range(5))}]\n  owner: {people[index]['name']}"
        )
    return "\n".join(blocks)


def logs_text(rng: random.Random) -> str:
    """A stretch of one log file: web server, system or application."""
    kind = rng.randrange(3)
    hour, minute, second = rng.randrange(24), rng.randrange(60), rng.randrange(60)
    day, month = rng.randint(1, 28), rng.choice("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split())
    host = f"{rng.choice(['web', 'db', 'cache', 'edge', 'mail'])}{rng.randint(1, 20):02d}"
    lines = []
    for _ in range(rng.randint(9, 12)):
        second += rng.randint(0, 9)
        minute, second = minute + second // 60, second % 60
        hour, minute = (hour + minute // 60) % 24, minute % 60
        clock = f"{hour:02d}:{minute:02d}:{second:02d}"
        address = f"10.{rng.randint(0, 9)}.{rng.randint(0, 255)}.{rng.randint(1, 254)}"
        if kind == 0:
            verb = rng.choices(["GET", "POST", "PUT", "DELETE"], [8, 3, 1, 1])[0]
            page = rng.choice(
                [
                    "index.html",
                    "api/users",
                    "api/orders",
                    "login",
                    "static/app.js",
                    "health",
                    "search?q=" + rng.choice(THINGS),
                ]
            )
            status = rng.choices([200, 301, 304, 401, 404, 500], [12, 1, 2, 1, 2, 1])[0]
            lines.append(
                f'{address} - - [{day:02d}/{month}/2026:{clock} +0000] "{verb} /{page} HTTP/1.1" {status} '
                f"{rng.randint(90, 60000)}"
            )
        elif kind == 1:
            pid = rng.randint(300, 32000)
            message = rng.choice(
                [
                    f"sshd[{pid}]: Accepted publickey for {rng.choice(NAMES).lower()} from {address} port "
                    f"{rng.randint(1024, 65535)} ssh2",
                    f"sshd[{pid}]: Failed password for invalid user admin from {address} port "
                    f"{rng.randint(1024, 65535)} ssh2",
                    f"systemd[1]: Started Session {rng.randint(1, 999)} of user {rng.choice(NAMES).lower()}.",
                    f"kernel: [{rng.randint(1000, 99999)}.{rng.randint(100000, 999999)}] eth0: link up, 1000 Mbps, "
                    "full duplex",
                    f"CRON[{pid}]: (root) CMD (run-parts /etc/cron.hourly)",
                    f"dhclient[{pid}]: DHCPACK of {address} from 10.0.0.1",
                ]
            )
            lines.append(f"{month} {day:2d} {clock} {host} {message}")
        else:
            level = rng.choices(["INFO", "DEBUG", "WARN", "ERROR"], [6, 3, 2, 1])[0]
            message = {
                "INFO": f"request_id={rng.getrandbits(32):08x} user={rng.randint(1, 9999)} status=ok "
                f"duration_ms={rng.randint(1, 900)}",
                "DEBUG": f"cache {rng.choice(['hit', 'miss'])} key=user:{rng.randint(1, 9999)}:profile "
                f"ttl={rng.randint(10, 3600)}",
                "WARN": f"slow query took {rng.randint(1000, 9000)} ms on {host}, retrying in {rng.randint(1, 30)} s",
                "ERROR": f"connection to {address}:{rng.choice([5432, 6379, 9092])} refused after "
                f"{rng.randint(2, 5)} attempts",
            }[level]
            lines.append(
                f"2026-{rng.randint(1, 12):02d}-{day:02d}T{clock}.{rng.randint(0, 999):03d}Z {level:<5} [{host}] "
                f"{message}"
            )
    return "\n".join(lines)


TABLES = {
    "customers": ["name", "city", "email", "created_at"],
    "orders": ["customer_id", "total", "status", "ordered_at"],
    "products": ["title", "price", "stock", "category"],
    "employees": ["name", "department", "salary", "hired_on"],
    "invoices": ["order_id", "amount", "due_date", "paid"],
    "shipments": ["order_id", "carrier", "weight", "shipped_at"],
}
NUMERIC = {"total", "price", "stock", "salary", "amount", "weight"}


def queries_text(rng: random.Random) -> str:
    """A short SQL script."""
    statements = []
    for _ in range(rng.randint(4, 6)):
        table, other = rng.sample(list(TABLES), 2)
        columns = TABLES[table]
        number = next(c for c in [*columns, "id"] if c in NUMERIC or c == "id")
        kind = rng.randrange(6)
        if kind == 0:
            body = ",\n".join(
                f"    {c} {'NUMERIC(10, 2)' if c in NUMERIC else 'TEXT'}{rng.choice(['', ' NOT NULL'])}"
                for c in columns
            )
            statements.append(f"CREATE TABLE {table} (\n    id INTEGER PRIMARY KEY,\n{body}\n);")
        elif kind == 1:
            rows = ",\n".join(
                f"    ({rng.randint(1, 9999)}, '{rng.choice(NAMES)} {rng.choice(SURNAMES)}', "
                f"'{rng.choice(CITIES)}', {rng.randint(1, 900)})"
                for _ in range(rng.randint(1, 3))
            )
            statements.append(f"INSERT INTO {table} (id, {columns[0]}, {columns[1]}, {columns[2]}) VALUES\n{rows};")
        elif kind == 2:
            statements.append(
                f"SELECT {', '.join(rng.sample(columns, 2))}\nFROM {table}\nWHERE {number} {rng.choice('<>=')} "
                f"{rng.randint(1, 5000)}"
                f"\nORDER BY {rng.choice(columns)} {rng.choice(['ASC', 'DESC'])}\nLIMIT {rng.randint(1, 100)};"
            )
        elif kind == 3:
            a, b = table[0], other[0] + "2"
            statements.append(
                f"SELECT {a}.{columns[0]}, {rng.choice(['COUNT(*)', f'SUM({a}.{number})', f'AVG({a}.{number})'])} "
                f"AS result\nFROM {table} {a}"
                f"\n{rng.choice(['LEFT JOIN', 'INNER JOIN', 'JOIN'])} {other} {b} ON {b}.id = "
                f"{a}.{rng.choice(['id', 'parent_id'])}\n"
                f"GROUP BY {a}.{columns[0]}\nHAVING COUNT(*) > {rng.randint(1, 50)};"
            )
        elif kind == 4:
            statements.append(
                f"UPDATE {table}\nSET {columns[2]} = '{rng.choice(CITIES)}', {number} = {number} + "
                f"{rng.randint(1, 99)}\n"
                f"WHERE id IN ({', '.join(str(rng.randint(1, 9999)) for _ in range(4))});"
            )
        else:
            statements.append(f"DELETE FROM {table} WHERE {columns[0]} IS NULL OR {number} < {rng.randint(1, 99)};")
    return "\n\n".join(statements)


GENERATORS = {"math": math_text, "records": records_text, "logs": logs_text, "queries": queries_text}


def generated_samples(domain: str, split: str, count: int) -> list[str]:
    """The first ``count`` samples of a generator in the seed range of ``split``."""
    start = SEED_RANGES[split]
    return [GENERATORS[domain](random.Random(f"{domain}:{seed}")) for seed in range(start, start + count)]


# --------------------------------------------------------------------------------------- files


def make_corpus(counts: dict[str, int]) -> dict[str, list[dict[str, str]]]:
    """Samples per split, ``counts[split]`` of each domain, by default none; fewer where the library holds no more."""
    library = library_samples()
    corpus: dict[str, list[dict[str, str]]] = {}
    for split in SPLITS:
        corpus[split] = []
        for domain in DOMAINS:
            texts = (
                generated_samples(domain, split, counts.get(split, 0))
                if domain in GENERATORS
                else library[split, domain][: counts.get(split, 0)]
            )
            corpus[split] += [{"text": text, "domain": domain} for text in texts]
    return corpus


def write_corpus(folder: Path, counts: dict[str, int]) -> dict[str, Path]:
    """Write one ``.jsonl`` per split and ``corpus.json``; the files by split."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus = make_corpus(counts)
    paths = {}
    for split, samples in corpus.items():
        paths[split] = folder / f"{split}.jsonl"
        paths[split].write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
    summary = {
        "python": platform.python_version(),
        "seed_ranges": SEED_RANGES,
        "samples": {
            split: {d: sum(s["domain"] == d for s in samples) for d in DOMAINS} for split, samples in corpus.items()
        },
        "characters": {
            split: {d: sum(len(s["text"]) for s in samples if s["domain"] == d) for d in DOMAINS}
            for split, samples in corpus.items()
        },
    }
    (folder / "corpus.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=4000, help="samples per domain in train.jsonl (default 4000)")
    parser.add_argument("--tune", type=int, default=100, help="samples per domain in tune.jsonl (default 100)")
    parser.add_argument("--heldout", type=int, default=100, help="samples per domain in heldout.jsonl (default 100)")
    arguments = parser.parse_args()
    counts = {split: getattr(arguments, split) for split in SPLITS}
    for path in write_corpus(arguments.folder, counts).values():
        print(path)


if __name__ == "__main__":
    main()
