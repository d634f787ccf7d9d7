"""A KernelConfig as a TOML file: there and back, and errors that name file and table."""

import pytest
from kernels import CUDAProperties, Device, LocalLayerRepository, ROCMProperties
from torch import nn

from kernelgraft.config import MODES, KernelConfig
from kernelgraft.errors import ConfigError, ConfigTypeError
from kernelgraft.kernel import Kernel

REFERENCE = "owner/repo:Name"
FUSION = (("RMSNorm", "model.layers.*.post_attention_layernorm"), ("MLP", "model.layers.*.mlp"))


class Plain(nn.Module):
    def forward(self, x):
        return x


def plain(x):
    return x


def test_a_file_says_what_a_dict_says(tmp_path):
    (tmp_path / "kernels.toml").write_text(
        """
        use_local_kernel = false
        inherit_mapping = false
        fallback = "reference"

        [[kernel]]
        replaces = "RMSNorm"
        use = "owner/repo:Name"
        version = 2
        trust_remote_code = ["owner/repo"]
        device = "cuda"
        mode = "inference"

        [[kernel]]
        fuses = [["RMSNorm", "model.layers.*.post_attention_layernorm"], ["MLP", "model.layers.*.mlp"]]
        use = "./my-kernel:RMSNormMLP"

        [[kernel]]
        replaces = "RMSNorm"
        use = ""
        device = { type = "rocm", min_capability = 90, max_capability = 94 }

        [[kernel]]
        replaces = "RMSNorm"
        use = "owner/repo:Other"
        revision = "main"
        trust_remote_code = true
        """
    )
    assert KernelConfig.from_file(tmp_path / "kernels.toml") == KernelConfig(
        {
            "RMSNorm": {
                "cuda": {"inference": (REFERENCE, {"version": 2, "trust_remote_code": ["owner/repo"]})},
                Device("rocm", ROCMProperties(min_capability=90, max_capability=94)): "",
                None: ("owner/repo:Other", {"revision": "main", "trust_remote_code": True}),
            },
            FUSION: f"{tmp_path}/my-kernel:RMSNormMLP",
        },
        inherit_mapping=False,
        fallback="reference",
    )


@pytest.mark.parametrize(
    "config",
    [
        KernelConfig(),
        KernelConfig({"A": ""}, fallback="reference"),
        KernelConfig({("Linear", "lm_head"): "package.module:Name", ("MLP", "model.layers.*.mlp"): ""}),
        KernelConfig({"A": "/path/to repo:Name"}, use_local_kernel=True, inherit_mapping=False),
        KernelConfig({"A": "package.module:Name", FUSION: ("owner/repo@main:Name", {"trust_remote_code": True})}),
        KernelConfig(
            {
                "A": {
                    "cuda": {mode: (REFERENCE, {"version": n}) for n, mode in enumerate((*MODES, None))},
                    Device("cuda", CUDAProperties(80, 90)): {"training": ""},
                    None: {"training": (REFERENCE, {"trust_remote_code": ["owner/repo", "a/b"]})},
                }
            }
        ),
    ],
)
def test_round_trip(config, tmp_path):
    path = tmp_path / "kernels.toml"
    config.to_file(path)
    again = KernelConfig.from_file(path)
    assert again == config
    again.to_file(tmp_path / "again.toml")
    assert (tmp_path / "again.toml").read_text() == path.read_text()


