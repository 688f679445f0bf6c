"""Encoder-decoders, images and sounds go the whole way that texts go: watched, compressed, proved, scored, healed."""

import io
import re
import wave

import numpy as np
import pytest
import torch
import transformers
from shrunk import build_shrunk
from tiny_architectures import build_architecture
from tiny_media import IMAGES, PICTURES, RATE, SOUNDS, feature_extractor, image_processor
from tiny_tokenizers import LETTERS, encoder_tokenizer

from hf_lowrank import InputError, compress, evaluate, make_report, recover
from hf_lowrank.cli import main
from hf_lowrank.data.batches import make_batches, rows_of
from hf_lowrank.data.synthetic import natural_noise
from hf_lowrank.data.target_texts import reads_targets, told_apart, with_targets
from hf_lowrank.hosts.blocks import Walk, calls_in_order, find_blocks, hidden_states, recorded_outputs
from hf_lowrank.hosts.dummy_inputs import dummy_inputs
from hf_lowrank.hosts.loading import load_dense, load_processor
from hf_lowrank.hosts.outputs import IGNORED_LABEL, run
from hf_lowrank.hosts.targets import find_matrices
from hf_lowrank.statistics.collection import STATISTICS, collect_statistics

WRITERS = [
    "T5ForConditionalGeneration",
    "BartForConditionalGeneration",
    "MarianMTModel",
    "PegasusForConditionalGeneration",
]
PAIRS = [{"source": " ".join(LETTERS[i : i + 5 + i % 3]), "target": " ".join(LETTERS[i : i + 4])} for i in range(16)]


def loaded(name, folder):
    build_architecture(name).save_pretrained(folder)
    return load_dense(folder)


def batch_of(read, written, seed=0):
    """Tokens to read and labels to write, of rows of these lengths."""
    generator = torch.Generator().manual_seed(seed)

    def side(lengths, fill):
        ids = torch.randint(3, 60, (len(lengths), max(lengths)), generator=generator)
        mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
        return torch.where(mask, ids, fill), mask.long()

    ids, mask = side(read, 0)
    return {"input_ids": ids, "attention_mask": mask, "labels": side(written, IGNORED_LABEL)[0]}


@pytest.fixture(scope="module", params=WRITERS)
def writer(request, tmp_path_factory):
    model = loaded(request.param, tmp_path_factory.mktemp("dense"))
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 0
    return model


def test_labels_are_read_by_the_decoder_as_the_host_does_it(writer):
    batch = batch_of([9, 6], [7, 3])

    said = run(writer, with_targets([batch], writer)[0])

    expected = writer(**batch).logits[batch["labels"] != IGNORED_LABEL]
    assert torch.allclose(said.rows, expected, atol=1e-5)


def test_without_labels_the_decoder_reads_what_the_model_writes(writer):
    rows = batch_of([9, 6], [1, 1])
    del rows["labels"]

    found = with_targets([rows], writer)[0]

    written = writer.generate(**rows, do_sample=False, num_beams=1, max_new_tokens=29)
    real = found["labels"] != IGNORED_LABEL
    assert real.any(dim=1).all()
    assert found["decoder_input_ids"][:, 0].tolist() == written[:, 0].tolist() == [0, 0]
    width = min(written.shape[1] - 1, real.shape[1])
    assert torch.equal(found["labels"][:, :width][real[:, :width]], written[:, 1 : width + 1][real[:, :width]])
    assert torch.equal(found["decoder_input_ids"][:, 1:][real[:, 1:]], found["labels"][:, :-1][real[:, 1:]])


def test_every_matrix_is_averaged_over_the_tokens_it_sees(writer, tmp_path):
    batches = with_targets([batch_of([9, 6], [7, 3]), batch_of([5, 5], [5, 2])], writer)
    matrices = find_matrices(writer)
    seen = {matrix.name: [] for matrix in matrices if matrix.role == "block"}
    hooks = [
        matrix.module.register_forward_pre_hook(
            lambda module, inputs, name=matrix.name: seen[name].append(
                inputs[0].reshape(len(inputs[0]), -1, inputs[0].shape[-1])
            )
        )
        for matrix in matrices
        if matrix.role == "block"
    ]
    for batch in batches:
        run(writer, batch)
    for hook in hooks:
        hook.remove()

    found = collect_statistics(
        writer, matrices, batches, frozenset(STATISTICS), path=tmp_path / "s.safetensors", fingerprint="a"
    )

    for matrix in (matrix for matrix in matrices if matrix.name in seen):
        reads = "encoder." in matrix.name.replace("decoder.", "") or re.search(
            r"(encoder_attn|EncDecAttention)\.[kv]", matrix.name
        )
        counts = [([9, 6], [5, 5]), ([7, 3], [5, 2])][0 if reads else 1]
        rows = torch.cat(
            [part[row, :n] for part, ns in zip(seen[matrix.name], counts, strict=True) for row, n in enumerate(ns)]
        )
        assert found[matrix.name].num_tokens == len(rows), matrix.name
        moment = rows.double().T @ rows.double() / len(rows)
        assert torch.allclose(found[matrix.name].input_moment, moment, rtol=1e-3, atol=1e-5), matrix.name
        assert found[matrix.name].output_moment.trace() > 0


