"""What reads input from outside: one function a kind, called with a hostile variant of sound input.

A target writes the input where moetool expects it and calls what reads it, in this process: thousands
of inputs a minute. It must return, or raise one of moetool's own errors; everything else is a defect.
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetool.errors import MoetoolError

MEGABYTES, SECONDS = 1500, 20  # beyond what the process has; a sound reader of these inputs takes a tenth


@dataclass(frozen=True)
class Target:
    """A kind of input.

    Attributes:
        seeds: sound inputs.
        read: called with an input.
        as_json: whether variants follow the structure of JSON.
        child: whether a native library reads it, so that a crash would end the process.
    """

    seeds: tuple[bytes, ...]
    read: Callable[[bytes], object]
    as_json: bool = True
    child: bool = False


@contextlib.contextmanager
def bounded(megabytes: int = MEGABYTES, seconds: int = SECONDS) -> Iterator[None]:
    """Raise MemoryError or TimeoutError where that much more is taken; 0 seconds: for as long as it takes."""

    def stop(signum: int, frame: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop) if seconds else None
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + megabytes * 2**20, hard))
    if seconds:
        signal.alarm(seconds)
    try:
        yield
    finally:
        if seconds:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def attempt(target: Target, data: bytes) -> bool:
    """Whether an input was taken; False: refused in one line. Anything else is raised."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            target.read(data)
    except MoetoolError:
        return False
    return True


def targets(llama: Path, mixtral: Path, scratch: Path) -> dict[str, Target]:
    """All kinds of input.

    Args:
        llama: a tiny dense checkpoint with a tokenizer.
        mixtral: a tiny Mixture of Experts.
        scratch: an empty folder, on a fast disk.
    """
    from tests.tiny import TEXT, in_process

    upcycled, tokens = scratch / "upcycled", scratch / "tokens"
    (scratch / "text.jsonl").write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXT * 3))
    for arguments in (
        ["upcycle", llama, upcycled, "--num-experts", 4, "--quiet"],
        ["tokenize", scratch / "text.jsonl", "--out", tokens, "--tokenizer", llama, "--quiet"],
    ):
        code, _, err = in_process(*arguments)
        assert code == 0, err

    def copies(folder: Path, name: str) -> Callable[[str], Path]:
        """A copy of a folder, of which one file is written anew each time."""
        where = scratch / name
        where.mkdir()
        for path in folder.iterdir():
            if path.is_file():
                shutil.copy(path, where)

        def fresh(file: str) -> Path:
            (where / file).unlink(missing_ok=True)
            return where / file

        return fresh

    return {
        "config": _config(copies(llama, "dense"), copies(mixtral, "moe"), llama, mixtral),
        "header": _header(scratch / "x.safetensors"),
        "index": _index(copies(llama, "indexed"), llama),
        "lineage": _lineage(copies(upcycled, "descended"), upcycled),
        "options": _options(scratch / "options.yaml", llama, scratch / "out"),
        "counts": _counts(scratch / "counts.json"),
        "jsonl": _text(scratch / "lines.jsonl", (scratch / "text.jsonl").read_bytes()),
        "json list": _text(scratch / "list.json", b'["first", {"text": "second \\u00e9", "n": 1}, null]'),
        "csv": _text(scratch / "rows.csv", 'n,text\n1,first é\n2,"second, ""quoted""\nline"\n'.encode()),
        "zstd": _text(scratch / "lines.jsonl.zst", _zstd((scratch / "text.jsonl").read_bytes()), child=True),
        "plain": _text(scratch / "plain.txt", "first é\n\nsecond\r\nthird\n".encode()),
        "gzip": _text(scratch / "lines.jsonl.gz", _gzipped((scratch / "text.jsonl").read_bytes()), child=True),
        "parquet": _text(scratch / "x.parquet", _table("parquet"), child=True),
        "arrow": _text(scratch / "x.arrow", _table("arrow"), child=True),
        "manifest": _tokens(copies(tokens, "manifest"), "manifest.json", tokens),
        "offsets": _tokens(copies(tokens, "offsets"), "offsets.bin", tokens),
        "tokens": _tokens(copies(tokens, "stream"), "tokens.bin", tokens),
        "metrics": _metrics(scratch / "metrics.jsonl"),
        "summary": _summary(copies(llama, "finished")),
        "state": _state(scratch / "run", llama),
        "kept score": _kept(scratch / "eval"),
        "tokenizer": _tokenizer(copies(llama, "tokenizer"), llama, "tokenizer.json"),
        "tokenizer config": _tokenizer(copies(llama, "tokenizer config"), llama, "tokenizer_config.json"),
    }


