"""KernelConfig: what it takes, what it refuses and with which words, and that it stays as it was made."""

import copy
import itertools
import pickle
import types

import kernels
import pytest
import torch
from kernels import CUDAProperties, Device, LayerRepository, Mode, ROCMProperties
from kernels.layer.kernelize import _validate_device_type
from kernels.layer.repos import DeviceRepos, _select_repository
from torch import nn

from kernelgraft.config import DEVICES, MISSING, MODES, Choice, Entry, KernelConfig, KernelReference, select
from kernelgraft.entry import device_type
from kernelgraft.errors import ConfigError, ConfigTypeError, KernelGraftError
from kernelgraft.kernel import Kernel

NORM = "model.layers.*.post_attention_layernorm"
FUSION = (("RMSNorm", NORM), ("MLP", "model.layers.*.mlp"))
REFERENCE = "owner/repo:Name"


class Plain(nn.Module):
    def forward(self, x):
        return x


def plain(x):
    return x


def uses(config):
    return {entry.target: [(c.device, c.mode, c.use) for c in entry.choices] for entry in config.entries}


def ref(text, **metadata):
    return KernelReference.parse(text, metadata=metadata)


# --- what it takes ----------------------------------------------------------------------------------------------------


def test_everything_that_transformers_takes():
    repository = LayerRepository("owner/repo", layer_name="Name", version=1)
    config = KernelConfig(
        {
            "RMSNorm": REFERENCE,
            "MLP": ("owner/repo:Name", {"version": 2, "trust_remote_code": True}),
            "A": ("owner/repo:Name", {"revision": "main"}),
            "B": {"cuda": REFERENCE, "rocm": (REFERENCE, {"version": 3})},
            "C": {"cuda": {Mode.INFERENCE: repository}},
            "D": repository,
            FUSION: REFERENCE,
        }
    )
    assert uses(config) == {
        "RMSNorm": [(None, None, ref(REFERENCE))],
        "MLP": [(None, None, ref(REFERENCE, version=2, trust_remote_code=True))],
        "A": [(None, None, ref("owner/repo@main:Name"))],
        "B": [("cuda", None, ref(REFERENCE)), ("rocm", None, ref(REFERENCE, version=3))],
        "C": [("cuda", "inference", repository)],
        "D": [(None, None, repository)],
        FUSION: [(None, None, ref(REFERENCE))],
    }
    assert (config.use_local_kernel, config.inherit_mapping, config.inherits, config.fallback) == (
        (False, True, True, "error")
    )


def test_everything_beyond():
    kernel = Kernel(Plain)
    config = KernelConfig(
        {
            "RMSNorm": {"cpu": {"inference": REFERENCE, "training": ""}, None: "package.module:Name"},
            "MLP": "",
            "A": Plain,
            "rotary_pos_emb": plain,
            "silu": torch.nn.functional.silu,
            "B": kernel,
            "C": ref(REFERENCE),
        },
        inherit_mapping=False,
        fallback="reference",
    )
    assert uses(config) == {
        "RMSNorm": [
            ("cpu", "inference", ref(REFERENCE)),
            ("cpu", "training", None),
            (None, None, ref("package.module:Name")),
        ],
        "MLP": [(None, None, None)],
        "A": [(None, None, Plain)],
        "rotary_pos_emb": [(None, None, plain)],
        "silu": [(None, None, torch.nn.functional.silu)],
        "B": [(None, None, kernel)],
        "C": [(None, None, ref(REFERENCE))],
    }
    assert (config.inherits, config.fallback) == (False, "reference")


def test_keys_as_lists_and_mappings_as_pairs():
    as_lists = [[["RMSNorm", NORM], ["MLP", "model.layers.*.mlp"]], REFERENCE]
    assert KernelConfig([as_lists, ("A", "")]) == KernelConfig({FUSION: REFERENCE, "A": ""})
    assert KernelConfig() == KernelConfig({}) == KernelConfig(None)
    assert KernelConfig().entries == ()


def test_use_local_kernel_reads_paths_and_inherits_nothing():
    config = KernelConfig({"RMSNorm": "owner/repo:Name"}, use_local_kernel=True)
    assert config.entries[0].choices[0].use.kind == "path"
    assert (config.inherit_mapping, config.inherits) == (True, False)


