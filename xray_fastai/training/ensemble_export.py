"""Writes the export of a fit of several networks: joins them, and judges them by images that they were not trained on.

With folds, each image has the outputs of the network that was not trained on it. Those of all folds together choose
calibration, threshold and the rest, and are measured. The export's own outputs, the means of all networks, are a little
less extreme than these of one network each.
"""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
from torch import nn

from xray_fastai.data.dataset import Collection
from xray_fastai.data.image_keys import file_key
from xray_fastai.export.layout import HISTORY_COLUMNS
from xray_fastai.export.run_folder import Reservation
from xray_fastai.metrics.comparison import Called, compare_metrics
from xray_fastai.metrics.groups import by_group
from xray_fastai.metrics.intervals import Interval, interval_of, measure
from xray_fastai.metrics.scored import Scored
from xray_fastai.model.architectures import build_network
from xray_fastai.model.ensemble import join
from xray_fastai.model.learner import parameter_counts
from xray_fastai.model.xray_learner import XrayLearner
from xray_fastai.system.errors import UserError
from xray_fastai.system.text import format_interval
from xray_fastai.training.calibration import Calibration
from xray_fastai.training.judgement import Ensemble, Outputs, called, gate_of, judge, positive_of
from xray_fastai.training.members import Members, Trained
from xray_fastai.training.messages import measured_words
from xray_fastai.training.plan import Plan
from xray_fastai.training.write_export import Outcome, Result, export, export_learner, phase_records

OWN = ("roc_auc", "balanced_accuracy")
"""The metrics of each network on the images that it validated on."""


def export_members(members: Members, run: Reservation) -> Result:
    """Join the networks that have trained for an epoch, write their export, and print how the fit ended.

    Raises:
        UserError: the loss was not finite before any epoch ended, or the export cannot be written.
    """
    plan, received, error = members.plan, members.stop.received, members.error
    trained = dict(sorted(members.with_epochs().items()))
    if not trained and error is None:
        # the export has all settings, and the present network with its own images
        members.trainer.plan = replace(members.trainer.plan, config=plan.config)
        return export_learner(members.trainer, run)
    if not trained:
        fault = f"{error}; no epoch was completed, so nothing is exported; try a lower lr= than {members.lr:g}"
        raise UserError(fault)
    joined = replace(plan, members=len(trained), pretrained=None, start=None)
    networks = [_network(plan, member) for member in trained.values()]
    first = plan.of_member(min(trained))
    learn = _joined(joined, first, networks)
    outputs = outputs_of(plan.data, trained)
    judgement = judge(joined, outputs, gate_of(networks[0], first))
    judgement = replace(judgement, ensemble=_ensemble(plan, trained, outputs, judgement.calibration))
    history = [{"member": number + 1, **row} for number, member in trained.items() for row in member.history]
    outcome = Outcome(
        status="diverged" if error else "interrupted" if received is not None else "complete",
        history=history,
        best=None,
        phases=[
            phase | {"name": f"{phase['name']}, member {number + 1}"}
            for number, member in trained.items()
            for phase in phase_records(member.history, plan.phases, member.ends, member.searches)
        ],
        seconds=sum(member.seconds for member in trained.values()),
        parameters=parameter_counts(learn),
        searches=[search | {"member": number + 1} for number, member in trained.items() for search in member.searches],
    )
    path = export(learn, joined, outcome, judgement, run)
    words = measured_words(judgement.ensemble.record)
    return Result(path, outcome.status, history, plan.config, received, error, lr=members.lr, measured=words)


def outputs_of(data: Collection, trained: dict[int, Trained]) -> Outputs:
    """Return the outputs that are judged: with folds those of each network on its own, else the mean of all."""
    logits = [member.logits.float().numpy() for member in trained.values()]
    if data.has_folds:
        images = pd.concat([data.of_member(number).valid for number in trained], ignore_index=True)
        targets = np.concatenate([member.targets.numpy() for member in trained.values()])
        return Outputs(images, np.concatenate(logits), targets)
    return Outputs(data.valid, np.mean(logits, axis=0), next(iter(trained.values())).targets.numpy())


def _network(plan: Plan, member: Trained) -> nn.Sequential:
    config = plan.config
    network = build_network(config.arch, len(plan.data.classes), config.dropout, config.size)
    network.load_state_dict(member.weights, assign=True)  # without copies: there may be twenty
    return network


