"""Where text comes from, and that batch `step` is the same whoever asks for it, whenever."""

import threading
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from geodiag.reference_models.data import Batch, Loader
from geodiag.reference_models.text import Corpus, flat_tokens, open_corpus, stdlib


@pytest.fixture(scope="module")
def library() -> Corpus:
    return stdlib()


@pytest.fixture
def three() -> Corpus:
    """Three domains, each of its own ids, sized 1 : 2 : 7."""
    sizes = {"a": 1000, "b": 2000, "c": 7000}
    rng = np.random.default_rng(0)
    return Corpus(
        {d: rng.integers(10 * i, 10 * i + 10, n) for i, (d, n) in enumerate(sizes.items())},
        vocab=30,
    )


def same(a: Batch, b: Batch) -> bool:
    return (
        a.step == b.step
        and a.domain_B == b.domain_B
        and torch.equal(a.token_ids_BS, b.token_ids_BS)
        and torch.equal(a.targets_BS, b.targets_BS)
    )


# -- where text comes from -----------------------------------------------------------------


def test_the_standard_library_has_several_domains_and_enough_text(library: Corpus) -> None:
    assert len(library.domains) >= 3
    assert {"code", "codecs"} <= set(library.domains)
    assert library.tokens > 5e6
    assert library.vocab == 256
    assert min(len(t) for t in library.domains.values()) > 10_000


def test_the_standard_library_is_found_for_every_installation_of_python(
    monkeypatch, tmp_path: Path
) -> None:
    root = tmp_path / "site-packages" / "python"
    (root / "encodings").mkdir(parents=True)
    (root / "site-packages/torch").mkdir(parents=True)
    (root / "re.py").write_text("import enum\n")
    (root / "encodings/latin.py").write_text("table\n")
    (root / "site-packages/torch/nn.py").write_text("not the library's own\n")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(root)})
    assert {d: bytes(t) for d, t in stdlib().domains.items()} == {
        "code": b"import enum\n",
        "codecs": b"table\n",
    }


def test_a_folder_is_read_by_kind_of_file_and_a_file_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "deep/er/a.py").write_text("x = 1\n")
    (tmp_path / "b.md").write_text("héllo\n", encoding="utf-8")
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8")
    (tmp_path / "empty.txt").touch()
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/not_mine.py").write_text("y = 2\n")
    found = open_corpus(str(tmp_path))
    assert {d: bytes(t) for d, t in found.domains.items()} == {
        "code": b"x = 1\n",
        "prose": "héllo\n".encode(),
    }
    assert bytes(open_corpus(str(tmp_path / "b.md")).domains["prose"]) == "héllo\n".encode()


def write(path: Path, ids: np.ndarray, kind: str) -> Path:
    ids.astype(kind).tofile(path)
    return path


@pytest.mark.parametrize("vocab", [40, 65, 256, 50_257, 60_000])
@pytest.mark.parametrize("kind", ["<u2", "<u4"])
def test_sixteen_and_thirty_two_bit_tokens_are_distinguished(
    tmp_path: Path, vocab: int, kind: str
) -> None:
    ids = np.random.default_rng(0).integers(0, vocab, 4000)
    ids[17] = vocab - 1
    found = flat_tokens(write(tmp_path / "t.bin", ids, kind))
    assert found.domains["t"].tolist() == ids.tolist()
    assert found.vocab == vocab


@pytest.mark.parametrize("vocab", [70_000, 129_280, 262_144])
def test_vocabularies_beyond_sixteen_bits_are_read_as_thirty_two(
    tmp_path: Path, vocab: int
) -> None:
    ids = np.random.default_rng(0).integers(0, vocab, 4000)
    assert flat_tokens(write(tmp_path / "t.bin", ids, "<u4")).domains["t"].tolist() == ids.tolist()


def test_an_odd_number_of_sixteen_bit_tokens_is_read_whole(tmp_path: Path) -> None:
    ids = np.arange(4001) % 300
    assert flat_tokens(write(tmp_path / "t.bin", ids, "<u2")).domains["t"].tolist() == ids.tolist()


def test_the_largest_id_counts_at_every_position(tmp_path: Path) -> None:
    ids = np.ones(3_000_001, np.int64)
    ids[-1] = 999
    assert flat_tokens(write(tmp_path / "t.bin", ids, "<u2")).vocab == 1000


def test_missing_text_is_an_error_that_names_what_to_pass(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"\xff")
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing.txt").touch()
    (tmp_path / "odd.bin").write_bytes(b"12345")
    (tmp_path / "short.bin").write_bytes(b"12")
    for name, message in {
        "absent": "does not exist; pass --data stdlib, a folder",
        "photos": "holds no text or code files; pass a folder with some",
        "empty": "holds no text or code files",
        "nothing.txt": "is empty",
        "odd.bin": "has 5 bytes, no flat file of tokens; write the ids as uint16 or uint32",
        "short.bin": "has 2 bytes",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError)) as e:
            open_corpus(str(tmp_path / name))
        assert name in str(e.value)
        assert message in str(e.value)
        assert "\n" not in str(e.value)


