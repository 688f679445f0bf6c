"""A Hub on loopback for tests: the routes huggingface_hub calls to push and to load, and ways to make them fail.

    with HubServer() as hub:
        environment = hub.environment()  # for a process whose client is to talk to it

Everything is kept in memory. Large files go the LFS way (batch, upload, verify) and are downloaded by a redirect to
another address, as from a content network; Xet, a protocol of its own, is switched off by the client's own setting.
"""

import base64
import gzip
import hashlib
import itertools
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE = re.compile(r"\.(safetensors|bin|onnx|png)$")
BRANCH = "main"


@dataclass
class Repo:
    private: bool
    refs: dict[str, str] = field(default_factory=dict)  # name -> commit
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> path -> content
    messages: dict[str, tuple[str, str]] = field(default_factory=dict)  # commit -> summary, description

    def commit(self, ref, files, message, description):
        serial = f"{len(self.commits)}{message}{sorted(files)}".encode()
        oid = hashlib.sha1(serial, usedforsecurity=False).hexdigest()
        self.commits[oid], self.messages[oid] = files, (message, description)
        self.refs[ref] = oid
        return oid

    def files(self, ref=BRANCH):
        return self.commits[self.refs.get(ref, ref)]


@dataclass
class Fault:
    method: str
    pattern: str
    status: int | None  # None cuts the connection in the middle of the request's body
    times: int


class Refused(Exception):
    def __init__(self, status, code="", message="", **body):
        super().__init__(message)
        self.status, self.code, self.message, self.body = status, code, message, body


class HubServer:
    """The server, its repositories by name, and its users by token."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}  # sha256 -> content of a large file
        self.users = {"hf_writertokenwritertoken": "user", "hf_readertokenreadertoken": "reader"}
        self.readers = {"reader"}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.token = "hf_writertokenwritertoken"
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self._http.server_port}"

    @property
    def content_endpoint(self):
        """Where large files are: another host, to which the client must not send its token."""
        return f"http://localhost:{self._http.server_port}"

    def environment(self, token=None):
        """What a process needs for its client to talk to this server."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_TOKEN": token or self.token,
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def fail(self, method, pattern, status, times=1):
        """Answer the next requests of that method and pattern of path with a status; None cuts them off."""
        self.faults.append(Fault(method, pattern, status, times))

    def fault(self, method, path):
        for fault in self.faults:
            if fault.times and fault.method == method and re.search(fault.pattern, path):
                fault.times -= 1
                return fault
        return None