def _joined(plan: Plan, first: Plan, networks: list[nn.Sequential]) -> XrayLearner:
    """Return a learner of all networks; its loaders, which show a batch of training images, are the first one's."""
    learn = plan.learner(first.dataloaders())
    whole = join(networks, plan.config.dropout) if len(networks) > 1 else networks[0]
    learn.model.load_state_dict(whole.state_dict())
    return learn


def _ensemble(plan: Plan, trained: dict[int, Trained], outputs: Outputs, calibration: Calibration) -> Ensemble:
    """Measure all outputs together, and those of each network."""
    data, folds = plan.data, plan.data.has_folds
    whole = _called(data, outputs, calibration)
    own = {number: _called(data, outputs_of(data, {number: member}), calibration) for number, member in trained.items()}
    measured = measure(whole.scored, {"chosen": whole.y_pred})
    metrics = measured.points["chosen"] | measured.free
    record = {
        "outputs": "out of fold" if folds else "validation",
        "planned": plan.members,
        "images": len(whole.y_pred),
        "patients": int(whole.scored.patients.max()) + 1,
        "metrics": {name: _estimate(interval) for name, interval in metrics.items()},
        "weakest": _weakest(whole, own, plan),
    }
    records = [
        {
            "member": number + 1,
            "seed": plan.of_member(number).config.seed,
            "train": len(plan.data.of_member(number).train),
            "valid": len(own[number].y_pred),
            "seconds": round(member.seconds, 1),
            "phases": phase_records(member.history, plan.phases, member.ends, member.searches),
            "best": {name: member.best[name] for name in HISTORY_COLUMNS},
            **{name: _estimate(interval_of(name, own[number].scored, y_pred=own[number].y_pred)) for name in OWN},
        }
        for number, member in trained.items()
    ]
    return Ensemble(record, records, _predictions(data, trained, outputs, whole.scored) if folds else None)


def _called(data: Collection, outputs: Outputs, calibration: Calibration) -> Called:
    y_prob = calibration.probabilities(outputs.logits)
    patients = pd.factorize(outputs.images.patient)[0]
    scored = Scored(outputs.targets, y_prob, patients, positive_of(data))
    return Called(scored, called(data, y_prob, calibration.threshold))


def _estimate(interval: Interval) -> list[float | None]:
    return [None if math.isnan(number) else float(number) for number in interval]


def _weakest(whole: Called, own: dict[int, Called], plan: Plan) -> str | None:
    """Say which network has a lower ROC AUC than another by more than chance; None if none has.

    With folds the networks have different images, of different patients. So the gap between the best and the worst has
    an interval that holds for all pairs together (`metrics.groups`). On the same images the difference is paired, and
    its p-value is multiplied by the number of pairs (Bonferroni).
    """
    if len(own) < 2:
        return None
    if plan.data.has_folds:
        names = [f"member {number + 1}" for number, one in own.items() for _ in one.y_pred]
        order = pd.Categorical(names, [f"member {number + 1}" for number in own])
        found = next((g for g in by_group(whole, order, plan.data.classes).gaps if g.metric == "roc_auc"), None)
        if found is None or not found.low > 0:
            return None
        gap = format_interval(found.difference, found.low, found.high)
        why = "its images may be harder, or its training went wrong"
        return f"the ROC AUC of {found.worst} is below that of {found.best} by {gap}: {why}"
    worst, *_, best = sorted(own, key=lambda number: interval_of("roc_auc", own[number].scored).value)
    found = compare_metrics(own[worst], own[best])["roc_auc"]
    if not found.p * len(own) * (len(own) - 1) / 2 < 0.05:
        return None
    gap = format_interval(found.difference, found.low, found.high)
    return f"the ROC AUC of member {worst + 1} is below that of member {best + 1} by {gap}: its training went wrong"


def _predictions(data: Collection, trained: dict[int, Trained], outputs: Outputs, scored: Scored) -> pd.DataFrame:
    """Return a row for each image, in the order of the networks; its file is a key, as a name may hold a patient's."""
    sizes = [len(member.targets) for member in trained.values()]
    return pd.DataFrame(
        {
            "file": outputs.images.file.map(file_key),
            "label": outputs.images.label,
            "member": np.repeat([number + 1 for number in trained], sizes),
            **{f"p_{name}": scored.y_prob[:, k] for k, name in enumerate(data.classes)},
        }
    )