def test_paths_in_a_file_start_at_its_folder(tmp_path, monkeypatch):
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    config = KernelConfig({"A": "./inside.py:Name", "B": "../outside:Name"})
    config.to_file("kernels.toml")
    text = (folder / "kernels.toml").read_text()
    assert 'use = "./inside.py:Name"' in text
    monkeypatch.chdir("/")
    inside, outside = (entry.choices[0].use for entry in KernelConfig.from_file(folder / "kernels.toml").entries)
    assert inside.path == folder / "inside.py"
    assert outside.path.resolve() == tmp_path / "outside"


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("[[kernel]", ConfigError, ["cannot be read as TOML", "[[kernel]]"]),
        ("kernels = []", ConfigError, ["'kernels'", "Did you mean 'kernel'?"]),
        ("kernel = 3", ConfigTypeError, ["list of tables"]),
        ("inherit_mapping = 1", ConfigTypeError, ["inherit_mapping is 1", "true or false"]),
        ('fallback = "x"', ConfigError, ["fallback is 'x'"]),
        ("[[kernel]]\nuse = 'a/b:C'", ConfigError, ["table 1", "neither replaces nor fuses"]),
        ("[[kernel]]\nuse = 'a/b:C'\nreplaces='A'\nfuses=[]", ConfigError, ["table 1", "both"]),
        ("[[kernel]]\nuse = 'a/b:C'\nreplaces=['A']", ConfigTypeError, ["table 1", 'replaces = "RMSNorm"']),
        ("[[kernel]]\nuse = 'a/b:C'\nfuses='A'", ConfigTypeError, ["table 1", "fuses = "]),
        ("[[kernel]]\nuse = 'a/b:C'\nfuses=['A', 'a.x']", ConfigTypeError, ["table 1", 'replaces = ["Linear"']),
        ("[[kernel]]\nuse = 'a/b:C'\nreplaces=['A', 'a.*']", ConfigError, ["table 1", "last segment"]),
        ("[[kernel]]\nuse = 'a/b:C'\nfuses=[]", ConfigError, ["table 1", "empty"]),
        ("[[kernel]]\nuse = 'a/b:C'\nfuses=[['A','a.x'],['B','b.y']]", ConfigError, ["table 1", "'a' and 'b'"]),
        ("[[kernel]]\nreplaces = 'A'", ConfigTypeError, ["table 1", "there is no use"]),
        ("[[kernel]]\nreplaces = 'A'\nuse = 3", ConfigTypeError, ["table 1", "use is 3"]),
        ("[[kernel]]\nreplaces = 'A'\nuse = 'a/b'", ConfigError, ["table 1", "owner/repo:KernelName"]),
        ("[[kernel]]\nreplaces = 'A'\nuse = ''\nversion = 1", ConfigError, ["table 1"]),
        ("[[kernel]]\nreplaces = 'A'\nuse = 'a/b:C'\nverson = 1", ConfigError, ["table 1", "'version'?"]),
        ("[[kernel]]\nreplaces = 'A'\nuse = 'a/b:C'\nversion = 'x'", ConfigError, ["table 1", "whole number"]),
        ("[[kernel]]\nreplaces = 'A'\nuse = 'a/b:C'\ndevice = 'gpu'", ConfigError, ["table 1", "'gpu'"]),
        ("[[kernel]]\nreplaces = 'A'\nuse = 'a/b:C'\ndevice = {type='cpu'}", ConfigError, ["table 1", "80"]),
        ("[[kernel]]\nreplaces = 'A'\nuse = 'a/b:C'\nmode = 'eval'", ConfigError, ["table 1", "'inference'"]),
        (
            "[[kernel]]\nreplaces='A'\nuse='a/b:C'\n[[kernel]]\nreplaces='A'\nuse='a/b:D'",
            ConfigError,
            ["table 2", "'A'", "twice"],
        ),
        (
            "[[kernel]]\nreplaces='A'\nuse='a/b:C'\nmode='training'\n" * 2,
            ConfigError,
            ["table 2", "mode 'training'", "twice"],
        ),
    ],
)
def test_errors_in_a_file_name_file_and_table(tmp_path, text, kind, words):
    path = tmp_path / "kernels.toml"
    path.write_text(text)
    with pytest.raises(kind) as error:
        KernelConfig.from_file(path)
    for word in (str(path), *words):
        assert word in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.toml"):
        KernelConfig.from_file(tmp_path / "missing.toml")


@pytest.mark.parametrize("use", [Plain, plain, Kernel(Plain), LocalLayerRepository("/x", layer_name="Name")])
def test_objects_are_not_written(tmp_path, use):
    path = tmp_path / "kernels.toml"
    with pytest.raises(ConfigError, match=r"'A' uses .* cannot be written|cannot be written: 'A' uses"):
        KernelConfig({"B": REFERENCE, "A": use}).to_file(path)
    assert not path.exists()
