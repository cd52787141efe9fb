"""Holds the two checklists of a statement, with the facts that answer their items, and fills them in.

They are CLAIM 2024 (Tejani et al., Checklist for Artificial Intelligence in Medical Imaging (CLAIM): 2024 Update,
Radiology: Artificial Intelligence 2024) and TRIPOD+AI (Collins et al., TRIPOD+AI statement, BMJ 2024). The topics are
in our words.
"""

CLAIM = (
    ("Title: the study is one of AI, and of which kind", None),
    ("Abstract: design, methods, results and conclusions", None),
    ("Introduction: background, intended use and clinical role", None),
    ("Introduction: aims and hypotheses", None),
    ("Methods: prospective or retrospective study", None),
    ("Methods: goal of the study", None),
    ("Methods, data: sources", "data"),
    ("Methods, data: inclusion and exclusion of patients; where and when they were seen", None),
    ("Methods, data: preprocessing", "preprocessing"),
    ("Methods, data: selection of parts of the images or of the data", "left_out"),
    ("Methods, data: de-identification", None),
    ("Methods, data: missing data", "missing"),
    ("Methods, data: how the images were acquired", None),
    ("Methods, reference standard: definition, and why it was chosen", None),
    ("Methods, reference standard: who annotated, with which tools, and how well they agree", None),
    ("Methods, partitions: how data were assigned", "partitions"),
    ("Methods, partitions: at which level they are disjoint", "disjoint"),
    ("Methods, testing: intended sample size, and why", None),
    ("Methods, model: description, inputs and outputs", "network"),
    ("Methods, model: software", "software"),
    ("Methods, model: initial weights", "weights"),
    ("Methods, training: approach, augmentation, hyperparameters", "training"),
    ("Methods, training: choice of the final model", "selection"),
    ("Methods, training: ensembles", "ensemble"),
    ("Methods, evaluation: measures of performance", "measures"),
    ("Methods, evaluation: uncertainty and significance", "intervals"),
    ("Methods, evaluation: robustness", "worst_group"),
    ("Methods, evaluation: explainability", None),
    ("Methods, evaluation: internal and external testing", "test"),
    ("Methods: registration of a clinical trial", None),
    ("Results, data: patients included and excluded, as a flow diagram", None),
    ("Results, data: demographic and clinical characteristics of each partition", None),
    ("Results: performance, with its uncertainty", "results"),
    ("Results: errors", "errors"),
    ("Discussion: limitations, and what the results mean for practice", None),
    ("Other: full protocol; availability of software, model and data", "availability"),
    ("Other: funding", None),
)
"""Topics of CLAIM 2024 in its order, each with the fact that answers it, or None."""

TRIPOD = (
    ("1 Title", None),
    ("2 Abstract", None),
    ("3 Background", None),
    ("4 Objectives", None),
    ("5 Data", "data"),
    ("6 Participants", None),
    ("7 Data preparation", "preprocessing"),
    ("8 Outcome", None),
    ("9 Predictors", "predictors"),
    ("10 Sample size", None),
    ("11 Missing data", "missing"),
    ("12 Analytical methods", "analysis"),
    ("13 Class imbalance", "imbalance"),
    ("14 Fairness", "groups"),
    ("15 Model output", "output"),
    ("16 Training versus evaluation", "test"),
    ("17 Ethical approval", None),
    ("18 Open science", "availability"),
    ("19 Patient and public involvement", None),
    ("20 Participants (results)", "test"),
    ("21 Model development", "partitions"),
    ("22 Model specification", "availability"),
    ("23 Model performance", "results"),
    ("24 Model updating", "updating"),
    ("25 Interpretation", None),
    ("26 Limitations", None),
    ("27 Usability of the model", None),
)
"""The 27 main items of TRIPOD+AI, each with the fact that answers it, at least in part, or None."""

REFERENCES = """\
- Tejani AS, Klontzas ME, Gatti AA, et al. Checklist for Artificial Intelligence in Medical Imaging (CLAIM): 2024
  Update. Radiology: Artificial Intelligence 2024;6(4):e240300. The list: https://doi.org/10.1148/ryai.240300
- Collins GS, Moons KGM, Dhiman P, et al. TRIPOD+AI statement: updated guidance for reporting clinical prediction models
  that use regression or machine learning methods. BMJ 2024;385:e078378. The list: https://www.tripod-statement.org
"""


def checklist(name: str, items: tuple, facts: dict[str, str]) -> list[str]:
    """Return the paragraphs of a checklist: the topics that a fact answers, and those that are open.

    Args:
        name: of the checklist.
        items: its topics, each with the name of a fact, or None.
        facts: sentences by name.
    """
    answered = [f"- [x] **{topic}.** {facts[fact]}" for topic, fact in items if fact in facts]
    left = [f"- [ ] {topic}" for topic, fact in items if fact not in facts]
    return [
        f"## {name}",
        f"{len(answered)} of {len(items)} topics have an answer or a part of one:",
        "\n".join(answered),
        "Open, for the authors:",
        "\n".join(left),
    ]