# method and path -> name of what answers; a repository's name may hold one slash
_REPO = r"(?P<repo>[\w.-]+/[\w.-]+|[\w.-]+)"
_ROUTES = [
    ("POST", r"/api/repos/create", "create_repo"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<ref>[^/]+)", "preupload"),
    ("POST", rf"/api/models/{_REPO}/commit/(?P<ref>[^/]+)", "commit"),
    ("POST", rf"/api/models/{_REPO}/branch/(?P<ref>[^/]+)", "create_branch"),
    ("GET", rf"/api/models/{_REPO}/tree/(?P<ref>[^/]+)(?:/(?P<path>.+))?", "tree"),
    ("GET", rf"/api/models/{_REPO}(?:/revision/(?P<ref>[^/]+))?", "info"),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/lfs/(?P<oid>\w+)", "upload"),
    ("POST", r"/lfs/(?P<oid>\w+)/verify", "verify"),
    ("HEAD|GET", rf"/{_REPO}/resolve/(?P<ref>[^/]+)/(?P<path>.+)", "resolve"),
    ("HEAD|GET", r"/cdn/(?P<oid>\w+)", "download"),
]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def _answer(self):
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.hub.requests.append((self.command, self.path))
        fault = self.hub.fault(self.command, url.path)
        if fault is not None and fault.status is None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            if fault is not None:
                raise Refused(fault.status, message=f"made to answer {fault.status}")
            self._route(url.path)
        except Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            body = {"error": refused.message, **refused.body}
            self._send(refused.status, json.dumps(body).encode(), {k: v for k, v in headers.items() if v})

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _route(self, path):
        for method, pattern, name in _ROUTES:
            found = re.fullmatch(pattern, path) if re.fullmatch(method, self.command) else None
            if found:
                parts = {key: unquote(value) for key, value in found.groupdict().items() if value is not None}
                getattr(self, f"_{name}")(**parts)
                return
        raise Refused(404, message=f"no such route: {self.command} {path}")

    def _send(self, status, content=b"", headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, str(value))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value, status=200):
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _user(self):
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if scheme and token not in self.hub.users:
            raise Refused(401, message="Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    def _writer(self, owner):
        user = self._user()
        if user is None:
            raise Refused(401, message="Invalid username or password.")
        if user in self.hub.readers or owner != user:
            raise Refused(403, message=f"You don't have the rights to write to {owner}.")
        return user

    def _found(self, repo, ref=BRANCH, writes=False):
        user = self._user()
        kept = self.hub.repos.get(repo)
        if kept is None or (kept.private and user != repo.partition("/")[0]):
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if ref not in kept.refs and ref not in kept.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {ref}")
        if writes and self.query.get("create_pr") != "1":
            self._writer(repo.partition("/")[0])
        return kept

    def _whoami(self):
        user = self._user()
        if user is None:
            raise Refused(401, message="Invalid username or password.")
        self._json({"type": "user", "name": user, "orgs": []})

    def _create_repo(self):
        asked = json.loads(self.body)
        owner = asked.get("organization") or self._user() or ""
        name = f"{owner}/{asked['name']}"
        self._writer(owner)
        answer = {"url": f"{self.hub.endpoint}/{name}", "name": name}
        if name in self.hub.repos:
            raise Refused(409, message="You already created this model repo", **answer)
        repo = self.hub.repos[name] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
        repo.commit(BRANCH, {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit", "")
        self._json(answer)

    def _validate_yaml(self):
        found = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        errors, warnings = [], [] if found else [{"message": "empty or missing yaml metadata in repo card"}]
        try:
            metadata = yaml.safe_load(found.group(1)) if found else {}
            if metadata.get("base_model_relation") not in (None, "finetune", "adapter", "merge", "quantized"):
                errors.append(
                    {"message": '"base_model_relation" must be one of [finetune, adapter, merge, quantized]'}
                )
            if not isinstance(metadata.get("tags", []), list):
                errors.append({"message": '"tags" must be an array'})
        except yaml.YAMLError as error:
            errors.append({"message": f"YAML is invalid: {error}"})
        self._json({"errors": errors, "warnings": warnings}, 400 if errors else 200)

    def _info(self, repo, ref=BRANCH):
        kept = self._found(repo, ref)
        sha = kept.refs.get(ref, ref)
        siblings = [{"rfilename": path} for path in sorted(kept.files(ref))]
        self._json({"id": repo, "modelId": repo, "sha": sha, "private": kept.private, "siblings": siblings})

    def _tree(self, repo, ref, path=""):
        files = self._found(repo, ref).files(ref)
        inside = sorted(name for name in files if not path or name.startswith(f"{path}/"))
        if not inside:
            raise Refused(404, "EntryNotFound", f"{path} does not exist on {ref}")
        if self.query.get("recursive", "").lower() not in ("1", "true"):
            inside = [name for name in inside if "/" not in name.removeprefix(f"{path}/")]
        self._json([_entry(name, files[name]) for name in inside])

    def _preupload(self, repo, ref):
        files = self._found(repo, ref, writes=True).files(ref)
        answers = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if LARGE.search(file["path"]) else "regular"
            there = files.get(file["path"])
            oid = None if there is None else _sha256(there) if mode == "lfs" else _git_oid(there)
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answers})

    def _batch(self, repo):
        self._found(repo, writes=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            href = f"{self.hub.endpoint}/lfs/{wanted['oid']}"
            actions = {"upload": {"href": href, "header": {}}, "verify": {"href": f"{href}/verify", "header": {}}}
            objects.append(wanted if wanted["oid"] in self.hub.stored else {**wanted, "actions": actions})
        self._json({"transfer": "basic", "objects": objects})

    def _upload(self, oid):
        if _sha256(self.body) != oid:
            raise Refused(400, message="the content is not that of the object id")
        self.hub.stored[oid] = self.body
        self._send(200)

    def _verify(self, oid):
        if len(self.hub.stored.get(oid, b"")) != json.loads(self.body)["size"]:
            raise Refused(404, message="the object was not uploaded")
        self._json({})

    def _create_branch(self, repo, ref):
        kept = self._found(repo, writes=True)
        if ref in kept.refs:
            raise Refused(409, message=f"Reference already exists: {ref}")
        kept.refs[ref] = kept.refs[BRANCH]
        self._json({})

    def _commit(self, repo, ref):
        kept = self._found(repo, ref, writes=True)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        files = dict(kept.files(ref))
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.stored:
                    raise Refused(400, message=f"the content of {value['path']} was not uploaded")
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
        is_pull = self.query.get("create_pr") == "1"
        numbers = (f"refs/pr/{number}" for number in itertools.count(1))
        target = next(name for name in numbers if name not in kept.refs) if is_pull else ref
        oid = kept.commit(target, files, header["summary"], header.get("description", ""))
        answer = {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{oid}", "commitOid": oid}
        if is_pull:
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo}/discussions/{target.rpartition('/')[2]}"
        self._json(answer)

    def _resolve(self, repo, ref, path):
        kept = self._found(repo, ref)
        commit = {"X-Repo-Commit": kept.refs.get(ref, ref)}
        if path not in kept.files(ref):
            self._send(404, b"Entry not found", {**commit, "X-Error-Code": "EntryNotFound"})
            return
        content = kept.files(ref)[path]
        if LARGE.search(path):
            oid = _sha256(content)
            linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": len(content)}
            self._send(302, b"", {**commit, **linked, "Location": f"{self.hub.content_endpoint}/cdn/{oid}"})
            return
        self._content(content, {**commit, "ETag": f'"{_git_oid(content)}"'})

    def _download(self, oid):
        if "Authorization" in self.headers:
            raise Refused(400, message="a token was sent to the content network")
        self._content(self.hub.stored[oid], {"ETag": f'"{oid}"'})

    def _content(self, content, headers):
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers = {**headers, "Accept-Ranges": "bytes"}
        if asked:
            start, end = int(asked[1]), int(asked[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            self._send(206, content[start : end + 1], headers)
        elif "gzip" in self.headers.get("Accept-Encoding", ""):
            self._send(200, gzip.compress(content), {**headers, "Content-Encoding": "gzip"})
        else:
            self._send(200, content, headers)


def _sha256(content):
    return hashlib.sha256(content).hexdigest()


def _git_oid(content):
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content), usedforsecurity=False).hexdigest()


def _entry(name, content):
    entry = {"type": "file", "path": name, "size": len(content), "oid": _git_oid(content)}
    if LARGE.search(name):
        oid = _sha256(content)
        entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
    return entry
