"""The house: which folder may import which, held by what the files say. `python tests/test_house.py` prints it."""

import ast
import re
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "hf_lowrank"

# Each row imports only rows above it, and no neighbour in its own row.
ORDER = (
    ("errors", "version", "progress", "remote_code"),
    ("extras", "files", "options"),
    ("hosts",),
    ("data", "planning", "records"),
    ("statistics", "evaluation"),
    ("methods",),
    ("compression", "sharing"),
    ("training", "studies", "runtimes"),
    ("cli", "registration"),
    ("__init__",),
)

# Private names of transformers and torch that the package leans on: what to look at when a release breaks it.
BORROWED = {
    *("_attn_implementation", "_commit_hash", "_name_or_path", "_supports_sdpa"),  # configurations
    *(
        "_hf_hook",
        "_hf_peft_config_loaded",
        "_is_hf_initialized",
        "_tied_weights_keys",
        "_weight_conversions",
    ),  # models
    *("_get_resized_embeddings", "_get_resized_lm_head"),  # their methods
    *("_extra_content", "_model_mapping"),  # auto classes
    *("_prepare_inputs", "_tokenizer"),  # Trainer, fast tokenizers
    *("_buffers", "_forward_hooks", "_forward_pre_hooks", "_modules", "_orig_mod"),  # torch modules
    *("_cdata", "_checkpointing", "_disabled_torch_function_impl", "_DropoutNd", "_to_copy"),  # torch
    *("_make_wrapper_subclass", "_python_dispatch", "_pytree"),
}
WORDS = {
    *("_per_second", "_runtime", "_token_id", "_data", "_to_dense", "_from_dense"),
    *("_qint8_avx512_vnni", "_q4", "_qint8_quantized", "_qint4_quantized"),
}  # ends of names, in strings

MAX_LAYERS = 9
MAX_ROOMS = 24
MAX_METHODS = 20
MAX_FILES = 15
TASK = "TASK"  # what the module of a task calls it
FLAT = {"remote_code"}  # transformers ships files that lie side by side


def module_name(path, package):
    parts = [package.name, *path.relative_to(package).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def read(package):
    return {
        module_name(path, package): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(package.rglob("*.py"))
    }


def room(module):
    return module.split(".")[1].replace("__main__", "cli")  # which is called by the package's name too


def owner(name, modules):
    """The module that a dotted name stands for or lies in."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def named(node, module, package):
    """Dotted names of ours that a node asks for, module names in strings included."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module if not node.level else f"{module.rpartition('.')[0]}.{node.module}"
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [match[0] for match in [re.match(rf"{package}(\.\w+)+", node.value)] if match]
    return []


def imports(trees, package):
    """Module -> the modules it asks for."""
    found = defaultdict(set)
    for module, tree in trees.items():
        docstrings = {id(part.value) for part in ast.walk(tree) if isinstance(part, ast.Expr)}
        for node in ast.walk(tree):
            if id(node) not in docstrings:
                targets = {owner(name, trees) for name in named(node, module, package)}
                found[module] |= {name for name in targets if name not in ("", package, module)}
    return {module: found[module] for module in trees}


def rooms_of(graph):
    found = defaultdict(set)
    for module, targets in graph.items():
        found[room(module)] |= {room(target) for target in targets} - {room(module)}
    return dict(found)


def climbs(graph):
    """Imports that do not lead down the order."""
    rank = {name: index for index, row in enumerate(ORDER) for name in row}
    for module, targets in graph.items():
        for target in sorted(targets):
            pair = room(module), room(target)
            is_down = rank.get(pair[1], 99) < rank.get(pair[0], -1)
            if pair[0] != pair[1] and not is_down:
                yield f"{module} -> {target}"


def layers(graph):
    """How many rooms stand on one another, and any circle as an error."""
    below = rooms_of(graph)
    height = {}
    for name in TopologicalSorter(below).static_order():
        height[name] = 1 + max((height[target] for target in below.get(name, ())), default=0)
    return height


def crowded(package):
    for folder in [package, *sorted(path for path in package.rglob("*") if path.is_dir())]:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        if folder.name not in FLAT and len(files) > MAX_FILES:
            yield f"{folder.relative_to(package)} holds {len(files)} files"


def large_classes(trees):
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                count = sum(isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)) for part in node.body)
                if count > MAX_METHODS:
                    yield f"{module}.{node.name} has {count} methods"