def _config(dense: Callable[[str], Path], moe: Callable[[str], Path], llama: Path, mixtral: Path) -> Target:
    from moetool.checkpoint.model import check_config
    from moetool.checkpoint.reader import CheckpointReader
    from moetool.commands.inspect import describe, render
    from moetool.recipe import UpcycleRecipe
    from moetool.upcycle.plan import plan_upcycling

    def read(data: bytes) -> None:
        for fresh in (moe, dense):
            path = fresh("config.json")
            path.write_bytes(data)
            with CheckpointReader(path.parent) as reader:
                document = describe(reader) | {"lineage": []}
                render(document)
                _shown(document)
                check_config(path.parent)
                if fresh is dense:
                    plan = plan_upcycling([reader], UpcycleRecipe("auto"), 10**9).plan
                    json.dumps(plan.config, allow_nan=False)
                    assert plan.num_bytes < 10**8

    return Target(((llama / "config.json").read_bytes(), (mixtral / "config.json").read_bytes()), read)


def _header(path: Path) -> Target:
    from moetool.checkpoint.header import read_header

    def seed(*shapes: list[int]) -> bytes:
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for number, shape in enumerate(shapes):
            size = 4
            for n in shape:
                size *= n
            entries[f"t{number}"] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
            at += size
        return json.dumps(entries).encode()

    def read(data: bytes) -> None:
        # The input is the JSON alone, or the whole file where it begins with a length that fits.
        whole = len(data).to_bytes(8, "little") + data + bytes(64) if data[:1] == b"{" else data
        path.write_bytes(whole)
        tensors, start = read_header(path)
        assert all(start <= t.start <= t.start + t.size <= len(whole) for t in tensors.values())

    whole = len(seed([2])).to_bytes(8, "little") + seed([2]) + bytes(8)
    return Target((seed([2, 3], [4], [], [0, 5], [5]), seed([16]), whole), read)


def _index(fresh: Callable[[str], Path], llama: Path) -> Target:
    from moetool.checkpoint.reader import CheckpointReader

    with CheckpointReader(llama) as reader:
        weight_map = dict.fromkeys(reader.tensors, "model.safetensors")

    def read(data: bytes) -> None:
        path = fresh("model.safetensors.index.json")
        path.write_bytes(data)
        with CheckpointReader(path.parent) as opened:
            assert all((path.parent / shard).resolve().parent == path.parent.resolve() for shard in opened.shards)

    seed = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()
    return Target((seed, b'{"weight_map": {"lm_head.weight": "model.safetensors"}}'), read)


def _lineage(fresh: Callable[[str], Path], upcycled: Path) -> Target:
    from moetool.commands.inspect import lineage_line
    from moetool.evaluate.score_plots import training_tokens
    from moetool.lineage import extend_lineage, read_lineage
    from moetool.routing.origin import find_dense, read_origin

    def read(data: bytes) -> None:
        path = fresh("moetool.json")
        path.write_bytes(data)
        entries = (read_lineage(path.parent) or {}).get("lineage", [])
        _shown({"lineage": entries, "lines": [lineage_line(entry) for entry in entries]})
        training_tokens(path.parent)
        extend_lineage(path.parent, {"command": "cpt"})
        origin = read_origin(path.parent)
        if origin:
            find_dense(origin)

    seed = (upcycled / "moetool.json").read_bytes()
    more = json.loads(seed)
    more["lineage"].append({"command": "cpt", "steps": 2, "tokens": 64, "seed": 0})
    return Target((seed, dumped(more)), read)


