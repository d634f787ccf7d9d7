"""Checkpoints that say in every file which one they are, and what a folder of them loads."""

import itertools
import json
import os

from kernelgraft.checkpoint.replace import Names, replacing

SINGLE, INDEX = Names().single, Names().index
RECORD = "kernelgraft.json"
TEMPLATE = "templates/deep/chat.jinja"
ADDED = "more/added.json"
SMALL = ("config.json", "generation_config.json", RECORD, TEMPLATE, ADDED)

KINDS = {"nothing": None, "single": 0, "two": 2, "three": 3}
TRANSITIONS = list(itertools.product(KINDS, ["single", "two", "three"]))
SOME = [("nothing", "two"), ("no weights", "two"), ("single", "two"), ("two", "single"), ("two", "two")]


def checkpoint(tag, shards=0, config="same", record=False):
    """Files of a checkpoint, whose weights all say `tag`; with another config other files differ, and one is added."""
    files = {"config.json": config, "generation_config.json": "same", TEMPLATE: config}
    if record:
        files[RECORD] = f"record of {tag}"
    if config != "same":
        files[ADDED] = config
    if not shards:
        return {**files, SINGLE: tag}
    names = [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
    index = {"weight_map": {f"w{i}": name for i, name in enumerate(names)}}
    return {**files, **dict.fromkeys(names, tag), INDEX: json.dumps(index)}


def before_and_after(old, new, config):
    """Two checkpoints, of which the second has another config if asked, and no record."""
    before = {} if old == "nothing" else checkpoint("old", KINDS.get(old, 0), record=config != "same")
    if old == "no weights":
        del before[SINGLE]
    if old == "stale index":
        before[INDEX] = json.dumps({"weight_map": {"w": "model-00001-of-00009.safetensors"}})
    return before, checkpoint("new", KINDS[new], config)


def put(folder, files):
    """Write files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def put_links(folder, files):
    """Write files as they lie in a snapshot of the Hub's cache: as links to blobs elsewhere."""
    for number, (name, text) in enumerate(files.items()):
        blob = folder.parent / "blobs" / f"{number}"
        put(blob.parent, {blob.name: text})
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(os.path.relpath(blob, (folder / name).parent))


def everything(folder):
    """What all files say."""
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def exactly(folder):
    """All files, links and folders as they are."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.is_file() and path.read_text()
        for path in sorted(folder.rglob("*"))
    }


def save(folder, files):
    """Save them, as models are saved."""
    with replacing(folder, Names(), (RECORD,)) as new:
        put(new, files)


def save_in_vain(folder):
    """A save that fails when it has done what it does at first."""
    try:
        with replacing(folder, Names(), (RECORD,)):
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass


def loads(folder):
    """What plain Transformers would load: small files, and what the files say in which it finds weights."""
    small = {name: (folder / name).read_text() for name in SMALL if (folder / name).exists()}
    if (folder / SINGLE).exists():
        return small, {(folder / SINGLE).read_text()}
    if (folder / INDEX).exists():
        names = json.loads((folder / INDEX).read_text())["weight_map"].values()
        return small, {(folder / name).read_text() for name in names}
    return None


def loads_of(files):
    """What a folder of these files loads."""
    small = {name: files[name] for name in SMALL if name in files}
    weights = {text for name, text in files.items() if name.endswith(".safetensors")}
    return (small, weights) if weights else None