def test_blocks_are_walked_stack_by_stack(writer):
    batch = with_targets([batch_of([9, 6], [7, 3])], writer)[0]
    blocks = calls_in_order(writer, find_blocks(writer, find_matrices(writer)), batch)
    with recorded_outputs(writer, blocks) as expected, torch.no_grad():
        run(writer, batch)

    walk = Walk(writer, blocks, [batch])

    for name in blocks:
        assert torch.equal(hidden_states(walk.advance()[0]), hidden_states(expected[name])), name


def test_sides_of_one_length_are_told_apart():
    batch = told_apart(
        {"input_ids": torch.ones(2, 5), "decoder_input_ids": torch.ones(2, 5), "labels": torch.ones(2, 5)}
    )

    assert batch["decoder_input_ids"].shape == batch["labels"].shape == (2, 6)
    assert (batch["labels"][:, 5] == IGNORED_LABEL).all()


def test_heads_that_make_their_own_decoder_inputs_are_left_alone():
    names = ["BartForSequenceClassification", "BartForConditionalGeneration", "BartModel", "ViTForImageClassification"]
    heads = {
        "BartForSequenceClassification": "BartForConditionalGeneration",
        "BartModel": "BartForConditionalGeneration",
    }

    found = {
        name: reads_targets(getattr(transformers, name)(build_architecture(heads.get(name, name)).config))
        for name in names
    }

    assert found == dict(zip(names, (False, True, True, False), strict=True))


def saved_model(name, folder):
    """A model of images or sounds with its processor, as users have it."""
    build_architecture(name).save_pretrained(folder)
    (image_processor if name.startswith("ViT") else feature_extractor)().save_pretrained(folder)
    return folder


def wav(samples, rate=RATE):
    written = io.BytesIO()
    with wave.open(written, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return written.getvalue()


def png(picture):
    written = io.BytesIO()
    picture.save(written, "PNG")
    return written.getvalue()


# How data sets, files and arrays hold an image, and a sound.
AS_IMAGE = {
    "Pillow": lambda folder: {"image": PICTURES[0]},
    "array": lambda folder: {"picture": np.asarray(PICTURES[0])},
    "bytes": lambda folder: {"image": {"bytes": png(PICTURES[0]), "path": None}},
    "path": lambda folder: {"file": folder / "one.png"},
}
TONE = np.sin(np.arange(400) / 9).astype(np.float32) / 2
AS_SOUND = {
    "array": lambda folder: {"audio": {"array": TONE, "sampling_rate": RATE}},
    "bytes": lambda folder: {"audio": {"bytes": wav(TONE), "path": None}},
    "path": lambda folder: {"file": str(folder / "one.wav")},
}


@pytest.mark.parametrize("way", [*AS_IMAGE, *(f"sound as {way}" for way in AS_SOUND)])
def test_however_data_hold_an_image_or_a_sound_it_is_the_same(way, tmp_path):
    (tmp_path / "one.png").write_bytes(png(PICTURES[0]))
    (tmp_path / "one.wav").write_bytes(wav(TONE))
    ways, processor = (AS_IMAGE, image_processor()) if way in AS_IMAGE else (AS_SOUND, feature_extractor())
    first = next(iter(ways.values()))

    expected, found = (
        make_batches([make(tmp_path)], processor)[0] for make in (first, ways[way.removeprefix("sound as ")])
    )

    assert expected.keys() == found.keys()
    assert all(torch.allclose(expected[name], found[name], atol=1e-2) for name in expected)


def test_a_sound_is_averaged_over_the_frames_that_are_no_padding(tmp_path):
    model = loaded("Wav2Vec2ForCTC", tmp_path / "dense")
    batch = make_batches(SOUNDS, feature_extractor(), batch_size=20)[0]

    found = collect_statistics(
        model,
        find_matrices(model),
        [batch],
        frozenset({"input_moment"}),
        path=tmp_path / "s.safetensors",
        fingerprint="a",
    )

    frames = int(model._get_feat_extract_output_lengths(batch["attention_mask"].sum(dim=1)).sum())
    counts = {matrix.num_tokens for name, matrix in found.items() if "encoder.layers" in name}
    assert len(counts) == 1
    assert abs(counts.pop() - frames) <= len(SOUNDS)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "Wav2Vec2ForCTC", "BartForConditionalGeneration"])
