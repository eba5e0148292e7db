//! PEFT folders: against golden adapters, and what is refused.

use indexmap::IndexMap;
use qpeft_formats::error::{Kind, Place};
use qpeft_formats::peft::names::{parse_key, tensor_key};
use qpeft_formats::peft::{HostTensor, InitLoraWeights, Part, PeftAdapter, PeftConfig, TargetModules};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use super::testdata;

const GOLDEN: [&str; 4] = ["lora_patterns", "dora", "pissa", "rslora"];

fn golden(name: &str) -> std::path::PathBuf {
    testdata(&format!("peft/fp32/{name}/trained"))
}

#[test]
fn adapters_of_peft_are_written_back_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    for name in GOLDEN {
        let adapter = PeftAdapter::read(&golden(name)).unwrap();
        let copy = dir.path().join(name);
        adapter.write(&copy).unwrap();
        assert_eq!(PeftAdapter::read(&copy).unwrap(), adapter);
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            let (ours, theirs) =
                (fs::read(copy.join(file)).unwrap(), fs::read(golden(name).join(file)).unwrap());
            assert!(ours == theirs, "{name}/{file}");
        }
        assert_eq!(fs::read_dir(&copy).unwrap().count(), 2);
    }
}

#[test]
fn unknown_keys_survive() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("adapter_config.json");
    let text = r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 11.3137, "zeta": {"b": [1, 2.5], "a": null}, "eva_config": {"rho": 2.0}}"#;
    fs::write(&path, text).unwrap();
    let config = PeftConfig::read(&path).unwrap();
    assert_eq!(config.lora_alpha, 11.3137);
    config.write(&path).unwrap();
    let before: serde_json::Value = serde_json::from_str(text).unwrap();
    let after: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    for (key, value) in before.as_object().unwrap() {
        assert_eq!(&after[key], value, "{key}");
    }
    assert_eq!(PeftConfig::read(&path).unwrap(), config);
}

#[test]
fn a_new_configuration_has_the_keys_that_peft_writes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("adapter_config.json");
    let mut config = PeftConfig::new(4, 8.0);
    config.base_model_name_or_path = Some("tiny-llama".into());
    config.use_dora = true;
    config.target_modules =
        Some(TargetModules::List(["v_proj", "q_proj", "down_proj"].map(str::to_owned).into()));
    config.write(&path).unwrap();
    let theirs = golden("dora").join("adapter_config.json");
    assert_eq!(fs::read_to_string(&path).unwrap(), fs::read_to_string(theirs).unwrap());
}

