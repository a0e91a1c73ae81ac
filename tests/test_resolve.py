"""What `from_pretrained` is asked for: names of folders and of the Hub, devices, dtypes."""

import pytest
import torch

from hybridkv.model import CheckpointError, from_pretrained

NO_NAMES = {
    "does/not/exist": "neither a folder nor a Hub name",
    "nothing-here": "neither a folder nor a Hub name",
    "./missing": "neither a folder nor a Hub name",
    "": "neither a folder nor a Hub name",
    " ": "neither a folder nor a Hub name",
    "a name/with spaces": "neither a folder nor a Hub name",
    "so/me\nlines": "neither a folder nor a Hub name",
    "nul\0": "neither a folder nor a Hub name|is no folder",
    "~nobody-of-that-name/x": "is no folder",
    "x" * 5000: "is no folder: File name too long",
    "some/" + "x" * 200: "could not be downloaded from the Hub: Repo id",
    "some/..": "could not be downloaded from the Hub: Repo id",
}


@pytest.mark.parametrize("name", NO_NAMES, ids=lambda name: repr(name[:20]))
def test_names_that_are_neither_a_folder_nor_on_the_hub(name):
    with pytest.raises(CheckpointError, match=NO_NAMES[name]) as error:
        from_pretrained(name, progress=False)
    assert len(str(error.value)) < 500 and len(str(error.value).splitlines()) == 1


DEVICES = [
    "hpu",
    "meta",
    "cuda:99",
    "nonsense",
    "privateuseone",
    "cpu:7",
    "",
    "cuda:-1",
    None,
    3.5,
    torch.device("meta"),
]


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_device_that_is_not_there(vlm, device):
    with pytest.raises(ValueError, match=r"^device .* can't be used: this machine has cpu"):
        from_pretrained(vlm, device=device)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64, torch.bool, "bfloat16"], ids=str)
def test_a_dtype_that_no_model_has(vlm, dtype):
    with pytest.raises(ValueError, match=r"can't be used: give torch.bfloat16, torch.float16, torch.float32"):
        from_pretrained(vlm, dtype=dtype)


def test_a_file_is_no_folder(vlm):
    with pytest.raises(CheckpointError, match="is a file"):
        from_pretrained(vlm / "config.json")


def test_hub_download(vlm, monkeypatch):
    """A name with one slash goes to the Hub, for safetensors and JSON only; what fails there is said in one line."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = {}

    def download(name, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(vlm)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert from_pretrained("someone/some-model", progress=False).visual is not None
    assert asked["name"] == "someone/some-model"
    assert not any(p.endswith((".bin", ".pt", "*")) for p in asked["patterns"])

    def fail(*args, **kwargs):
        raise LocalEntryNotFoundError("no connection\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"could not be downloaded from the Hub: no connection$"):
        from_pretrained("someone/some-model")