@pytest.mark.parametrize("has_data", [True, False], ids=["data", "no data"])
def test_the_default_looks_at_what_a_model_reads_and_what_is_saved_computes_the_same(name, has_data, tmp_path):
    sources = {"ViT": IMAGES, "Wav": SOUNDS, "Bar": PAIRS}
    given = {"calibration": sources[name[:3]]} if has_data else {}
    if name.startswith("Bart"):
        dense = loaded(name, tmp_path / "dense")
        given["tokenizer"] = encoder_tokenizer()
    else:
        dense = load_dense(saved_model(name, tmp_path / "dense"))

    small = compress(dense, keep_targets=0.5, **given)

    assert small.config.compression["provenance"]["text"]["source"] == ("rows" if has_data else "synthetic")
    assert ("refinement" in small.config.compression["provenance"]) is has_data
    small.save_pretrained(tmp_path / "small")
    again = type(small).from_pretrained(tmp_path / "small").eval()
    inputs = dummy_inputs(dense)
    with torch.no_grad():
        assert torch.equal(small(**inputs).logits, again(**inputs).logits)
    if has_data:
        reader = given.get("tokenizer")
        healed = recover(again, teacher=dense, dataset=given["calibration"], tokenizer=reader, epochs=1)
        found = healed.config.compression["provenance"]["recovery"]
        assert found["before"] >= found["after"] > 0
        data = [row["source"] for row in PAIRS] if reader else given["calibration"]
        reader = reader or load_processor(str(tmp_path / "dense"), dense)
        scores = evaluate(healed, data, "agreement", dense=dense, tokenizer=reader).model.scores
        assert 0 <= scores["top1_agreement"] <= 1


def test_images_go_from_a_folder_to_a_proven_card_on_the_command_line(tmp_path, capsys):
    dense, small, images = (str(tmp_path / name) for name in ("dense", "small", "images"))
    saved_model("ViTForImageClassification", tmp_path / "dense")
    for number, row in enumerate(IMAGES):
        file = tmp_path / "images" / f"LABEL_{row['label']}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(file)

    assert main(["compress", dense, small, "--keep-targets", "0.5", "--calibration", images]) == 0
    scored = ["evaluate", small, "--dense", dense, "--dataset", images, "--task", "image-classification", "--record"]
    assert main(scored) == 0
    assert main(["verify", small]) == 0
    assert main(["push", small, "me/small", "--dry-run"]) == 0

    capsys.readouterr()
    card = (tmp_path / "small" / "README.md").read_text()
    assert "Looked at 20 images or sounds of `images`" in card
    assert f"image-classification on {tmp_path.name}/images" in card
    assert 'pipeline("image-classification"' in card
    assert not main(
        ["recover", small, str(tmp_path / "healed"), "--teacher", dense, "--dataset", images, "--epochs", "1"]
    )


@pytest.mark.parametrize("model_type", ["clip", "llava"])
def test_what_no_data_reach_stays_dense_and_is_told_and_all_else_is_replaced(model_type, tmp_path):
    build_shrunk(model_type).save_pretrained(tmp_path)
    dense = load_dense(tmp_path)

    small = compress(dense, keep_targets=0.5)

    kept = {one.name for one in make_report(small).modules if "nothing that was looked at" in one.note}
    assert bool(kept) is (model_type == "llava")
    assert all("vision" in name for name in kept)
    assert any("vision" in name or "encoder" in name for name in small.config.compression["modules"]) is not bool(kept)
    assert torch.isfinite(small(**dummy_inputs(dense))[0]).all()


REFUSED = {
    "text for a model of images": (["some text"] * 4, "reads images or sounds, and no column is one: text"),
    "a file that is no image": ([{"image": {"bytes": b"x"}}] * 4, "neither an image nor 16-bit WAV"),
    "sounds for a model of images": (SOUNDS, "ViTImageProcessorPil cannot read the data"),
    "nothing there": ([{"image": None}] * 4, "no column is one: image"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_processor_cannot_read_is_one_line(case, tmp_path):
    data, message = REFUSED[case]

    with pytest.raises(InputError, match=message) as error:
        compress(saved_model("ViTForImageClassification", tmp_path), keep_targets=0.5, calibration=data)

    assert "\n" not in str(error.value)


def test_sounds_of_several_rates_are_refused():
    rows = [SOUNDS[0], {"audio": {"array": TONE, "sampling_rate": 2 * RATE}}]

    with pytest.raises(InputError, match="several rates: 8000, 16000"):
        make_batches(rows, feature_extractor())


def test_a_model_of_images_without_a_processor_says_what_to_give(tmp_path):
    dense = loaded("ViTForImageClassification", tmp_path)

    with pytest.raises(InputError, match=r"reads pixel_values, and there is no processor .* batches of pixel_values"):
        compress(dense, keep_targets=0.5, calibration=IMAGES)


def test_noise_has_the_spectrum_of_natural_images():
    noise = natural_noise(torch.Size([64, 1, 32, 32]), torch.Generator().manual_seed(0))

    power = torch.fft.rfft2(noise).abs().square().mean(dim=(0, 1))
    assert (noise.mean().abs() < 1e-5, abs(float(noise.std()) - 1) < 1e-3) == (True, True)
    assert float(power[0, 4] / power[0, 8]) == pytest.approx(4, rel=0.5)  # amplitude 1 / f


def test_rows_of_a_batch_lose_the_padding_of_their_own_side():
    rows = rows_of(told_apart({**batch_of([9, 6], [7, 3]), "decoder_input_ids": torch.ones(2, 7)}))

    assert [[len(row["input_ids"]), len(row["labels"])] for row in rows] == [[9, 7], [6, 7]]
