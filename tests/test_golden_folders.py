"""What this library has saved once loads for ever, with the code it was saved with and with today's."""

import json
import zipfile

import pytest
from elsewhere import run_elsewhere
from every_structure import OF_ANY_MODEL
from golden_folders import ARCHIVES, AUTO_CLASSES, HEADS, TOLERANCE, load_golden

import hf_lowrank
from hf_lowrank.remote_code.lowrank_table import CODES, SHARED_PARTS, STRUCTURES

each_archive = pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: f"{path.parent.name}-{path.stem}")


@each_archive
def test_a_golden_folder_loads_with_the_library_and_computes_what_it_did(archive, tmp_path):
    model_class, info, error = load_golden(archive, tmp_path)

    head = archive.stem.partition("-")[2]
    assert model_class.__name__ == f"LowRank{head}"
    assert head not in HEADS or model_class is getattr(hf_lowrank, f"LowRank{head}")  # families it registers
    assert not any(info.values())
    assert error <= TOLERANCE


def test_golden_folders_of_every_structure_load_without_the_library_and_compute_what_they_did(tmp_path):
    # Each structure in one kind of model: the code is the same in all. `python tests/golden_folders.py` loads all.
    code = "import golden_folders as golden; golden.main([golden.ARCHIVES[i] for i in jobs['chosen']])"
    places = {}
    for index, archive in enumerate(ARCHIVES):
        places.setdefault((archive.parent, archive.stem.partition("-")[0]), []).append(index)

    run_elsewhere(code, tmp_path, chosen=[found[turn % len(found)] for turn, found in enumerate(places.values())])


@pytest.mark.parametrize("head", AUTO_CLASSES)
def test_every_structure_and_shared_part_is_in_a_golden_folder(head):
    found = set()
    for archive in ARCHIVES:
        if archive.stem.endswith(head):
            plan = json.loads(zipfile.ZipFile(archive).read("config.json"))["compression"]
            found |= {spec["structure"] for spec in [*plan["modules"].values(), *plan.get("shared", {}).values()]}
            found |= {plan["packed"]["code"]} if "packed" in plan else set()

    tied = {name for name in STRUCTURES if name.endswith("_head")}  # follow the table, which the plan names
    expected = {*OF_ANY_MODEL, *SHARED_PARTS, *CODES} if head in HEADS else {*STRUCTURES} - {*OF_ANY_MODEL}
    assert found >= expected - tied
