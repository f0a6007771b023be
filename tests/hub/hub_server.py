"""A small Hub on loopback: enough protocol for the real client to push and pull.

The requests it serves; its state is in hub_state.py.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.hub.hub_state import Fault, Hub, Login, Refusal, Repo


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _asks_private(asked: dict[str, Any]) -> bool:
    """Older clients send ``private``, newer ones ``visibility``."""
    return asked.get("visibility") == "private" or bool(asked.get("private"))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _serve(self) -> None:
        split = urlsplit(self.path)
        self.query = parse_qs(split.query)
        path = unquote(split.path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.status = 0
        with self.hub.lock:
            try:
                fault = self._fault(f"{self.command} {path}")
                if fault is not None and not fault.after:
                    self._send(fault.status, fault.body.encode())
                elif fault is not None:
                    real_send, self._send = self._send, lambda *args, **kw: None
                    self._route(path)
                    self._send = real_send
                    self._send(fault.status, fault.body.encode())
                else:
                    self._route(path)
            except Refusal as refusal:
                headers = {"X-Error-Message": refusal.message.encode("ascii", "replace").decode()}
                if refusal.code:
                    headers["X-Error-Code"] = refusal.code
                self._json(refusal.body, refusal.status, headers)
            self.hub.requests.append((self.command, path, self.status))

    def _fault(self, line: str) -> Fault | None:
        for fault in self.hub.faults:
            if fault.times > 0 and re.search(fault.route, line):
                fault.times -= 1
                return fault
        return None

    def _route(self, path: str) -> None:
        routes: list[tuple[str, str, Callable[..., None]]] = [
            ("GET", r"/api/whoami-v2", self._whoami),
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", self._validate_yaml),
            ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self._info),
            ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self._tree),
            ("POST", r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
            ("POST", r"/api/models/([^/]+/[^/]+)/commit/(.+)", self._commit),
            ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._lfs_batch),
            ("PUT", r"/lfs/([0-9a-f]{64})(?:/(\d+))?", self._lfs_put),
            ("POST", r"/lfs/([0-9a-f]{64})", self._lfs_complete),
            ("POST", r"/lfs-verify", self._lfs_verify),
            ("GET|HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
        ]
        for methods, pattern, handler in routes:
            if self.command in methods.split("|") and (found := re.fullmatch(pattern, path)):
                return handler(*found.groups())
        raise Refusal(404, "no such route")

    # Who may do what ----------------------------------------------------------------------

    def _login(self) -> Login | None:
        _, _, token = (self.headers.get("Authorization") or "").partition(" ")
        if not token:
            return None
        if token not in self.hub.logins:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.logins[token]

    def _writer(self, owner: str) -> None:
        login = self._login()
        if login is None:
            raise Refusal(401, "Invalid username or password.")
        if login.role != "write" or owner not in (login.name, *login.orgs):
            raise Refusal(403, "Forbidden: you don't have the rights to write here")

    def _repo(self, repo_id: str, *, write: bool = False) -> Repo:
        login, repo = self._login(), self.hub.repos.get(repo_id)
        owner = repo_id.split("/")[0]
        hidden = repo is None or (
            repo.private and (login is None or owner not in (login.name, *login.orgs))
        )
        if hidden or repo is None:
            raise Refusal(404 if login else 401, "Repository not found", "RepoNotFound")
        if write:
            self._writer(owner)
        return repo

    # API ----------------------------------------------------------------------------------

    def _whoami(self) -> None:
        login = self._login()
        if login is None:
            raise Refusal(401, "Invalid username or password.")
        self._json(
            {
                "type": "user",
                "name": login.name,
                "orgs": [{"name": org} for org in login.orgs],
                "auth": {"type": "access_token", "accessToken": {"role": login.role}},
            }
        )

    def _create(self) -> None:
        asked = json.loads(self.body)
        login = self._login()
        owner = asked.get("organization") or (login.name if login else "")
        self._writer(owner)
        repo_id = f"{owner}/{asked['name']}"
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repos:
            raise Refusal(409, "You already created this model repo", url=url)
        self.hub.add_repo(repo_id, {}, private=_asks_private(asked))
        self._json({"url": url, "id": repo_id})

    def _validate_yaml(self) -> None:
        text = json.loads(self.body)["content"]
        found = re.match(r"---\r?\n(.*?)\r?\n---", text, re.S)
        errors, warnings = [], []
        if found is None:
            warnings.append({"message": "empty or missing yaml metadata in repo card"})
        else:
            data = yaml.safe_load(found.group(1)) or {}
            names = data.get("base_model") or []
            for name in [names] if isinstance(names, str) else names:
                if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
                    errors.append({"message": '"base_model" with value is not valid'})
        self._json({"errors": errors, "warnings": warnings}, 400 if errors else 200)

    def _info(self, repo_id: str, revision: str | None) -> None:
        repo = self._repo(repo_id)
        files = repo.at(revision or "main")
        if files is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        sha = next(sha for sha, there in repo.commits[::-1] if there is files)
        siblings = [self._entry(repo, name, data, "rfilename") for name, data in files.items()]
        self._json(
            {
                "id": repo_id,
                "modelId": repo_id,
                "sha": sha,
                "private": repo.private,
                "tags": [],
                "siblings": siblings,
            }
        )

    def _tree(self, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id)
        files = repo.at(revision)
        if files is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        self._json([self._entry(repo, name, data, "path") for name, data in files.items()])

    def _entry(self, repo: Repo, name: str, data: bytes, key: str) -> dict[str, Any]:
        oid = _git_oid(data)
        entry = {"type": "file", key: name, "size": len(data), "oid": oid, "blobId": oid}
        if name in repo.large:
            sha = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": sha, "sha256": sha, "size": len(data), "pointerSize": 130}
        return entry

    def _preupload(self, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id, write=True)
        files = repo.at(revision)
        if files is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        answer = []
        for asked in json.loads(self.body)["files"]:
            there = files.get(asked["path"])
            mode = "lfs" if asked["path"].endswith(".safetensors") else "regular"
            digest = (lambda data: hashlib.sha256(data).hexdigest()) if mode == "lfs" else _git_oid
            answer.append(
                {
                    "path": asked["path"],
                    "uploadMode": mode,
                    "shouldIgnore": False,
                    "oid": None if there is None else digest(there),
                }
            )
        self._json({"files": answer})

    def _commit(self, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id, write=True)
        files = dict(repo.files)
        summary = ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                summary = value["summary"]
                repo.parents.append(value.get("parentCommit"))
                if value.get("parentCommit") not in (None, repo.sha):
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Refusal(400, "lfs object was not uploaded")
                files[value["path"]] = self.hub.blobs[value["oid"]]
                repo.large.add(value["path"])
        sha = repo.commit(files, summary)
        url = f"{self.hub.url}/{repo_id}/commit/{sha}"
        self._json({"success": True, "commitOid": sha, "commitUrl": url, "pullRequestUrl": None})

    # Large files --------------------------------------------------------------------------

    def _lfs_batch(self, repo_id: str) -> None:
        self._repo(repo_id, write=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            entry: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.blobs:
                url = f"{self.hub.url}/lfs/{oid}"
                upload: dict[str, Any] = {"href": url}
                if self.hub.part_bytes:
                    count = -(-size // self.hub.part_bytes)
                    urls = {f"{number:05}": f"{url}/{number}" for number in range(1, count + 1)}
                    upload["header"] = {"chunk_size": str(self.hub.part_bytes), **urls}
                verify = {"href": f"{self.hub.url}/lfs-verify"}
                entry["actions"] = {"upload": upload, "verify": verify}
            objects.append(entry)
        transfer = "multipart" if self.hub.part_bytes else "basic"
        self._json({"transfer": transfer, "objects": objects})

    def _lfs_put(self, oid: str, part: str | None) -> None:
        if part is None:
            self._keep(oid, self.body)
        else:
            self.hub.parts.setdefault(oid, {})[int(part)] = self.body
        self._send(200, b"", {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def _lfs_complete(self, oid: str) -> None:
        parts = self.hub.parts.pop(oid)
        order = [part["partNumber"] for part in json.loads(self.body)["parts"]]
        self._keep(oid, b"".join(parts[number] for number in order))
        self._json({})

    def _keep(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refusal(400, "content does not match its oid")
        self.hub.blobs[oid] = data

    def _lfs_verify(self) -> None:
        asked = json.loads(self.body)
        if len(self.hub.blobs.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, "object not found")
        self._json({})

    # Files --------------------------------------------------------------------------------

    def _resolve(self, repo_id: str, revision: str, name: str) -> None:
        repo = self._repo(repo_id)
        files = repo.at(revision)
        if files is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if name not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        data = files[name]
        etag = hashlib.sha256(data).hexdigest() if name in repo.large else _git_oid(data)
        sha = next(sha for sha, there in repo.commits[::-1] if there is files)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if name in repo.large:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return self._send(200, data, headers)
        start, stop = int(wanted.group(1)), int(wanted.group(2) or len(data) - 1)
        piece = data[start : stop + 1]
        headers["Content-Range"] = f"bytes {start}-{start + len(piece) - 1}/{len(data)}"
        return self._send(206, piece, headers)

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        kind = {"Content-Type": "application/json"}
        self._send(status, json.dumps(value).encode(), {**kind, **(headers or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.status = status
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub on a free loopback port. alice's tokens: hf_alice (writes), hf_read (only reads)."""
    hub = Hub()
    hub.logins = {
        "hf_alice": Login("alice", "write", ("team",)),
        "hf_read": Login("alice", "read", ("team",)),
        "hf_bob": Login("bob", "write"),
    }
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
