"""Downloads, against a stand-in for the hub on this machine; sockets to anywhere else are blocked."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest

from sdxl_cli.checkpoint import download, released, stream
from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.checkpoint.write import save_model, save_vae
from sdxl_cli.cli import run
from sdxl_cli.model.config import ModelConfig
from sdxl_cli.model.sdxl import SDXL

Capture = pytest.CaptureFixture[str]
COMMIT = "462165984030d82259a11f4367a4eed129e94a7b"
BASE = released.RELEASED["base"]


@dataclass
class Hub:
    """Repositories, and what goes wrong with them."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Repository -> path -> content."""
    url: str = ""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path, Range."""
    cut_after: int | None = None
    """The next answer with content ends after so many bytes."""
    fail: int | None = None
    """Answers with content have this status instead, once ``cut_after`` was used."""
    corrupt: bool = False
    """A bit of the content is wrong."""
    gated: bool = False

    def ranges(self) -> list[str]:
        return [value for method, _, value in self.requests if method == "GET" and value]

    def bodies(self) -> int:
        return sum(method == "GET" and "/resolve/" in path for method, path, _ in self.requests)


class Handler(BaseHTTPRequestHandler):
    """Answers as the hub does, as far as huggingface_hub asks."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        self.hub.requests.append((self.command, self.path, self.headers.get("Range", "")))
        parts = urlparse(self.path).path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self.listing("/".join(parts[2:4]))
        repo, revision, name = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        if self.hub.gated:
            return self.refuse(403, "GatedRepo")
        if repo not in self.hub.files:
            return self.refuse(404, "RepoNotFound")
        if revision not in ("main", "v1", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        if name not in self.hub.files[repo]:
            return self.refuse(404, "EntryNotFound")
        return self.content(self.hub.files[repo][name], with_body)

    def listing(self, repo: str) -> None:
        rows = [
            {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
            for name, data in self.hub.files[repo].items()
        ]
        body = json.dumps(rows).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def content(self, data: bytes, with_body: bool) -> None:
        if with_body and self.hub.fail and self.hub.cut_after is None:
            return self.refuse(self.hub.fail, "Broken")
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        rest = data[start:]
        large = len(data) > 5000
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        self.send_header("ETag", f'"{git}"')
        if large:
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if with_body:
            self.body(rest)
        return None

    def body(self, rest: bytes) -> None:
        if self.hub.corrupt:
            rest = rest[:-1] + bytes([rest[-1] ^ 1])
        if self.hub.cut_after is not None:
            rest, self.hub.cut_after = rest[: self.hub.cut_after], None
            self.close_connection = True
        self.wfile.write(rest)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, an empty cache, and no way to anywhere else."""
    stand_in = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": stand_in}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    stand_in.url = f"http://127.0.0.1:{server.server_port}"
    for name in (
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "HF_TOKEN",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", stand_in.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    connect = socket.socket.connect

    def only_here(self: socket.socket, address: Any) -> None:
        assert address[0] == "127.0.0.1", f"somebody wants {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", only_here)
    # what is written to disk at a time; files here are smaller than the 10 MB of the real thing
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    # huggingface_hub waits a second before it tries again
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    yield stand_in
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="session")
def contents(tmp_path_factory: pytest.TempPathFactory, small_config: ModelConfig) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "base.safetensors", SDXL(small_config), small_config)
    save_vae(folder / "vae.safetensors", SDXL(small_config, ("vae",)).vae, small_config.vae)
    return {path.stem: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def offered(hub: Hub, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The base under its released name, whose hash is then that of the small file."""
    hub.files[BASE.repo] = {BASE.file: contents["base"], "config.json": b"{}"}
    small = hashlib.sha256(contents["base"]).hexdigest()
    monkeypatch.setitem(released.RELEASED, "base", released.Released(BASE.repo, BASE.file, small))
    return hub


def got(capsys: Capture, *args: str) -> tuple[int, str, str]:
    code = run(["download", *args])
    captured = capsys.readouterr()
    return code, captured.out.strip(), captured.err.strip()


def test_the_base_comes_and_is_found(offered: Hub, contents: dict[str, bytes], capsys: Capture) -> None:
    code, out, err = got(capsys, "base")
    assert code == 0, err
    assert Path(out).read_bytes() == contents["base"]
    assert locate("base").path == Path(out)
    assert locate(None).path == Path(out)
    assert locate("base").sha256 == hashlib.sha256(contents["base"]).hexdigest()
    assert f"{BASE.repo}/{BASE.file}: " in err


def test_huggingface_hub_finds_what_we_downloaded(offered: Hub, capsys: Capture, tmp_path: Path) -> None:
    from huggingface_hub import hf_hub_download

    _, out, _ = got(capsys, "base")
    cache = tmp_path / "hf" / "hub"
    assert hf_hub_download(BASE.repo, BASE.file, cache_dir=cache, local_files_only=True) == out


def test_what_is_there_is_not_fetched_again(offered: Hub, capsys: Capture) -> None:
    first = got(capsys, "base")
    bodies = offered.bodies()
    assert got(capsys, "base")[:2] == first[:2]
    assert offered.bodies() == bodies


def test_a_connection_that_breaks_is_taken_up_at_once(
    offered: Hub, contents: dict[str, bytes], capsys: Capture
) -> None:
    offered.cut_after = 10_000
    code, out, _ = got(capsys, "base")
    assert code == 0
    assert Path(out).read_bytes() == contents["base"]
    assert offered.ranges() == ["bytes=10000-"]


def test_a_download_that_stopped_goes_on_in_the_next_run(
    offered: Hub, contents: dict[str, bytes], capsys: Capture, tmp_path: Path
) -> None:
    offered.cut_after, offered.fail = 20_000, 500
    code, _, err = got(capsys, "base")
    assert code == 1
    assert "could not be fetched" in err
    assert "run the same command again to go on" in err
    assert "\n" not in err.partition("sdxl: ")[2]
    assert [path.stat().st_size for path in tmp_path.rglob("*.incomplete")] == [20_000]
    # other commands say what is the matter
    assert run(["inspect-checkpoint", "base"]) == 3
    assert "a download stopped (20.0 kB are here); `sdxl download base` goes on" in capsys.readouterr().err

    offered.fail = None
    offered.requests.clear()
    code, out, err = got(capsys, "base")
    assert code == 0
    assert "20.0 kB are here already" in err
    assert offered.ranges() == ["bytes=20000-"]
    assert Path(out).read_bytes() == contents["base"]
    assert not list(tmp_path.rglob("*.incomplete"))


def test_a_file_that_comes_damaged_never_gets_its_name(offered: Hub, capsys: Capture, tmp_path: Path) -> None:
    offered.corrupt = True
    code, out, err = got(capsys, "base")
    assert (code, out) == (3, "")
    assert "came damaged (hash " in err
    assert "was removed; run the same command again" in err
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 5000]
    offered.corrupt = False
    assert got(capsys, "base")[0] == 0


def test_a_file_of_the_cache_that_went_bad_is_found_and_fetched_anew(
    offered: Hub, contents: dict[str, bytes], capsys: Capture
) -> None:
    _, out, _ = got(capsys, "base")
    blob = Path(out).resolve()
    blob.write_bytes(contents["base"][:-1] + b"\xff")
    code, _, err = got(capsys, "base")
    assert code == 3
    assert "came damaged" in err
    assert got(capsys, "base")[0] == 0
    assert Path(out).read_bytes() == contents["base"]


def test_another_file_than_the_released_one_is_not_fetched(offered: Hub, capsys: Capture) -> None:
    offered.files[BASE.repo][BASE.file] += b"more"
    code, _, err = got(capsys, "base")
    assert code == 3
    assert "is not the released file" in err
    assert offered.bodies() == 0
    assert got(capsys, "base", "--revision", "main")[0] == 0


def test_the_known_hashes_are_those_of_the_released_files() -> None:
    known = {name: entry.sha256[:10] for name, entry in released.RELEASED.items() if entry.sha256}
    assert known == {"base": "31e35c80fc", "refiner": "7440042bbd", "vae": "63aeecb90f"}


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_is_an_exit_code_of_its_own(
    variable: str, offered: Hub, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "1")
    for name in ("base", "me/mine"):
        code, out, err = got(capsys, name)
        assert (code, out) == (6, "")
        assert "the network is forbidden by HF_HUB_OFFLINE; unset it and run the same command again" in err
    assert offered.requests == []
    monkeypatch.setenv(variable, "0")
    assert got(capsys, "base")[0] == 0
    monkeypatch.setenv(variable, "1")
    seen = len(offered.requests)
    code, out, err = got(capsys, "base")
    assert code == 0
    assert "taken from the cache" in err
    assert locate("base").path == Path(out)
    assert len(offered.requests) == seen


def test_room_is_checked_before_anything_is_fetched(
    offered: Hub, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr(stream.shutil, "disk_usage", lambda path: usage)
    code, _, err = got(capsys, "base")
    assert code == 1
    assert "the disk has 1.0 kB free; make room" in err
    assert offered.bodies() == 0


@pytest.mark.parametrize(
    ("args", "gated", "code", "says"),
    [
        (["nobody/nothing/x.safetensors"], False, 3, "is not on the hub, or is private: then log in"),
        (["base", "--revision", "v9"], False, 3, "has no such revision"),
        ([f"{BASE.repo}/other.safetensors"], False, 3, "has no file other.safetensors"),
        (["base"], True, 3, "asks for an agreement"),
        (["bsae"], False, 2, "'bsae' is no hub id; give base, refiner, vae, org/name"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    args: list[str], gated: bool, code: int, says: str, offered: Hub, capsys: Capture
) -> None:
    offered.gated = gated
    found, _, err = got(capsys, *args)
    assert found == code
    assert says in err
    assert "\n" not in err


def test_a_hub_that_is_not_there_is_one_line(
    offered: Hub, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    code, _, err = got(capsys, "base")
    assert code == 1
    assert "could not be fetched" in err.splitlines()[-1]


def test_a_revision_is_asked_for_and_found(offered: Hub, capsys: Capture) -> None:
    code, out, _ = got(capsys, "base", "--revision", "v1")
    assert code == 0
    assert any("/resolve/v1/" in path for _, path, _ in offered.requests)
    assert locate(f"{BASE.repo}@v1").path == Path(out)


def test_a_repository_with_one_file(hub: Hub, contents: dict[str, bytes], capsys: Capture) -> None:
    hub.files["me/mine"] = {"mine.safetensors": contents["base"], "README.md": b"hello"}
    code, out, _ = got(capsys, "me/mine")
    assert (code, Path(out).name) == (0, "mine.safetensors")
    assert locate("me/mine").path == Path(out)
    hub.files["me/mine"]["other.safetensors"] = b"x"
    code, _, err = got(capsys, "me/mine")
    assert code == 3
    assert "has several files (mine.safetensors, other.safetensors); give one as me/mine/" in err


def test_a_diffusers_folder_in_the_wanted_precision() -> None:
    names = [
        "model_index.json",
        "README.md",
        "sd_xl_base_1.0.safetensors",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "unet/config.json",
        "unet/model.onnx",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "vae_1_0/diffusion_pytorch_model.safetensors",
    ]
    common = [
        "model_index.json",
        "unet/config.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    texts = ["tokenizer/vocab.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json"]
    half = download._model_files("a/b", names, "fp16")
    assert sorted(half) == sorted([*common, *texts, "unet/diffusion_pytorch_model.fp16.safetensors"])
    assert half[0] == "model_index.json"
    assert download._model_files("a/b", names, None) == ["sd_xl_base_1.0.safetensors"]
    folder = download._model_files("a/b", [name for name in names if not name.startswith("sd_xl")], None)
    assert sorted(folder) == sorted([*common, *texts, "unet/diffusion_pytorch_model.safetensors"])


def test_a_variant_of_the_base_is_its_folder(offered: Hub) -> None:
    names = ("model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.fp16.safetensors")
    offered.files[BASE.repo] |= dict.fromkeys(names, b"{}")
    assert [wanted.file for wanted in download.choose("base", None, "fp16")] == list(names)
    assert [wanted.file for wanted in download.choose("base", None, None)] == [BASE.file]


def test_a_whole_folder_is_downloaded_and_can_be_read(
    hub: Hub, contents: dict[str, bytes], capsys: Capture, tmp_path: Path
) -> None:
    model = tmp_path / "base.safetensors"
    model.write_bytes(contents["base"])
    assert run(["convert", str(model), str(tmp_path / "folder"), "--quiet", "--variant", "fp16"]) == 0
    capsys.readouterr()
    folder = tmp_path / "folder"
    hub.files["me/mine"] = {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    code, out, err = got(capsys, "me/mine", "--variant", "fp16")
    assert code == 0, err
    found = locate("me/mine", variant="fp16")
    assert found.path == Path(out)
    assert found.layout == "diffusers"
    assert {str(path.relative_to(out)) for path in Path(out).rglob("*") if path.is_file()} == set(
        hub.files["me/mine"]
    )
