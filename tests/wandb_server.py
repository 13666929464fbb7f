"""A server that W&B's client talks to in tests: it keeps the history it is given, and can fall silent or answer 500.

It knows as much of the protocol as wandb 0.31 needs for runs without artifacts.
"""

import gzip
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789abcdef" * 2 + "01234567"


class Server(ThreadingHTTPServer):
    """What it was told, by run id: rows of history, and the last description of the run."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.views: list[dict[str, Any]] = []  # workspaces
        self.ends: dict[str, int] = {}  # exit codes
        self.silent = False
        self.status = 200

    @property
    def environment(self) -> dict[str, str]:
        """Of a process that uses it."""
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.server_port}", "WANDB_API_KEY": KEY}

    def history(self, run: str) -> list[dict[str, Any]]:
        return self.rows.get(run, [])

    def describe(self, run: str) -> dict[str, Any]:
        rows = self.history(run)
        given = self.runs[run]
        return {
            "id": run, "name": run, "displayName": given["displayName"], "config": given["config"], "tags": None,
            "description": None, "notes": None, "sweepName": None, "wandbConfig": json.dumps({"t": 1}),
            "historyLineCount": len(rows), "eventsLineCount": 0, "logLineCount": 0, "summaryMetrics": "{}",
            "historyTail": json.dumps([json.dumps(rows[-1])] if rows else []), "eventsTail": "[]",
            "project": {"id": "p", "name": given["project"], "entity": {"id": "e", "name": "tester"}},
        }  # fmt: skip

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "UpsertBucket" in query:
            before = self.runs.get(variables["name"], {})
            given = {k: v for k, v in variables.items() if v is not None}
            self.runs[variables["name"]] = {**before, **given}
            return {"upsertBucket": {"bucket": self.describe(variables["name"]), "inserted": not before}}
        if "RunResumeStatus" in query:
            known = variables["name"] in self.runs
            found = {"id": "p", "name": "p", "entity": {"id": "e", "name": "tester"}}
            return {"model": {**found, "bucket": self.describe(variables["name"])} if known else None}
        if "CreateRunFiles" in query:
            address = f"http://127.0.0.1:{self.server_port}/upload/"
            files = [{"name": name, "uploadUrl": address + name} for name in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if "upsertView" in query:
            self.views.append(variables)
            return {"upsertView": {"view": {"id": "v", "name": variables["name"]}, "inserted": True}}
        if "iewer" in query:
            viewer = {"id": "u", "entity": "tester", "username": "tester", "email": "", "flags": "{}"}
            return {"viewer": {**viewer, "teams": {"edges": []}}}
        return {}

    def stream(self, run: str, body: dict[str, Any]) -> dict[str, Any]:
        sent = body.get("files", {}).get("wandb-history.jsonl")
        if sent:
            rows, begin = self.rows.setdefault(run, []), sent["offset"]
            rows[begin : begin + len(sent["content"])] = map(json.loads, sent["content"])
        if body.get("complete"):
            self.ends[run] = body["exitcode"]
        return {}


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        while self.server.silent:
            time.sleep(0.05)
        answer: Any = {}
        if self.server.status == 200 and self.path == "/graphql":
            given = json.loads(body)
            answer = {"data": self.server.graphql(given["query"], given.get("variables") or {})}
        elif self.server.status == 200 and self.path.endswith("/file_stream"):
            plain = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
            answer = self.server.stream(self.path.split("/")[-2], json.loads(plain))
        text = json.dumps(answer).encode()
        with suppress(BrokenPipeError):  # a client that has waited long enough
            self.answer(text)

    def answer(self, text: bytes) -> None:
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_PUT = do_GET = do_POST

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serve() -> Iterator[Server]:
    """A server in threads of this process."""
    server = Server()
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.silent = False
        server.shutdown()
        server.server_close()
