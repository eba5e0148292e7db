//! What a training run was asked to do: every setting that `qpeft train` resolves, by its flag's name.
//!
//! The field names are the flags and the YAML keys, so the `config` object of a run's `qpeft.json`
//! can be given back to `--config` as it is.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use qpeft_formats::peft;
use qpeft_kernels::weight::WeightType;

use super::data::DataOptions;
use super::schedule::SchedulerType;
pub use crate::adapters::Method;
use crate::model::weight_name;

/// Which linear layers get an adapter.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(from = "TargetsText", into = "TargetsText")]
pub enum TargetModules {
    /// Every linear layer of every block; not the head.
    #[default]
    AllLinear,
    /// The layers with these names, as PEFT matches them: `q_proj`, or the end of a dotted path.
    Names(Vec<String>),
}

/// The two spellings in a file: `"all-linear"` or a list of names.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum TargetsText {
    One(String),
    Many(Vec<String>),
}

impl TargetModules {
    /// From the parts of a comma list; the single part `all-linear` is [`TargetModules::AllLinear`].
    pub fn from_names(names: Vec<String>) -> TargetModules {
        match names.as_slice() {
            [one] if one == "all-linear" => TargetModules::AllLinear,
            _ => TargetModules::Names(names),
        }
    }
}

impl From<TargetsText> for TargetModules {
    fn from(text: TargetsText) -> TargetModules {
        match text {
            TargetsText::One(one) => TargetModules::from_names(vec![one]),
            TargetsText::Many(names) => TargetModules::from_names(names),
        }
    }
}

impl From<TargetModules> for TargetsText {
    fn from(targets: TargetModules) -> TargetsText {
        match targets {
            TargetModules::AllLinear => TargetsText::One("all-linear".to_owned()),
            TargetModules::Names(names) => TargetsText::Many(names),
        }
    }
}

impl From<&TargetModules> for peft::TargetModules {
    fn from(targets: &TargetModules) -> peft::TargetModules {
        match targets {
            TargetModules::AllLinear => peft::TargetModules::AllLinear,
            TargetModules::Names(names) => peft::TargetModules::List(names.clone()),
        }
    }
}

impl fmt::Display for TargetModules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TargetModules::AllLinear => f.write_str("all-linear"),
            TargetModules::Names(names) => f.write_str(&names.join(",")),
        }
    }
}

/// The settings of a run after flags, file and defaults were put together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// GGUF file or Hugging Face folder.
    pub model: PathBuf,
    /// The type to which the linears of the base are quantized at load.
    #[serde(default, with = "weight_name", skip_serializing_if = "Option::is_none")]
    pub base_quant: Option<WeightType>,
    /// Training examples, JSONL.
    pub data: PathBuf,
    /// Folder of the run.
    pub output: PathBuf,
    /// `tokenizer.json` to use in place of the model's own.
    pub tokenizer: Option<PathBuf>,

    /// The method.
    pub method: Method,
    /// A trained magnitude per output row; always on for [`Method::Dora`].
    pub use_dora: bool,
    /// Scale by `alpha / sqrt(r)` in place of `alpha / r`.
    pub use_rslora: bool,
    /// Rank r.
    pub lora_r: usize,
    /// Alpha; the branch is scaled by `alpha / r`.
    pub lora_alpha: f64,
    /// Probability of dropping an input element of the low-rank branch.
    pub lora_dropout: f64,
    /// The adapted layers.
    pub target_modules: TargetModules,
    /// Power iterations of PiSSA's randomized SVD.
    pub pissa_niter: usize,
    /// Rounds after the first in which PiSSA's pair and residual are made again, each for what the other leaves.
    #[serde(default)]
    pub pissa_refinements: usize,
    /// The type of PiSSA's residuals; `None`: each linear's own.
    #[serde(default, with = "weight_name", skip_serializing_if = "Option::is_none")]
    pub residual_quant: Option<WeightType>,
    /// Saved adapter to start from.
    pub init_adapter: Option<PathBuf>,

    /// Key of the question in pair data, where it is not a usual one.
    pub prompt_field: Option<String>,
    /// Key of the answer in pair data, where it is not a usual one.
    pub completion_field: Option<String>,
    /// Also train on the tokens of the prompt.
    pub train_on_prompt: bool,
    /// Join prompt and completion as they are, without the model's chat template.
    pub no_chat_template: bool,
    /// Keep the order of the data file.
    pub no_shuffle: bool,
    /// Longest example in tokens; the rest is cut.
    pub max_seq_length: usize,

    /// Examples per forward pass.
    pub batch_size: usize,
    /// Forward passes per optimizer step.
    pub gradient_accumulation_steps: usize,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Shape of the learning rate after the warmup.
    pub lr_scheduler_type: SchedulerType,
    /// Share of all steps that are warmup, where `warmup_steps` is not given.
    pub warmup_ratio: f64,
    /// Steps of warmup.
    pub warmup_steps: Option<u64>,
    /// Optimizer steps; wins over `num_train_epochs`.
    pub max_steps: Option<u64>,
    /// Passes over the data.
    pub num_train_epochs: f64,
    /// AdamW's decoupled weight decay.
    pub weight_decay: f64,
    /// Largest total gradient norm; 0 does not clip.
    pub max_grad_norm: f64,
    /// AdamW's decay of the first moment.
    pub adam_beta1: f64,
    /// AdamW's decay of the second moment.
    pub adam_beta2: f64,
    /// AdamW's epsilon.
    pub adam_epsilon: f64,
    /// Seed of initialization, shuffling and dropout.
    pub seed: u64,
    /// Keep only block inputs and compute the rest again in the backward pass.
    pub gradient_checkpointing: bool,
    /// Bytes of device memory that the run may take; `None`: what is free.
    pub memory_limit: Option<u64>,

    /// Held-out examples, JSONL.
    pub eval_data: Option<PathBuf>,
    /// Share of `data` that is held out, where `eval_data` is not given.
    pub eval_split: f64,
    /// Steps between evaluations; 0 evaluates only before the first and after the last step.
    pub eval_steps: u64,
    /// Steps between checkpoints; 0 saves only after the last step.
    pub save_steps: u64,
    /// Newest checkpoints to keep; `None` keeps all.
    pub save_total_limit: Option<usize>,
    /// Steps between lines of the log.
    pub logging_steps: u64,
}