def test_too_little_text_and_invalid_loader_settings_are_refused(three: Corpus) -> None:
    with pytest.raises(
        ValueError, match="has 10000 tokens, in no domain one sequence of 7001; add text"
    ):
        Loader(three, 4, 7000)
    with pytest.raises(ValueError, match="not 0, 0"):
        Loader(three, 0, 16)
    with pytest.raises(ValueError, match="a seed of at least 0, not 4, -1"):
        Loader(three, 4, 16, seed=-1)
    assert set(Loader(three, 4, 1999).batch(0).domain_B) <= {"b", "c"}, (
        "a domain that is too short is left out"
    )


# -- batches -------------------------------------------------------------------------------


def test_a_batch_is_a_function_of_corpus_seed_and_step(three: Corpus) -> None:
    a, b = Loader(three, 8, 16, seed=1), Loader(three, 8, 16, seed=1, step=50)
    assert all(same(a.batch(s), b.batch(s)) for s in (0, 7, 100_000))
    assert same(a.batch(7), a.batch(7))
    assert not torch.equal(a.batch(7).token_ids_BS, a.batch(8).token_ids_BS)
    assert not torch.equal(
        a.batch(7).token_ids_BS, Loader(three, 8, 16, seed=2).batch(7).token_ids_BS
    )


def test_iterating_gives_the_batches_one_would_ask_for_in_order(three: Corpus) -> None:
    loader = Loader(three, 8, 16, step=3)
    assert all(same(found, loader.batch(3 + i)) for i, found in enumerate(islice(loader, 20)))


def test_targets_are_the_next_tokens_of_one_window_of_one_domain(three: Corpus) -> None:
    found = Loader(three, 8, 16).batch(5)
    assert found.token_ids_BS.shape == found.targets_BS.shape == (8, 16)
    assert torch.equal(found.token_ids_BS[:, 1:], found.targets_BS[:, :-1])
    for row, last, domain in zip(
        found.token_ids_BS, found.targets_BS[:, -1], found.domain_B, strict=True
    ):
        window = np.append(row.numpy(), last)
        text = three.domains[domain]
        assert any(np.array_equal(text[i : i + 17], window) for i in range(len(text) - 16))


def test_the_last_window_of_a_text_can_come_up_and_none_beyond_it() -> None:
    loader = Loader(Corpus({"a": np.arange(20)}, 20), 4, 16)
    starts = Counter(int(s) for step in range(100) for s in loader.batch(step).token_ids_BS[:, 0])
    assert set(starts) == {0, 1, 2, 3}
    assert int(max(loader.batch(s).targets_BS.max() for s in range(100))) == 19


def test_every_batch_has_its_share_of_every_domain(three: Corpus) -> None:
    """Systematic sampling: a domain's count in a batch is its share, rounded down or up."""
    loader = Loader(three, 20, 16)
    total: Counter[str] = Counter()
    for step in range(200):
        counts = Counter(loader.batch(step).domain_B)
        total += counts
        for domain, size in three.domains.items():
            share = 20 * (len(size) - 16) / (three.tokens - 3 * 16)
            assert counts[domain] in (int(share), int(share) + 1)
    for domain, size in three.domains.items():
        share = (len(size) - 16) / (three.tokens - 3 * 16)
        assert total[domain] / 4000 == pytest.approx(share, abs=0.01)


def test_a_loader_resumes_where_the_last_batch_was_taken(three: Corpus) -> None:
    whole = list(islice(Loader(three, 4, 16, seed=5), 10))
    first = Loader(three, 4, 16, seed=5)
    batches = iter(first)
    for _ in range(4):
        next(batches)
    second = Loader(three, 4, 16)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == {"seed": 5, "step": 4}, (
        "what was made ahead and not taken does not count"
    )
    assert all(map(same, islice(second, 6), whole[4:]))


def makers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "geodiag-data"]


def test_batches_are_made_ahead_by_one_thread_that_ends_with_the_iteration(three: Corpus) -> None:
    before, made = len(makers()), []

    class Noted(Loader):
        def batch(self, step: int) -> Batch:
            made.append(step)
            return super().batch(step)

    batches = iter(Noted(three, 4, 16))
    next(batches)
    deadline = time.monotonic() + 10
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(makers()) == before + 1
    assert 5 <= len(made) <= 6, "ahead, and not without end"
    assert made == list(range(len(made)))
    batches.close()
    assert len(makers()) == before


def test_an_iteration_that_is_dropped_or_fails_ends_its_thread_too(three: Corpus) -> None:
    before = len(makers())
    for found in Loader(three, 4, 16):
        assert found.step == 0
        break
    del found

    class Broken(Loader):
        def batch(self, step: int) -> Batch:
            if step == 2:
                raise OSError("the disk is gone")
            return super().batch(step)

    batches = iter(Broken(three, 4, 16))
    assert [next(batches).step, next(batches).step] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert len(makers()) == before


def test_micro_batches_are_the_batch_cut_in_order(three: Corpus) -> None:
    found = Loader(three, 6, 16).batch(0)
    parts = found.split(3)
    assert torch.equal(torch.cat([p.token_ids_BS for p in parts]), found.token_ids_BS)
    assert torch.equal(torch.cat([p.targets_BS for p in parts]), found.targets_BS)
    assert sum((p.domain_B for p in parts), ()) == found.domain_B
