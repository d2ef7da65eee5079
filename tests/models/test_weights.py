"""Published weights: nothing in a file is run, and only weights that fit are loaded."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ask_ray.command import guarded
from ask_ray.config import ModelSettings
from ask_ray.models.audio_towers import ResNet38
from ask_ray.models.registry import build
from ask_ray.models.weights import WeightsError, fit, load_tensors


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("wrap", [None, "model", "state_dict"])
@pytest.mark.parametrize("suffix", ["pth", "pt", "bin"])
def test_checkpoints_are_read_and_unwrapped(tmp_path: Path, wrap: str | None, suffix: str) -> None:
    tensors = {"a": torch.arange(3.0), "b.c": torch.ones(2, 2)}
    torch.save({wrap: tensors} if wrap else tensors, tmp_path / f"w.{suffix}")
    found = load_tensors(tmp_path / f"w.{suffix}")
    assert found.keys() == tensors.keys()
    assert torch.equal(found["a"], tensors["a"])


def test_safetensors_are_read(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3.0)}, tmp_path / "w.safetensors")
    assert torch.equal(load_tensors(str(tmp_path / "w.safetensors"))["a"], torch.arange(3.0))


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"model": Trap(tmp_path / "sprung")}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"w\.pth cannot be read as plain tensors"):
        load_tensors(tmp_path / "w.pth")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04 cut short", b"\x80\x02}q\x00."])
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=r"model\.audio_weights: .*" + name):
        load_tensors(tmp_path / name)


def test_missing_files_and_other_kinds_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"some\.setting: .*gone\.pth is not a file"):
        load_tensors(tmp_path / "gone.pth", "some.setting")
    (tmp_path / "w.txt").write_text("hello")
    with pytest.raises(WeightsError, match=r"w\.txt is no weights file"):
        load_tensors(tmp_path / "w.txt")
    torch.save([torch.ones(1)], tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="something else than tensors"):
        load_tensors(tmp_path / "w.pt")


def test_a_job_tells_of_weights_that_are_not_there_without_a_traceback(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        guarded(lambda: build(ModelSettings(audio="ced-tiny", audio_weights="no such/weights"), 16000))
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: model.audio_weights: no such/weights is neither a folder nor the id")


def test_weights_that_do_not_fit_are_listed() -> None:
    module = nn.Sequential(*(nn.Linear(2, 2) for _ in range(6)))
    tensors = module.state_dict() | {"0.weight": torch.ones(3, 2), "other": torch.ones(1), "ignored.x": torch.ones(1)}
    for number in range(1, 6):
        del tensors[f"{number}.bias"]
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        fit(module, tensors, ["ignored."], "the file")
    message = str(caught.value)
    assert message.startswith("the file does not fit Sequential")
    assert "5 missing: 1.bias, 2.bias, 3.bias, 4.bias, …" in message
    assert "1 unexpected: other" in message
    assert "0.weight (3, 2) instead of (2, 2)" in message
    assert "ignored" not in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def published_names() -> list[str]:
    """The names in the published ResNet38 checkpoint."""

    def norm(name: str) -> list[str]:
        return [f"{name}.{part}" for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]

    def block(name: str) -> list[str]:
        return [name + ".conv1.weight", *norm(name + ".bn1"), name + ".conv2.weight", *norm(name + ".bn2")]

    stft = "spectrogram_extractor.stft.conv_"
    names = [f"{stft}real.weight", f"{stft}imag.weight", "logmel_extractor.melW", *norm("bn0"), *block("conv_block1")]
    for layer, count in enumerate((3, 4, 6, 3), start=1):
        for number in range(count):
            names += block(f"resnet.layer{layer}.{number}")
        if layer > 1:
            shortcut = f"resnet.layer{layer}.0.downsample"
            names += [f"{shortcut}.1.weight", *norm(f"{shortcut}.2")]
    names += block("conv_block_after1")
    return [*names, "fc1.weight", "fc1.bias", "fc_audioset.weight", "fc_audioset.bias"]


def test_the_published_resnet38_checkpoint_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = ResNet38(1.0, 0, 0).eval()
    parameters = sum(parameter.numel() for parameter in source.parameters())
    # Kong et al. 2020, table 13, count 73,783,247 with the classifier of 527 AudioSet classes.
    assert parameters == 73_783_247 - (2048 * 527 + 527) == 72_703_424
    tensors = {name: source.state_dict().get(name, torch.ones(2)) for name in published_names()}
    torch.save({"iteration": 520000, "model": tensors}, tmp_path / "ResNet38_mAP=0.434.pth")
    path = str(tmp_path / "ResNet38_mAP=0.434.pth")
    built = build(ModelSettings(audio="resnet38", audio_weights=path, width=0.25, dim=8), 32000).audio.eval()
    assert built.width == 2048
    waves, lengths = 0.1 * torch.randn(1, 16000), torch.tensor([16000])
    with torch.no_grad():
        assert torch.equal(built(waves, lengths), source(waves, lengths))
        # At full width, with values of hundreds, what is made of a clip does not depend on its batch but for rounding.
        waves, lengths = 0.1 * torch.randn(2, 40000), torch.tensor([17000, 40000])
        together = source(waves, lengths)
        alone = [source(wave[None, :length], length[None])[0] for wave, length in zip(waves, lengths, strict=True)]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5 * float(together.abs().max()), rtol=0)


def test_a_checkpoint_of_another_tower_is_refused(tmp_path: Path) -> None:
    tower = ResNet38(0.125, 0, 0)
    tensors = {name: torch.ones(1) for name in published_names() if not name.startswith("resnet.layer4")}
    with pytest.raises(WeightsError, match=r"missing: resnet\.layer4\.0\.bn1\.bias.*differently shaped: bn0\.bias"):
        fit(tower, tensors, ResNet38.IGNORE, "cnn14.pth")
