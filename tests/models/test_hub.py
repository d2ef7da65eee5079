"""Models from the hub: a server on this machine that answers as the hub does, or does not answer at all."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save

from ask_ray.config import ModelSettings
from ask_ray.models import weights
from ask_ray.models.ced import Ced
from ask_ray.models.registry import audio_tower
from ask_ray.models.weights import WeightsError, folder_of, published_tensors

VERSION = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """One model, `org/model`, and the paths that were asked for."""

    files: dict[str, bytes]
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        if path in ("/api/models/org/model", "/api/models/org/model/revision/main"):
            self.answer(json.dumps({"id": "org/model", "sha": VERSION, "siblings": []}).encode())
        elif path == f"/api/models/org/model/tree/{VERSION}":
            files = [{"type": "file", "path": name, "size": len(body), "oid": name} for name, body in self.files.items()]
            self.answer(json.dumps(files).encode())
        elif path.startswith(f"/org/model/resolve/{VERSION}/"):
            self.answer(self.files[path.rpartition(f"{VERSION}/")[2]])
        else:
            self.send_error(404)

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        for name, value in {"Content-Length": len(body), "ETag": f'"{hash(body)}"', "X-Repo-Commit": VERSION}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def use(monkeypatch: pytest.MonkeyPatch, port: int, cache: Path) -> None:
    """The hub is at a port of this machine."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"http://127.0.0.1:{port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    names = ("config.json", "vocab.txt", "spm.model", "pytorch_model.bin", "modeling.py", "onnx/model.safetensors")
    Hub.files = {name: f"{{}} {name}".encode() for name in names}
    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    use(monkeypatch, server.server_port, tmp_path / "cache")
    yield server
    server.shutdown()
    server.server_close()


def test_a_model_is_fetched_without_code_and_pickles_and_kept_for_when_the_hub_is_gone(hub, monkeypatch, tmp_path) -> None:
    folder = folder_of("org/model", "model.text_weights")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "spm.model", "vocab.txt"]
    assert (folder / "vocab.txt").read_bytes() == b"{} vocab.txt"
    assert not any(name in path for path in Hub.asked for name in (".bin", ".py", "onnx"))
    with pytest.raises(WeightsError, match=r"model\.audio_weights: .*holds neither model\.safetensors nor"):
        published_tensors("org/model")
    hub.shutdown()
    hub.server_close()
    assert folder_of("org/model", "model.text_weights") == folder
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert folder_of("org/model", "model.text_weights") == folder


def test_a_published_audio_tower_comes_from_the_hub(hub) -> None:
    torch.manual_seed(0)
    source = Ced("tiny", 1.0, 0, 0).eval()
    own = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith("front.")}
    heads = {f"outputlayer.{number}.{kind}": torch.ones(2) for number in (0, 1) for kind in ("weight", "bias")}
    Hub.files = {"config.json": b"{}", "model.safetensors": save({f"encoder.{name}": own[name] for name in own} | heads)}
    built = audio_tower(ModelSettings(audio="ced-tiny", audio_weights="org/model"), 16000)
    assert any(path.endswith("/model.safetensors") for path in Hub.asked)
    waves, lengths = 0.1 * torch.randn(1, 16000), torch.tensor([16000])
    with torch.no_grad():
        assert torch.equal(built.eval()(waves, lengths), source(waves, lengths))


def test_a_model_that_the_hub_does_not_have_is_refused(hub) -> None:
    with pytest.raises(WeightsError, match=r"model\.text: org/other is no folder, and could not be had .*404.*local folder"):
        folder_of("org/other", "model.text")


def test_a_hub_that_never_answers_is_given_up_in_seconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert weights.HUB_PATIENCE <= 10
    monkeypatch.setattr(weights, "HUB_PATIENCE", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        use(monkeypatch, silent.getsockname()[1], tmp_path)
        started = time.monotonic()
        with pytest.raises(WeightsError, match=r"org/model .*timed out.*where the hub cannot be reached, give a local folder"):
            folder_of("org/model", "model.audio_weights")
        assert time.monotonic() - started < 30


def test_a_hub_that_refuses_connections_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        use(monkeypatch, closed.getsockname()[1], tmp_path)
        with pytest.raises(WeightsError, match=r"org/model .*refused.*give a local folder"):
            folder_of("org/model", "model.audio_weights")
