"""Configurations: to JSON and back, every unknown key named, nothing accepted that does not run."""

import json
import warnings
from dataclasses import fields, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import multistage_diffusion
import tiny
from multistage_diffusion import config as config_module
from multistage_diffusion import noise
from multistage_diffusion.cli import dispatch
from multistage_diffusion.config import ModelConfig, RunConfig, StagesConfig, TrainingConfig, flat, from_dict, to_dict
from multistage_diffusion.errors import ConfigError, NumericsError
from multistage_diffusion.noise import Process, process_by_kind
from multistage_diffusion.recipes import RECIPES, recipe
from multistage_diffusion.records import RENAMED
from multistage_diffusion.training.run import build_trainer

SECTIONS = [item.name for item in fields(RunConfig)]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_json(name):
    config = recipe(name)
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("kind", Process.kinds())
def test_processes_survive_json(kind):
    config = replace(tiny.run_config(), process=Process.kinds()[kind]())
    assert from_dict(RunConfig, to_dict(config)) == config
    assert process_by_kind(kind) == Process.kinds()[kind]() and process_by_kind(kind).kind == kind


def test_missing_keys_take_their_defaults():
    document = {"model": {"architecture": "unified"}, "training": {"steps": 5}}
    assert from_dict(RunConfig, document) == RunConfig(
        model=ModelConfig(architecture="unified"), training=TrainingConfig(steps=5)
    )


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"trainin": {}}, 'file: unknown key trainin; did you mean "training"'),
        ({"training": {"learning-rate": 1}}, 'file: unknown key training.learning-rate; did you mean "learning_rate"'),
        ({"process": {"kind": "edm", "beta_min": 0.1}}, "file: unknown key process.beta_min; known: kind, p_mean"),
        ({"process": {"beta_min": 0.1}}, "file: no process"),
        ({"process": {"kind": "EDM"}}, "file: no process EDM"),
        ({"process": "edm"}, "file: "),
        ({"training": {"steps": 5.5}}, "file: training.steps"),
        ({"training": {"steps": "5"}}, "file: training.steps"),
        ({"training": {"steps": True}}, "file: training.steps"),
        ({"training": {"steps": None}}, "file: training.steps"),
        ({"training": {"betas": [0.9]}}, "file: training.betas"),
        ({"data": {"flip": 1}}, "file: data.flip"),
        ({"model": {"architecture": "unifed"}}, "file: model.architecture"),
        ({"model": {"multipliers": []}}, "file: model.multipliers must be"),
        ({"stages": {"edges": [2.0, 1.0]}}, "file: stages.edges must be positive and increasing"),
        ({"stages": {"edges": [1.0]}}, "file: model.decoder-widths must be 2 widths"),
        ([], "file: the document must hold named values"),
        (7, "file: the document must hold named values"),
        ({"training": []}, "file: training must hold named values"),
    ],
)
def test_mistakes_are_named(document, message):
    with pytest.raises(ConfigError) as caught:
        from_dict(RunConfig, document, "file")
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize("section", ["data", "model", "training", "sampling", "stages", *Process.kinds()])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 1e31])
def test_no_field_takes_a_number_out_of_all_proportion(section, number):
    kind = (
        Process.kinds()[section]
        if section in Process.kinds()
        else type(getattr(RunConfig(model=tiny.architecture("unified")), section))
    )
    for item in fields(kind):
        default = getattr(kind(), item.name)
        if isinstance(default, float):
            with pytest.raises(ConfigError, match=item.name.replace("_", "-")):
                kind(**{item.name: number})
    with pytest.raises(ConfigError, match=r"stages\.edges"):
        StagesConfig(edges=(1.0, number))


def test_a_run_must_fit_together():
    with pytest.raises(ConfigError, match=r"training\.batch-size must be at least 3, the number of stages, got 2"):
        tiny.run_config(batch_size=2)
    with pytest.raises(ConfigError, match=r"training\.quotas must be 3 shares"):
        tiny.run_config(quotas=(1.0, 1.0))
    config = tiny.run_config(tiny.architecture("unified"), batch_size=1)
    assert config.edges == () and config.stages.edges == tiny.EDGES


