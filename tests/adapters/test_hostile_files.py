"""Files made to hang, to take all memory, or to change under the reader's hands end in our errors, soon."""

from __future__ import annotations

import hashlib
import json
import struct
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from onnx_lora import bind, read_adapter
from onnx_lora.adapters.formats.files import gguf_file, pickle_program
from onnx_lora.adapters.formats.files import zip_archive as zip_file
from onnx_lora.adapters.formats.files.npz_file import read_npz
from onnx_lora.adapters.formats.files.reading import open_reading
from onnx_lora.adapters.formats.files.torch_pickle import read_torch_pickle
from onnx_lora.adapters.problems import abbreviate
from onnx_lora.errors import AdapterFileError, InputError
from tests.adapters.building import PackageBuilder, lora, numbers, peft_folder
from tests.adapters.test_format_gguf import file as gguf_sample

SOON = 10  # seconds


def read_bin(folder: Path, program: bytes) -> Any:
    file = folder / "adapter_model.bin"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", program)
        archive.writestr("a/data/0", bytes(4))
    with open_reading(file) as reading:
        return read_torch_pickle(reading).tensors


# --- pickles -----------------------------------------------------------------------------------

# A tuple of 30 tuples, each of which holds the one before ten times: 10^30 members. It stands on the stack whole.
BOMB = b"((K\x01tq\x00" + b"(h\x00h\x00h\x00h\x00h\x00h\x00h\x00h\x00h\x00h\x00tq\x00" * 30 + b"t"
STORAGE = b"ctorch\nFloatStorage\n"


@pytest.mark.parametrize(
    "program",
    [
        BOMB + b"Q.",
        b"(" + BOMB + STORAGE + b"U\x010U\x03cpuK\x01tQ.",
        b"(U\x07storage" + BOMB + b"U\x010U\x03cpuK\x01tQ.",
        b"(U\x07storage" + STORAGE + BOMB + b"U\x03cpuK\x01tQ.",
        b"(U\x07storage" + STORAGE + b"U\x010U\x03cpu" + BOMB + b"tQ.",
        b"(U\x07storage" + STORAGE + b"U\x010U\x03cpuK\x01" + BOMB + b"tQ.",
        b"}" + BOMB + b"K\x01s.",
        b"}(" + BOMB + b"K\x01u.",
        b"(" + BOMB + b"K\x01d.",
        b"}U\x01a" + BOMB + b"s.",
        b"]" + BOMB + b"b.",
        b"ccollections\nOrderedDict\n" + BOMB + b"\x85R.",
        b"ccollections\nOrderedDict\n" + BOMB + b"R.",
        b"ccollections\nOrderedDict\n](" + BOMB + b"K\x01\x86e\x85R.",
        b"ctorch\nSize\n" + BOMB + b"\x85R.",
        b"ctorch._utils\n_rebuild_parameter\n" + BOMB + b"\x85R.",
        b"ctorch._utils\n_rebuild_tensor_v2\n((U\x07storage" + STORAGE + b"U\x010U\x03cpuK\x01tQK\x00" + BOMB + b")tR.",
        b"ctorch._utils\n_rebuild_tensor_v2\n((U\x07storage" + STORAGE + b"U\x010U\x03cpuK\x01tQ" + BOMB + b"))tR.",
        BOMB + b"U\x01a\x93.",
        BOMB + b"(R.",
        BOMB + b".",
    ],
)
def test_tuples_that_hold_each_other_are_never_looked_into(tmp_path: Path, program: bytes) -> None:
    begin = time.perf_counter()
    with pytest.raises(AdapterFileError):
        read_bin(tmp_path, b"\x80\x02" + program)
    assert time.perf_counter() - begin < SOON


def test_attributes_of_a_state_dict_are_not_looked_into(tmp_path: Path) -> None:
    assert read_bin(tmp_path, b"\x80\x02}" + BOMB + b"b.") == {}


@pytest.mark.parametrize("opcode", [b"0", b"2", b"1", b"\x81", b"o", b"i", b"\x82\x01", b"\x8f", b"\x91", b"P"])
def test_instructions_that_torch_save_does_not_write_are_refused(tmp_path: Path, opcode: bytes) -> None:
    with pytest.raises(AdapterFileError):
        read_bin(tmp_path, b"\x80\x02}" + opcode + b"os\nsystem\n.")


def test_marks_without_end_are_refused(tmp_path: Path) -> None:
    begin = time.perf_counter()
    with pytest.raises(AdapterFileError, match="in more than 100 others"):
        read_bin(tmp_path, b"(" * 10**7)
    assert time.perf_counter() - begin < SOON


def test_instructions_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_program, "_MOST_INSTRUCTIONS", 1000)
    with pytest.raises(AdapterFileError, match="more than 1000 instructions"):
        read_bin(tmp_path, b"]" + b"Na" * 1000 + b".")