def test_devices_and_modes():
    limited = Device("cuda", CUDAProperties(min_capability=80, max_capability=90))
    config = KernelConfig({"A": {Device("cuda"): Plain, limited: plain}})
    assert [c.device for c in config.entries[0].choices] == ["cuda", limited]
    assert [c.device_type for c in config.entries[0].choices] == ["cuda", "cuda"]
    for mode in (Mode.TRAINING | Mode.TORCH_COMPILE, "torch_compile|training", " Training | torch_compile "):
        assert KernelConfig({"A": {"cpu": {mode: plain}}}).entries[0].choices[0].mode == "training|torch_compile"
    for mode in (Mode.FALLBACK, "fallback", None):
        assert KernelConfig({"A": {"cpu": {mode: plain}}}).entries[0].choices[0].mode is None


def test_labels():
    entry, fusion, top = KernelConfig({"A": "", FUSION: "", (("X", "a"), ("Y", "b")): ""}).entries
    assert (entry.label, entry.is_fusion) == ("A", False)
    assert (fusion.label, fusion.is_fusion) == ("RMSNorm + MLP at model.layers.*.{post_attention_layernorm, mlp}", True)
    assert top.label == "X + Y at {a, b}"
    (alone,) = KernelConfig({("Linear", "lm_head"): ""}).entries
    assert (alone.label, alone.target, alone.is_fusion) == ("Linear at lm_head", (("Linear", "lm_head"),), False)
    for key in (["Linear", "lm_head"], (("Linear", "lm_head"),)):
        assert KernelConfig([(key, "")]) == KernelConfig({("Linear", "lm_head"): ""})


# --- what it refuses --------------------------------------------------------------------------------------------------

_OTHER_PARENT = (("RMSNorm", NORM), ("MLP", "model.blocks.*.mlp"))


