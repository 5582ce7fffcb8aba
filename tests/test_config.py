"""Settings are checked strictly, and one message names every offender and the way out."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from concept_guard.config import GuardConfig, read_yaml, validated
from concept_guard.errors import ConfigError
from concept_guard.strict import expand_path, parse_yaml


def written(folder: Path, text: str) -> Path:
    path = folder / "guard.yaml"
    path.write_text(text, encoding="utf8")
    return path


def test_a_valid_file_is_read_with_the_rest_at_its_defaults(tmp_path: Path) -> None:
    text = "alpha: 1e-3\nstart: 1ep\nbudget: 5%\ntap: stage:-1@NHWC\n"
    text += "action: [refit, augment, rebalance, project]\n"
    config = GuardConfig.load(written(tmp_path, text))
    assert config == GuardConfig(alpha=0.001, start="1ep", budget=0.05, tap="stage:-1@NHWC")
    assert config.action == ("project", "rebalance", "augment", "refit")
    assert GuardConfig.load(str(tmp_path / "guard.yaml")) == config


def test_nothing_an_empty_file_and_a_mapping_are_sources_too(tmp_path: Path) -> None:
    assert GuardConfig.load(None) == GuardConfig.load({}) == GuardConfig()
    assert GuardConfig.load(written(tmp_path, "# only a comment\n")) == GuardConfig()
    config = GuardConfig(alpha=0.2)
    assert GuardConfig.load(config) is config


def test_one_message_names_every_offender_with_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, "alpah: 0.1\n\nstrength: 2\nconcepts: 1\nseed: true\n")
    with pytest.raises(ConfigError) as caught:
        GuardConfig.load(path)
    assert str(caught.value).splitlines() == [
        f"{path}: 4 problems",
        f"  {path}:1: unknown key 'alpah'; nearest: 'alpha'",
        f"  {path}:3: strength = 2: expected less than or equal to 1",
        f"  {path}:4: concepts = 1: expected auto, or a whole number of concepts, at least 2",
        f"  {path}:5: seed = True: expected a valid integer",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"evry": 3}, "unknown key 'evry'; nearest: 'every'"),
        ({"zzz": 3}, "unknown key 'zzz'; known here: action, alpha, .*track_every"),
        ({"alpha": 0}, "alpha = 0: expected greater than 0"),
        ({"alpha": 1}, "alpha = 1: expected less than 1"),
        ({"alpha": "0.1"}, "alpha = '0.1': expected a valid number"),
        ({"alpha": float("nan")}, "alpha = nan: expected a finite number"),
        ({"concepts": "many"}, "concepts = 'many': expected auto, or a whole number"),
        ({"start": 0}, "start = 0: expected a whole number of updates, at least 1, or epochs"),
        ({"every": "0ep"}, "every = '0ep': expected a whole number"),
        ({"track_every": True}, "track_every = True: expected a whole number"),
        ({"track_every": "often"}, "track_every = 'often': .* such as \"1ep\"; or auto"),
        ({"every": "auto"}, "every = 'auto': expected a whole number"),
        ({"every": "2 epochs"}, "every = '2 epochs': expected a whole number"),
        ({"action": ["project", "observe"]}, "observe cannot be used here: expected observe alone"),
        ({"action": ["project", "project"]}, "project cannot be used here: .* names each once"),
        ({"action": "erase"}, "erase cannot be used here: .* project, penalize, rebalance"),
        ({"action": 3}, "action = 3: expected observe, or a list out of project, penalize"),
        ({"max_erased": 0}, "max_erased = 0: expected greater than or equal to 1"),
        ({"approve": "ask"}, "approve = 'ask': expected 'auto' or 'manual'"),
        ({"strength": 0}, "strength = 0: expected greater than 0"),
        ({"strength": -0.5}, "strength = -0.5: expected greater than 0"),
        ({"strength": float("inf")}, "strength = inf: expected a finite number"),
        ({"strength": float("nan")}, "strength = nan: expected a finite number"),
        ({"ramp": -1}, "ramp = -1: expected a whole number of updates, .* or 0 for none"),
        ({"ramp": False}, "ramp = False: expected a whole number of updates"),
        ({"ramp": "0ep"}, "ramp = '0ep': expected a whole number of updates"),
        ({"budget": "200%"}, "budget = '200%': expected a share .* such as \"5%\" or 0.05"),
        ({"budget": 5}, "budget = 5: expected a share"),
        ({"max_rows": 0}, "max_rows = 0"),
        ({"reference_images": -1}, "reference_images = -1"),
        ({"steps_per_epoch": 0}, "steps_per_epoch = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"tap": "layer4"}, "tap = 'layer4': expected pre_logits, stage:<number> .*module:layer4"),
        ({"tap": "stage:-1@NHW"}, "tap = 'stage:-1@NHW': expected pre_logits"),
    ],
)
def test_a_wrong_value_is_refused_by_name(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GuardConfig.load(settings)
    with pytest.raises(ConfigError, match=message):
        GuardConfig(**settings)  # the same words for keyword arguments


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        ("observe", ()),
        (["observe"], ()),
        ([], ()),
        ("project", ("project",)),
        (["rebalance"], ("rebalance",)),
        (["rebalance", "project"], ("project", "rebalance")),
        ("penalize", ("penalize",)),
        (["rebalance", "penalize", "project"], ("project", "penalize", "rebalance")),
    ],
)
def test_actions_are_stored_in_a_fixed_order(value: object, stored: tuple[str, ...]) -> None:
    config = GuardConfig.load({"action": value})
    assert config.action == stored
    assert GuardConfig.load(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(("value", "share"), [("5%", 0.05), ("2.5 %", 0.025), (0.1, 0.1)])
def test_a_budget_becomes_a_share(value: object, share: float) -> None:
    assert GuardConfig.load({"budget": value}).budget == pytest.approx(share)
    assert GuardConfig().budget is None


def test_schedules_count_updates_or_epochs() -> None:
    config = GuardConfig(start=30, every="2ep", track_every="0.1ep", steps_per_epoch=14)
    assert [config.updates(name) for name in ("start", "every", "track_every")] == [30, 28, 1]
    assert GuardConfig(ramp="1ep", steps_per_epoch=14).updates("ramp") == 14
    assert (GuardConfig().updates("ramp"), GuardConfig(ramp=7).updates("ramp")) == (0, 7)
    assert (GuardConfig().track_every, GuardConfig().updates("track_every")) == ("auto", 25)
    with pytest.raises(ConfigError, match="every = '2ep' is in epochs, but steps_per_epoch"):
        GuardConfig(every="2ep").updates("every")


def test_a_configuration_cannot_be_changed() -> None:
    config = GuardConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.alpha = 0.2  # type: ignore[misc]


@given(
    st.builds(
        GuardConfig,
        alpha=st.floats(0.001, 0.999),
        start=st.one_of(st.integers(1, 999), st.sampled_from(["1ep", "0.5ep"])),
        concepts=st.one_of(st.just("auto"), st.integers(2, 64)),
        action=st.sampled_from(["observe", "project", ["project", "rebalance"]]),
        budget=st.one_of(st.none(), st.sampled_from(["5%", 0.25])),
    )
)
def test_what_is_written_is_read_back(config: GuardConfig) -> None:
    assert GuardConfig.load(config.model_dump(mode="json")) == config


def test_malformed_yaml_is_refused_with_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, "alpha: 0.1\n  every: 3\n")
    with pytest.raises(ConfigError, match=rf"{path}:2: this is not readable YAML: mapping values"):
        GuardConfig.load(path)


def test_a_key_that_is_set_twice_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "alpha: 0.1\nevery: 3\nalpha: 0.2\n")
    with pytest.raises(ConfigError, match=rf"{path}:3: 'alpha' is set a second time"):
        GuardConfig.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- alpha\n", "got a list, expected lines of the form `key: value`"),
        ("3: x\n", "got keys that are not text"),
        ("a: &a [*a]\n", "not readable YAML"),
        ("a: !!python/object:os.system x\n", "not readable YAML"),
        ("a: {\n", "not readable YAML"),
    ],
)
def test_what_is_no_list_of_settings_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_yaml(written(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"nothing.yaml: cannot be read: No such file"):
        GuardConfig.load(tmp_path / "nothing.yaml")
    monkeypatch.delenv("NOT_SET_HERE", raising=False)
    with pytest.raises(ConfigError, match=r"environment variable \$NOT_SET_HERE is not set"):
        GuardConfig.load("$NOT_SET_HERE/guard.yaml")


def test_home_and_environment_variables_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("DATA", "/data")
    assert expand_path("~/a") == "/home/someone/a"
    assert expand_path("${DATA}/a") == "/data/a"
    assert expand_path("relative/a") == "relative/a"
    written(tmp_path, "alpha: 0.3\n")
    monkeypatch.setenv("RUNS", str(tmp_path))
    assert GuardConfig.load("$RUNS/guard.yaml").alpha == 0.3


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("5E2", 500.0),
        (".5", 0.5),
        ("-3", -3),
        ("3.0", 3.0),
        ("0", 0),
        ("2024-01-01", "2024-01-01"),
        ("12:30", "12:30"),
        ("007", "007"),
        ("true", True),
        ("null", None),
        ("", None),
        ("1ep", "1ep"),
        ("[1, 2]", [1, 2]),
        ("{a: 1}", {"a": 1}),
    ],
)
def test_yaml_values_mean_what_they_look_like(text: str, value: object) -> None:
    found, _ = parse_yaml(text, "here")
    assert found == value
    assert type(found) is type(value)


def test_lines_are_known_at_every_depth() -> None:
    _, lines = parse_yaml("a: 1\nb:\n  c: 2\n  d:\n    - 3\n    - 4\n", "here")
    assert lines == {("a",): 1, ("b",): 2, ("b", "c"): 3, ("b", "d"): 4} | {
        ("b", "d", 0): 5,
        ("b", "d", 1): 6,
    }


def test_checking_data_needs_no_lines() -> None:
    assert validated(GuardConfig, {"alpha": 0.1}, {}, "somewhere").alpha == 0.1
    with pytest.raises(ConfigError, match="^somewhere: unknown key 'alpah'"):
        validated(GuardConfig, {"alpah": 0.1}, {}, "somewhere")