def test_what_python_2_wrote_is_read(tmp_path: Path) -> None:
    """Texts as bytes, and a state dict made of pairs."""
    tensor = b"ctorch._utils\n_rebuild_tensor\n((U\x07storage" + STORAGE + b"U\x010U\x03cpuK\x01tQK\x00(K\x01t(K\x01ttR"
    program = b"\x80\x02ccollections\nOrderedDict\n(](](U\x03\xc3\xa9w" + tensor + b"eetR."
    assert {name: values.shape for name, values in read_bin(tmp_path, program).items()} == {"éw": (1,)}


def test_tensors_that_use_a_file_again_and_again_are_refused(tmp_path: Path) -> None:
    storage = b"(U\x07storage" + STORAGE + b"U\x010U\x03cpuM\xff\xfftQq\x00"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(h\x00K\x00(M\xff\xfft(K\x00t\x89NtR"
    items = b"".join(b"X\x04\x00\x00\x00" + f"{number:04}".encode() + tensor for number in range(4000))
    with pytest.raises(AdapterFileError, match="the whole file has"):
        read_bin(tmp_path, b"\x80\x02" + storage + b"\x85" + b"}(" + items + b"u.")


# --- archives ----------------------------------------------------------------------------------


def npz(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def read_npz_file(path: Path) -> Any:
    with open_reading(path) as file:
        return read_npz(file).tensors


def npy(header: bytes, data: bytes = b"", *, version: bytes = b"\x01\x00") -> bytes:
    length = struct.pack("<H" if version == b"\x01\x00" else "<I", len(header))
    return b"\x93NUMPY" + version + length + header + data


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"'",
        b"(" * 5000,
        b"__import__('os').system('x')",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (1,)",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (1L,)'}",
        b"{'descr': 'O', 'fortran_order': False, 'shape': (1,)}",
        b"{'descr': 'f16', 'fortran_order': False, 'shape': (1,)}",
        b"{'descr': 'V99999999999', 'fortran_order': False, 'shape': (1,)}",
        b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"9" * 5000 + b",)}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
        b"{'descr': '<f4', 'fortran_order': 3, 'shape': 'x'}",
        b"\xff\xfe\0\0",
    ],
)
@pytest.mark.parametrize("version", [b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"])
def test_headers_of_npz_that_are_no_literal_are_refused(tmp_path: Path, header: bytes, version: bytes) -> None:
    with pytest.raises(AdapterFileError):
        read_npz_file(npz(tmp_path / "x.npz", {"a.npy": npy(header, bytes(4), version=version)}))


def test_encrypted_members_are_refused(tmp_path: Path) -> None:
    path = npz(tmp_path / "x.npz", {"a.npy": b"secret"})
    data = bytearray(path.read_bytes())
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + place] |= 1
    path.write_bytes(data)
    with pytest.raises(AdapterFileError, match="not compressed or encrypted"):
        read_npz_file(path)


def test_archives_of_too_many_members_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zip_file, "_MOST_MEMBERS", 10)
    with pytest.raises(AdapterFileError, match="at most 10 members"):
        read_npz_file(npz(tmp_path / "x.npz", {f"{number}": b"" for number in range(11)}))


# --- totals ------------------------------------------------------------------------------------


def test_arrays_of_gguf_are_counted_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"output.weight.lora_a": numbers(2, 4), "output.weight.lora_b": numbers(8, 2)}
    path = gguf_sample(tmp_path / "x.gguf", tensors, arch="llama", fields={"llama.attention.head_count": 2})
    read_adapter(path)
    monkeypatch.setattr(gguf_file, "_MOST_VALUES", 3)
    with pytest.raises(AdapterFileError, match="cannot hold"):
        read_adapter(path)


def test_values_of_a_header_are_counted_before_they_are_made(tmp_path: Path) -> None:
    text = b'{"a":[' + b"[]," * 2_000_000 + b"[]]}"
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(AdapterFileError, match="at most 2000000 values"):
        read_adapter(tmp_path / "x.safetensors")


# --- names, numbers, paths ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a\0b", "a\x1b[31m", "a\nb", "x" * 1001])
def test_names_that_nothing_can_be_called_are_refused(tmp_path: Path, name: str) -> None:
    folder = peft_folder(tmp_path / "a", lora("m.q", 4, 6) | {f"{name}.weight": numbers(2)})
    with pytest.raises(AdapterFileError, match="a name must have") as caught:
        read_adapter(folder)
    assert str(caught.value).replace("\n", "").isprintable()


def test_halves_of_characters_are_refused(tmp_path: Path) -> None:
    header = json.dumps({"\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(AdapterFileError, match="damaged"):
        read_adapter(tmp_path / "x.safetensors")
    with pytest.raises(AdapterFileError):
        read_bin(tmp_path, b"\x80\x02}X\x03\x00\x00\x00\xed\xa0\x80Ns.")


@pytest.mark.parametrize("path", [b"adapter", 3, None, ["a"], object()])
def test_what_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(InputError, match="a path must be"):
        read_adapter(path)


def test_an_initial_adapter_must_have_a_path_too(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a path must be"):
        read_adapter(peft_folder(tmp_path), initial=b"adapter")  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "\ud800"])
def test_paths_that_no_file_can_have_are_refused(path: str) -> None:
    with pytest.raises(AdapterFileError):
        read_adapter(path)


@pytest.mark.parametrize("value", [[[[]]] * 10**5, "x" * 10**7, 10**299, {"a": {"b": {"c": [{}] * 1000}}}])
def test_a_value_in_a_message_is_short(value: Any) -> None:
    assert len(abbreviate(value)) <= 80


# --- one reading -------------------------------------------------------------------------------


def ours(folder: Path) -> Path:
    path = folder / "ours.safetensors"
    tensors = {"m.q.lora_A.weight": numbers(1, 4, 2), "m.q.lora_B.weight": numbers(1, 2, 6)}
    path.write_bytes(safetensors.numpy.save(tensors, {"onnx_lora": "1"}))
    return path


def kohya(folder: Path) -> Path:
    path = folder / "kohya.safetensors"
    tensors = {"lora_unet_q.lora_down.weight": numbers(2, 4), "lora_unet_q.lora_up.weight": numbers(6, 2)}
    path.write_bytes(safetensors.numpy.save(tensors))
    return path


def gguf(folder: Path) -> Path:
    tensors = {"output.weight.lora_a": numbers(2, 4), "output.weight.lora_b": numbers(8, 2)}
    return gguf_sample(folder / "x.gguf", tensors, arch="llama")


def peft(folder: Path) -> Path:
    return peft_folder(folder / "peft") / "adapter_model.safetensors"


@pytest.mark.parametrize("sample", [ours, kohya, gguf, peft])
def test_weights_are_opened_once_and_the_digest_is_of_what_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample: Any
) -> None:
    path: Path = sample(tmp_path)
    opens: Counter[str] = Counter()
    opening = Path.open

    def counted(self: Path, *args: Any, **options: Any) -> Any:
        opens[self.name] += 1
        return opening(self, *args, **options)

    monkeypatch.setattr(Path, "open", counted)
    adapter = read_adapter(path.parent if path.name.startswith("adapter_model") else path)
    assert opens[path.name] == 1
    monkeypatch.undo()
    assert adapter.origin.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_that_is_replaced_while_it_is_read_stays_the_one_that_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"before" * 100_000)
    with open_reading(path) as file:
        assert file.take(6) == b"before"
        (tmp_path / "b").write_bytes(b"behind" * 100_000)
        (tmp_path / "b").replace(path)
        assert file.rest() == b"before" * 99_999
        assert file.sha256() == hashlib.sha256(b"before" * 100_000).hexdigest()


