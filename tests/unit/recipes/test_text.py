"""The text recipe: its tokenizer, sequences and masks, both kinds of rows, a Hugging Face model, and the page."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lossk
from lossk.analysis.sequences import sequence_traces
from lossk.cli.config import load_config
from lossk.cli.main import main
from lossk.errors import LosskError
from lossk.recipes import RecipeError, RecipeTask, text
from lossk.recipes.text import SequenceLoss
from lossk.recipes.text_data import Document, cut, read_documents
from lossk.recipes.transformer import Shape, TinyTransformer, frequency_loss, mean_token_loss
from lossk.recipes.words import Words
from lossk.report.contexts import choose_rows, describe_contexts, in_context, write_page

SMALL = {"context": 12, "steps": 150, "num_probe": 6, "required_gain": 0.3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two documents whose words follow each other in a fixed order: learnable in seconds."""
    path = tmp_path_factory.mktemp("texts")
    for name, words in (("animals", "cat dog cow hen fox"), ("numbers", "one two six ten")):
        paragraph = " ".join((words.split() * 6)[:23])
        (path / f"{name}.txt").write_text("\n\n".join([paragraph, paragraph[: len(paragraph) // 3]] * 12) + "\n")
    (path / "link").symlink_to(path / "animals.txt")
    (path / "empty").touch()
    return path


@pytest.fixture(scope="module")
def task(folder: Path) -> RecipeTask:
    return text.make_task(text=folder, **SMALL)


def test_text_is_the_concatenation_of_its_tokens() -> None:
    sample = "The cat, the dog_1 and\n\n\tthe  Üñ 42 cat."
    words = Words.of(sample * 3 + "unseen once")
    assert "".join(words.tokens[n] for n in words.encode(sample)) == sample
    assert len(words.encode(" cat cat")) == 2  # a word and the space before it
    assert words.encode(" once") == words.encode(" ") + [n for c in "once" for n in words.encode(c)]  # too rare
    assert list(words.tokens) == sorted(words.tokens, key=words.tokens.index)
    assert len(set(words.tokens)) == len(words)
    with pytest.raises(ValueError, match=r"text must hold characters of the tokenizer's own text only, got 'z'"):
        words.encode("zz")
    with pytest.raises(ValueError, match="text must not be empty"):
        Words.of("")


def test_packed_windows_predict_every_token_but_the_first_once() -> None:
    ids = list(range(1, 24))
    found = cut([Document("a", "x")], lambda _: ids, context=5, how="packed")
    assert found.inputs.flatten().tolist() == ids[:20]
    assert found.targets.flatten().tolist() == ids[1:21]
    assert cut([Document("a", "x")], lambda _: ids[:21], context=5, how="packed").targets[-1, -1] == ids[20]


def test_padded_paragraphs_end_in_a_mask() -> None:
    documents = [Document("a", "1 2 3\n\n4\n\n5 6\n"), Document("b", "7 8 9 1 2 3 4")]
    found = cut(documents, lambda part: [int(n) for n in part.split()], context=4, how="padded")
    assert found.targets.tolist() == [[2, 3, -100, -100], [6, -100, -100, -100], [8, 9, 1, 2]]
    assert found.inputs.tolist() == [[1, 2, 0, 0], [5, 0, 0, 0], [7, 8, 9, 1]]
    assert found.document.tolist() == [0, 0, 1]


def test_missing_or_short_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"holds no text; the licences .* package base-files; elsewhere: --set"):
        read_documents(tmp_path / "nothing")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="is not UTF-8 text"):
        read_documents(tmp_path / "bytes")
    (tmp_path / "short").write_text("one two")
    with pytest.raises(RecipeError, match=r"at least two sequences \(65 tokens in a row\), got 0"):
        text.make_task(text=tmp_path / "short")


def test_links_and_empty_files_are_left_out(folder: Path) -> None:
    assert [document.name for document in read_documents(folder)] == ["animals.txt", "numbers.txt"]


def test_padding_does_not_change_the_losses_before_it() -> None:
    model = TinyTransformer(Shape(vocabulary=9, context=6, width=8, heads=2)).eval()
    ids = torch.randint(0, 9, (3, 6))
    other = ids.clone()
    other[:, 4:] = 0
    with torch.inference_mode():
        assert torch.equal(model(ids)[:, :4], model(other)[:, :4])
        torch.testing.assert_close(model(ids[:, :4]), model(ids)[:, :4])


def test_the_model_learns_and_the_rows_are_the_probes_tokens(task: RecipeTask) -> None:
    inputs, targets = task.samples.tensors
    assert task.loss == "token_cross_entropy"
    assert inputs.shape == targets.shape == (6, 12)
    assert task.labels is not None
    assert task.row_texts is not None
    assert torch.equal(task.labels, targets.flatten())
    assert len(task.row_texts) == 72
    assert task.held_out is not None
    assert task.held_out.shape == (72,)
    assert mean_token_loss(task.model, inputs, targets) < 1.0
    assert not any(module.training for module in task.model.modules())


def test_a_model_no_better_than_token_frequencies_is_refused(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"held-out loss is \d\.\d\d nats per token, not 0.3 below the"):
        text.make_task(text=folder, **{**SMALL, "steps": 0})


def test_frequency_loss_is_that_of_the_counts() -> None:
    train = torch.tensor([[0, 0, 1, -100]])
    expected = -(torch.tensor([3.0, 2.0]).double() / 6).log()  # counts 2, 1, 0, one added to each
    assert frequency_loss(train, torch.tensor([[0, 1, -100]]), 3) == pytest.approx(float(expected.mean()))


@pytest.fixture(scope="module")
def both(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RecipeTask, RecipeTask]:
    """Padded sequences, their tokens and themselves, of one network."""
    settings = {**SMALL, "num_probe": 5, "steps": 100, "checkpoint": tmp_path_factory.mktemp("weights") / "w.pt"}
    tokens, sequences = (text.make_task(text=folder, sequences="padded", rows=rows, **settings) for rows in text.ROWS)
    return tokens, sequences


def test_sequence_rows_are_sums_of_token_rows_under_the_same_law(
    both: tuple[RecipeTask, RecipeTask], sgld: Callable[..., lossk.SGLD]
) -> None:
    """The training loss is the same function of the weights, so with one n_beta and seed the draws are the same."""
    tokens, sequences = both
    assert isinstance(sequences.loss, SequenceLoss)
    settings = {"num_chains": 2, "num_draws": 5, "backend": "torch", "progress": False}
    traces = [
        lossk.sample_losses(
            one.model, one.samples, train=one.train, loss=one.loss, sampler=sgld(lr=1e-4, n_beta=30.0), **settings
        )
        for one in (tokens, sequences)
    ]
    summed = sequence_traces(traces[0]).losses / sequences.loss.mean_tokens
    torch.testing.assert_close(summed, traces[1].losses, rtol=1e-4, atol=1e-5)
    token_kernel = lossk.LossKernel.from_traces(traces[0])
    kernel = lossk.LossKernel.from_traces(sequence_traces(traces[0]))
    assert token_kernel.tokens is not None
    member = torch.nn.functional.one_hot(token_kernel.tokens[:, 0]).double()  # [N, S]
    expected = member.T @ torch.from_numpy(token_kernel.to_numpy()).double() @ member
    torch.testing.assert_close(torch.from_numpy(kernel.to_numpy()).double(), expected, rtol=1e-4, atol=1e-7)


def test_sequence_traces_keep_sets_apart() -> None:
    losses = torch.arange(2 * 3 * 6).float().view(2, 3, 6)
    tokens = torch.tensor([[0, 0], [0, 1], [2, 0], [2, 1], [2, 0], [2, 2]])  # set b begins at the number a ends with
    sets = {"a": slice(0, 4), "b": slice(4, 6)}
    found = sequence_traces(lossk.LossTraces(losses, tokens=tokens, sets=sets))
    assert torch.equal(found.losses, torch.stack([losses[..., a : a + 2].sum(dim=2) for a in (0, 2, 4)], dim=2))
    assert found.sets == {"a": slice(0, 2), "b": slice(2, 3)}
    with pytest.raises(ValueError, match="must be those of a loss per token"):
        sequence_traces(lossk.LossTraces(losses))


def test_sequence_rows_are_labelled_by_document(both: tuple[RecipeTask, RecipeTask]) -> None:
    _, sequences = both
    assert sequences.labels is not None
    assert sequences.row_texts is not None
    assert len(sequences.labels) == len(sequences.row_texts) == 5
    assert list(sequences.class_names) == ["animals.txt", "numbers.txt"]
    for label, shown in zip(sequences.labels.tolist(), sequences.row_texts, strict=True):
        assert ("cat" in shown) == (label == 0)


def test_tokens_are_shown_in_context() -> None:
    texts = ["a", " b", "\n", " c", " d", " x", " y"]
    tokens = torch.tensor([[0, t] for t in range(5)] + [[1, 0], [1, 1]])
    assert str(in_context(2, texts, tokens)) == "a b[⏎] c d"
    assert str(in_context(5, texts, tokens)) == "[ x] y"  # nothing of another sequence
    assert str(in_context(3, texts, None)) == "c"
    assert str(in_context(0, ["word " * 50], None)).endswith("word ...")


def test_the_page_shows_what_the_kernel_says(task: RecipeTask, build: Callable, tmp_path: Path) -> None:
    kernel = build(task.model, task.samples, loss=task.loss)
    assert task.row_texts is not None
    neighbors = kernel.neighbors(3)
    write_page(kernel, task.row_texts, neighbors, tmp_path / "page.html", title="<title> & more")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "&lt;title&gt; &amp; more" in page
    assert page.count("<section>") == len(choose_rows(kernel)) == 12
    row = int(torch.argmax(kernel.variance))
    other, value = int(neighbors.index[row, 0]), float(neighbors.correlation[row, 0])
    told = describe_contexts(kernel, task.row_texts, neighbors).splitlines()
    assert told[1] == str(in_context(row, task.row_texts, kernel.tokens))
    assert told[3].split(maxsplit=1)[1].strip() == f"{value:.2f}  {in_context(other, task.row_texts, kernel.tokens)}"
    assert f'<td class="r">{value:.2f}</td>' in page


def test_run_writes_the_page_and_refuses_to_overwrite_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", "text", "--out", str(tmp_path / "t.lossk"), "--set", f"task_args.text={folder}"]
    for key, value in {**SMALL, "checkpoint": tmp_path / "w.pt"}.items():
        arguments += ["--set", f"task_args.{key}={value}"]
    fixed = {"step_size": 1e-3, "n_beta": 30, "localization": 100, "num_burnin_steps": 2, "num_steps_bw_draws": 1}
    for key, value in fixed.items():
        arguments += ["--set", f"sampler.{key}={value}"]
    arguments += ["--set", "build.num_draws=4", "--set", "build.num_chains=2", "--set", "picture=null"]
    (tmp_path / "t.contexts.html").write_text("mine")
    assert main(arguments) == 2
    assert "t.contexts.html exists" in capsys.readouterr().err
    assert (tmp_path / "t.contexts.html").read_text() == "mine"
    assert main([*arguments, "--overwrite"]) == 0
    shown = capsys.readouterr().out
    assert "nearest neighbors, these show the same token" in shown
    assert "Nearest tokens, in context" in shown
    assert "<section>" in (tmp_path / "t.contexts.html").read_text(encoding="utf-8")


def save_tiny_gpt2(path: Path, folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = sorted({word for file in folder.glob("*.txt") for word in file.read_text().split()})
    numbers = {"[UNK]": 0, **{word: i + 1 for i, word in enumerate(words)}}
    plain = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]").save_pretrained(path)
    config = GPT2Config(
        vocab_size=len(numbers), n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(path)


def test_a_hugging_face_model_goes_through_the_same_recipe(
    folder: Path, tmp_path: Path, build: Callable, sgld: Callable[..., lossk.SGLD]
) -> None:
    save_tiny_gpt2(tmp_path, folder)
    task = text.make_task(text=folder, model=tmp_path, context=8, num_probe=4, required_gain=-9.0)
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    kernel = build(task.model, task.samples, train=task.train, loss=task.loss, sampler=sgld(lr=1e-4))
    assert kernel.num_samples == 32
    assert torch.isfinite(kernel.variance).all()
    assert (kernel.variance > 0).all()
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    assert task.row_texts is not None
    assert set(task.row_texts) <= {word for file in folder.glob("*.txt") for word in file.read_text().split()}
    whole = text.make_task(text=folder, model=tmp_path, rows="sequences", context=8, num_probe=4, required_gain=-9.0)
    assert build(whole.model, whole.samples, loss=whole.loss, sampler=sgld(lr=1e-4)).num_samples == 4
    with pytest.raises(ValueError, match=r"context must be at most 16, the positions of .*, got 17"):
        text.make_task(text=folder, model=tmp_path, context=17)


def test_a_missing_hugging_face_model_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"model '.*nowhere' cannot be loaded"):
        text.make_task(text=folder, model=tmp_path / "nowhere")


def test_a_missing_package_names_its_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(LosskError, match=r'needs transformers: pip install "lossk\[text\]"'):
        text.make_task(text=folder, model="any")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": "words"}, r"rows must be one of \['tokens', 'sequences'\], got 'words'"),
        ({"sequences": "cut"}, r"sequences must be one of \['packed', 'padded'\], got 'cut'"),
        ({"context": 0}, "context must be at least 1, got 0"),
        ({"num_probe": 1}, "num_probe must be at least 2, got 1"),
        ({"held_out_share": 1.0}, "held_out_share must be below 1, got 1.0"),
        ({"steps": -1}, "steps must be at least 0, got -1"),
    ],
)
def test_bad_arguments_are_refused(folder: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text.make_task(text=folder, **{**SMALL, **arguments})


def test_the_packaged_config_is_valid() -> None:
    assert load_config("text").task == "lossk.recipes.text:make_task"
