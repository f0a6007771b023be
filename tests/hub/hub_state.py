"""What the test Hub knows: tokens, repositories, large files, injected faults, past requests."""

from __future__ import annotations

import hashlib
import re
import threading
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Login:
    """Who a token belongs to. role: "write" or "read"."""

    name: str
    role: str
    orgs: tuple[str, ...] = ()


@dataclass
class Fault:
    """Answer ``status`` to the next ``times`` requests whose "METHOD path" matches ``route``."""

    route: str
    status: int
    times: int = 1_000_000
    body: str = '{"error": "injected"}'
    after: bool = False  # do the work first, then lose the answer


@dataclass
class Repo:
    """A repository: commits in order, each a complete mapping of path to content."""

    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    large: set[str] = field(default_factory=set)
    messages: list[str] = field(default_factory=list)
    parents: list[str | None] = field(default_factory=list)  # as the client stated them

    @property
    def sha(self) -> str:
        return self.commits[-1][0]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][1]

    def at(self, revision: str) -> dict[str, bytes] | None:
        if revision == "main":
            return self.files
        return next((files for sha, files in self.commits if sha == revision), None)

    def commit(self, files: dict[str, bytes], message: str = "by hand") -> str:
        seed = f"{len(self.commits)}{sorted(files)}{message}{id(self)}"
        sha = hashlib.sha1(seed.encode()).hexdigest()
        self.commits.append((sha, files))
        self.messages.append(message)
        return sha


@dataclass
class Hub:
    """The server's state, for a test to set up and look at."""

    logins: dict[str, Login] = field(default_factory=dict)
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str, int]] = field(default_factory=list)
    part_bytes: int | None = None
    url: str = ""
    lock: threading.RLock = field(default_factory=threading.RLock)

    def add_repo(self, repo_id: str, files: dict[str, bytes], *, private: bool = False) -> Repo:
        repo = self.repos[repo_id] = Repo(private)
        repo.commit({".gitattributes": b"", **files})
        return repo

    def asked(self, pattern: str) -> list[tuple[str, str, int]]:
        """The requests whose "METHOD path" matches."""
        return [entry for entry in self.requests if re.search(pattern, f"{entry[0]} {entry[1]}")]


class Refusal(Exception):
    """An HTTP error as the Hub words it."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.body = {"error": message, **body}