@pytest.mark.parametrize(
    ("mapping", "kind", "words"),
    [
        ("x.toml", ConfigTypeError, ["KernelConfig.from_file('x.toml')"]),
        (3, ConfigTypeError, ["int", '{"RMSNorm"']),
        (["RMSNorm"], ConfigTypeError, ["(key, value)", '{"RMSNorm"']),
        ({3: REFERENCE}, ConfigTypeError, ["3", "int", '"RMSNorm"']),
        ({"": REFERENCE}, ConfigError, ["empty"]),
        ({"model.layers.*.mlp": REFERENCE}, ConfigError, ["no class name", "beside a class name"]),
        ({(): REFERENCE}, ConfigError, ["empty", NORM]),
        ({((), ("MLP", "a.b")): REFERENCE}, ConfigError, ["no pair", NORM]),
        ({("RMSNorm", "model.layers.*"): REFERENCE}, ConfigError, ["last segment"]),
        ({("RMSNorm", "a b"): REFERENCE}, ConfigError, ["one whole segment"]),
        ({("RMSNorm", "MLP", "X"): REFERENCE}, ConfigTypeError, ["'RMSNorm'", "not a pair"]),
        ({(("RMSNorm", 1), ("MLP", "a.b")): REFERENCE}, ConfigTypeError, ["no text"]),
        ({(("RMSNorm", NORM, 1), ("MLP", "a.b")): REFERENCE}, ConfigError, ["no pair"]),
        ({(("", "a.x"), ("MLP", "a.b")): REFERENCE}, ConfigError, ["no class name"]),
        ({_OTHER_PARENT: REFERENCE}, ConfigError, ["'model.layers.*'", "'model.blocks.*'"]),
        ({(("A", "a.x"), ("B", "a.x")): REFERENCE}, ConfigError, ["'a.x' twice"]),
        ({(("A", "a.x*"), ("B", "a.y")): REFERENCE}, ConfigError, ["'x*'", "one whole segment"]),
        ({(("A", "a.*"), ("B", "a.y")): REFERENCE}, ConfigError, ["last segment"]),
        ({(("A", "a..x"), ("B", "a.y")): REFERENCE}, ConfigError, ["empty segment"]),
        ({(("A", ""), ("B", "a.y")): REFERENCE}, ConfigError, ["empty segment"]),
        ([("A", REFERENCE), ("A", "")], ConfigError, ["'A'", "twice", REFERENCE]),
        ([(FUSION, REFERENCE), ([list(pair) for pair in FUSION], "")], ConfigError, ["twice"]),
        ({"A": "owner/repo"}, ConfigError, ["'A'", "owner/repo:KernelName"]),
        ({"A": None}, ConfigTypeError, ["'A'", "NoneType", '""']),
        ({"A": 3}, ConfigTypeError, ["'A'", "int"]),
        ({"A": Plain()}, ConfigTypeError, ["Give its class"]),
        ({"A": int}, ConfigTypeError, ["'int' has no forward"]),
        ({"A": {}}, ConfigError, ["'A'", "names no device"]),
        ({"A": {"cuda": {}}}, ConfigError, ["'A'", "names no mode"]),
        ({"A": {"gpu": REFERENCE}}, ConfigError, ["'gpu'", "'cuda'"]),
        ({"A": {"cuda:0": REFERENCE}}, ConfigError, ["'cuda:0'", "Write 'cuda'"]),
        ({"A": {torch.device("cpu"): REFERENCE}}, ConfigTypeError, ["device", "kernels.Device"]),
        ({"A": {0: REFERENCE}}, ConfigTypeError, ["int", "'cuda'"]),
        ({"A": {"cuda": {"eval": REFERENCE}}}, ConfigError, ["'eval'", "'inference'"]),
        ({"A": {"cuda": {"inference|training": REFERENCE}}}, ConfigError, ["'inference'"]),
        ({"A": {"cuda": {"torch_compile": REFERENCE}}}, ConfigError, ["never chooses", "'training|torch_compile'"]),
        ({"A": {"cuda": {Mode.TORCH_COMPILE: REFERENCE}}}, ConfigError, ["never chooses"]),
        ({"A": {"cuda": {True: REFERENCE}}}, ConfigTypeError, ["bool", "'inference'"]),
        ({"A": {"cuda": {"inference": "", Mode.INFERENCE: ""}}}, ConfigError, ["twice", "'inference'"]),
        ({"A": {"cuda": "", Device("cuda"): ""}}, ConfigError, ["twice", "'cuda'"]),
        ({"A": {"cuda": {"inference": {"x": ""}}}}, ConfigTypeError, ["dict"]),
        ({"A": (REFERENCE,)}, ConfigError, ["1 parts"]),
        ({"A": (REFERENCE, "main")}, ConfigTypeError, ["not a reference and a dict"]),
        ({"A": ("", {"version": 1})}, ConfigError, ["owner/repo:KernelName"]),
        ({"A": (REFERENCE, {"revision": "a", "version": 1})}, ConfigError, ["'A'", "one of the two"]),
        ({"A": (REFERENCE, {"trust_remote_code": "yes"})}, ConfigTypeError, ["'A'", "['owner/repo']"]),
        ({"A": (REFERENCE, {"branch": "a"})}, ConfigError, ["'branch'", "'revision'"]),
    ],
)
def test_what_cannot_be_meant(mapping, kind, words):
    with pytest.raises(kind) as error:
        KernelConfig(mapping)
    for word in words:
        assert word in str(error.value)
    assert isinstance(error.value, KernelGraftError)


@pytest.mark.parametrize("options", [{"use_local_kernel": 1}, {"inherit_mapping": "no"}])
def test_flags_are_flags(options):
    with pytest.raises(ConfigTypeError, match="Write True or False"):
        KernelConfig({}, **options)


def test_fallback_is_one_of_two():
    with pytest.raises(ConfigError, match="'error', or 'reference'"):
        KernelConfig({}, fallback="silent")


# --- it never changes -------------------------------------------------------------------------------------------------


def test_it_shares_nothing_with_what_it_was_given():
    metadata = {"version": 2}
    by_mode = {"inference": ("owner/repo:Name", metadata)}
    mapping = {"A": {"cuda": by_mode}}
    config = KernelConfig(mapping)
    metadata["version"], by_mode["training"], mapping["B"] = 3, REFERENCE, REFERENCE
    expected = {"A": {"cuda": {"inference": ("owner/repo:Name", {"version": 2})}}}
    assert config.kernel_mapping == expected
    config.kernel_mapping["A"]["cuda"]["inference"][1]["version"] = 4
    config.kernel_mapping.clear()
    assert config.kernel_mapping == expected
    assert uses(config) == {"A": [("cuda", "inference", ref(REFERENCE, version=2))]}


