"""`kernelgraft.json`: what a model was saved with, and loading it so again."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import kernelgraft
import tiny
from kernelgraft import Kernel, KernelConfig, recorded_config
from kernelgraft.errors import ConfigError, KernelGraftError
from kernelgraft.plan import KernelUse, KindPlan, Plan
from kernelgraft.recorded_config import FILE, Recorded, asked, read
from kernelgraft.reference import KernelReference

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.transformers

REPOSITORY = Path(__file__).parent / "repositories"


def saved(folder, config, **options):
    """A model saved with kernels into `folder`, and its record."""
    model = tiny.model("llama")
    graft = kernelgraft.graft(model, config)
    kernelgraft.save_pretrained(model, folder, **options)
    return graft, json.loads((Path(folder) / FILE).read_text())


def loaded(folder, kernel_config="recorded", **options):
    return kernelgraft.from_pretrained(tiny.model_class("llama"), folder, kernel_config=kernel_config, **options)


def references(config):
    return [choice.use for entry in config.entries for choice in entry.choices]


def kernel_file(folder, name="kernels.py"):
    """A file with kernels, to be edited and moved."""
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(REPOSITORY / "gated.py", folder / name))


def mapping(file):
    return {tiny.FUSION: f"{file}:NormMLP"}


def test_a_model_is_loaded_with_the_kernels_it_was_saved_with(tmp_path):
    graft, record = saved(tmp_path, tiny.guide_config(fallback="reference"))
    assert list(record) == ["kernelgraft", "torch", "transformers", "device", "config", "kernels"]
    assert record["kernelgraft"] == kernelgraft.__version__
    assert record["torch"] == torch.__version__
    assert record["transformers"] == transformers.__version__
    assert record["device"] == "cpu"
    assert record["config"] == {
        "inherit_mapping": False,
        "fallback": "reference",
        "kernel": [
            {"replaces": "RMSNorm", "use": f"{tiny.EXAMPLE}:CustomRMSNorm"},
            {"fuses": [list(pair) for pair in tiny.FUSION], "use": f"{tiny.EXAMPLE}:RMSNormMLP"},
        ],
    }
    digests = {use.reference: use.digest for kind in graft.plan.kinds for use in kind.kernels}
    assert {each["reference"]: each["digest"] for each in record["kernels"]} == digests
    for load in (
        loaded,
        lambda folder: kernelgraft.AutoModelForCausalLM.from_pretrained(folder, kernel_config="recorded"),
    ):
        model = load(tmp_path)
        assert kernelgraft.graft_of(model).plan == graft.plan
        assert torch.equal(tiny.logits(model, "llama"), tiny.logits(graft.model, "llama"))
    plain = tiny.model_class("llama").from_pretrained(tmp_path)
    assert kernelgraft.graft_of(plain) is None


def test_a_model_that_was_loaded_so_is_saved_so(tmp_path):
    _, first = saved(tmp_path / "first", tiny.guide_config())
    loaded(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert json.loads((tmp_path / "second" / FILE).read_text()) == first


def test_the_working_folder_at_the_time_of_the_graft_counts(tmp_path, monkeypatch):
    kernel_file(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    model = tiny.model("llama")
    kernelgraft.graft(model, mapping("./kernels.py"))
    monkeypatch.chdir(tmp_path)
    kernelgraft.save_pretrained(model, "saved")
    assert len(kernelgraft.graft_of(loaded("saved")).plan.sites) == 2


def test_devices_modes_versions_and_what_is_left_alone(tmp_path):
    config = KernelConfig(
        {
            "RMSNorm": {"cpu": {"inference": f"{tiny.EXAMPLE}:CustomRMSNorm"}, "cuda": ("a/b:C", {"version": 3})},
            "MLP": "",
        },
        inherit_mapping=False,
        fallback="reference",
    )
    _, record = saved(tmp_path, config)
    assert read(tmp_path, {}).config == config
    assert record["config"]["kernel"][1] == {"replaces": "RMSNorm", "use": "a/b:C", "version": 3, "device": "cuda"}
    assert [each["name"] for each in record["kernels"]] == ["CustomRMSNorm"]


def test_nothing_is_asked_for():
    assert asked(None) is asked(KernelConfig()) is asked({"RMSNorm": ""}) is None
    assert asked("recorded") == {}
    for said in ({"trust": True}, True):
        with pytest.raises(ConfigError, match="means nothing"):
            asked(("recorded", said))


# --- what cannot be recorded


def test_an_object_of_the_process_is_saved_and_not_loaded(tmp_path):
    class Norm(torch.nn.Module):
        def forward(self, hidden_states):
            return torch.nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)

    for number, kernel in enumerate((Norm, Kernel(Norm))):
        config = KernelConfig({"RMSNorm": kernel, tiny.FUSION: f"{tiny.EXAMPLE}:RMSNormMLP"}, inherit_mapping=False)
        _, record = saved(tmp_path / f"{number}", config)
        (missing,) = record["not_recorded"]
        assert missing["replaces"] == "RMSNorm"
        assert "Norm" in missing["use"]
        assert [table["use"] for table in record["config"]["kernel"]] == [f"{tiny.EXAMPLE}:RMSNormMLP"]
        with pytest.raises(ConfigError, match=r"does not say how to load .*Norm: .*kernel_config=KernelConfig"):
            loaded(tmp_path / f"{number}")


def test_a_kernel_that_was_loaded_from_somewhere_is_recorded_by_its_reference(tmp_path):
    kernels = pytest.importorskip("kernels")
    local = kernels.LocalLayerRepository(tiny.EXAMPLE, layer_name="CustomRMSNorm")
    for number, kernel in enumerate(
        (local, kernelgraft.kernel.load_kernel(KernelReference.parse(f"{tiny.EXAMPLE}:CustomRMSNorm")))
    ):
        _, record = saved(tmp_path / f"{number}", KernelConfig({"RMSNorm": kernel}, inherit_mapping=False))
        assert "not_recorded" not in record
        assert record["config"]["kernel"] == [{"replaces": "RMSNorm", "use": f"{tiny.EXAMPLE}:CustomRMSNorm"}]
        assert len(kernelgraft.graft_of(loaded(tmp_path / f"{number}")).plan.sites) == 5


# --- digests


def test_another_digest_is_an_error_that_says_how_to_accept_it(tmp_path):
    file = kernel_file(tmp_path / "kernels")
    _, record = saved(tmp_path / "model", mapping(file))
    file.write_text(file.read_text() + "\n# edited\n")
    old = record["kernels"][0]["digest"]
    with pytest.raises(ConfigError, match=rf"NormMLP has digest \w+, and was saved at {old}.*pass a config instead"):
        loaded(tmp_path / "model")
    assert len(kernelgraft.graft_of(loaded(tmp_path / "model", mapping(file))).plan.sites) == 2


def plan_of(device, *uses):
    kinds = tuple(
        KindPlan("RMSNorm", ("LlamaRMSNorm",), "", (KernelUse("K", reference, digest, False, False),), None)
        for reference, digest in uses
    )
    return Plan("Llama", device, (), kinds)


@pytest.mark.parametrize(
    ("device", "uses", "wrong"),
    [
        ("cuda", [("a/b:C", "1")], None),
        ("cuda", [("a/b:C", "2")], "a/b:C has digest 2, and was saved at 1"),
        ("cpu", [("a/b:C", "2")], "a/b:C has digest 2, and was saved at 1"),
        ("cuda", [("a/b:D", "2")], None),
        ("cuda", [("x/y:Z", "1")], "x/y:Z is not among the kernels"),
        ("cpu", [("x/y:Z", "1")], None),
    ],
)
def test_kernels_are_those_of_the_record(device, uses, wrong):
    """On another type of device the config may name others."""
    record = Recorded("folder", KernelConfig(), "cuda", {"a/b:C": "1", "a/b:D": None})
    if wrong is None:
        record.check(plan_of(device, *uses))
    else:
        with pytest.raises(ConfigError, match=wrong):
            record.check(plan_of(device, *uses))


# --- trust


def test_trust_is_the_user_s_and_never_the_file_s(tmp_path):
    trusted = (f"{tiny.EXAMPLE}:CustomRMSNorm", {"trust_remote_code": True})
    _, record = saved(tmp_path, KernelConfig({"RMSNorm": trusted}, inherit_mapping=False))
    assert "trust" not in json.dumps(record)
    assert [use.trust_remote_code for use in references(read(tmp_path, {}).config)] == [False]
    for trust, kept in ((True, True), (["a/b"], ("a/b",))):
        found = read(tmp_path, asked(("recorded", {"trust_remote_code": trust}))).config
        assert [use.trust_remote_code for use in references(found)] == [kept]
    assert kernelgraft.graft_of(loaded(tmp_path, ("recorded", {"trust_remote_code": True}))).is_applied

    record["config"]["kernel"][0]["trust_remote_code"] = True
    (tmp_path / FILE).write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="asks for trust_remote_code, which a file cannot give"):
        loaded(tmp_path)


def test_code_beside_the_weights_needs_trust_and_moves_with_them(tmp_path):
    file = kernel_file(tmp_path / "model")
    _, record = saved(tmp_path / "model", mapping(file))
    assert record["config"]["kernel"][0]["use"] == record["kernels"][0]["reference"] == "./kernels.py:NormMLP"
    shutil.move(tmp_path / "model", tmp_path / "moved")
    with pytest.raises(ConfigError, match="code that lies beside the weights"):
        loaded(tmp_path / "moved")
    model = loaded(tmp_path / "moved", ("recorded", {"trust_remote_code": True}))
    assert len(kernelgraft.graft_of(model).plan.sites) == 2


def in_the_cache(folder, record):
    """A repository "me/model" of the Hub, as its cache has it."""
    commit = "0123456789" * 4
    snapshot = folder / "models--me--model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "models--me--model" / "refs").mkdir()
    (folder / "models--me--model" / "refs" / "main").write_text(commit)
    if record is not None:
        (snapshot / FILE).write_text(json.dumps(record))
    return {"cache_dir": folder, "local_files_only": True}


def record_with(*uses):
    tables = [{"replaces": f"Norm{i}", "use": use} for i, use in enumerate(uses)]
    kernels = [{"reference": use, "digest": "1"} for use in uses]
    return {"device": "cuda", "config": {"kernel": tables}, "kernels": kernels}


def test_a_record_from_the_hub_names_kernels_of_the_hub(tmp_path):
    options = in_the_cache(tmp_path / "a", record_with("owner/repo@main:Norm", "owner/other:Norm"))
    found = read("me/model", {}, **options)
    assert [str(use) for use in references(found.config)] == ["owner/repo@main:Norm", "owner/other:Norm"]
    assert found.digests == {"owner/repo@main:Norm": "1", "owner/other:Norm": "1"}
    for number, use in enumerate(("./kernel.py:Norm", "/tmp/kernel.py:Norm", "os.path:Norm")):
        options = in_the_cache(tmp_path / f"{number}", record_with(use))
        with pytest.raises(ConfigError, match=r"comes from the Hub and names .*, which is no kernel of the Hub"):
            read("me/model", {"trust_remote_code": True}, **options)


# --- no record, or none that can be read


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("{", "cannot be read as a record"),
        ("[]", "cannot be read as a record"),
        ('{"config": {"kernel": [1]}, "kernels": [], "device": "cpu"}', "cannot be read as a record"),
        ('{"config": {"kernel": [{"use": "a/b:C"}]}, "kernels": [], "device": "cpu"}', "neither replaces nor fuses"),
        ('{"config": {"kernel": [{"replaces": "A", "use": 3}]}, "kernels": [], "device": "cpu"}', "use is 3"),
        (None, f"has no {FILE}: the model in it was not saved with kernels"),
    ],
)
def test_a_record_that_says_nothing(content, found, tmp_path):
    tiny.model("llama").save_pretrained(tmp_path)
    if content is not None:
        (tmp_path / FILE).write_text(content)
    with pytest.raises(KernelGraftError, match=found):
        loaded(tmp_path)


def test_there_is_no_such_place(tmp_path):
    with pytest.raises(ConfigError, match=r"is no folder, and its kernelgraft\.json cannot be had from the Hub"):
        read("me/model", {}, **in_the_cache(tmp_path, None))
    with pytest.raises(ConfigError, match="needs a folder or a Hub id"):
        loaded(None, state_dict={})


def test_use_kernels_false_reads_nothing(tmp_path):
    saved(tmp_path, tiny.guide_config())
    (tmp_path / FILE).write_text("{")
    assert kernelgraft.graft_of(loaded(tmp_path, use_kernels=False)) is None


def test_a_subfolder(tmp_path):
    saved(tmp_path / "sub", tiny.guide_config())
    assert kernelgraft.graft_of(loaded(tmp_path, subfolder="sub")).is_applied


def test_a_repository_object_that_has_no_place_is_not_recorded():
    class Repository:
        def load(self):
            raise AssertionError

    described = recorded_config.described(KernelConfig({"RMSNorm": Repository()}))
    assert described["config"]["kernel"] == []
    assert len(described["not_recorded"]) == 1