/// Settings that may differ between a run and its resumption: they change where and how often something is
/// written, how a run is fitted into memory, or a file that is compared by its content.
const FREE_ON_RESUME: [&str; 11] = [
    "model",
    "data",
    "output",
    "tokenizer",
    "gradient_checkpointing",
    "memory_limit",
    "eval_data",
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "logging_steps",
];

impl TrainConfig {
    /// How records become examples.
    pub fn data_options(&self) -> DataOptions {
        DataOptions {
            max_seq_length: self.max_seq_length,
            prompt_field: self.prompt_field.clone(),
            completion_field: self.completion_field.clone(),
            train_on_prompt: self.train_on_prompt,
            use_chat_template: !self.no_chat_template,
        }
    }

    /// The settings that decide the bytes of the trained adapter, as a checkpoint keeps them.
    pub fn binding(&self) -> serde_json::Map<String, serde_json::Value> {
        let serde_json::Value::Object(mut all) =
            serde_json::to_value(self).expect("a struct of plain fields has a JSON form")
        else {
            unreachable!("a struct serializes to an object")
        };
        all.retain(|key, _| !FREE_ON_RESUME.contains(&key.as_str()));
        all
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn example() -> TrainConfig {
        TrainConfig {
            model: "base.gguf".into(),
            base_quant: None,
            data: "chat.jsonl".into(),
            output: "run".into(),
            tokenizer: None,
            method: Method::Dora,
            use_dora: true,
            use_rslora: false,
            lora_r: 16,
            lora_alpha: 32.0,
            lora_dropout: 0.0,
            target_modules: TargetModules::AllLinear,
            pissa_niter: 16,
            pissa_refinements: 0,
            residual_quant: None,
            init_adapter: None,
            prompt_field: None,
            completion_field: None,
            train_on_prompt: false,
            no_chat_template: false,
            no_shuffle: false,
            max_seq_length: 1024,
            batch_size: 4,
            gradient_accumulation_steps: 1,
            learning_rate: 2e-4,
            lr_scheduler_type: SchedulerType::Cosine,
            warmup_ratio: 0.03,
            warmup_steps: None,
            max_steps: Some(60),
            num_train_epochs: 1.0,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            seed: 42,
            gradient_checkpointing: false,
            memory_limit: None,
            eval_data: None,
            eval_split: 0.0,
            eval_steps: 0,
            save_steps: 100,
            save_total_limit: None,
            logging_steps: 1,
        }
    }

    #[test]
    fn a_config_survives_json() {
        let mut config = example();
        config.target_modules = TargetModules::Names(vec!["q_proj".into(), "v_proj".into()]);
        config.base_quant = Some("nf4-dq".parse().unwrap());
        config.residual_quant = Some("q8_0".parse().unwrap());
        let text = serde_json::to_string(&config).unwrap();
        assert!(text.contains(r#""base_quant":"nf4-dq""#), "{text}");
        assert!(text.contains(r#""residual_quant":"Q8_0""#), "{text}");
        assert!(text.contains(r#""target_modules":["q_proj","v_proj"]"#), "{text}");
        assert_eq!(serde_json::from_str::<TrainConfig>(&text).unwrap(), config);
        let text = serde_json::to_string(&example()).unwrap();
        assert!(text.contains(r#""target_modules":"all-linear""#), "{text}");
        assert_eq!(serde_json::from_str::<TrainConfig>(&text).unwrap(), example());
    }

    #[test]
    fn only_settings_that_change_the_adapter_bind_a_checkpoint() {
        let mut other = example();
        other.output = "elsewhere".into();
        other.save_steps = 7;
        other.logging_steps = 9;
        assert_eq!(other.binding(), example().binding());
        other.lora_r = 8;
        assert_ne!(other.binding(), example().binding());
        for key in FREE_ON_RESUME {
            let all = serde_json::to_value(example()).unwrap();
            assert!(all.get(key).is_some(), "`{key}` is not a setting");
        }
    }
}