def test_it_cannot_be_set():
    config = KernelConfig({"A": REFERENCE})
    with pytest.raises(AttributeError, match="Make a new one"):
        config.fallback = "reference"
    with pytest.raises(AttributeError, match="does not change"):
        del config.entries
    with pytest.raises(AttributeError, match="Make a new one"):
        config.kernel_mapping = {}
    with pytest.raises(AttributeError):
        config.entries[0].target = "B"


def test_equality_hash_copies_and_pickles():
    mapping = {"A": {"cuda": REFERENCE, "cpu": Plain}, FUSION: ""}
    config = KernelConfig(mapping, inherit_mapping=False, fallback="reference")
    same = KernelConfig(dict(reversed(mapping.items())), inherit_mapping=False, fallback="reference")
    assert config == same
    assert hash(config) == hash(same)
    assert config != KernelConfig(mapping, fallback="reference")
    assert config != KernelConfig(mapping, inherit_mapping=False)
    assert config != mapping
    assert copy.copy(config) is config
    assert copy.deepcopy(config) is config
    assert pickle.loads(pickle.dumps(config)) == config

    class Unhashable:
        __hash__ = None

        def load(self): ...

    hash(KernelConfig({"A": Unhashable()}))


def test_repr_shows_every_choice():
    config = KernelConfig({"A": REFERENCE, "B": {"cpu": {"training": ""}}}, fallback="reference")
    assert repr(config) == (
        "KernelConfig(\n"
        "    A: owner/repo:Name\n"
        "    B: left alone (device 'cpu', mode 'training')\n"
        "    fallback='reference'\n"
        ")"
    )
    assert repr(KernelConfig()) == "KernelConfig()"


# --- choosing by device and mode --------------------------------------------------------------------------------------

STATES = list(itertools.product((False, True), (False, True)))


def kernels_mode(training, compiling):
    mode = Mode.TRAINING if training else Mode.INFERENCE
    return mode | Mode.TORCH_COMPILE if compiling else mode


def test_the_order_of_preference_is_that_of_the_kernels_library():
    theirs = {
        "inference": Mode.INFERENCE,
        "training": Mode.TRAINING,
        "inference|torch_compile": Mode.INFERENCE | Mode.TORCH_COMPILE,
        "training|torch_compile": Mode.TRAINING | Mode.TORCH_COMPILE,
        None: Mode.FALLBACK,
    }
    assert set(MODES) | {None} == set(theirs)
    for count in range(1, 6):
        for modes in itertools.combinations(theirs, count):
            entry = Entry("A", tuple(Choice("cpu", mode, f"kernel {mode}") for mode in modes))
            repositories = {theirs[mode]: f"kernel {mode}" for mode in modes}
            for training, compiling in STATES:
                found = _select_repository(repositories, mode=kernels_mode(training, compiling))
                ours = select(entry, "cpu", training=training, compiling=compiling)
                assert ours == (MISSING if found is None else found[0])


def test_the_devices_are_those_of_the_kernels_library():
    for device in DEVICES:
        _validate_device_type(device)
        DeviceRepos.create_repo(Device(device))
    with pytest.raises(ValueError, match=", ".join(DEVICES)):
        _validate_device_type("gpu")


def test_the_device_decides_before_the_mode():
    config = KernelConfig({"A": {"cpu": {"inference": "a/b:Cpu"}, "cuda": "", None: "a/b:Other"}})
    entry = config.entries[0]
    assert select(entry, "cpu", training=False) == ref("a/b:Cpu")
    assert select(entry, torch.device("cpu"), training=False) == ref("a/b:Cpu")
    assert select(entry, "cpu", training=True) is MISSING
    assert select(entry, "cuda:1", training=True) is None
    assert select(entry, "mps", training=True) == ref("a/b:Other")
    assert select(entry, "meta", training=False) == ref("a/b:Other")
    assert select(KernelConfig({"A": {"cuda": Plain}}).entries[0], "cpu", training=False) is MISSING


def test_cuda_is_called_rocm_on_a_rocm_build(monkeypatch):
    entry = KernelConfig({"A": {"cuda": "a/b:Cuda", "rocm": "a/b:Rocm"}}).entries[0]
    monkeypatch.setattr(torch.version, "hip", None)
    assert select(entry, "cuda:0", training=False) == ref("a/b:Cuda")
    monkeypatch.setattr(torch.version, "hip", "6.3")
    assert select(entry, torch.device("cuda", 0), training=False) == ref("a/b:Rocm")
    assert device_type("cuda") == device_type("rocm") == "rocm"
    assert device_type(torch.device("cpu")) == "cpu"


