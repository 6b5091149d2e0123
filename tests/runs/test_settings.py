"""Settings are defined once, as dataclass fields; files, options and records follow from these."""

from dataclasses import MISSING, replace
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from gossamer import GossamerError
from gossamer.runs.presets import Preset, presets
from gossamer.runs.settings import RunConfig, SettingsSource, settings
from gossamer.runs.settings_file import all_settings, read_settings
from gossamer.training.constraints import CrossEntropy, KLDivergence
from gossamer.training.multiplier import MultiplierConfig
from gossamer.training.settings import TrainingConfig

ASKED = {"model": "smollm2", "text": "self"}


def test_a_configuration_is_the_one_that_its_mapping_makes() -> None:
    config = RunConfig(
        "gpt2",
        "text.txt",
        tokens=4096,
        lora_targets=("q_proj",),
        training=TrainingConfig(
            constraint=KLDivergence(epsilon=0.3), multiplier=MultiplierConfig(integral=2.0), processes=2, batch_size=3
        ),
    )
    flat = config.to_dict()
    assert (flat["constraint"], flat["epsilon"], flat["multiplier_integral"], flat["processes"]) == ("kl", 0.3, 2.0, 2)
    assert "slack" not in flat
    assert RunConfig.from_dict(yaml.safe_load(yaml.safe_dump(flat))) == config
    assert RunConfig.from_dict(ASKED) == RunConfig("smollm2", "self")


def test_steps_follow_from_the_tokens() -> None:
    config = RunConfig.from_dict({**ASKED, "tokens": 1000, "seq_len": 16, "batch_size": 2, "gradient_accumulation": 3})
    assert (config.tokens_per_step, config.steps, config.tokens_trained) == (96, 10, 960)
    assert config.in_processes(4).steps == 1000 // 384
    assert replace(config, tokens=1).steps == 1


def test_every_setting_is_explained_and_in_the_printed_file(tmp_path: Path) -> None:
    written = all_settings()
    for name, one in settings().items():
        assert one.help
        if not one.recorded:
            assert f"\n{name}:" in f"\n{written}".replace("\n# ", "\n")
    file = tmp_path / "all.yaml"
    file.write_text(written)
    assert RunConfig.from_sources([SettingsSource(ASKED), read_settings(file)]) == RunConfig("smollm2", "self")
    file.write_text(written.replace("\nlearning_rate: 0.0001", "\nlearning_rate: 1e-5"))
    assert RunConfig.from_sources([SettingsSource(ASKED), read_settings(file)]).training.learning_rate == 1e-5


@pytest.mark.parametrize("preset", presets().values(), ids=lambda preset: preset.name)
def test_the_printed_file_of_a_preset_is_the_preset(preset: Preset, tmp_path: Path) -> None:
    file = tmp_path / "preset.yaml"
    file.write_text(all_settings(preset.settings))
    asked = RunConfig.from_sources([SettingsSource(preset.settings)])
    assert RunConfig.from_sources([read_settings(file)]) == asked


def test_defaults_that_json_writes_without_a_dot_come_back_as_numbers() -> None:
    """YAML 1.1 reads 1e-05 as a string, so the printed file must not contain such numbers."""
    from gossamer.fields import Setting
    from gossamer.runs.settings_file import _entry

    for value in (1e-05, 1e30, 2.5e-7, 1000000.0, 3):
        line = _entry(Setting("x", float, "A number.", MISSING), "ce", value).splitlines()[-1]
        assert yaml.safe_load(line) == {"x": value}
        assert not isinstance(yaml.safe_load(line)["x"], str)


def test_the_help_of_a_field_is_in_the_docstring() -> None:
    for kind in (RunConfig, TrainingConfig, MultiplierConfig, CrossEntropy):
        for name in get_type_hints(kind):
            if name in kind.__dataclass_fields__ and "help" in kind.__dataclass_fields__[name].metadata:
                assert f"    {name}: " in (kind.__doc__ or "")


def test_the_later_place_goes_before_the_earlier_one() -> None:
    config = RunConfig.from_sources(
        [
            SettingsSource(presets()["gpt2"].settings, "preset"),
            SettingsSource({"batch_size": 3, "seq_len": 32}),
            SettingsSource({"seq_len": "64"}),
        ]
    )
    assert (config.model, config.seq_len) == ("openai-community/gpt2", 64)
    assert (config.training.batch_size, config.training.gradient_accumulation) == (3, 2)