json_values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(10**30), 10**30), st.integers(-2, 40), st.floats(), st.text(max_size=5),
        st.sampled_from(["vp", "edm", "unified", "separate", "mixed", "single-p", "box", "conv", "digits"]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip


def keys(section):
    kinds = Process.kinds().values() if section == "process" else [type(getattr(tiny.run_config(), section))]
    return sorted({item.name for kind in kinds for item in fields(kind)})


KEYS = {section: keys(section) for section in SECTIONS}
changes = st.sampled_from(SECTIONS).flatmap(
    lambda section: st.tuples(
        st.just(section), st.one_of(st.sampled_from(KEYS[section]), st.text(max_size=5)), json_values
    )
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(changes=st.lists(changes, min_size=1, max_size=2))
def test_any_document_is_refused_with_a_line_or_takes_a_step(changes):
    document = to_dict(tiny.run_config())
    for section, key, value in changes:
        document[section][key] = value
    try:
        config = from_dict(RunConfig, document, "file")
    except ConfigError as error:
        assert str(error).startswith("file: ") and "\n" not in str(error)
        return
    for section, key, _ in changes:
        assert hasattr(getattr(config, section), key), "an unknown key was ignored"
    model, training = config.model, config.training
    if max(model.width, *model.decoder_widths) * max(model.multipliers) > 64 or training.batch_size > 40:
        return  # it would run, but not in this test
    if model.blocks * len(model.multipliers) > 8 or model.classes:
        return
    try:
        next(build_trainer(config, tiny.images()).run(1))
    except (ConfigError, NumericsError) as error:
        assert "\n" not in str(error)


@settings(max_examples=50)
@given(document=json_values)
def test_any_json_is_no_traceback(document):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from_dict(RunConfig, document, "file")
        except ConfigError as error:
            assert str(error).startswith("file: ")


def test_old_keys_are_read_with_one_warning():
    document = to_dict(tiny.run_config(sigma_rel=(0.1,)))
    document["training"]["ema_lengths"] = document["training"].pop("sigma_rel")
    document["engine"] = {"accumulation": 2, "checkpointing": True}
    with pytest.warns(FutureWarning, match="file: training.ema_lengths is now called training.sigma_rel, ") as caught:
        config = from_dict(RunConfig, document, "file")
    assert len(caught) == 1 and config.training.sigma_rel == (0.1,)
    assert (config.engine.gradient_accumulation, config.engine.activation_checkpointing) == (2, True)
    assert document["engine"] == {"accumulation": 2, "checkpointing": True}, "the caller's document was changed"
    with pytest.warns(FutureWarning, match="is now called"):
        assert from_dict(type(config.engine), document["engine"], "file", "engine") == config.engine
    document["engine"]["gradient_accumulation"] = 3
    with pytest.raises(ConfigError, match=r"unknown key engine\.accumulation"), pytest.warns(FutureWarning):
        from_dict(RunConfig, document, "file")


def test_every_old_name_leads_to_a_new_one():
    known = flat(to_dict(RunConfig()))
    for old, new in RENAMED.items():
        assert old not in known and ("." not in new or new in known)


def test_old_words_of_the_command_line_are_understood(capsys):
    words = ["train", "digits", "--dry-run", "--json", "--training.ema-lengths", "0.1", "--engine.accumulation=2"]
    with pytest.warns(FutureWarning, match="--training.ema-lengths is now called --training.sigma-rel"):
        assert dispatch([*words, "--engine.checkpointing"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["training"]["sigma_rel"] == [0.1]
    assert document["engine"]["gradient_accumulation"] == 2 and document["engine"]["activation_checkpointing"]


@pytest.mark.parametrize("name", ["VP", "Cosine", "VE", "EDM", "LDM", "Flow"])
def test_old_names_of_processes_warn(name):
    with pytest.warns(DeprecationWarning, match=f"{name}Config is now multistage_diffusion.noise.{name}"):
        assert getattr(config_module, f"{name}Config") is getattr(noise, name)


def test_old_functions_of_processes_warn():
    with pytest.warns(DeprecationWarning, match="process_by_kind"):
        assert config_module.process_config("edm") == noise.EDM()
    with pytest.warns(DeprecationWarning, match="its own record"):
        assert multistage_diffusion.make_process(noise.VP()) == noise.VP()
    with pytest.raises(AttributeError, match="no attribute 'XConfig'"):
        _ = config_module.XConfig