def _options(path: Path, llama: Path, out: Path) -> Target:
    def read(data: bytes) -> None:
        from moetool.cli import run

        path.write_bytes(data)
        code = run(["upcycle", str(llama), str(out), "--plan", "--config", str(path)])
        assert code in (0, 1, 2), f"exit {code}"

    lines = b"""# moetool upcycle
num-experts: 4
top_k: 2
method: drop
drop-ratio: 0.5
moe-layers: "al\\u006c"
max-shard-size: 5GB
workers: 2
seed: 0
overwrite: false
"""
    return Target((lines, b"a: &a [1, 2]\nb: *a\n? c\n: !!python/name:os.system\n"), read, as_json=False)


def _counts(path: Path) -> Target:
    from moetool.routing.counts_file import read_counts
    from moetool.routing.html import render
    from moetool.routing.report import build_report

    def read(data: bytes) -> None:
        path.write_bytes(data)
        report = build_report("x", read_counts(path, 2))
        _shown(report)
        render(report)

    one = {"en": {"0": [4, 4, 4, 4], "1": [8, 8, 0, 0]}, "code": {"0": [2, 2, 2, 2], "1": [4, 4, 0, 0]}}
    return Target((dumped(one), b'{"a": {"0": [1, 1]}}'), read)


def _text(path: Path, seed: bytes, child: bool = False) -> Target:
    from moetool.data.text import TextSource, read_documents

    def read(data: bytes) -> None:
        path.write_bytes(data)
        for rule in ("file", "line", "paragraph") if path.suffix == ".txt" else ("file",):
            for text in read_documents(TextSource(str(path), "text", rule)):
                text.encode()

    return Target((seed,), read, as_json=path.suffix in (".jsonl", ".json"), child=child)


def _gzipped(data: bytes) -> bytes:
    import gzip

    return gzip.compress(data, mtime=0)


def _zstd(data: bytes) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(data)
    return bytes(sink.getvalue())


def _table(kind: str) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"text": [f"document {i} é" for i in range(50)], "n": list(range(50))})
    sink = pa.BufferOutputStream()
    if kind == "parquet":
        pq.write_table(table, sink)
    else:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return bytes(sink.getvalue())


def _tokens(fresh: Callable[[str], Path], file: str, tokens: Path) -> Target:
    from moetool.data.tokens import open_tokens, split_validation

    def read(data: bytes) -> None:
        path = fresh(file)
        path.write_bytes(data)
        stream = open_tokens(path.parent)
        split = split_validation(stream, "0.3", 0) if stream.num_documents > 1 else (stream,)
        for part in split:
            found = part.read(0, min(part.num_tokens, 10**4))
            assert found.max() < stream.manifest["vocab_size"]
            part.positions(0, min(part.num_tokens, 10**4))

    return Target(((tokens / file).read_bytes(),), read, as_json=file.endswith(".json"))


def _metrics(path: Path) -> Target:
    from moetool.train.metrics_log import MetricsLog, summarize

    def read(data: bytes) -> None:
        path.write_bytes(data)
        log = MetricsLog(path, 2)
        _shown(summarize(log, 64, ["a"]))

    rows = [
        {"step": 0, "val": {"a": 1.0, "b": 2.0}, "routing": {"a": {"mri": [0.5]}}},
        {
            "step": 1,
            "loss": 3.5,
            "lr": 0.1,
            "grad_norm": 1.0,
            "num_tokens": 64,
            "tokens_per_second": 100.0,
            "balance": {},
        },
        {"step": 2, "loss": 3.1, "lr": 0.1, "tokens_per_second": 10.0, "val": {"a": 0.5, "b": 2.5}, "routing": {}},
    ]
    return Target((b"".join(dumped(row) + b"\n" for row in rows), *(dumped(row) for row in rows)), read)


