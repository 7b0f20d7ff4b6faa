"""Stand in for the Hub's server, as far as `rlhf push` speaks to it: repositories in memory."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKENS = {"hf_writer": ("me", "org"), "hf_reader": ()}
"""Token → the owners that it may write to."""


class StandInHub:
    """Hold what the server has, and what it was asked."""

    def __init__(self):
        self.repositories = {}
        """ORG/NAME → {"private", "branches": {branch: {file: content}}, "commits": [subject]}."""
        self.objects = {}
        """sha256 → content, of large files."""
        self.asked = []
        """(method, path) of each request."""
        self.address = ""

    def add(self, name, private=True, **files):
        """Put a repository there, with files on its main branch."""
        content = {"private": private, "branches": {"main": dict(files)}, "commits": []}
        self.repositories[name] = content
        return content


@contextmanager
def running_hub():
    """Run the server while the block runs."""
    hub = StandInHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    """Answer one request."""

    hub: StandInHub

    def log_message(self, *_):
        """Print nothing."""

    def do_GET(self):
        self.handle_request("GET")

    def do_POST(self):
        self.handle_request("POST")

    def do_PUT(self):
        self.handle_request("PUT")

    def handle_request(self, method):
        """Read the body, and answer."""
        path = self.path.partition("?")[0]
        self.hub.asked.append((method, path))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path.startswith("/objects/"):
            self.hub.objects[path.removeprefix("/objects/")] = self.body
            return self.answer(200, {})
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            return self.answer(401, {"error": "Invalid username or password."})
        self.owners = TOKENS.get(token, ())
        parts = path.strip("/").split("/")
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(self.body))
        if parts[-1] == "batch":
            return self.large_files()
        return self.of_repository(method, "/".join(parts[2:4]), parts[4:])

    def answer(self, status, value, **headers):
        """Send a JSON value."""
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(content)

    def create(self, asked):
        """Make a repository."""
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] not in self.owners:
            return self.answer(403, {"error": f'You don\'t have the rights to create a model under "{name}".'})
        self.hub.add(name, private=asked.get("visibility") == "private" or asked.get("private") is True)
        return self.answer(200, {"url": f"{self.hub.address}/{name}", "name": name})

    def large_files(self):
        """Say where large files are put."""
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.address}/objects/{one['oid']}", "header": {}}}}
            for one in json.loads(self.body)["objects"]
        ]
        return self.answer(200, {"transfer": "basic", "objects": objects})

    def of_repository(self, method, name, rest):
        """Answer what is asked of one repository."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository["private"] and name.split("/")[0] not in self.owners):
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        branches = repository["branches"]
        if not rest:
            files = [{"rfilename": file} for file in branches["main"]]
            return self.answer(200, {"id": name, "private": repository["private"], "siblings": files, "sha": "0" * 40})
        if name.split("/")[0] not in self.owners and method == "POST":
            return self.answer(403, {"error": "Forbidden: pass a token with write access"})
        what, branch = rest[0], rest[1]
        if what == "tree":
            tree = [{"type": "file", "path": file, "size": 1, "oid": "0" * 40} for file in branches[branch]]
            return self.answer(200, tree)
        if what == "branch":
            if branch in branches:
                return self.answer(409, {"error": "Reference already exists"})
            branches[branch] = dict(branches["main"])
            return self.answer(201, {})
        if what == "preupload":
            files = [
                {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular"}
                for one in json.loads(self.body)["files"]
            ]
            return self.answer(200, {"files": [one | {"shouldIgnore": False, "oid": None} for one in files]})
        assert what == "commit"
        return self.commit(repository, branches[branch])

    def commit(self, repository, files):
        """Take one commit."""
        for line in self.body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                repository["commits"].append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
                assert hashlib.sha256(files[value["path"]]).hexdigest() == value["oid"]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        address = f"{self.hub.address}/me/x/commit/{'c' * 40}"
        return self.answer(200, {"success": True, "commitUrl": address, "commitOid": "c" * 40})