def test_a_file_that_is_cut_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(10**6))
    with open_reading(path) as file:
        file.take(6)
        path.write_bytes(b"")
        with pytest.raises(AdapterFileError, match="cut off while it was read"):
            file.rest()


# --- many modules ------------------------------------------------------------------------------


def test_what_is_wrong_with_a_shared_tensor_is_said_once(tmp_path: Path) -> None:
    tensors = {"base_model.vera_A": np.full((2, 4), np.nan, "f4"), "base_model.vera_B": numbers(6, 2)}
    for module in ("m.q", "m.v", "n.q"):
        tensors[f"base_model.model.{module}.vera_lambda_d"] = numbers(2)
        tensors[f"base_model.model.{module}.vera_lambda_b"] = numbers(6)
    folder = peft_folder(
        tmp_path, tensors, peft_type="VERA", remove=["lora_alpha", "lora_dropout", "init_lora_weights"]
    )
    with pytest.raises(AdapterFileError) as caught:
        read_adapter(folder)
    assert caught.value.problems == ("vera_A: 8 of 8 values are NaN or infinite; train or save it again",)


def test_thousands_of_modules_are_read_and_bound_in_linear_time(tmp_path: Path) -> None:
    """Whole weights, saved modules, patterns and factors: each of them once took a look at all others."""
    names = [f"model.layers.{number}.mlp" for number in range(4000)]
    builder = PackageBuilder(tmp_path / "package")
    tensors: dict[str, Any] = {}
    for name in names:
        builder.point(f"{name}.q", 2, 2).whole(f"{name}.norm.weight", 2)
        tensors |= lora(f"{name}.q", 2, 2, rank=1)
        tensors[f"base_model.model.{name}.norm.weight"] = numbers(2)
    config = {"target_modules": [f"{name}.q" for name in names], "modules_to_save": [f"{name}.norm" for name in names]}
    ranks = {f"{name}.q": 1 for name in names}
    folder = peft_folder(tmp_path / "adapter", tensors, rank_pattern=ranks, alpha_pattern=ranks, **config)
    package = builder.open()
    begin = time.process_time()
    bound = bind(read_adapter(folder), package)
    assert time.process_time() - begin < 12  # seconds; a look at all modules for each took 20
    assert (len(bound.coverage.applied), len(bound.coverage.replaced)) == (4000, 4000)


def test_a_config_deeper_than_python_can_print_ends_in_our_error(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path)
    for depth in (500, 900, 990, 5000):
        text = '{"peft_type": "LORA", "r": ' + "[" * depth + "]" * depth + "}"
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(AdapterFileError):
            read_adapter(folder)