@pytest.mark.parametrize(("build", "properties"), [("cuda", CUDAProperties), ("rocm", ROCMProperties)])
@pytest.mark.parametrize("capability", [70, 75, 80, 86, 90, 121])
def test_capabilities_are_chosen_as_by_the_kernels_library(monkeypatch, build, properties, capability):
    monkeypatch.setattr(torch.version, "hip", "6.3" if build == "rocm" else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: divmod(capability, 10))
    monkeypatch.setattr(kernels.layer.repos, "_find_capability", lambda: capability)
    ranges = {None: "any", (75, 89): "wide", (80, 89): "narrow", (90, 90): "one"}
    for count in range(1, 5):
        for chosen in itertools.combinations(ranges, count):
            devices = [Device(build, properties(*limits) if limits else None) for limits in chosen]
            repositories = DeviceRepos.create_repo(devices[0])
            for device, limits in zip(devices, chosen, strict=True):
                repositories.insert(device, {Mode.FALLBACK: ranges[limits]})
            found = repositories.repos
            choices = [
                Choice(d if d.properties else build, None, ranges[x]) for d, x in zip(devices, chosen, strict=True)
            ]
            entry = Entry("A", (*choices, Choice(None, None, "elsewhere")))
            expected = "elsewhere" if found is None else found[Mode.FALLBACK]
            for device in ("cuda:0", build, torch.device("cuda:0")):
                assert select(entry, device, training=True) == expected


def test_a_machine_without_a_gpu_takes_what_names_no_capability(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    limited = Device("cuda", CUDAProperties(min_capability=0, max_capability=999))
    entry = KernelConfig({"A": {limited: "a/b:Limited", "cuda": "a/b:Any"}}).entries[0]
    assert select(entry, "cuda", training=False) == ref("a/b:Any")


# --- the configs of others --------------------------------------------------------------------------------------------


def test_of_takes_what_says_the_same(tmp_path):
    config = KernelConfig({"A": REFERENCE})
    config.to_file(tmp_path / "kernels.toml")
    assert KernelConfig.of(config) is config
    assert KernelConfig.of({"A": REFERENCE}) == config
    assert KernelConfig.of([("A", REFERENCE)]) == config
    assert KernelConfig.of(tmp_path / "kernels.toml") == KernelConfig.of(str(tmp_path / "kernels.toml")) == config
    for other in (None, 3, object()):
        with pytest.raises(ConfigTypeError, match="is no kernel config"):
            KernelConfig.of(other)


def test_of_copies_what_looks_like_the_config_of_transformers():
    theirs = types.SimpleNamespace(
        kernel_mapping={"A": ("/path/to/repo:Name", {"version": 1})}, use_local_kernel=True, inherit_mapping=False
    )
    before = copy.deepcopy(theirs.kernel_mapping)
    config = KernelConfig.of(theirs)
    assert config == KernelConfig({"A": "/path/to/repo:Name"}, use_local_kernel=True, inherit_mapping=False)
    assert theirs.kernel_mapping == before


@pytest.mark.transformers
def test_of_takes_the_config_of_transformers_before_and_after_use(monkeypatch):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.KernelConfig({"RMSNorm": (REFERENCE, {"version": 2}), "MLP": {"cpu": REFERENCE}})
    fresh = KernelConfig.of(theirs)
    assert fresh == KernelConfig(theirs.kernel_mapping)
    if not transformers.utils.is_kernels_available():
        pytest.skip("this Transformers refuses the installed kernels, so that it cannot use a config")
    monkeypatch.setattr(transformers.utils.kernel_config, "KERNELS_SUPPORTED_DEVICE_TYPES", ["cpu"])
    theirs.create_compatible_mapping(nn.Linear(1, 1).eval())
    assert KernelConfig.of(theirs) == KernelConfig(
        {
            "RMSNorm": {"cpu": {"inference": LayerRepository("owner/repo", layer_name="Name", version=2)}},
            "MLP": {"cpu": {"inference": LayerRepository("owner/repo", layer_name="Name", version=1)}},
        }
    )
    assert KernelConfig.of(theirs) == KernelConfig.of(theirs)