def names_defined_twice(trees):
    """Public classes, and tables in capitals, that stand in more than one file."""
    places = defaultdict(list)
    for module, tree in trees.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                names = [node.name]
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [t.id for t in targets if isinstance(t, ast.Name) and t.id.isupper()]
            else:
                names = []
            for name in names:
                if len(name) > 1 and name != TASK and not name.startswith("_"):
                    places[name].append(module)
    return {name: modules for name, modules in places.items() if len(modules) > 1}


def own_names(trees):
    """All that the package itself defines or sets."""
    found = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found |= {node.attr} if ast.unparse(node.value) in ("self", "cls") else set()
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
    return found


def borrowed_private_names(trees):
    """Private names of other libraries that the package reads, sets or imports."""
    ours, found = own_names(trees), set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                names = [node.attr]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names = [node.value]
            elif isinstance(node, ast.ImportFrom):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            else:
                names = []
            found |= {name for name in names if re.fullmatch(r"_[a-zA-Z]\w+", name) and name not in ours}
    return found


@pytest.fixture(scope="module")
def trees():
    return read(PACKAGE)


@pytest.fixture(scope="module")
def graph(trees):
    return imports(trees, PACKAGE.name)


def test_imports_lead_down(graph):
    assert list(climbs(graph)) == []


def test_no_circle_among_files(graph):
    TopologicalSorter(graph).prepare()


def test_rooms_stand_on_few_layers(graph):
    assert max(layers(graph).values()) <= MAX_LAYERS


def test_the_top_is_seen_at_a_glance(graph):
    assert len(rooms_of(graph)) <= MAX_ROOMS


def test_no_folder_is_crowded():
    assert list(crowded(PACKAGE)) == []


def test_no_class_has_too_many_methods(trees):
    assert list(large_classes(trees)) == []


def test_a_public_name_stands_once(trees):
    assert names_defined_twice(trees) == {}


def test_private_names_of_others_are_those_listed(trees):
    assert borrowed_private_names(trees) - WORDS == BORROWED


def test_the_gates_see_what_they_forbid(tmp_path):
    package = tmp_path / "house"
    for name, text in {
        "hosts/a.py": "from house.cli.b import c",
        "cli/b.py": 'HOME = "house.hosts.a:x"\nclass Twice:\n    pass\n',
        "errors.py": "class Twice:\n"
        + "".join(f"    def f{i}(self): self.x._strange\n" for i in range(MAX_METHODS + 1)),
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text, encoding="utf-8")
    trees = read(package)
    graph = imports(trees, "house")

    assert list(climbs(graph)) == ["house.hosts.a -> house.cli.b"]
    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()
    assert list(large_classes(trees)) == [f"house.errors.Twice has {MAX_METHODS + 1} methods"]
    assert names_defined_twice(trees) == {"Twice": ["house.cli.b", "house.errors"]}
    assert borrowed_private_names(trees) == {"_strange"}


@pytest.mark.parametrize("page", ["architecture.md", "contributing.md"])
def test_what_the_pages_name_exists(page):
    text = (PACKAGE.parents[0] / "docs" / page).read_text(encoding="utf-8")
    for path, name in re.findall(r"`([a-z_]+/[a-z_/]+\.py)(?::(\w+))?`", text):
        file = next(base / path for base in (PACKAGE, PACKAGE.parent) if (base / path).is_file())
        tree = ast.parse(file.read_text(encoding="utf-8"))
        known = {
            getattr(node, "name", None) or ast.unparse(getattr(node, "target", ast.Name(""))) for node in tree.body
        }
        assert not name or name in known, f"{path}:{name}"


def main():
    trees = read(PACKAGE)
    graph = imports(trees, PACKAGE.name)
    for climb in climbs(graph):
        print("UP", climb)
    height = layers(graph)
    for name, targets in sorted(rooms_of(graph).items(), key=lambda item: -height[item[0]]):
        print(f"{height[name]:2} {name:14} -> {', '.join(sorted(targets, key=lambda t: -height[t]))}")
    arrows = sum(map(len, rooms_of(graph).values()))
    print(f"{len(height)} rooms, {max(height.values())} layers, {arrows} arrows, {len(graph)} files")
    for line in [*crowded(PACKAGE), *large_classes(trees)]:
        print(line)
    for name, modules in sorted(names_defined_twice(trees).items()):
        print("TWICE", name, *modules)


if __name__ == "__main__":
    main()