def test_another_constraint_replaces_the_settings_of_the_one_before() -> None:
    file = SettingsSource({**ASKED, "constraint": "kl", "epsilon": 0.2}, "file.yaml")
    assert RunConfig.from_sources([file]).training.constraint == KLDivergence(0.2)
    line = SettingsSource({"constraint": "ce", "slack": "0.1"}, options=True)
    assert RunConfig.from_sources([file, line]).training.constraint == CrossEntropy(0.1)
    with pytest.raises(GossamerError, match=r"^--slack is a setting of the constraint ce, not of kl; leave it out, or"):
        RunConfig.from_sources([file, SettingsSource({"slack": "0.1"}, options=True)])


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("tokns: 5", "bad.yaml: tokns is no setting; did you mean tokens?"),
        ("wibble: 5", "bad.yaml: wibble is no setting; gossamer settings prints all that there are"),
        ("processes: 2", "bad.yaml: processes is no setting"),
        ("tokens: 0", "bad.yaml: tokens 0 cannot be used; give a whole number from 1 to"),
        ("tokens: 1.5", "bad.yaml: tokens 1.5 cannot be used; give a whole number"),
        ("tokens: true", "bad.yaml: tokens True cannot be used; give a whole number"),
        ("seq_len: long", "bad.yaml: seq_len 'long' cannot be used; give a whole number from 2 to"),
        ("hard_fraction: 1.5", "bad.yaml: hard_fraction 1.5 cannot be used; give a finite number from 0 to 1"),
        ("multiplier_integral: .inf", "bad.yaml: multiplier_integral inf cannot be used; give a finite number"),
        ("seed: null", "bad.yaml: seed None cannot be used; give a whole number"),
        ("control: 1", "bad.yaml: control 1 cannot be used; give true or false"),
        ("train: some", "bad.yaml: train 'some' cannot be used; give one of all, attention, lora"),
        ("constraint: [ce]", "bad.yaml: constraint ['ce'] cannot be used; give one of ce, kl"),
        ("lora_targets: {a: 1}", "bad.yaml: lora_targets {'a': 1} cannot be used; give a list of names"),
        ("epsilon: 0.1", "bad.yaml: epsilon is a setting of the constraint kl, not of ce"),
        ("constraint: kl\nepsilon: 0", "--epsilon 0 cannot be held"),
        ("1: 2", "bad.yaml: 1 is no setting"),
        ("- tokens", "bad.yaml holds no settings; give lines like"),
        ("tokens: 1\ntokens: 2", "bad.yaml is not YAML: tokens stands twice"),
        ("tokens: [", "bad.yaml is not YAML"),
    ],
)
def test_what_a_file_cannot_say_is_named(written: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(written)
    with pytest.raises(GossamerError) as refused:
        RunConfig.from_sources([SettingsSource(ASKED), read_settings(file)])
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_setting_that_a_record_names_and_there_is_none_of_is_named() -> None:
    with pytest.raises(GossamerError, match=r"^run/config\.json: tokns is no setting; did you mean tokens\?$"):
        RunConfig.from_dict({**ASKED, "tokns": 5}, source="run/config.json")


def test_what_has_no_default_has_to_be_given(tmp_path: Path) -> None:
    assert [name for name, one in settings().items() if one.default is MISSING] == ["model", "text"]
    with pytest.raises(GossamerError, match=r"^--text is not given: Training text: a .txt"):
        RunConfig.from_sources([SettingsSource({"model": "smollm2"}, options=True)])
    with pytest.raises(GossamerError, match="cannot be read: No such file"):
        read_settings(tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").touch()
    assert read_settings(tmp_path / "empty.yaml").values == {}


def test_values_that_python_gives_are_checked_too() -> None:
    with pytest.raises(GossamerError, match="gate_bias nan cannot be used; give a finite number"):
        RunConfig("smollm2", "self", gate_bias=float("nan")).check()


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("seed", -1, "from 0 to 4,294,967,295"),
        ("gate_bias", 1e300, "from -10000 to 10000"),
        ("gradient_accumulation", 99999999999, "from 1 to 1,048,576"),
        ("batch_size", 10**12, "from 1 to 1,048,576"),
        ("tokens", 10**30, "from 1 to 1,000,000,000,000,000"),
        ("slack", 1e308, "from 0 to 10000"),
        ("multiplier_integral", -1, "from 0 to 1000"),
    ],
)
def test_numbers_that_nothing_can_be_made_of_are_refused(name: str, value: float, wanted: str) -> None:
    with pytest.raises(GossamerError, match=f"{name} .* cannot be used; give .*{wanted}"):
        RunConfig.from_dict({**ASKED, name: value})