#[test]
fn every_spelling_of_a_setting_reads_and_writes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("adapter_config.json");
    let read = |target: &str, init: &str| {
        let text = format!(
            r#"{{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": {target}, "init_lora_weights": {init}}}"#
        );
        fs::write(&path, text).unwrap();
        let config = PeftConfig::read(&path).unwrap();
        config.write(&path).unwrap();
        assert_eq!(PeftConfig::read(&path).unwrap(), config);
        (config.target_modules, config.init_lora_weights)
    };
    assert_eq!(read("null", "true"), (None, InitLoraWeights::Bool(true)));
    let (target, init) = read(r#""All-Linear""#, r#""pissa_niter_16""#);
    assert_eq!(
        (target, init),
        (Some(TargetModules::AllLinear), InitLoraWeights::Named("pissa_niter_16".into()))
    );
    assert_eq!(read(r#"".*q_proj""#, "false").0, Some(TargetModules::Regex(".*q_proj".into())));
    assert_eq!(read(r#"["q_proj"]"#, "null").0, Some(TargetModules::List(vec!["q_proj".into()])));
}

#[test]
fn scaling_follows_rank_alpha_and_their_patterns() {
    let config = PeftConfig::read(&golden("lora_patterns").join("adapter_config.json")).unwrap();
    // r 4, alpha 8; ranks: layers.1.mlp.down_proj 2, q_proj 6; alphas: layer 1's q_proj 3, v_proj 32.
    let cases = [
        ("model.layers.0.self_attn.q_proj", 6, 8.0),
        ("model.layers.1.self_attn.q_proj", 6, 3.0),
        ("model.layers.0.self_attn.v_proj", 4, 32.0),
        ("model.layers.1.mlp.down_proj", 2, 8.0),
        ("model.layers.0.mlp.down_proj", 4, 8.0),
        // `layers.1.` is not the end of `layers.11.`, and `q_proj` is not a part of `xq_proj`.
        ("model.layers.11.mlp.down_proj", 4, 8.0),
        ("model.layers.0.self_attn.xq_proj", 4, 8.0),
    ];
    for (module, rank, alpha) in cases {
        assert_eq!(config.rank_of(module).unwrap(), rank, "{module}");
        assert_eq!(config.alpha_of(module).unwrap(), alpha, "{module}");
        assert_eq!(config.scaling(module).unwrap(), alpha / rank as f64, "{module}");
    }
    let mut config = PeftConfig::new(16, 8.0);
    config.use_rslora = true;
    assert_eq!(config.scaling("any").unwrap(), 2.0);
    // The first pattern that matches counts, in the order of the file.
    config.rank_pattern = IndexMap::from([(".*_proj".to_owned(), 4), ("q_proj".to_owned(), 64)]);
    assert_eq!(config.rank_of("model.layers.0.self_attn.q_proj").unwrap(), 4);
    // Python's patterns may look ahead.
    config.rank_pattern = IndexMap::from([(r"layers\.(?!0\.).*q_proj".to_owned(), 4)]);
    assert_eq!(config.rank_of("model.layers.0.self_attn.q_proj").unwrap(), 16);
    assert_eq!(config.rank_of("model.layers.3.self_attn.q_proj").unwrap(), 4);
    config.rank_pattern = IndexMap::from([("(".to_owned(), 4)]);
    let error = config.scaling("q_proj").unwrap_err();
    assert!(matches!(&error.kind, Kind::BadPattern { pattern, .. } if **pattern == *"("), "{error}");
    assert_eq!(error.place, Place::Key("rank_pattern".into()));
}

#[test]
fn targets_are_matched_as_peft_matches_them() {
    let module = "model.layers.1.self_attn.q_proj";
    let mut config = PeftConfig::new(8, 8.0);
    let mut targets = |target: Option<TargetModules>, exclude: Option<TargetModules>| {
        config.target_modules = target;
        config.exclude_modules = exclude;
        config.targets(module).unwrap()
    };
    let list = |names: &[&str]| Some(TargetModules::List(names.iter().map(|&s| s.to_owned()).collect()));
    let regex = |s: &str| Some(TargetModules::Regex(s.to_owned()));
    assert!(!targets(None, None));
    assert!(targets(Some(TargetModules::AllLinear), None));
    assert!(targets(list(&["k_proj", "q_proj"]), None));
    assert!(targets(list(&[module]), None));
    assert!(!targets(list(&["proj", "_proj", "attn.q_proj"]), None), "only whole components match");
    assert!(targets(list(&["self_attn.q_proj"]), None));
    assert!(targets(regex(r".*\.(q|v)_proj"), None));
    assert!(!targets(regex("q_proj"), None), "a pattern matches the whole path");
    assert!(!targets(list(&["q_proj"]), regex(r".*layers\.1\..*")), "exclusion wins");
    config.target_modules = list(&["q_proj"]);
    config.exclude_modules = None;
    let mut in_layers = |layers: serde_json::Value, module: &str| {
        config.other.insert("layers_to_transform".into(), layers);
        config.targets(module)
    };
    assert!(in_layers(serde_json::json!([0, 1]), module).unwrap());
    assert!(in_layers(serde_json::json!(0), module).unwrap());
    assert!(!in_layers(serde_json::json!([1]), module).unwrap());
    assert!(!in_layers(serde_json::json!([1]), "model.1.q_proj").unwrap(), "the number follows two parts");
    let error = in_layers(serde_json::json!(["last"]), module).unwrap_err();
    assert!(matches!(error.kind, Kind::WrongSetting { .. }));
    config.other.insert("layers_pattern".into(), serde_json::json!("layers"));
    assert!(matches!(config.targets(module).unwrap_err().kind, Kind::UnsupportedSetting { .. }));
}

#[test]
fn keys_are_those_of_peft() {
    let module = "model.layers.0.self_attn.q_proj";
    let keys = [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
    ];
    for (part, key) in Part::ALL.into_iter().zip(keys) {
        assert_eq!(tensor_key(module, part), key);
        assert_eq!(parse_key(key), Some((module, part)));
    }
    for key in
        ["base_model.model.lora_A.weight", "model.q_proj.lora_A.weight", "base_model.model.x.lora_A", ""]
    {
        assert_eq!(parse_key(key), None, "{key}");
    }
    let adapter = PeftAdapter::read(&golden("dora")).unwrap();
    assert_eq!(adapter.modules().len(), 6);
    assert_eq!(adapter.get(module, Part::A).unwrap().shape, [4, 128]);
    assert_eq!(adapter.get(module, Part::Magnitude).unwrap().shape, [128]);
    assert!(adapter.get("model.layers.0.self_attn.k_proj", Part::A).is_none());
}

#[test]
fn other_methods_are_refused_by_name() {
    for (name, found) in [("adalora", "ADALORA"), ("ia3", "IA3"), ("vera", "VERA")] {
        let error = PeftAdapter::read(&golden(name)).unwrap_err();
        let expected =
            format!("key `peft_type`: is `\"{found}\"`, which is not supported; supported: `LORA`");
        assert!(error.to_string().ends_with(&expected), "{error}");
    }
    let error = PeftAdapter::read(&golden("gpt2_lora")).unwrap_err();
    assert_eq!(error.place, Place::Key("fan_in_fan_out".into()));
}

/// A small adapter of rank 2 on one module.
fn small(dora: bool) -> PeftAdapter {
    let mut adapter = PeftAdapter { config: PeftConfig::new(2, 4.0), tensors: BTreeMap::new() };
    adapter.config.use_dora = dora;
    let tensor =
        |shape: &[usize]| HostTensor { shape: shape.to_vec(), data: vec![0.5; shape.iter().product()] };
    adapter.insert("q_proj", Part::A, tensor(&[2, 3]));
    adapter.insert("q_proj", Part::B, tensor(&[4, 2]));
    if dora {
        adapter.insert("q_proj", Part::Magnitude, tensor(&[4]));
    }
    adapter
}

#[test]
fn tensors_that_do_not_belong_together_are_not_written() {
    let dir = tempfile::tempdir().unwrap();
    small(false).write(&dir.path().join("fine")).unwrap();
    small(true).write(&dir.path().join("fine")).unwrap();
    assert_eq!(PeftAdapter::read(&dir.path().join("fine")).unwrap(), small(true));

    let refuse = |dora: bool, damage: &dyn Fn(&mut PeftAdapter)| {
        let mut adapter = small(dora);
        damage(&mut adapter);
        let error = adapter.write(&dir.path().join("never")).unwrap_err();
        assert!(!dir.path().join("never").exists());
        assert!(error.path.is_some());
        error
    };
    let key = |part| tensor_key("q_proj", part);
    assert!(matches!(refuse(false, &|a| a.tensors.clear()).kind, Kind::NoTensors));
    for part in Part::ALL {
        let error = refuse(true, &|a| drop(a.tensors.remove(&key(part))));
        assert!(matches!(error.kind, Kind::MissingTensor), "{error}");
        assert_eq!(error.place, Place::Tensor(key(part)));
        let error = refuse(true, &|a| a.tensors.get_mut(&key(part)).unwrap().shape.push(1));
        assert!(matches!(error.kind, Kind::WrongShape { .. }), "{error}");
        let error = refuse(true, &|a| a.tensors.get_mut(&key(part)).unwrap().data.push(0.0));
        assert!(matches!(error.kind, Kind::WrongLength { .. }), "{error}");
    }
    let error = refuse(true, &|a| a.config.use_dora = false);
    assert!(matches!(error.kind, Kind::UnexpectedTensor { .. }), "{error}");
    let error = refuse(false, &|a| a.config.r = 3);
    assert!(error.to_string().ends_with("lora_A.weight`: has shape [2, 3], expected [3, in]"), "{error}");
    let error = refuse(false, &|a| {
        a.tensors.insert("base_model.model.lm_head.weight".into(), HostTensor::default());
    });
    assert!(matches!(error.kind, Kind::UnexpectedTensor { .. }), "{error}");
}

#[test]
fn settings_that_are_not_implemented_are_not_written() {
    let refuse = |damage: &dyn Fn(&mut PeftConfig)| {
        let mut config = PeftConfig::new(2, 4.0);
        damage(&mut config);
        let error = config.write(Path::new("never/adapter_config.json")).unwrap_err();
        assert!(matches!(error.kind, Kind::UnsupportedSetting { .. } | Kind::WrongSetting { .. }), "{error}");
        let Place::Key(key) = error.place else { panic!("no key") };
        key
    };
    assert_eq!(refuse(&|c| c.peft_type = "VERA".into()), "peft_type");
    assert_eq!(refuse(&|c| c.bias = "all".into()), "bias");
    assert_eq!(refuse(&|c| c.fan_in_fan_out = true), "fan_in_fan_out");
    assert_eq!(refuse(&|c| c.modules_to_save = Some(vec!["lm_head".into()])), "modules_to_save");
    assert_eq!(refuse(&|c| c.r = 0), "r");
    assert_eq!(refuse(&|c| c.rank_pattern = [("q_proj".into(), 0)].into()), "rank_pattern");
    assert_eq!(refuse(&|c| c.lora_alpha = f64::NAN), "lora_alpha");
    assert_eq!(refuse(&|c| c.alpha_pattern = [("q_proj".into(), f64::INFINITY)].into()), "alpha_pattern");
    assert_eq!(refuse(&|c| c.lora_dropout = 1.0), "lora_dropout");
    let keys = [
        "alora_invocation_tokens",
        "arrow_config",
        "kasa_config",
        "layer_replication",
        "lora_bias",
        "monteclora_config",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "use_qalora",
        "velora_config",
    ];
    for key in keys {
        assert_eq!(refuse(&|c| drop(c.other.insert(key.into(), serde_json::json!([1])))), key);
    }
}