def _summary(fresh: Callable[[str], Path]) -> Target:
    from moetool.commands.cpt import _result_text
    from moetool.train.differences import differences
    from moetool.train.state import find

    def read(data: bytes) -> None:
        path = fresh("summary.json")
        path.write_bytes(data)
        found = find(path.parent)
        assert found.identity is not None
        differences(found.identity, {"train": {"a": ""}, "model": ""})
        document = {"out": "x", "already_finished": True, **(found.summary or {})}
        _shown(document)
        _result_text(document)

    seed = {
        "steps": 2,
        "tokens": 64,
        "loss": 3.0,
        "val": {"a": {"before": 1.0, "after": 0.5}},
        "adaptation": {"a": -0.5},
        "forgetting": {},
        "mri": {"a": {"before": [0.5], "after": [0.6]}},
        "seconds": 1.0,
        "tokens_per_second": 10.0,
        "ledger": {"a": {"sequences": 2, "tokens": 64, "epochs": 0.5}},
        "identity": {"train": {"a": "00"}, "model": "0", "lr": 0.1},
    }
    return Target((dumped(seed),), read)


def _state(run: Path, llama: Path) -> Target:
    from moetool.train.differences import differences
    from moetool.train.state import find

    step = run / "checkpoints" / "step-000002"
    (step / "training_state").mkdir(parents=True)
    shutil.copy(llama / "config.json", step)
    seed = {"format": 1, "step": 2, "master": False, "identity": {"train": {"a": "00"}}, "torch": "2", "files": {}}
    seed["files"] = {"config.json": "0" * 32}

    def read(data: bytes) -> None:
        (step / "training_state" / "state.json").write_bytes(data)
        found = find(run)
        differences(found.identity or {}, {"train": {"a": ""}})

    return Target((dumped(seed), dumped(seed | {"files": {}})), read)


def _kept(out: Path) -> Target:
    from moetool.evaluate import cache
    from moetool.evaluate.evaluation import Evaluation
    from moetool.evaluate.results import build_document
    from moetool.evaluate.tasks import Tasks

    class Task:
        @staticmethod
        def aggregation() -> dict[str, Any]:
            from lm_eval.api.metrics import bits_per_byte

            return {"bits_per_byte": bits_per_byte}

    place = out / cache.FOLDER
    place.mkdir(parents=True)

    def read(data: bytes) -> None:
        (place / "k.json").write_bytes(data)
        entry = cache.read(out, "k", "a")
        if entry is not None:
            assert "/" not in entry["date"]
            build_document({"m": out}, Tasks(tasks={"a": Task()}), Evaluation(entries={"m": {"a": entry}}))

    results = {
        "results": {
            "a": {
                "name": "a",
                "alias": "a",
                "sample_len": 2,
                "bits_per_byte,none": 6.5,
                "bits_per_byte_stderr,none": "N/A",
            }
        },
        "group_subtasks": {},
        "configs": {"a": {"task": "a"}},
        "versions": {"a": 1.0},
        "n-shot": {"a": 0},
        "higher_is_better": {"a": {"bits_per_byte": False}},
        "n-samples": {"a": {"original": 2, "effective": 2}},
    }
    samples = [
        {"doc_id": i, "filter": "none", "metrics": ["bits_per_byte"], "bits_per_byte": [-200.0, 47]} for i in range(2)
    ]
    entry = {
        "results": results,
        "samples": samples,
        "routing": None,
        "model_info": {},
        "tokenizer_info": {},
        "date": "2026-11-22T19-23-37.0",
    }
    return Target((dumped(entry),), read)


def _tokenizer(fresh: Callable[[str], Path], llama: Path, file: str) -> Target:
    from moetool.checkpoint.model import load_tokenizer, tokenizer_sha256
    from moetool.data.make_tokens import write_tokens

    def read(data: bytes) -> None:
        path = fresh(file)
        path.write_bytes(data)
        tokenizer = load_tokenizer(path.parent)
        tokenizer_sha256(path.parent)
        shutil.rmtree(path.parent.parent / "made", ignore_errors=True)
        write_tokens(["some text", "é <|endoftext|>"], tokenizer, path.parent.parent / "made")

    return Target(((llama / file).read_bytes(),), read, child=True)


def dumped(document: Any) -> bytes:
    """A document as moetool writes it."""
    return json.dumps(document).encode()


def _shown(document: dict[str, Any]) -> None:
    """What `--json` does with a document, and that nothing in it acts on a terminal."""
    from moetool.outside import finite, printable_json

    text = printable_json(json.dumps(finite(document), indent=2, ensure_ascii=False, default=str))
    assert "\x1b" not in text
    assert "\u202e" not in text
    text.encode()
