"""devinterp 2's `sample()`, run by lossk: the same arguments, its tree of results."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lossk.accumulate.panel import chain_panels
from lossk.available import available_bytes
from lossk.checks import (
    MOST_NUMBER,
    check_callable,
    check_device,
    check_instance,
    check_integer,
    check_mapping,
    check_number,
    check_optional,
    check_path,
)  # fmt: skip
from lossk.data.data import Samples
from lossk.disk.files import naming, sync_tree
from lossk.disk.swap import in_one_step
from lossk.interop.devinterp2_chain import Law, LoggedChain, StepLog
from lossk.interop.devinterp2_inputs import (
    ObservableSpec,
    ParamMasks,
    check_observables,
    choose_sequences,
    read_sequences,
    sampled_masks,
)  # fmt: skip
from lossk.interop.devinterp2_loss import LossFn, TokenLoss
from lossk.interop.devinterp2_settings import Settings, stored_config
from lossk.interop.devinterp2_tree import PREFIX, observable_id, open_tree
from lossk.optional import require
from lossk.probe.probe import Probe, prepare_probe, rows_fingerprint
from lossk.provenance import model_fingerprint, versions
from lossk.run.backends import resolve_backend
from lossk.samplers.chain import Surroundings
from lossk.store.witness import WITNESS, differences
from lossk.task.agreement import witness_of
from lossk.task.losses import resolve_loss
from lossk.task.task import Task, fitting_batch
from lossk.timings import Progress, Timings


def sample(
    model: nn.Module,
    dataset: Any,
    observables: Mapping[str, ObservableSpec],
    *,
    lr: float,
    n_beta: float,
    param_masks: ParamMasks | None = None,
    num_chains: int = 4,
    num_draws: int = 200,
    batch_size: int = 32,
    num_burnin_steps: int = 0,
    num_steps_bw_draws: int = 1,
    num_init_loss_batches: int = 32,
    init_seed: int = 100,
    batches_per_draw: int = 3,
    obs_seed: int = 1337,
    gradient_accumulation_steps: int = 1,
    localization: float = 0.0,
    noise_level: float = 1.0,
    llc_weight_decay: float = 0.0,
    bounding_box_size: float | None = None,
    sampling_method: str = "sgmcmc_sgld",
    sampling_method_kwargs: dict[str, Any] | None = None,
    rmsprop_eps: float | None = None,
    rmsprop_alpha: float | None = None,
    shuffle: bool = True,
    match_sampling_input_ids_across_chains: bool = True,
    init_noise: float | None = None,
    device: str | None = None,
    save_metrics: bool = False,
    output_path: str | Path | None = None,
    loss_fn: LossFn | None = None,
) -> Any:
    """SGLD sampling with observables; arguments and result as `devinterp.slt.sampling.sample`.

    The same law and the same sequences in every observable, from lossk's chain and probe. What differs:

    - the model runs in eval mode (theirs: train mode, dropout active) and comes back bit-identical;
    - noise and minibatches are lossk's counter-based ones; a minibatch is drawn without replacement, afresh at each
      step (theirs repeats the order of the first epoch);
    - a draw is taken after its `num_steps_bw_draws` steps (theirs: after the first of them);
    - the initial loss is one and the same for all chains, of `num_init_loss_batches` minibatches' number of samples, or
      of all training samples if these are fewer;
    - a chain that diverges raises DivergedError (theirs warns and leaves NaN);
    - `output_path` is written at the end, in one piece. A store of the same settings is opened instead of sampling.

    Returns:
        xarray.DataTree, in memory (from the store, if `output_path` is given).

    Raises:
        ValueError, TypeError: a bad argument, before work starts; `save_metrics=True`, `noise_level=0` and masks other
            than 0 and 1 are not to be had.
        MemoryError: the losses of all steps and draws do not fit.
        DivergedError: see above.
        FileExistsError: `output_path` holds something else; the message says what differs.
        ImportError: xarray is not installed.
    """
    xr = require("xarray", "devinterp")
    check_instance("model", model, nn.Module)
    check_optional(check_callable, "loss_fn", loss_fn)
    for name, value in (("rmsprop_eps", rmsprop_eps), ("rmsprop_alpha", rmsprop_alpha)):
        check_optional(check_number, name, value, above=0.0, most=1.0 if name == "rmsprop_alpha" else MOST_NUMBER)
        if value is not None and sampling_method != "rmsprop_sgld":
            raise ValueError(
                f"{name} must be None: sampling_method_kwargs of {sampling_method!r} have none (rmsprop_sgld's do), "
                f"got {value!r}"
            )
    batches_per_draw = check_integer("batches_per_draw", batches_per_draw, 1)
    obs_seed = check_integer("obs_seed", obs_seed, 0)
    observables = check_observables(observables)
    given = {} if sampling_method_kwargs is None else check_mapping("sampling_method_kwargs", sampling_method_kwargs)
    settings = Settings(
        lr=lr,
        n_beta=n_beta,
        num_chains=num_chains,
        num_draws=num_draws,
        batch_size=batch_size,
        num_burnin_steps=num_burnin_steps,
        num_steps_bw_draws=num_steps_bw_draws,
        num_init_loss_batches=num_init_loss_batches,
        init_seed=init_seed,
        gradient_accumulation_steps=gradient_accumulation_steps,
        localization=localization,
        noise_level=noise_level,
        llc_weight_decay=llc_weight_decay,
        bounding_box_size=bounding_box_size,
        sampling_method=sampling_method,
        sampling_method_kwargs={
            **given,
            **{key: v for key, v in (("eps", rmsprop_eps), ("alpha", rmsprop_alpha)) if v is not None},
        },
        shuffle=shuffle,
        match_sampling_input_ids_across_chains=match_sampling_input_ids_across_chains,
        init_noise=init_noise,
        save_metrics=save_metrics,
    )
    path = check_optional(check_path, "output_path", output_path)
    finished = _finished(path, settings) if path is not None and path.exists() else None
    masks = sampled_masks(model, param_masks)
    train = read_sequences(dataset, "dataset")
    sets = {}
    for name, spec in observables.items():
        source, batches = spec if isinstance(spec, tuple) else (spec, batches_per_draw)
        sets[observable_id(name)] = choose_sequences(
            read_sequences(source, f"observables[{name!r}]"), batches * batch_size, obs_seed, name
        )
    with Progress(True) as bar:
        run = _Sampling(model, train, sets, settings, settings.law(masks), masks, device, loss_fn, bar)
        if finished is not None:
            run.refuse_other(finished, output_path)
            return finished
        root = run.result(xr)
    tree = xr.DataTree(root)
    if path is None:
        return tree
    with in_one_step(path) as parts, naming(path):
        tree.to_zarr(parts, zarr_format=3, consolidated=False)
        sync_tree(parts)
    return open_tree(path)


class _Sampling:
    """One call, its data read and its settings checked."""

    def __init__(
        self,
        model: nn.Module,
        train: Samples,
        sets: dict[str, Samples],
        settings: Settings,
        law: Law,
        masks: ParamMasks | None,
        device: str | torch.device | None,
        loss_fn: LossFn | None,
        bar: Progress,
    ) -> None:
        self.settings, self.law, self.train, self.sets, self.bar = settings, law, train, sets, bar
        self.positions = train.tree["input_ids"].shape[1] - 1
        if settings.step_samples > len(train):
            raise ValueError(
                "batch_size * gradient_accumulation_steps must be at most the samples of the dataset, "
                f"{len(train)}, got {settings.step_samples}"
            )
        for name, samples in sets.items():
            if samples.tree["input_ids"].shape[1] != self.positions + 1:
                raise ValueError(
                    f"observables[{name!r}] must hold sequences of the dataset's length, {self.positions + 1}, "
                    f"got {samples.tree['input_ids'].shape[1]}"
                )
        patterns = None if masks is None else [name.replace("[", "[[]") for name in masks]
        place = check_device("device", device) or ("cuda" if torch.cuda.is_available() else "cpu")
        self.loss = TokenLoss(loss_fn)
        self.task = Task(model, resolve_loss(self.loss), params=patterns, device=place)
        self.backend = resolve_backend("auto", self.task.device)
        if loss_fn is None:
            self.loss = TokenLoss(None, self.backend)
            self.task.use_loss(resolve_loss(self.loss))
        self._fit()

    def _fit(self) -> None:
        s, rows = self.settings, sum(len(samples) for samples in self.sets.values())
        log = StepLog.nbytes(s.num_chains, s.num_steps, s.step_samples, self.positions)
        losses = 4 * s.num_chains * s.num_draws * rows * self.positions
        free = available_bytes()
        if log + losses > 0.9 * free:
            raise MemoryError(
                f"the losses of all draws need {losses / 1e9:.2f} GB, the tokens and losses of all steps "
                f"{log / 1e9:.2f} GB, and {free / 1e9:.2f} GB are available; take fewer draws, steps or sequences"
            )
        self.bar.say(
            f"lossk: {s.num_chains} chains x {s.num_draws} draws, {s.num_chains * s.num_steps} steps of "
            f"{s.step_samples} sequences, {rows} sequences in {len(self.sets)} observables at each draw, "
            f"{self.task.num_weights} weights, backend {self.backend}; holds {(log + losses) / 1e6:.0f} MB"
        )

    def prepare(self) -> tuple[Probe, Samples, dict[str, Any]]:
        """The rows, the training samples, and what tells this run from one of another model, loss or data."""
        fingerprints = {
            "model": model_fingerprint(self.task.model),
            "probe": rows_fingerprint(self.sets),
            "train": self.train.fingerprint(),
        }
        probe, train = prepare_probe(self.task, self.sets, self.train)
        named = {part.name: part.samples for part in probe.parts}
        return probe, train, {"fingerprints": fingerprints, WITNESS: witness_of(self.task, named)}

    def refuse_other(self, tree: Any, path: str | Path | None) -> None:
        """Raise FileExistsError if a store is of another model, loss or data, as far as it says."""
        saved = tree.attrs["metadata"].get("lossk", {}).get("run")
        changed = [] if saved is None else differences(saved, self.prepare()[2])
        if changed:
            raise FileExistsError(f"output_path={str(path)!r} exists and holds another run: {'; '.join(changed)}")

    def result(self, xr: Any) -> Any:
        """Run all chains; the tree's dataset."""
        s, started = self.settings, time.perf_counter()
        probe, train, identity = self.prepare()
        with self.task:
            initial = self._initial_loss(train)  # [P] float64
            log = StepLog(s.num_chains, s.num_steps, s.step_samples, self.positions)
            losses = torch.empty(s.num_chains, s.num_draws, len(probe), dtype=torch.float32, device="cpu")
            anchor = torch.full((len(train),), float(initial.mean()), dtype=torch.float64, device="cpu")
            around = Surroundings(self.task, train, anchor, s.init_seed, self.backend, Timings(), fitted={})
            self.bar.start(s.num_chains * s.num_steps)
            for chain in range(s.num_chains):
                self._run(LoggedChain(around, s.sgld(), chain, law=self.law, loss=self.loss, log=log), probe, losses)
        made_by = {"run": identity, "seconds": round(time.perf_counter() - started, 3)}
        return self._dataset(xr, probe, losses, log, initial, made_by)

    def _run(self, chain: LoggedChain, probe: Probe, losses: Tensor) -> None:
        draws = self.settings.num_draws
        panel = min(draws, 16)
        for part in chain_panels(
            chain, probe, panel=panel, num_draws=draws, timings=chain.around.timings, progress=self.bar
        ):
            losses[part.chain, part.first_draw : part.first_draw + len(part.losses)] = part.losses

    def _initial_loss(self, train: Samples) -> Tensor:
        """[P] float64: the mean loss at w* of each position, over as many samples as the settings say."""
        count = min(len(train), self.settings.num_init_loss_batches * self.settings.step_samples)
        generator = np.random.default_rng(np.random.SeedSequence(self.settings.init_seed))
        index = torch.from_numpy(np.sort(generator.choice(len(train), count, replace=False)))
        total = torch.zeros(self.positions, dtype=torch.float64, device="cpu")
        for part in index.split(fitting_batch(self.task.passes.probe_batch, self.positions)):
            rows, _ = self.task.rows(train[part])
            total += rows.view(len(part), self.positions).double().sum(dim=0).cpu()
        return total / count

    def _dataset(
        self, xr: Any, probe: Probe, losses: Tensor, log: StepLog, initial: Tensor, made_by: dict[str, Any]
    ) -> Any:
        s = self.settings
        batch, at_draws = (
            ("chain", "draw", "batch", "token_pos"),
            slice(s.steps_to_first_draw, None, s.num_steps_bw_draws),
        )
        micro = log.losses[:, at_draws]
        micro = micro.view(*micro.shape[:2], s.gradient_accumulation_steps, s.batch_size, -1).mean(dim=2)
        variables: dict[str, Any] = {
            "init_loss": (("chain", "token_pos"), np.tile(initial.numpy().astype(np.float32), (s.num_chains, 1))),
            "sampling_loss": (batch, micro.numpy()),
            "sampling_loss_micro": (("chain", "step", "batch_sampling", "token_pos"), log.losses.numpy()),
            "sampling_input_ids_micro": (("chain", "step", "batch_sampling", "token"), log.input_ids.numpy()),
        }
        for name, samples in self.sets.items():
            part = losses[:, :, probe.sets[name]]
            part = part.reshape(*part.shape[:2], len(samples), self.positions)
            variables[f"{PREFIX}{name}"] = (("chain", "draw", f"batch_{name}", "token_pos"), part.numpy())
            variables[f"input_ids_{name}"] = ((f"batch_{name}", "token"), samples.tree["input_ids"].numpy())
        config = {
            "sampler": stored_config(s),
            "observables": [
                {
                    "type": "ObserveDifferentDataset",
                    "obs_id": name,
                    "batches_per_draw": len(samples) // s.batch_size,
                }
                for name, samples in self.sets.items()
            ],
            "shared_observable_dims": ["token", "token_pos"],
            "tokenizer_context_length": self.positions + 1,
        }
        made_by = {**made_by, "versions": versions(), "backend": self.backend}
        return xr.Dataset(variables, attrs={"metadata": {"config": config, "lossk": made_by}, "completed": 1})


def _finished(path: Path, settings: Settings) -> Any:
    """The store at `path`, if it is that of the same settings."""
    try:
        tree = open_tree(path)
    except Exception as error:
        raise FileExistsError(
            f"output_path={str(path)!r} exists and is no store of sampling results: {error}"
        ) from error
    if tree.attrs.get("completed") != 1:
        raise FileExistsError(f"output_path={str(path)!r} exists and holds a run that was not finished")
    stored, wanted = tree.attrs["metadata"]["config"]["sampler"], stored_config(settings)
    changed = [
        f"{key}: {stored.get(key)!r} there, {v!r} asked for" for key, v in wanted.items() if stored.get(key) != v
    ]
    if changed:
        raise FileExistsError(f"output_path={str(path)!r} exists and holds another run: {'; '.join(changed)}")
    return tree
